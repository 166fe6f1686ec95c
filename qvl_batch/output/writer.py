"""Writes answers to parts as they arrive.

What enters: tables of answers, in any order of rows. What leaves: parts of bounded size, written within
`SECONDS_PER_FILE`. Only the driver writes: answers are small, and no other process is left that could write after the
job has ended.
"""

import threading
import time
from collections.abc import Mapping
from typing import Self

import pyarrow as pa

from qvl_batch.columns import places_of, with_columns
from qvl_batch.errors import OutputError
from qvl_batch.output.parts import (
    BYTES_PER_FILE,
    ROWS_PER_FILE,
    PartNotes,
    PartRecord,
    Tally,
    cannot_write,
    in_order,
    part_name,
    read_part,
    write_part,
)
from qvl_batch.output.storage import Folder
from qvl_batch.rows import Row

#: Longest time that answers wait to be written; a crash of the machine loses at most these.
SECONDS_PER_FILE = 10.0


class AnswerWriter:
    """Buffers answers and writes them to parts.

    It writes when `ROWS_PER_FILE` rows or `BYTES_PER_FILE` are buffered, and `SECONDS_PER_FILE` after the last write;
    for the latter it has a thread, so that this does not depend on further answers. Use it as a context manager:
    however the block ends, by Ctrl-C too, all answers that have arrived are written.

    Args:
        folder: where to, held by this job.
        schema: of the parts.
        failed: rows that are answered again, and the names of the parts that hold their errors: the new answer replaces
            the error in that part.
        notes: are told of each part that is written.
    """

    def __init__(
        self,
        folder: Folder,
        schema: pa.Schema,
        failed: Mapping[Row, str] | None = None,
        notes: PartNotes | None = None,
    ) -> None:
        self.tally = Tally()
        self._folder, self._schema, self._failed = folder, schema, failed or {}
        self._notes = notes or PartNotes()
        self._buffer: list[pa.Table] = []
        #: Name of the part that the buffered answers to new rows go to, from the first attempt at writing it on: one
        #: that is said to have failed can have come to pass.
        self._next: str | None = None
        self._due = time.monotonic() + SECONDS_PER_FILE
        #: Held while answers are added or written.
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._timer = threading.Thread(target=self._write_when_due, name="qvl-answers", daemon=True)
        #: The error that ended the thread.
        self._error: OutputError | None = None

    def add(self, table: pa.Table) -> Tally:
        """Add answers.

        Args:
            table: the columns of the schema, and `FILE` and `ROW`; rows in any order.

        Returns:
            Counts of these answers.

        Raises:
            OutputError: these or earlier answers cannot be written.
        """
        tally = Tally.of(table)
        with self._lock:
            self._buffer.append(table)
            self.tally += tally
            rows, size = (sum(getattr(each, name) for each in self._buffer) for name in ("num_rows", "nbytes"))
            if rows >= ROWS_PER_FILE or size >= BYTES_PER_FILE:
                self.flush()
        if self._error is not None:
            raise self._error
        return tally

    def flush(self) -> None:
        """Write all buffered answers, sorted in the order of the input: to a new part, or in place of their errors.

        Raises:
            OutputError: a part cannot be built or written.
        """
        with self._lock:
            self._write()
            self._buffer, self._next = [], None
            self._due = time.monotonic() + SECONDS_PER_FILE

    def _write_when_due(self) -> None:
        """Write whenever `SECONDS_PER_FILE` have passed since the last write, until the block ends."""
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
        if self._buffer:
            name = self._part_of(min(place for table in self._buffer for place in places_of(table)))
            try:
                table = in_order(pa.concat_tables(self._buffer))
                places = places_of(table)
                # Indices of rows, by the part that holds their errors; None for rows that were not answered before.
                by_part: dict[str | None, list[int]] = {}
                for index, place in enumerate(places):
                    by_part.setdefault(self._failed.get(place), []).append(index)
                for failed, indices in by_part.items():
                    name = self._part_of(places[indices[0]])
                    answers = table.take(indices)
                    self._write_part(name, answers if failed is None else self._with_others(name, answers))
            except OSError as error:
                raise cannot_write(self._folder, error) from error
            except pa.ArrowException as error:
                why = str(error).split("\n")[0]
                raise OutputError(
                    f"{self._folder}/{name} cannot be made: {why}; if a column of --keep-columns has large values, "
                    "leave it out and give another --output"
                ) from error

    def _part_of(self, first: Row) -> str:
        """Name of the part for answers whose first row is this one."""
        if first in self._failed:
            return self._failed[first]
        self._next = self._next or part_name(*first)
        return self._next

    def _write_part(self, name: str, answers: pa.Table) -> None:
        self._notes.note(name, write_part(self._folder, name, answers, self._schema))

    def _with_others(self, name: str, answers: pa.Table) -> pa.Table:
        """All answers of a part, in which these replace errors."""
        record = PartRecord.read(self._folder, name)
        earlier = with_columns(read_part(self._folder, name).cast(self._schema), record.places())
        answered = set(places_of(answers))
        kept = earlier.filter(pa.array([place not in answered for place in places_of(earlier)]))
        return in_order(pa.concat_tables([kept, answers.select(kept.column_names).cast(kept.schema)]))

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.flush()
