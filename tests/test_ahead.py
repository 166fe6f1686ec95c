"""Images are fetched ahead of the rows that are waited for, within bounds, and rows come in their order."""

import time
from concurrent.futures import Future

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import caption_config, images_of
from web import Answer, serving

from qvl_batch.columns import LOCATIONS
from qvl_batch.input import ahead
from qvl_batch.input.ahead import Begun, Fetching, in_order
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit
from qvl_batch.input.source import open_source


class Things:
    """Things of so many images each: `begun` has the futures of those that were begun, `arrive` has one's come."""

    def __init__(self, *images, held=0, ends=None):
        self._images, self._held, self._ends = images, held, ends
        self.begun = []

    def __iter__(self):
        for number, count in enumerate(self._images):
            self.begun.append([Future() for _ in range(count)])
            yield Begun(Fetching(self.begun[-1]), self._held, lambda images, number=number: (number, images))
        if self._ends is not None:
            raise self._ends

    def arrive(self, number, image=b"image"):
        for future in self.begun[number]:
            future.set_result(image)


@pytest.fixture
def late(monkeypatch):
    """Images that are waited for arrive then."""
    original = Fetching.results

    def results(self):
        for image in self.images:
            if not image.done():
                image.set_result(b"late")
        return original(self)

    monkeypatch.setattr(Fetching, "results", results)


@pytest.mark.usefixtures("late")
def test_things_come_in_order_and_are_begun_ahead_within_bounds():
    things = Things(1, 1, 1, 1, 1, 1)
    coming = in_order(things, 3)
    assert next(coming) == (0, [b"late"])
    assert len(things.begun) == 3
    things.arrive(2)
    things.arrive(1)
    assert [next(coming), next(coming)] == [(1, [b"image"]), (2, [b"image"])]
    assert len(things.begun) == 3
    assert list(coming) == [(number, [b"late"]) for number in (3, 4, 5)]


@pytest.mark.usefixtures("late")
def test_nothing_is_begun_ahead_where_it_must_not_be():
    things = Things(0, 1, 2, 0)
    for number, made in enumerate(in_order(things, 0)):
        assert made[0] == number
        assert len(things.begun) == number + 1


def test_things_that_wait_for_nothing_are_handed_on_at_once():
    things = Things(0, 0, 0)
    assert next(in_order(things, 100)) == (0, [])
    assert len(things.begun) == 1


@pytest.mark.usefixtures("late")
def test_bytes_that_are_held_or_have_arrived_are_bounded(monkeypatch):
    monkeypatch.setattr(ahead, "BYTES_AHEAD", 100)
    things = Things(*[1] * 20, held=40)
    next(in_order(things, 1000))
    assert len(things.begun) == 3

    things = Things(*[1] * 20)

    def arriving():
        for number, thing in enumerate(things):
            if number:
                things.arrive(number, b"x" * 40)
            yield thing

    next(in_order(arriving(), 1000))
    assert len(things.begun) == 4


@pytest.mark.usefixtures("late")
def test_an_error_comes_after_all_that_was_begun_before_it():
    coming = in_order(Things(1, 1, ends=ValueError("damaged")), 100)
    assert [next(coming), next(coming)] == [(0, [b"late"]), (1, [b"late"])]
    with pytest.raises(ValueError, match="damaged"):
        next(coming)


@pytest.mark.usefixtures("late")
def test_images_that_nobody_waits_for_any_longer_are_not_begun():
    things = Things(1, 3)
    coming = in_order(things, 100)
    next(coming)
    coming.close()
    assert all(image.cancelled() for image in things.begun[1])


def _unit(folder, locations):
    pq.write_table(pa.table({"id": range(len(locations)), "image": locations}), folder / "rows.parquet")
    source = open_source(caption_config(folder, prompt="What?", allow_images_from=("http://127.0.0.1",)))
    (unit,) = source.units()
    return unit, source.columns


def test_a_slow_host_does_not_hold_up_the_others(tmp_path):
    with serving() as slow, serving() as web:
        rows = [f"{slow.url}/0", *(f"{web.url}/{at}" for at in range(1, 64))]
        seen = []

        def answer(_):
            until = time.monotonic() + 10
            while len(web.asked) < 63 and time.monotonic() < until:
                time.sleep(0.01)
            seen.append(len(web.asked))
            return Answer()

        slow.answers["/0"] = answer
        unit, columns = _unit(tmp_path, rows)
        tables = list(read_unit(unit, columns, "What?", 8, Fetcher([slow.url, web.url])))
    assert seen == [63]  # all others were fetched before the first was there
    assert [table["id"].to_pylist() for table in tables] == [list(range(at, at + 8)) for at in range(0, 64, 8)]
    assert images_of(pa.concat_tables(tables)) == [b"from afar"] * 64


def test_a_row_that_is_read_alone_is_the_only_one_that_is_fetched(tmp_path):
    with serving() as web:
        unit, columns = _unit(tmp_path, [f"{web.url}/{at}" for at in range(4)])
        for at, _ in enumerate(read_unit(unit, columns, "What?", 1, Fetcher([web.url]))):
            assert web.paths == [f"/{each}" for each in range(at + 1)]


def test_rows_say_where_their_images_come_from_without_what_gives_access(tmp_path):
    (tmp_path / "a").write_bytes(b"inside")
    with serving() as web:
        lists = [[f"{web.url}/a?key=1", "a"], ["https://Elsewhere.example/b"], [], ["https://user:word@host/b"], None]
        unit, columns = _unit(tmp_path, lists)
        tables = read_unit(unit, columns, "What?", 8, Fetcher([web.url, str(tmp_path)]))
        found = pa.concat_tables(tables)[LOCATIONS].to_pylist()
    assert found == [[f"{web.url}/a?…", "a"], ["https://Elsewhere.example/b"], [], ["https://host/b"], [None]]
