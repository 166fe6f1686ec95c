"""A row that ends its worker is found and set aside, and no other row is."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qvl_batch.columns import FILE, ROW, failure_columns, failures_of
from qvl_batch.input.containers.parquet import footer_sha256
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.input_columns import InputColumns, Kept
from qvl_batch.input.reader import read_unit
from qvl_batch.input.units import Unit
from qvl_batch.pipeline.crash_guard import (
    ALONE,
    READ,
    READ_IDS,
    TOGETHER,
    UNREACHABLE,
    WITH_NODES,
    AttemptsInMemory,
    Guarded,
    GuardedRead,
)


class Died(BaseException):
    """Stands for the end of a process."""


def _rows_without_failures(rows):
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


def _are_forgotten(attempts, stage, table):
    """Whether each row may be begun as often as one that never was."""
    return all(
        [attempts.begin(stage, [(0, row)]) for _ in range(TOGETHER + 1)] == [*[True] * TOGETHER, False]
        and [attempts.begin_alone(stage, (0, row)) for _ in range(ALONE + 1)] == [*[True] * ALONE, False]
        for row in table[ROW].to_pylist()
    )


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
    result = pa.concat_tables(results)
    assert _are_forgotten(attempts, "vision", result)
    return result, deaths, seen


def test_rows_that_do_no_harm_stay_together():
    result, deaths, seen = _work([_rows_without_failures([1, 2]), _rows_without_failures([3])], poison=set())
    assert (result[ROW].to_pylist(), deaths, seen) == ([1, 2, 3], 0, [[1, 2], [3]])
    assert failures_of(result) == [None] * 3


@pytest.mark.parametrize("poison", [{2}, {1}, {1, 3}, {1, 2, 3}])
def test_rows_that_end_their_worker_fail_and_no_others(poison):
    result, deaths, _ = _work([_rows_without_failures([1, 2, 3]), _rows_without_failures([4, 5])], poison)
    assert result[ROW].to_pylist() == [1, 2, 3, 4, 5]
    failures = dict(zip(result[ROW].to_pylist(), failures_of(result), strict=True))
    assert {row for row, failure in failures.items() if failure} == poison
    assert deaths == TOGETHER + ALONE * len(poison)
    (failure, *_) = (failure for failure in failures.values() if failure)
    assert (failure.stage, failure.type) == ("vision", "WorkerLostError")
    assert failure.message.startswith("this row crashed its worker 4 times, the last 2 times alone in it")


def test_a_worker_that_is_killed_now_and_then_costs_no_row():
    attempts, deaths = AttemptsInMemory(), iter([True, True, True, False, True, False, False, False])

    def work(table):
        if next(deaths):
            raise Died
        return table

    guarded = Guarded(work, "vision", attempts)
    for _ in range(4):
        with pytest.raises(Died):
            guarded(_rows_without_failures([1, 2, 3]))
    result = guarded(_rows_without_failures([1, 2, 3]))
    assert failures_of(result) == [None] * 3


def test_stages_are_counted_apart():
    attempts = AttemptsInMemory()
    for stage in ("image", "vision"):
        assert [attempts.begin(stage, [(0, 1), (0, 2)]) for _ in range(3)] == [True, True, False]
    attempts.done("image", [(0, 1), (0, 2)])
    assert attempts.begin("image", [(0, 1)])
    assert not attempts.begin("vision", [(0, 1)])


def test_nothing_goes_on_beside_a_row_that_is_begun_alone():
    attempts, going_on, most = AttemptsInMemory(), [], {"together": 0, "beside alone": 0}
    lock = threading.Lock()
    for row in range(0, 200, 3):
        for _ in range(TOGETHER):
            attempts.begin("vision", [(0, row)])

    def work(table):
        alone = table[ROW][0].as_py() % 3 == 0
        with lock:
            going_on.append(alone)
            kind = "beside alone" if any(going_on) else "together"
            most[kind] = max(most[kind], len(going_on))
        time.sleep(0.002)
        with lock:
            going_on.remove(alone)
        return table

    guarded = Guarded(work, "vision", attempts)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: guarded(_rows_without_failures([row])), range(200)))
    assert most["beside alone"] == 1
    assert most["together"] > 1


def test_a_call_that_fails_lets_the_others_go_on():
    seen = []
    guarded = Guarded(Worker({1}, seen), "vision", AttemptsInMemory())
    for _ in range(TOGETHER + ALONE):
        with pytest.raises(Died):
            guarded(_rows_without_failures([1]))
        guarded(_rows_without_failures([2]))
    guarded(_rows_without_failures([1]))
    assert seen == [[1], [2]] * (TOGETHER + ALONE) + [[1]]


SCHEMA = pa.schema({"id": pa.int64(), "image": pa.binary(), "note": pa.string()})
KEPT = (Kept("note", pa.field("note", pa.string())),)
COLUMNS = InputColumns(pa.field("id", pa.int64()), KEPT, "image", None, schemas=(SCHEMA,))


def _read_through(path, groups, ends, spans=None, *, ids_end=False):
    """Read row groups of 10 as one of Ray's tasks does, again after each death: tables are taken as they come, and
    those of a later attempt from where the earlier ones ended; tables, deaths.
    """
    rows = range(10 * groups)
    pq.write_table(pa.table({"id": rows, "image": [b"i"] * len(rows), "note": ["n"] * len(rows)}), path, 10)
    with pa.OSFile(str(path)) as file:
        footer = footer_sha256(file)
    units = [Unit(str(path), footer, 0, at, 10 * at, spans or [(10 * at, 10 * at + 10)]) for at in range(groups)]
    attempts, tables, deaths = AttemptsInMemory(), [], 0

    def read(unit, rows_per_table, lost=None):
        if lost and lost.known and ids_end:
            raise Died
        for table in read_unit(unit, COLUMNS, "What?", rows_per_table, Fetcher(()), lost):
            if lost is None and any(ends(unit, row) for row in range(unit.first_row, table[ROW][-1].as_py() + 1)):
                raise Died
            yield table

    while True:
        try:
            for number, table in enumerate(GuardedRead(read, 4, attempts)(units)):
                if number == len(tables):
                    tables.append(table)
                assert table[ROW].equals(tables[number][ROW])
        except Died:
            deaths += 1
        else:
            break
    assert all(_are_forgotten(attempts, stage, pa.concat_tables(tables)) for stage in (READ, READ_IDS))
    return tables, deaths


def _alone(*poison):
    """Rows that end their reader, unless they are left out."""
    return lambda unit, row: row in poison and any(start <= row < stop for start, stop in unit.spans)


def _from(first, end):
    """No reader gets past a row within its row group."""
    return lambda _, row: first <= row < end


@pytest.mark.parametrize(
    ("ends", "failed", "behind", "deaths"),
    [
        (_alone(), [], [], 0),
        (_alone(13), [13], [], TOGETHER + ALONE),
        (_alone(10, 12, 25), [10, 12, 25], [], TOGETHER + 3 * ALONE),
        (_from(13, 20), [13, 14], [15, 16, 17, 18, 19], TOGETHER + 2 * ALONE),
    ],
)
def test_rows_that_end_their_reader_fail_and_those_that_can_be_read_do_not(ends, failed, behind, deaths, tmp_path):
    tables, died = _read_through(tmp_path / "a.parquet", 3, ends)
    assert [table.num_rows for table in tables] == [4, 4, 2] * 3
    assert died == deaths
    rows = pa.concat_tables(tables)
    assert rows[ROW].to_pylist() == rows["id"].to_pylist() == list(range(30))
    assert set(rows["note"].to_pylist()) == {"n"}
    failures = {row: failure for row, failure in enumerate(failures_of(rows)) if failure}
    assert list(failures) == failed + behind
    for row, failure in failures.items():
        assert (failure.stage, failure.type) == ("read", "WorkerLostError")
        why = UNREACHABLE if row in behind else "crashed its worker 4 times, the last 2 times alone in it"
        assert failure.message.startswith(f"row {row} of {tmp_path}/a.parquet {why}")


def test_rows_whose_ids_end_their_reader_too_have_none(tmp_path):
    tables, _ = _read_through(tmp_path / "a.parquet", 1, _alone(3), [(1, 5), (8, 10)], ids_end=True)
    rows = pa.concat_tables(tables)
    assert rows[ROW].to_pylist() == [1, 2, 3, 4, 8, 9]
    assert rows["id"].to_pylist() == [1, 2, None, 4, 8, 9]
    assert [failure is not None for failure in failures_of(rows)] == [row == 3 for row in rows[ROW].to_pylist()]


def test_a_row_is_not_to_blame_for_nodes_that_went_away():
    lost = set()
    attempts = AttemptsInMemory(lambda: lost)
    rows = [(0, row) for row in range(3)]
    for number in range(WITH_NODES):
        assert attempts.begin("vision", rows, f"node {number}")
        lost.add(f"node {number}")
    # A worker that ends on a node that stays counts as ever.
    assert [attempts.begin("vision", rows, "stays") for _ in range(TOGETHER + 1)] == [*[True] * TOGETHER, False]
    for number in range(WITH_NODES):
        assert attempts.begin_alone("vision", rows[0], f"node {number}")
    assert [attempts.begin_alone("vision", rows[0], "stays") for _ in range(ALONE + 1)] == [*[True] * ALONE, False]
    attempts.done("vision", rows)
    assert attempts.begin("vision", rows, "stays")


def test_a_row_that_ends_every_node_is_found():
    lost = set()
    attempts = AttemptsInMemory(lambda: lost)

    def fall(begin):
        """Number of nodes that end before no more are taken."""
        nodes = 0
        while begin(f"node {len(lost)}"):
            lost.add(f"node {len(lost)}")
            nodes += 1
        return nodes

    assert fall(lambda node: attempts.begin("vision", [(0, 0), (0, 1)], node)) == TOGETHER + WITH_NODES
    assert fall(lambda node: attempts.begin_alone("vision", (0, 1), node)) == ALONE + WITH_NODES
    assert attempts.begin_alone("vision", (0, 0), "stays")
