"""Answers to files, which appear only whole.

A file's name follows from the first of its rows. Its footer says which rows of the input it
answers, so that answers and the record of them cannot differ, whatever was killed when.
Only the driver writes: answers are small, and with one writer nothing is left behind that could
write after the job has ended.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.errors import OutputError
from qvl_batch.input.source import FILE, ROW, rows_of, with_columns
from qvl_batch.output.storage import Folder
from qvl_batch.rows import Row, Span, spans

PARTS = "part-*.parquet"
#: Key of the footer that holds a `PartRecord`.
FOOTER = b"qvl_batch"
ROWS_PER_FILE = 1024
#: Kept columns may be large, and Arrow joins at most 2 GiB of a column of strings.
BYTES_PER_FILE = 256_000_000
#: Answers wait at most so long to be written: what a crash of the machine can cost.
SECONDS_PER_FILE = 10.0


@dataclass(slots=True)
class Tally:
    """Counts of answered rows; tallies of parts add up to that of the run."""

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
    """What a file of answers says of itself: spans of rows by number of their file, in its order, and counts."""

    rows: dict[int, list[Span]]
    tally: Tally

    def places(self) -> dict[str, pa.Array]:
        """Where each row of the file stands in the input, as columns `FILE` and `ROW`."""
        each = [(file, row) for file, parts in self.rows.items() for part in parts for row in range(*part)]
        return {
            FILE: pa.array([file for file, _ in each], pa.int32()),
            ROW: pa.array([row for _, row in each], pa.int64()),
        }

    def footer(self) -> bytes:
        """As it is written."""
        tally = {name: getattr(self.tally, name) for name in Tally.__slots__}
        return json.dumps({"rows": list(self.rows.items()), "tally": tally}).encode()

    @classmethod
    def read(cls, folder: Folder, name: str) -> "PartRecord":
        """Of a file.

        Raises:
            OutputError: it is no file of answers, or damaged.
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
                f"{folder}/{name} is damaged, or no file of answers ({error}): delete it to answer its rows again"
            ) from error


class AnswerWriter:
    """Collects answers and writes them in files of `ROWS_PER_FILE` rows or `BYTES_PER_FILE`, or what there
    is after `SECONDS_PER_FILE`, for which a thread waits: no other answer need come. Use it as a context
    manager: whatever ends the block, a Ctrl-C too, all answers that have arrived are written.

    Args:
        folder: where to, held by this job.
        schema: of the files.
        failed: rows that are answered again, by number of their file and index, and the files that hold
            their errors: there the new answer takes the error's place.
    """

    def __init__(self, folder: Folder, schema: pa.Schema, failed: Mapping[Row, str] | None = None) -> None:
        self.tally = Tally()
        self._folder, self._schema, self._failed = folder, schema, failed or {}
        self._waiting: list[pa.Table] = []
        self._due = time.monotonic() + SECONDS_PER_FILE
        #: Held while answers are taken or written.
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._write_in_time, name="qvl-answers", daemon=True)
        #: Of the thread, which it ended.
        self._error: OutputError | None = None

    def add(self, table: pa.Table) -> Tally:
        """Take answers: columns of the schema, and `FILE` and `ROW`, in any order of rows. Their counts.

        Raises:
            OutputError: these or earlier ones cannot be written.
        """
        tally = Tally.of(table)
        with self._lock:
            self._waiting.append(table)
            self.tally += tally
            rows, size = (sum(getattr(part, of) for part in self._waiting) for of in ("num_rows", "nbytes"))
            if rows >= ROWS_PER_FILE or size >= BYTES_PER_FILE:
                self.flush()
        if self._error is not None:
            raise self._error
        return tally

    def flush(self) -> None:
        """Write what has arrived, in the order of the input: to one file, or where it replaces errors.

        Raises:
            OutputError: a file cannot be made or written.
        """
        with self._lock:
            self._write()
            self._waiting = []
            self._due = time.monotonic() + SECONDS_PER_FILE

    def _write_in_time(self) -> None:
        """Write what waits for long, until the block ends."""
        while not self._ended.wait(max(0.0, self._due - time.monotonic())):
            with self._lock:
                if time.monotonic() < self._due:
                    continue
                try:
                    self.flush()
                except OutputError as error:
                    self._error = error
                    return

    def _write(self) -> None:
        if self._waiting:
            name = self._file_of(min(place for table in self._waiting for place in rows_of(table)))
            try:
                table = _sorted(pa.concat_tables(self._waiting))
                places = rows_of(table)
                parts: dict[str | None, list[int]] = {}
                for index, place in enumerate(places):
                    parts.setdefault(self._failed.get(place), []).append(index)
                for failed, indices in parts.items():
                    name = self._file_of(places[indices[0]])
                    answers = table.take(indices)
                    self._write_new(name, answers) if failed is None else self._replace_errors(name, answers)
            except OSError as error:
                raise cannot_write(self._folder, error) from error
            except pa.ArrowException as error:
                why = str(error).split("\n")[0]
                raise OutputError(
                    f"{self._folder}/{name} cannot be made: {why}; if a column of --keep-columns has large values, "
                    "leave it out and give another --output"
                ) from error

    def _file_of(self, first: Row) -> str:
        """Where answers go of which this row is the first."""
        return self._failed.get(first) or part_name(*first)

    def _write_new(self, name: str, answers: pa.Table) -> None:
        files, rows = answers[FILE].to_numpy(), answers[ROW].to_numpy()
        by_file = {int(file): spans(rows[files == file]) for file in np.unique(files)}
        write_part(self._folder, name, answers.select(self._schema.names).cast(self._schema), by_file)

    def _replace_errors(self, name: str, answers: pa.Table) -> None:
        record = PartRecord.read(self._folder, name)
        held = with_columns(read_part(self._folder, name).cast(self._schema), record.places())
        answered = set(rows_of(answers))
        kept = held.filter(pa.array([place not in answered for place in rows_of(held)]))
        table = _sorted(pa.concat_tables([kept, answers.select(kept.column_names).cast(kept.schema)]))
        write_part(self._folder, name, table.select(self._schema.names), record.rows)

    def __enter__(self) -> Self:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.flush()


def _sorted(answers: pa.Table) -> pa.Table:
    return answers.sort_by([(FILE, "ascending"), (ROW, "ascending")])


def part_name(file: int, row: int) -> str:
    """The file of answers of which a row is the first."""
    return f"part-{file:06d}-{row:012d}.parquet"


def is_part(folder: Folder, name: str) -> bool:
    """Whether a file is one of answers, and whole."""
    try:
        PartRecord.read(folder, name)
    except OutputError:
        return False
    return True


def read_part(folder: Folder, name: str) -> pa.Table:
    """The answers of a file."""
    return pq.read_table(pa.BufferReader(folder.read(name)))


def write_part(folder: Folder, name: str, answers: pa.Table, rows: dict[int, list[Span]]) -> None:
    """Write answers to rows of the input, by number of their file."""
    footer = PartRecord(rows, Tally.of(answers)).footer()
    folder.write(name, parquet(answers.replace_schema_metadata({FOOTER: footer})))


def parquet(table: pa.Table) -> bytes:
    """A table as a parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return bytes(buffer.getvalue())


def cannot_write(folder: Folder, error: OSError) -> OutputError:
    """What to say of a folder that cannot be written to."""
    return OutputError(f"{folder} cannot be written: {error.strerror or error}")
