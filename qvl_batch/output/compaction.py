"""Merges small parts into parts of about the usual size, once all rows have an answer.

What enters: a folder that this job holds, and the names of its small parts. What leaves: fewer parts with the same
answers. Answers are written within seconds, so a slow model leaves thousands of parts of a few rows, and so does a job
that is stopped often.

Small parts are taken in the order of their names, which is that of their first rows, as many as a part holds. To merge
some of them takes two steps:

    1. one part with all their rows is put in place of the first of them; its footer names the others
    2. the others are removed

This is right whenever it ends, since

- the put is atomic: before it nothing has changed, and after it every row is in the new part;
- whoever reads parts in the order of their names meets the new one before those that it names, and passes over these.
  So do a job that goes on, which removes them before anything else, and `parts.each_part`;
- a name is never used again while it is named: a part is named after one of its rows, and that row is in the new part.

Readers that know nothing of this can see answers twice, in the new part and in those that are not removed yet. On a
plain folder that cannot be avoided, since several files become one: the only other order would hide answers. They never
miss one: what they list is read, or is gone, which is an error.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from qvl_batch.columns import with_columns
from qvl_batch.output.parts import (
    BYTES_PER_FILE,
    READERS,
    ROWS_PER_FILE,
    PartNotes,
    PartRecord,
    cannot_write,
    damaged,
    in_order,
    read_each,
    read_part,
    write_part,
)
from qvl_batch.output.storage import Folder

logger = logging.getLogger(__name__)
#: With fewer small parts, merging is not worth it.
FEWEST = 16
#: Is written and removed to see whether files can be removed here: some may only add to an object store.
TRIAL = "_compaction"
#: A part's name and answers, with their places in the input.
Part = tuple[str, pa.Table]


def compact(folder: Folder, schema: pa.Schema, notes: PartNotes) -> Iterator[int]:
    """Merge the small parts of a folder.

    Each is read once and removed once; at most one usual part, and `READERS` small ones, are in memory. Ctrl-C ends it
    after the two steps that have begun.

    Args:
        folder: held by this job.
        schema: of the parts.
        notes: say which parts are small, and are told what becomes of them.

    Yields:
        For each part that is written, the number of those that it was merged from.

    Raises:
        OutputError: the folder cannot be written to, or a part cannot be read. All answers are there; the next run goes
            on.
    """
    names = sorted(notes.small)
    if len(names) < FEWEST or not _can_remove(folder):
        return
    # Ctrl-C interrupts the main thread alone, which then waits for this one.
    with ThreadPoolExecutor(1, "qvl-compaction") as thread:
        for group in _groups(read_each(folder, names, partial(_read, schema), at_once=READERS)):
            if len(group) > 1:
                thread.submit(_merge, folder, schema, group, notes).result()
                yield len(group)


def _can_remove(folder: Folder) -> bool:
    try:
        folder.write(TRIAL, b"")
        folder.remove(TRIAL)
    except OSError as error:
        logger.warning("small parts of %s stay as they are, since files cannot be removed there: %s", folder, error)
        return False
    return True


def _read(schema: pa.Schema, folder: Folder, name: str) -> pa.Table:
    """Answers of a part and their places in the input."""
    try:
        table = read_part(folder, name)
        return with_columns(table.cast(schema), PartRecord.of(table.schema.metadata).places())
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise damaged(folder, name, error) from error


def _groups(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """Successive parts that together have at most the usual size."""
    group: list[Part] = []
    rows = size = 0
    for name, table in parts:
        rows, size = rows + table.num_rows, size + table.nbytes
        if group and (rows > ROWS_PER_FILE or size > BYTES_PER_FILE):
            yield group
            group, rows, size = [], table.num_rows, table.nbytes
        group.append((name, table))
    if group:
        yield group


def _merge(folder: Folder, schema: pa.Schema, group: Sequence[Part], notes: PartNotes) -> None:
    """Put one part in place of the first of a group, and remove the others."""
    (first, *others), tables = zip(*group, strict=True)
    try:
        record = write_part(folder, first, in_order(pa.concat_tables(tables)), schema, replaces=others)
        folder.remove(*others)
    except OSError as error:
        raise cannot_write(folder, error) from error
    notes.forget(others)
    notes.note(first, record)
