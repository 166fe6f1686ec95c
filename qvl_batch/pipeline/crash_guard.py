"""Isolates rows that crash the process that works on them: such a row fails, and no other.

When a worker dies, Ray starts another and gives it the same rows again. If a row itself is the cause, by a crash in a
library or by using up the memory, that would repeat for ever. So workers count their attempts in a place that outlives
them:

    a batch of rows was begun, and the worker died    the batch is begun again
    that happened twice                               each row is begun alone in its process
    a row was begun alone, and the worker died twice  the row has failed

This finds the row after at most four workers. A node that goes away ends its workers too, for which no row is to blame:
attempts there are not counted, unless they are so many that the row must be what ends the nodes.

A group, such as parquet's row group, can only be read row by row, so a row that crashes its reader can make those
behind it unreachable: after two such rows in succession, the rest of the group fails too.

This module knows nothing of Ray.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import pyarrow as pa

from qvl_batch.columns import FAILURE, failure_columns, places_of, with_columns
from qvl_batch.errors import WorkerLostError
from qvl_batch.input.units import Lost, Unit
from qvl_batch.rows import Row
from qvl_batch.schema import Failure

#: Attempts at a batch, and at a row alone.
TOGETHER, ALONE = 2, 2
#: Attempts that may end with their node, of a batch and of a row alone: a row can take the memory of all of a node.
WITH_NODES = 6
#: Successive rows that crashed their reader, after which the rest of the group is given up.
IMPASSABLE = 2
#: Stages in the counts of attempts: reading rows, and reading only ids and kept columns of rows that failed.
READ, READ_IDS = "read", "read ids"
CRASHED = (
    f"crashed its worker {TOGETHER + ALONE} times, the last {ALONE} times alone in it: "
    "memory ran out, or a library crashed or hung"
)
UNREACHABLE = "is behind rows of its group that crashed their reader, and cannot be read past them"


class Attempts(Protocol):
    """Counts attempts at rows. It must outlive the workers."""

    def begin(self, stage: str, rows: Sequence[Row]) -> bool:
        """Count an attempt at a batch; False if there were `TOGETHER` already, and its rows are to be begun alone."""

    def begin_alone(self, stage: str, row: Row) -> bool:
        """Count an attempt at a row alone; False if there were `ALONE` already, and the row has failed."""

    def survived(self, stage: str, row: Row) -> None:
        """A row that was begun alone did not crash its process: forget its attempts."""

    def done(self, stage: str, rows: Sequence[Row]) -> None:
        """The results of rows are handed on: forget their attempts."""


class AttemptsInMemory:
    """Counts in this object's memory.

    Args:
        lost_nodes: IDs of the nodes that are gone.
    """

    def __init__(self, lost_nodes: Callable[[], Container[str]] = frozenset) -> None:
        self._lost_nodes = lost_nodes
        #: Nodes on which attempts were begun.
        self._together: defaultdict[tuple[str, Row], list[str]] = defaultdict(list)
        self._alone: defaultdict[tuple[str, Row], list[str]] = defaultdict(list)

    def begin(self, stage: str, rows: Sequence[Row], node: str = "") -> bool:
        """As `Attempts.begin`, on a node."""
        if any(self._are_enough(self._together[stage, row], TOGETHER) for row in rows):
            return False
        for row in rows:
            self._together[stage, row].append(node)
        return True

    def begin_alone(self, stage: str, row: Row, node: str = "") -> bool:
        """As `Attempts.begin_alone`, on a node."""
        if self._are_enough(self._alone[stage, row], ALONE):
            return False
        self._alone[stage, row].append(node)
        return True

    def _are_enough(self, nodes: Sequence[str], most: int) -> bool:
        """Whether attempts on these nodes are as many as there may be."""
        if len(nodes) < most:
            return False
        lost = self._lost_nodes()
        return sum(node not in lost for node in nodes) >= most or len(nodes) >= most + WITH_NODES

    def survived(self, stage: str, row: Row) -> None:
        """As `Attempts.survived`."""
        self._alone.pop((stage, row), None)

    def done(self, stage: str, rows: Sequence[Row]) -> None:
        """As `Attempts.done`."""
        for row in rows:
            self._together.pop((stage, row), None)
            self._alone.pop((stage, row), None)


class Guarded:
    """A stage whose rows may crash this process; threads can share it.

    Args:
        work: the stage; it passes on rows that have a failure.
        stage: its name in failures.
        attempts: counts attempts at rows.
    """

    def __init__(self, work: Callable[[pa.Table], pa.Table], stage: str, attempts: Attempts) -> None:
        self._work, self._stage, self._attempts = work, stage, attempts
        self._calls = _Calls()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Run the stage on a table, isolating rows that crash the process."""
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
        # Only now: if a later row crashes this worker, the next one begins with the first row again.
        self._attempts.done(self._stage, rows)
        return pa.concat_tables(results)

    def _failed(self, table: pa.Table) -> pa.Table:
        lost = WorkerLostError(f"this row {CRASHED}", stage=self._stage)
        return with_columns(table.drop_columns(list(FAILURE)), failure_columns([Failure.of(lost)]))


