"""Files of answers ("parts"): their names, the record in their footers, reading and writing them.

What enters: tables of answers, and which rows of the input they answer. What leaves: parquet files, written atomically.

A part is named after its first row. Its footer says which rows of the input it answers; answers and the record of them
are one file, so a crash cannot make them differ. Only the driver writes parts: answers are small, and no other process
is left that could write after the job has ended.
"""

import json
from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.columns import place_columns
from qvl_batch.errors import OutputError
from qvl_batch.output.storage import Folder
from qvl_batch.rows import Span

PARTS = "part-*.parquet"
#: Key of the footer's metadata that holds a `PartRecord`.
FOOTER = b"qvl_batch"


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
    """

    rows: dict[int, list[Span]]
    tally: Tally

    def places(self) -> dict[str, pa.Array]:
        """The place in the input of each row of the part, as columns `FILE` and `ROW`."""
        return place_columns([(file, row) for file, each in self.rows.items() for span in each for row in range(*span)])

    def footer(self) -> bytes:
        """The record as JSON, as the footer holds it."""
        tally = {name: getattr(self.tally, name) for name in Tally.__slots__}
        return json.dumps({"rows": list(self.rows.items()), "tally": tally}).encode()

    @classmethod
    def read(cls, folder: Folder, name: str) -> "PartRecord":
        """Read the record of a part.

        Raises:
            OutputError: the file is not a file of answers, or damaged.
        """
        try:
            with folder.open(name) as file:
                found = json.loads(pq.read_metadata(file).metadata[FOOTER])
            rows = {int(file): [(int(start), int(stop)) for start, stop in each] for file, each in found["rows"]}
            counts = found["tally"]
            for kind in ("finish_reasons", "errors"):
                counts[kind] = Counter(counts[kind])
            return cls(rows, Tally(**counts))
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise OutputError(
                f"{folder}/{name} is damaged, or not a file of answers ({error}): delete it to answer its rows again"
            ) from error


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


def write_part(folder: Folder, name: str, answers: pa.Table, rows: dict[int, list[Span]]) -> None:
    """Write a part.

    Args:
        folder: where to.
        name: of the part.
        answers: its table.
        rows: the rows of the input that it answers, in its order, by number of their file.
    """
    footer = PartRecord(rows, Tally.of(answers)).footer()
    folder.write(name, parquet(answers.replace_schema_metadata({FOOTER: footer})))


def parquet(table: pa.Table) -> bytes:
    """A table as a parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return bytes(buffer.getvalue())


def cannot_write(folder: Folder, error: OSError) -> OutputError:
    """The error for a folder that cannot be written to."""
    return OutputError(f"{folder} cannot be written: {error.strerror or error}")
