"""Work of the stages is counted once, however tables are cut, joined and answered on the way."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answers import ask
from conftest import QUESTIONS

from qvl_batch.bundle.loading import BundleReference
from qvl_batch.clock import Clock
from qvl_batch.columns import ASKED, FILE, ROW, SECONDS, THUMBNAIL, seconds_column, seconds_of, with_columns
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.engine import Engine, decoder_clocks
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.decoder.requests import Request
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit
from qvl_batch.input.source import open_source
from qvl_batch.pipeline.crash_guard import AttemptsInMemory, Guarded
from qvl_batch.pipeline.prepare import prepare
from qvl_batch.pipeline.read import timed
from qvl_batch.pipeline.stages import AnswerForm, DecoderStage, VisionStage
from qvl_batch.report.sample import choose, sampled
from qvl_batch.report.utilization import ADVICE, Utilization, advice
from qvl_batch.vision.encoder import VisionEncoder
from qvl_batch.vision.features import ImageFeatures

WORK = ("read", "image", "vision", "prefill", "decode")


@pytest.fixture
def ticks(monkeypatch):
    """A clock's time goes on by a second with each look at it, so that each piece of work takes one."""
    counter = itertools.count()
    monkeypatch.setattr("qvl_batch.clock.time", SimpleNamespace(perf_counter=lambda: float(next(counter))))


def _places(rows):
    return pa.table({FILE: pa.array([0] * rows, pa.int32()), ROW: pa.array(range(rows), pa.int64())})


def _columns(seconds, rows):
    return {name: column for work in WORK for name, column in seconds_column(work, seconds, rows).items()}


def test_cutting_and_joining_keeps_the_sum():
    tables = [with_columns(_places(rows), _columns(seconds, rows)) for rows, seconds in ((5, 2.0), (1, 0.5), (7, 4.0))]
    assert all(
        seconds_of(table) == dict.fromkeys(WORK, seconds) for table, seconds in zip(tables, (2, 0.5, 4), strict=True)
    )
    joined = pa.concat_tables(tables)
    assert seconds_of(joined) == dict.fromkeys(WORK, 6.5)
    parts = [joined.slice(at, 3) for at in range(0, 13, 3)]
    assert [sum(seconds_of(part)[work] for part in parts) for work in WORK] == [6.5] * 5


@pytest.mark.usefixtures("ticks")
def test_a_clock_adds_up_threads_and_gives_each_second_once():
    clock = Clock()
    inside = threading.Barrier(2)

    def work():
        with clock.running():
            inside.wait(10)

    with ThreadPoolExecutor(2) as threads:
        for call in [threads.submit(work) for _ in range(2)]:
            call.result()
    # Looks 0 and 1, then 2 and 3: both were inside at one time, and their seconds add up.
    assert (clock.take(), clock.take()) == (4.0, 0.0)
    with pytest.raises(KeyError), clock.running():
        raise KeyError
    assert clock.take() == 1.0


@pytest.mark.usefixtures("ticks")
def test_only_the_making_of_a_table_is_timed():
    def tables():
        yield _places(3)
        yield _places(0)
        yield _places(2)

    found = []
    for table in timed(tables()):
        with Clock().running():  # looks that are not the tables'
            found.append(table)
    assert [table[SECONDS["read"]].to_pylist() if table.num_rows else [] for table in found] == [
        [1.0, 0.0, 0.0], [], [2.0, 0.0]
    ]  # fmt: skip


@pytest.mark.usefixtures("ticks")
def test_rows_that_are_begun_alone_keep_the_sum():
    clock = Clock()

    def work(table):
        with clock.running():
            pass
        return with_columns(table, seconds_column("vision", clock.take(), table.num_rows))

    attempts, rows = AttemptsInMemory(), [(0, row) for row in range(4)]
    for _ in range(2):
        attempts.begin("vision", rows)
    table = with_columns(_places(4), seconds_column("image", 7.0, 4))
    result = Guarded(work, "vision", attempts)(table)
    assert result[SECONDS["vision"]].to_pylist() == [1.0] * 4
    assert sum(result[SECONDS["image"]].to_pylist()) == 7.0


