"""The list of rows that could not be read: their record is damaged, or an image of theirs is missing or damaged.

What enters: the parts that have such rows. What leaves: `_unreadable.parquet`, written from the error columns of the
answers, so that it is complete over all runs of a job, and rows that `--retry-errors` has mended leave it.

The list is removed before a run answers its first row, and written at the end of the run, however it ends. So one that
is there is complete; where a job was killed there is none, and the next run writes it. Without such rows there is none.

Addresses in it have no user names, passwords or queries, which can give access: the list is made to be passed on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.columns import FILE, ROW, with_columns
from qvl_batch.input.addresses import public_text, short, without_access
from qvl_batch.output.parts import UNREAD_STAGES, PartNotes, PartRecord, cannot_write, damaged, read_each
from qvl_batch.output.storage import Folder
from qvl_batch.rows import InputFile
from qvl_batch.schema import ERROR_FIELDS, ID, LOCATION_FIELD, readable

UNREADABLE = "_unreadable.parquet"
#: Columns of the list besides `id`: the row's file, its index there, and its error.
FIELDS = (pa.field("file", pa.string()), pa.field("row", pa.int64()), LOCATION_FIELD, *ERROR_FIELDS)
#: Rows that a report shows; rows of a row group.
SHOWN, GROUP_ROWS = 20, 1 << 16


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What is in the list.

    Args:
        rows: how many there are.
        first: the first `SHOWN` of them, by the names of their columns.
    """

    rows: int = 0
    first: Sequence[dict[str, Any]] = ()

    def record(self) -> dict[str, Any]:
        """The entry in `_run.json`."""
        return {"rows": self.rows, "list": UNREADABLE if self.rows else None, "first": list(self.first)}


def is_listed(folder: Folder, notes: PartNotes) -> bool:
    """Whether the list is there, if there must be one, and is not, if there must be none.

    Raises:
        OutputError: the folder cannot be used.
    """
    try:
        return _is_there(folder) == bool(notes.unread)
    except OSError as error:
        raise cannot_write(folder, error) from error


def remove_list(folder: Folder) -> None:
    """Remove the list if it is there: a role that may only add to a bucket cannot even remove what is not.

    Raises:
        OutputError: the folder cannot be written to.
    """
    try:
        if _is_there(folder):
            folder.remove(UNREADABLE)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _is_there(folder: Folder) -> bool:
    try:
        folder.open(UNREADABLE).close()
    except FileNotFoundError:
        return False
    return True


def write_list(folder: Folder, notes: PartNotes, files: Sequence[InputFile], id_type: pa.DataType) -> Unreadable:
    """Write the list, or remove it if there are no such rows.

    A part is read only if it has such rows, and only its id and error columns. The list is in memory as it is written,
    compressed.

    Args:
        folder: held by this job.
        notes: say which parts have such rows.
        files: of the input.
        id_type: type of the ids.

    Raises:
        OutputError: the folder cannot be written to, or a part cannot be read.
    """
    rows, first = 0, list[dict[str, Any]]()
    schema = pa.schema([pa.field(ID, id_type), *FIELDS])
    buffer, waiting = pa.BufferOutputStream(), list[pa.Table]()
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for _, table in read_each(folder, sorted(notes.unread), partial(_unread, files)):
            rows += table.num_rows
            if len(first) < SHOWN:
                first += _shown(table.slice(0, SHOWN - len(first)))
            waiting.append(table.cast(schema))
            if sum(map(len, waiting)) >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    if not rows:
        remove_list(folder)
        return Unreadable()
    try:
        folder.write(UNREADABLE, bytes(buffer.getvalue()))
    except OSError as error:
        raise cannot_write(folder, error) from error
    return Unreadable(rows, first)


def _unread(files: Sequence[InputFile], folder: Folder, name: str) -> pa.Table:
    """Rows of the list, of one part."""
    errors = [LOCATION_FIELD.name, *(field.name for field in ERROR_FIELDS)]
    try:
        with folder.open(name) as opened:
            part = pq.ParquetFile(opened)
            places = PartRecord.of(part.metadata.metadata).places()
            answers = with_columns(part.read(columns=[ID, *errors]), places)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise damaged(folder, name, error) from error
    answers = answers.filter(pc.is_in(answers["error_stage"], pa.array(UNREAD_STAGES)))
    paths = [public_text(files[number].path) for number in answers[FILE].to_pylist()]
    columns = {ID: answers[ID], "file": pa.array(paths, pa.string()), "row": answers[ROW]}
    columns |= {name: answers[name] for name in errors}
    columns["error_message"] = pa.array(map(without_access, readable(answers["error_message"])), pa.string())
    return pa.table(columns)


def _shown(table: pa.Table) -> list[dict[str, Any]]:
    """Rows for people."""
    columns = {name: readable(table[name]) for name in table.column_names}
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [{name: short(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]