class Read(Protocol):
    """Reads a unit in tables of at most `rows_per_table` rows; with `lost`, rows that fail for that reason."""

    def __call__(self, unit: Unit, rows_per_table: int, lost: Lost | None = None) -> Iterator[pa.Table]:
        """Read a unit."""


class GuardedRead:
    """Reads units, isolating rows that crash the process. The process must not read anything else meanwhile.

    Ray keeps the tables that a task had returned when its process died, and takes the others from the next process. So
    every attempt cuts rows into tables in the same way.

    Args:
        read: reads a unit.
        rows_per_table: most rows of a table that is returned.
        attempts: counts attempts at rows.
    """

    def __init__(self, read: Read, rows_per_table: int, attempts: Attempts) -> None:
        self._read, self._rows_per_table, self._attempts = read, rows_per_table, attempts

    def __call__(self, units: Sequence[Unit]) -> Iterator[pa.Table]:
        """Read the units of one task."""
        begun = [(unit.file_number, unit.spans[0][0]) for unit in units]
        if self._attempts.begin(READ, begun):
            for unit in units:
                yield from self._read(unit, self._rows_per_table)
        else:
            for unit in units:
                for tables in self._row_by_row(unit):
                    yield pa.concat_tables(tables).combine_chunks()
                    begun += [row for table in tables for row in places_of(table)]
        # Only now: if a later row crashes this process, the next one begins with the first unit again.
        self._attempts.done(READ, begun)
        self._attempts.done(READ_IDS, begun)

    def _row_by_row(self, unit: Unit) -> Iterator[list[pa.Table]]:
        """For each table that is to be returned, its rows as tables of one row."""
        reading: Iterator[pa.Table] | None = None
        lost = 0
        for start, stop in unit.cuts(self._rows_per_table):
            tables: list[pa.Table] = []
            for row in range(start, stop):
                if lost == IMPASSABLE:
                    reading = reading or self._failed(_part(unit, row), UNREACHABLE)
                    tables.append(next(reading))
                elif self._attempts.begin_alone(READ, (unit.file_number, row)):
                    reading = reading or self._read(_part(unit, row), 1)
                    tables.append(next(reading))
                    self._attempts.survived(READ, (unit.file_number, row))
                    lost = 0
                else:
                    tables += self._failed(_part(unit, row, row + 1), CRASHED)
                    reading = None
                    lost += 1
            yield tables

    def _failed(self, unit: Unit, why: str) -> Iterator[pa.Table]:
        """Rows that have failed as tables of one row; with their ids, unless reading those crashes the process too."""
        first = (unit.file_number, unit.spans[0][0])
        known = self._attempts.begin_alone(READ_IDS, first)
        tables = self._read(unit, 1, Lost(WorkerLostError(why, stage=READ), known))
        table = next(tables)
        if known:
            self._attempts.survived(READ_IDS, first)
        yield table
        yield from tables


def _part(unit: Unit, first: int, end: int | None = None) -> Unit:
    """The rows of a unit from `first` on, up to but without `end`."""
    rows = (range(max(start, first), stop if end is None else min(stop, end)) for start, stop in unit.spans)
    return replace(unit, spans=[(each.start, each.stop) for each in rows if each])


class _Calls:
    """Lets calls run at the same time, or one of them alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Enter once no call runs alone or waits to run alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._running >= 0 and not self._waiting)
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Enter once no other call runs."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._running == 0)
            self._waiting -= 1
            self._running = -1
        try:
            yield
        finally:
            with self._changed:
                self._running = 0
                self._changed.notify_all()
