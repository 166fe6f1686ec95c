"""Answers to files, as they arrive.

Only the driver writes: answers are small, and with one writer nothing is left behind that could write after the job
has ended.
"""

import threading
import time
from collections.abc import Mapping
from typing import Self

import numpy as np
import pyarrow as pa

from qvl_batch.columns import FILE, ROW, places_of, with_columns
from qvl_batch.errors import OutputError
from qvl_batch.output.parts import PartRecord, Tally, cannot_write, part_name, read_part, write_part
from qvl_batch.output.storage import Folder
from qvl_batch.rows import Row, spans

ROWS_PER_FILE = 1024
#: Kept columns may be large, and Arrow joins at most 2 GiB of a column of strings.
BYTES_PER_FILE = 256_000_000
#: Answers wait at most so long to be written: what a crash of the machine can cost.
SECONDS_PER_FILE = 10.0


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
            name = self._file_of(min(place for table in self._waiting for place in places_of(table)))
            try:
                table = _sorted(pa.concat_tables(self._waiting))
                places = places_of(table)
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
        answered = set(places_of(answers))
        kept = held.filter(pa.array([place not in answered for place in places_of(held)]))
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
