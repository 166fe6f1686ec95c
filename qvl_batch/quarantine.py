"""Rows that end the process that works on them are found, and fail as any other row does.

A worker that dies takes no row with it: Ray starts another, which works on the same rows again. A
row that is itself the cause, by a crash in a library or by memory that runs out, would go on like
that for ever. So a worker says which rows it begins and which it has done, and

    begun together, and the worker died      they are begun again
    that happened twice                      each is begun alone in its process
    begun alone, and the worker died twice   the row has failed

which finds the row and no other, after four workers at most. This module knows nothing of Ray.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import pyarrow as pa

from qvl_batch.errors import WorkerLostError
from qvl_batch.rowset import Row
from qvl_batch.schema import Failure
from qvl_batch.source import FAILURE, failure_columns, rows_of, with_columns

TOGETHER, ALONE = 2, 2


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
        rows = rows_of(table)
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
        lost = WorkerLostError(
            f"this row ended its worker {TOGETHER + ALONE} times, the last {ALONE} alone in it: "
            "memory ran out, or a library crashed or hung",
            stage=self._stage,
        )
        return with_columns(table.drop_columns(list(FAILURE)), failure_columns([Failure.of(lost)]))


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