@pytest.mark.usefixtures("ticks")
def test_each_image_and_each_step_is_counted(tiny_bundle):
    """Of the engine, all of a row's work has been counted when its answer is there."""
    images = [np.full((672, 672, 3), value, np.uint8) for value in (30, 90, 200)]
    images[2][:100] = 0
    features = ImageFeatures(VisionEncoder(tiny_bundle, threads=2))
    found = features.of([*images, images[0]], [b"a", b"b", b"c", b"a"])
    assert features.clock.take() == 3.0

    layout, decoder = RowLayout(tiny_bundle), Decoder(tiny_bundle, 4, threads=2)
    row = ask(layout, "How many shapes are there?", found[0])
    clocks = decoder_clocks()
    with Engine(decoder, (), clocks) as engine:
        for _ in range(2):
            engine.submit(Request(row, 5)).result(60)
            # Prefill makes the first token, each step another.
            assert {work: clock.take() for work, clock in clocks.items()} == {"prefill": 1.0, "decode": 4.0}
        # The second row of an image takes the first one's beginning.
        pair = [row, ask(layout, "How many shapes are there?", found[0])]
        for future in [engine.submit(Request(each, 3, [b"b"])) for each in pair]:
            future.result(60)
        assert clocks["prefill"].take() == 2.0
        # Two answers to one row have one prefill.
        for future in [engine.submit(Request(row, 3)) for _ in range(2)]:
            future.result(60)
        assert clocks["prefill"].take() == 1.0


def test_tables_carry_work_and_sample_through_all_stages(tiny_bundle, tmp_path):
    rows = pq.read_table(QUESTIONS).slice(0, 5)
    pq.write_table(rows, tmp_path / "rows.parquet")
    config = CaptionConfig(bundle=tiny_bundle.path, input=(str(tmp_path),), output=tmp_path / "out")
    source = open_source(config)
    sample = frozenset({(0, 1), (0, 4)})
    read = timed(read_unit(next(source.units()), source.columns, None, 8, Fetcher(())))
    (table,) = [prepare(each, View.of(tiny_bundle.manifest.layout.resolution), sample) for each in read]
    vision = VisionStage(BundleReference.of(tiny_bundle), 2, lambda: "v")
    decoder = DecoderStage(BundleReference.of(tiny_bundle), 8, 2, AnswerForm(16), lambda: "d")
    table = decoder(vision(table))
    for work in WORK:
        first, *others = table[SECONDS[work]].to_pylist()
        assert first > 0
        assert others == [0.0] * 4
    assert [value is not None for value in table[THUMBNAIL].to_pylist()] == [False, True, False, False, True]
    assert table[ASKED].to_pylist()[1] == rows["prompt"][1].as_py()
    shown = sampled(table, sample)
    assert [(row["id"], row["answer"]) for row in shown.values()] == [
        (table["id"][index].as_py(), table["answer"][index].as_py()) for index in (1, 4)
    ]
    assert choose(source.rows, source.spans()) == {(0, row) for row in range(5)}


def test_a_share_is_of_the_time_in_which_a_stage_could_have_worked():
    stage = Utilization({"prefill": 30.0, "decode": 15.0}, threads=2, duration=50.0)
    assert (stage.seconds, stage.busy, stage.share(30.0)) == (45.0, 0.45, 0.3)
    record = stage.record(rows=900)
    assert (record["busy"], record["seconds"], record["at_once"]) == (0.45, 45.0, 2)
    # Twice two threads at 20 rows a second of work.
    assert record["images_per_second"] == 40.0
    assert record["parts"]["decode"] == {"seconds": 15.0, "busy": 0.15}
    assert Utilization({"read": 0.0}, 1, 0.0).record(0) == {
        "seconds": 0.0, "at_once": 1, "busy": 0.0, "images_per_second": None
    }  # fmt: skip
    assert Utilization({"vision": 9.0}, 1, 8.9).busy == 1.0


@pytest.mark.parametrize(
    ("busy", "limiting"),
    [
        ({"read": 0.01, "image": 0.2, "vision": 0.97, "decoder": 0.5}, "vision"),
        ({"read": 0.01, "image": 0.2, "vision": 0.4, "decoder": 0.97}, "decoder"),
        ({"read": 0.9, "image": 0.2, "vision": 0.4, "decoder": 0.3}, "read"),
        ({"read": 0.1, "image": 0.9, "vision": 0.4, "decoder": 0.3}, "image"),
        ({"read": 0.01, "image": 0.2, "vision": 0.97, "decoder": 0.9}, None),
        ({"read": 0.01, "image": 0.2, "vision": 0.6, "decoder": 0.5}, None),
        ({}, None),
    ],
)
def test_advice_is_given_where_one_stage_limits(busy, limiting):
    assert advice(busy) == (ADVICE[limiting] if limiting else None)
