"""Answers to files, which appear only whole.

A file is written under a temporary name, synced, and moved to its final name, which follows
from the first of its rows. A reader never sees half a file. Its footer says which rows of the
input it answers, so that answers and the record of them cannot differ, whatever was killed when.
Only the driver writes: answers are small, and with one writer nothing is left behind that could
write after the job has ended.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.errors import OutputError
from qvl_batch.rowset import Row, Span, spans
from qvl_batch.source import FILE, ROW, rows_of, with_columns

PARTS = "part-*.parquet"
#: Key of the footer that holds a `PartRecord`.
FOOTER = b"qvl_batch"
ROWS_PER_FILE = 1024
#: Answers wait at most so long to be written: what a crash of the machine can cost.
SECONDS_PER_FILE = 10.0
PARTIAL = ".partial-"


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
    def read(cls, path: Path) -> "PartRecord":
        """Of a file.

        Raises:
            OutputError: it is no file of answers, or damaged.
        """
        try:
            found = json.loads(pq.read_metadata(path).metadata[FOOTER])
            rows = {int(file): [(int(start), int(stop)) for start, stop in each] for file, each in found["rows"]}
            counts = found["tally"]
            for name in ("finish_reasons", "errors"):
                counts[name] = Counter(counts[name])
            return cls(rows, Tally(**counts))
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise OutputError(
                f"{path} is damaged, or no file of answers ({error}): delete it to answer its rows again"
            ) from error


class AnswerWriter:
    """Collects answers and writes them in files of `ROWS_PER_FILE` rows, or what there is after
    `SECONDS_PER_FILE`. Use it as a context manager: whatever ends the block, a Ctrl-C too, all
    answers that have arrived are written.

    Args:
        output: the folder.
        schema: of the files.
        failed: rows that are answered again, by number of their file and index, and the files that hold
            their errors: there the new answer takes the error's place.
    """

    def __init__(self, output: Path, schema: pa.Schema, failed: Mapping[Row, Path] | None = None) -> None:
        self.tally = Tally()
        self._output, self._schema, self._failed = output, schema, failed or {}
        self._waiting: list[pa.Table] = []
        self._last_write = time.monotonic()

    def add(self, table: pa.Table) -> Tally:
        """Take answers: columns of the schema, and `FILE` and `ROW`, in any order of rows. Their counts."""
        self._waiting.append(table)
        tally = Tally.of(table)
        self.tally += tally
        full = sum(part.num_rows for part in self._waiting) >= ROWS_PER_FILE
        if full or time.monotonic() - self._last_write > SECONDS_PER_FILE:
            self.flush()
        return tally

    def flush(self) -> None:
        """Write what has arrived, in the order of the input: to one file, or where it replaces errors."""
        if self._waiting:
            table = _sorted(pa.concat_tables(self._waiting))
            parts: dict[Path | None, list[int]] = {}
            for index, place in enumerate(rows_of(table)):
                parts.setdefault(self._failed.get(place), []).append(index)
            for path, indices in parts.items():
                answers = table.take(indices)
                try:
                    self._write_new(answers) if path is None else self._replace_errors(path, answers)
                except OSError as error:
                    raise OutputError(f"{self._output} cannot be written: {error.strerror}") from error
            self._waiting = []
        self._last_write = time.monotonic()

    def _write_new(self, answers: pa.Table) -> None:
        files, rows = answers[FILE].to_numpy(), answers[ROW].to_numpy()
        by_file = {int(file): spans(rows[files == file]) for file in np.unique(files)}
        path = self._output / f"part-{files[0]:06d}-{rows[0]:012d}.parquet"
        write_part(path, answers.select(self._schema.names).cast(self._schema), by_file)

    def _replace_errors(self, path: Path, answers: pa.Table) -> None:
        record = PartRecord.read(path)
        held = with_columns(pq.read_table(path, schema=self._schema), record.places())
        answered = set(rows_of(answers))
        kept = held.filter(pa.array([place not in answered for place in rows_of(held)]))
        table = _sorted(pa.concat_tables([kept, answers.select(kept.column_names).cast(kept.schema)]))
        write_part(path, table.select(self._schema.names), record.rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def _sorted(answers: pa.Table) -> pa.Table:
    return answers.sort_by([(FILE, "ascending"), (ROW, "ascending")])


def write_part(path: Path, answers: pa.Table, rows: dict[int, list[Span]]) -> None:
    """Write answers to rows of the input, by number of their file."""
    footer = PartRecord(rows, Tally.of(answers)).footer()
    write_table(path, answers.replace_schema_metadata({FOOTER: footer}))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file as `write_whole` does."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, data: bytes | pa.Buffer) -> None:
    """Write a file so that it is there whole or not at all, even if the machine stops."""
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
