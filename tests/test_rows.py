"""A set of rows holds what was added, no more, in a bit each."""

import tracemalloc

import numpy as np
import pytest

from qvl_batch.rows import RowSet, spans


def test_a_set_is_what_a_set_of_pairs_is():
    rng = np.random.default_rng(0)
    rows = [0, 1, 7, 8, 9, 64, 1000]
    ours, plain = RowSet(rows), set()
    for _ in range(300):
        file = int(rng.integers(len(rows)))
        start, stop = sorted(rng.integers(0, rows[file] + 1, 2).tolist())
        added = {(file, row) for row in range(start, stop)}
        assert ours.add(file, start, stop) == len(added & plain)
        plain |= added
        assert ours.count == len(plain)
        file = int(rng.integers(len(rows)))
        start, stop = sorted(rng.integers(0, rows[file] + 1, 2).tolist())
        if plain and rng.random() < 0.3:
            taken = sorted(plain)[int(rng.integers(len(plain)))]
            ours.remove(*taken)
            plain.remove(taken)
        missing = [row for first, last in ours.missing(file, start, stop) for row in range(first, last)]
        assert missing == [row for row in range(start, stop) if (file, row) not in plain]


def test_missing_rows_are_as_few_spans_as_can_be():
    rows = RowSet([20])
    assert rows.missing(0, 3, 20) == [(3, 20)]
    rows.add(0, 5, 9)
    rows.add(0, 12, 13)
    assert rows.missing(0, 0, 20) == [(0, 5), (9, 12), (13, 20)]
    assert rows.missing(0, 5, 9) == []
    assert [rows.held(0, *span) for span in ((0, 20), (0, 5), (6, 13), (9, 9))] == [5, 0, 4, 0]


@pytest.mark.parametrize("span", [(2, 0, 1), (0, 0, 4), (-1, 0, 1), (0, -1, 1), (1, 2, 1)])
def test_rows_that_no_file_has_are_an_error(span):
    rows = RowSet([3, 3])
    with pytest.raises(IndexError, match="of file"):
        rows.add(*span)
    assert rows.count == 0


def test_spans_of_rows():
    assert spans([]) == []
    assert spans([4]) == [(4, 5)]
    assert spans([0, 1, 2, 5, 7, 8]) == [(0, 3), (5, 6), (7, 9)]


def test_a_hundred_million_rows_take_a_bit_each():
    files, rows = 1000, 100_000
    tracemalloc.start()
    done = RowSet([rows] * files)
    for file in range(0, files, 2):
        for start in range(0, rows, 50_000):
            done.add(file, start, start + 50_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert done.count == files * rows // 2
    assert peak < 20e6
