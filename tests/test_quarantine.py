"""A row that ends its worker is found and set aside, and no other row is."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from qvl_batch.quarantine import ALONE, TOGETHER, AttemptsInMemory, Guarded, _Calls
from qvl_batch.source import FILE, ROW, failure_columns, failures_of


class Died(BaseException):
    """Stands for the end of a process."""


def _table(rows):
    own = {FILE: pa.array([0] * len(rows), pa.int32()), ROW: pa.array(rows, pa.int64())}
    return pa.table(own | failure_columns([None] * len(rows)))


class Worker:
    """A process: it dies of some rows, unless they have failed."""

    def __init__(self, poison, seen):
        self.poison, self.seen = poison, seen

    def __call__(self, table):
        rows = table[ROW].to_pylist()
        self.seen.append(rows)
        failures = failures_of(table)
        if any(row in self.poison and failure is None for row, failure in zip(rows, failures, strict=True)):
            raise Died
        return table


def _work(tables, poison):
    """Do the work as Ray does, a new worker after each death; results, deaths, and what workers saw."""
    attempts, seen, deaths, results = AttemptsInMemory(), [], 0, []
    guarded = Guarded(Worker(poison, seen), "vision", attempts)
    for table in tables:
        while True:
            try:
                results.append(guarded(table))
            except Died:
                deaths += 1
                guarded = Guarded(Worker(poison, seen), "vision", attempts)
            else:
                break
    assert not attempts._together
    assert not attempts._alone
    return pa.concat_tables(results), deaths, seen


def test_rows_that_do_no_harm_stay_together():
    result, deaths, seen = _work([_table([1, 2]), _table([3])], poison=set())
    assert (result[ROW].to_pylist(), deaths, seen) == ([1, 2, 3], 0, [[1, 2], [3]])
    assert failures_of(result) == [None] * 3


@pytest.mark.parametrize("poison", [{2}, {1}, {1, 3}, {1, 2, 3}])
def test_rows_that_end_their_worker_fail_and_no_others(poison):
    result, deaths, _ = _work([_table([1, 2, 3]), _table([4, 5])], poison)
    assert result[ROW].to_pylist() == [1, 2, 3, 4, 5]
    failures = dict(zip(result[ROW].to_pylist(), failures_of(result), strict=True))
    assert {row for row, failure in failures.items() if failure} == poison
    assert deaths == TOGETHER + ALONE * len(poison)
    (failure, *_) = (failure for failure in failures.values() if failure)
    assert (failure.stage, failure.type) == ("vision", "WorkerLostError")
    assert failure.message.startswith("this row ended its worker 4 times, the last 2 alone in it")


def test_a_worker_that_is_killed_now_and_then_costs_no_row():
    attempts, deaths = AttemptsInMemory(), iter([True, True, True, False, True, False, False, False])

    def work(table):
        if next(deaths):
            raise Died
        return table

    guarded = Guarded(work, "vision", attempts)
    for _ in range(4):
        with pytest.raises(Died):
            guarded(_table([1, 2, 3]))
    result = guarded(_table([1, 2, 3]))
    assert failures_of(result) == [None] * 3


def test_stages_are_counted_apart():
    attempts = AttemptsInMemory()
    for stage in ("image", "vision"):
        assert [attempts.begin(stage, [(0, 1), (0, 2)]) for _ in range(3)] == [True, True, False]
    attempts.done("image", [(0, 1), (0, 2)])
    assert attempts.begin("image", [(0, 1)])
    assert not attempts.begin("vision", [(0, 1)])


def test_nothing_goes_on_beside_a_call_that_is_alone():
    calls, going_on, most = _Calls(), [], {"together": 0, "beside alone": 0}
    lock = threading.Lock()

    def call(number):
        alone = number % 3 == 0
        with calls.alone() if alone else calls.together():
            with lock:
                going_on.append(alone)
                kind = "beside alone" if any(going_on) else "together"
                most[kind] = max(most[kind], len(going_on))
            time.sleep(0.002)
            with lock:
                going_on.remove(alone)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(200)))
    assert most["beside alone"] == 1
    assert most["together"] > 1


def test_a_call_that_fails_lets_the_others_go_on():
    calls = _Calls()
    for kind in (calls.alone, calls.together, calls.alone):
        with pytest.raises(Died), kind():
            raise Died
    with calls.together():
        pass
