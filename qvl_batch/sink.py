"""The output: folder of answers, whose files appear only whole.

A file is written under a temporary name, synced, and moved to its final name, which follows
from the first of its rows. A reader never sees half a file. Only the driver writes: answers are
small, and with one writer nothing is left behind that could write after the job has ended.
"""

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.errors import OutputError
from qvl_batch.source import FILE, ROW

PARTS = "part-*.parquet"
RUN = "_run.json"
ROWS_PER_FILE = 1024
#: Answers wait at most so long to be written: what a crash of the machine can cost.
SECONDS_PER_FILE = 30.0
_PARTIAL = ".partial-"


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

    def add(self, other: "Tally") -> None:
        """Add another tally to this one."""
        self.rows += other.rows
        self.prompt_tokens += other.prompt_tokens
        self.answer_tokens += other.answer_tokens
        self.finish_reasons += other.finish_reasons
        self.errors += other.errors


def prepare_output(output: Path, *, overwrite: bool) -> None:
    """Make the output folder, and clear it of another run's answers if `overwrite`.

    Raises:
        OutputError: it holds answers already, or cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        held = [*output.glob(PARTS), *output.glob(RUN)]
        if held and not overwrite:
            raise OutputError(f"{output} holds answers already: give another --output, or --overwrite to delete them")
        for path in [*held, *output.glob(f"{_PARTIAL}*")]:
            path.unlink()
        write_whole(output / RUN, b"{}")
        (output / RUN).unlink()
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}") from error


class AnswerWriter:
    """Collects answers and writes them in files of `ROWS_PER_FILE` rows, or what there is after
    `SECONDS_PER_FILE`. Use it as a context manager: whatever ends the block, a Ctrl-C too, all
    answers that have arrived are written.

    Args:
        output: the folder.
        schema: of the files.
    """

    def __init__(self, output: Path, schema: pa.Schema) -> None:
        self.tally = Tally()
        self._output, self._schema = output, schema
        self._waiting: list[pa.Table] = []
        self._last_write = time.monotonic()

    def add(self, table: pa.Table) -> None:
        """Take answers: columns of the schema, and `FILE` and `ROW`, in any order of rows."""
        self._waiting.append(table)
        self.tally.add(Tally.of(table))
        full = sum(part.num_rows for part in self._waiting) >= ROWS_PER_FILE
        if full or time.monotonic() - self._last_write > SECONDS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what has arrived, in the order of the input, to one file."""
        if self._waiting:
            table = pa.concat_tables(self._waiting).sort_by([(FILE, "ascending"), (ROW, "ascending")])
            first = (table[FILE][0].as_py(), table[ROW][0].as_py())
            self._write(f"part-{first[0]:06d}-{first[1]:012d}.parquet", table)
            self._waiting = []
        self._last_write = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.flush()
        if kind is None and not self.tally.rows:
            # No rows in, no rows out, but still a table that says so.
            self._write("part-000000-000000000000.parquet", self._schema.empty_table())

    def _write(self, name: str, table: pa.Table) -> None:
        write_table(self._output / name, table.select(self._schema.names).cast(self._schema))


def write_run(output: Path, report: dict[str, Any]) -> None:
    """Write `_run.json`."""
    write_whole(output / RUN, json.dumps(report, indent=1).encode() + b"\n")


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file as `write_whole` does."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, data: bytes | pa.Buffer) -> None:
    """Write a file so that it is there whole or not at all, even if the machine stops."""
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
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
