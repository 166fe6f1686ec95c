"""Rows that end the process that works on them are found, and fail as any other row does.

A worker that dies takes no row with it: Ray starts another, which works on the same rows again. A
row that is itself the cause, by a crash in a library or by memory that runs out, would go on like
that for ever. So a worker says which rows it begins and which it has done, and

    begun together, and the worker died      they are begun again
    that happened twice                      each is begun alone in its process
    begun alone, and the worker died twice   the row has failed

which finds the row and no other, after four workers at most. Reading goes on from row to row within a
row group, so there is a row that no other behind it can be read past: where two rows that follow each
other have failed, so have all that are left of their row group. This module knows nothing of Ray.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Protocol

import pyarrow as pa

from qvl_batch.columns import FAILURE, failure_columns, places_of, with_columns
from qvl_batch.errors import WorkerLostError
from qvl_batch.input.reader import Lost
from qvl_batch.input.source import Unit
from qvl_batch.rows import Row
from qvl_batch.schema import Failure

TOGETHER, ALONE = 2, 2
#: Rows that follow each other and end their worker in reading: no row behind them is tried.
IMPASSABLE = 2
READ, READ_IDS = "read", "read ids"
ENDED = (
    f"ended its worker {TOGETHER + ALONE} times, the last {ALONE} alone in it: "
    "memory ran out, or a library crashed or hung"
)
BEHIND = "is behind rows of its row group that ended their worker in reading: it cannot be read past them"


class Attempts(Protocol):
    """Where workers say what they begin. It must outlive them."""

    def begin(self, stage: str, rows: Sequence[Row]) -> bool:
        """Whether rows may be begun together."""

    def begin_alone(self, stage: str, row: Row) -> bool:
        """Whether a row may be begun; if not, it has failed."""

    def survived(self, stage: str, row: Row) -> None:
        """A row that was begun alone did no harm."""

    def done(self, stage: str, rows: Sequence[Row]) -> None:
        """Rows need not be begun again."""


class AttemptsInMemory:
    """`Attempts` of the workers that share this object."""

    def __init__(self) -> None:
        self._together: Counter[tuple[str, Row]] = Counter()
        self._alone: Counter[tuple[str, Row]] = Counter()

    def begin(self, stage: str, rows: Sequence[Row]) -> bool:
        """Whether rows may be begun together; if so, they are."""
        if any(self._together[stage, row] >= TOGETHER for row in rows):
            return False
        self._together.update((stage, row) for row in rows)
        return True

    def begin_alone(self, stage: str, row: Row) -> bool:
        """Whether a row may be begun; if so, it is."""
        if self._alone[stage, row] >= ALONE:
            return False
        self._alone[stage, row] += 1
        return True

    def survived(self, stage: str, row: Row) -> None:
        """Take back that a row was begun."""
        self._alone.pop((stage, row), None)

    def done(self, stage: str, rows: Sequence[Row]) -> None:
        """Forget rows."""
        for row in rows:
            self._together.pop((stage, row), None)
            self._alone.pop((stage, row), None)


class Guarded:
    """Work on tables whose rows may end this process. Threads may share it.

    Args:
        work: a stage; it leaves rows with a failure as they are.
        stage: its name, as failures have it.
        attempts: where to say what is begun.
    """

    def __init__(self, work: Callable[[pa.Table], pa.Table], stage: str, attempts: Attempts) -> None:
        self._work, self._stage, self._attempts = work, stage, attempts
        self._calls = _Calls()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Do the work."""
        rows = places_of(table)
        with self._calls.together():
            if self._attempts.begin(self._stage, rows):
                result = self._work(table)
                self._attempts.done(self._stage, rows)
                return result
        results: list[pa.Table] = []
        for index, row in enumerate(rows):
            with self._calls.alone():
                one = table.slice(index, 1)
                if self._attempts.begin_alone(self._stage, row):
                    results.append(self._work(one))
                    self._attempts.survived(self._stage, row)
                else:
                    results.append(self._work(self._failed(one)))
        # Only now: if a later row ends this worker, another begins with the first one again.
        self._attempts.done(self._stage, rows)
        return pa.concat_tables(results)

    def _failed(self, table: pa.Table) -> pa.Table:
        lost = WorkerLostError(f"this row {ENDED}", stage=self._stage)
        return with_columns(table.drop_columns(list(FAILURE)), failure_columns([Failure.of(lost)]))


