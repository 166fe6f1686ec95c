"""Files of answers ("parts"): their names, the record in their footers, reading and writing them.

What enters: tables of answers, with their places in the input. What leaves: parquet files, written atomically.

A part is named after its first row. Its footer says which rows of the input it answers; answers and the record of them
are one file, so a crash cannot make them differ. Only the driver writes parts: answers are small, and no other process
is left that could write after the job has ended.

A part that was merged from several (see `compaction`) also says which others it replaces. Where one of these is still
there, its answers are in both and count once.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.columns import FILE, ROW, place_columns
from qvl_batch.errors import OutputError
from qvl_batch.output.storage import Folder
from qvl_batch.rows import Span, spans

PARTS = "part-*.parquet"
#: Key of the footer's metadata that holds a `PartRecord`.
FOOTER = b"qvl_batch"
#: The usual size of a part. Kept columns can be large, and Arrow concatenates at most 2 GiB of a string column.
ROWS_PER_FILE, BYTES_PER_FILE = 1024, 256_000_000
#: A part with fewer rows, and fewer bytes in memory, is small.
SMALL_ROWS, SMALL_BYTES = ROWS_PER_FILE // 4, BYTES_PER_FILE // 16
#: Stages of errors of rows whose record, or an image of it, could not be read.
UNREAD_STAGES = ("read", "image")
#: Parts read at a time: on a network file system, each read is a round trip.
READERS = 16
Found = TypeVar("Found")


@dataclass(slots=True)
class Tally:
    """Counts of answered rows. Tallies can be added and subtracted."""

    rows: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, table: pa.Table) -> "Tally":
        """Count the rows of a table of answers. Errors are counted as `stage: type`."""
        stages, types = table["error_stage"].to_pylist(), table["error_type"].to_pylist()
        kinds = [f"{stage}: {kind}" for stage, kind in zip(stages, types, strict=True) if stage is not None]
        return cls(
            rows=table.num_rows,
            prompt_tokens=pc.sum(table["prompt_tokens"]).as_py() or 0,
            answer_tokens=pc.sum(table["answer_tokens"]).as_py() or 0,
            finish_reasons=Counter(table["finish_reason"].to_pylist()),
            errors=Counter(kinds),
        )

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __sub__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class PartRecord:
    """The record in a part's footer.

    Args:
        rows: for each number of an input file, spans of the rows that are answered, in the order of the part.
        tally: counts of the answers.
        size: bytes of the answers in memory.
        replaces: names of other parts, whose rows are all in this one. Each of them sorts after its own.
    """

    rows: dict[int, list[Span]]
    tally: Tally
    size: int = 0
    replaces: Sequence[str] = ()

    @property
    def is_small(self) -> bool:
        """Whether the part is worth merging with others."""
        return self.tally.rows < SMALL_ROWS and self.size < SMALL_BYTES

    @property
    def unread(self) -> int:
        """How many of its rows could not be read, or have an image that could not."""
        return sum(count for kind, count in self.tally.errors.items() if kind.partition(":")[0] in UNREAD_STAGES)

    def places(self) -> dict[str, pa.Array]:
        """The place in the input of each row of the part, as columns `FILE` and `ROW`."""
        return place_columns([(file, row) for file, each in self.rows.items() for span in each for row in range(*span)])

    def footer(self) -> bytes:
        """The record as JSON, as the footer holds it."""
        tally = {name: getattr(self.tally, name) for name in Tally.__slots__}
        record = {"rows": list(self.rows.items()), "tally": tally, "size": self.size, "replaces": self.replaces}
        return json.dumps(record).encode()

    @classmethod
    def of(cls, metadata: Mapping[bytes, bytes]) -> "PartRecord":
        """Parse the record in a footer's metadata.

        Raises:
            KeyError, TypeError, ValueError: there is none, or it is damaged.
        """
        found = json.loads(metadata[FOOTER])
        rows = {int(file): [(int(start), int(stop)) for start, stop in each] for file, each in found["rows"]}
        counts = found["tally"]
        for kind in ("finish_reasons", "errors"):
            counts[kind] = Counter(counts[kind])
        return cls(rows, Tally(**counts), int(found["size"]), tuple(map(str, found["replaces"])))

    @classmethod
    def read(cls, folder: Folder, name: str) -> "PartRecord":
        """Read the record of a part.

        Raises:
            OutputError: the file is not a file of answers, or damaged.
        """
        try:
            with folder.open(name) as file:
                return cls.of(pq.read_metadata(file).metadata)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise damaged(folder, name, error) from error


class PartNotes:
    """Names of parts that a job comes back to: small ones, and those with rows that could not be read."""

    def __init__(self) -> None:
        self.small: set[str] = set()
        self.unread: set[str] = set()

    def note(self, name: str, record: PartRecord) -> None:
        """Note what a part is now."""
        for names, belongs in ((self.small, record.is_small), (self.unread, record.unread > 0)):
            (names.add if belongs else names.discard)(name)

    def forget(self, names: Iterable[str]) -> None:
        """Forget parts that are gone."""
        self.small.difference_update(names)
        self.unread.difference_update(names)


def part_name(file: int, row: int) -> str:
    """Name of the part whose first row is this row of this file of the input."""
    return f"part-{file:06d}-{row:012d}.parquet"


def is_part(folder: Folder, name: str) -> bool:
    """Whether a file is a file of answers with an intact footer."""
    try:
        PartRecord.read(folder, name)
    except OutputError:
        return False
    return True


def read_part(folder: Folder, name: str) -> pa.Table:
    """The answers of a part."""
    return pq.read_table(pa.BufferReader(folder.read(name)))


def each_part(folder: Folder, read: Callable[[Folder, str], pa.Table] = read_part) -> Iterator[tuple[str, pa.Table]]:
    """Read all parts in the order of their names, for a reader that does not hold the folder: no row comes twice, also
    not while a job merges parts, or after it was killed as it did.

    Args:
        folder: of answers.
        read: reads a part, or some of its columns. The table has the footer's metadata.

    Raises:
        OutputError: a footer is damaged.
    """
    replaced: set[str] = set()
    for name in folder.names(PARTS):
        if name not in replaced:
            table = read(folder, name)
            if FOOTER in (table.schema.metadata or {}):
                try:
                    replaced.update(PartRecord.of(table.schema.metadata).replaces)
                except (KeyError, TypeError, ValueError) as error:
                    raise damaged(folder, name, error) from error
            yield name, table


def read_each(
    folder: Folder, names: Sequence[str], read: Callable[[Folder, str], Found], at_once: int = 4 * READERS
) -> Iterator[tuple[str, Found]]:
    """Call `read` for each of these parts, in threads: its name and result, in order.

    At most `at_once` results are held: the records of a hundred million rows would together take a gigabyte.
    """
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(names), at_once):
            chunk = names[start : start + at_once]
            yield from zip(chunk, pool.map(partial(read, folder), chunk), strict=True)


def in_order(answers: pa.Table) -> pa.Table:
    """Answers in the order of the input, by their columns `FILE` and `ROW`."""
    return answers.sort_by([(FILE, "ascending"), (ROW, "ascending")])


def write_part(
    folder: Folder, name: str, answers: pa.Table, schema: pa.Schema, replaces: Sequence[str] = ()
) -> PartRecord:
    """Write a part.

    Args:
        folder: where to.
        name: of the part.
        answers: the columns of the schema, and `FILE` and `ROW`; in the order of the input.
        schema: of the part.
        replaces: names of the other parts that it was merged from.

    Returns:
        Its record.
    """
    files, rows = answers[FILE].to_numpy(), answers[ROW].to_numpy()
    by_file = {int(file): spans(rows[files == file]) for file in np.unique(files)}
    table = answers.select(schema.names).cast(schema)
    record = PartRecord(by_file, Tally.of(table), table.nbytes, replaces)
    folder.write(name, parquet(table.replace_schema_metadata({FOOTER: record.footer()})))
    return record


def parquet(table: pa.Table) -> bytes:
    """A table as a parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return bytes(buffer.getvalue())


def cannot_write(folder: Folder, error: OSError) -> OutputError:
    """The error for a folder that cannot be written to."""
    return OutputError(f"{folder} cannot be written: {error.strerror or error}")


def damaged(folder: Folder, name: str, error: Exception) -> OutputError:
    """The error for a file that cannot be read as one of answers."""
    why = str(error).split("\n")[0]
    return OutputError(
        f"{folder}/{name} cannot be read, is damaged, or not a file of answers ({why}): if it is damaged, delete it to "
        "answer its rows again"
    )