class Read(Protocol):
    """How a unit is read in tables of at most so many rows, or why it is not."""

    def __call__(self, unit: Unit, rows_per_table: int, lost: Lost | None = None) -> Iterator[pa.Table]:
        """Read a unit."""


class GuardedRead:
    """Reading of units whose rows may end this process, which reads nothing else meanwhile.

    Ray keeps the tables that it has of a task whose process died, and takes those that follow from the
    next process: so in all of them a table has the same rows.

    Args:
        read: reads a unit.
        rows_per_table: of the tables that come out, at most.
        attempts: where to say what is begun.
    """

    def __init__(self, read: Read, rows_per_table: int, attempts: Attempts) -> None:
        self._read, self._rows_per_table, self._attempts = read, rows_per_table, attempts

    def __call__(self, units: Sequence[Unit]) -> Iterator[pa.Table]:
        """Read all units of a task."""
        begun = [(unit.file_number, unit.spans[0][0]) for unit in units]
        if self._attempts.begin(READ, begun):
            for unit in units:
                yield from self._read(unit, self._rows_per_table)
        else:
            for unit in units:
                for tables in self._row_by_row(unit):
                    yield pa.concat_tables(tables).combine_chunks()
                    begun += [row for table in tables for row in places_of(table)]
        # Only now: if a later row ends this process, another begins with the first unit again.
        self._attempts.done(READ, begun)
        self._attempts.done(READ_IDS, begun)

    def _row_by_row(self, unit: Unit) -> Iterator[list[pa.Table]]:
        """The rows that a table is to have, each as its own."""
        reading: Iterator[pa.Table] | None = None
        lost = 0
        for rows in self._tables(unit):
            tables: list[pa.Table] = []
            for row in rows:
                if lost == IMPASSABLE:
                    reading = reading or self._failed(_part(unit, row), BEHIND)
                    tables.append(next(reading))
                elif self._attempts.begin_alone(READ, (unit.file_number, row)):
                    reading = reading or self._read(_part(unit, row), 1)
                    tables.append(next(reading))
                    self._attempts.survived(READ, (unit.file_number, row))
                    lost = 0
                else:
                    tables += self._failed(_part(unit, row, row + 1), ENDED)
                    reading = None
                    lost += 1
            yield tables

    def _tables(self, unit: Unit) -> Iterator[list[int]]:
        """Rows of each table, were the unit read together."""
        for start, stop in unit.spans:
            for _, rows in groupby(range(start, stop), lambda row: (row - unit.first_row) // self._rows_per_table):
                yield list(rows)

    def _failed(self, unit: Unit, why: str) -> Iterator[pa.Table]:
        """Rows that have failed, each as a table, with their ids if to read those ends no worker."""
        first = (unit.file_number, unit.spans[0][0])
        known = self._attempts.begin_alone(READ_IDS, first)
        tables = self._read(unit, 1, Lost(WorkerLostError(why, stage=READ), known))
        table = next(tables)
        if known:
            self._attempts.survived(READ_IDS, first)
        yield table
        yield from tables


def _part(unit: Unit, first: int, end: int | None = None) -> Unit:
    """The rows of a unit from one on, to before another."""
    rows = (range(max(start, first), stop if end is None else min(stop, end)) for start, stop in unit.spans)
    return replace(unit, spans=[(each.start, each.stop) for each in rows if each])


class _Calls:
    """Calls that go on together, or one that goes on alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._going_on = 0
        self._waiting = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Enter once nothing goes on, or waits to go on, alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._going_on >= 0 and not self._waiting)
            self._going_on += 1
        try:
            yield
        finally:
            with self._changed:
                self._going_on -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Enter once nothing goes on."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._going_on == 0)
            self._waiting -= 1
            self._going_on = -1
        try:
            yield
        finally:
            with self._changed:
                self._going_on = 0
                self._changed.notify_all()
