"""What is said of a run is what happened, in bounded memory however long it lasts."""

import io
import math
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from qvl_batch.columns import (
    ASKED,
    COLUMNS,
    FILE,
    LOCATIONS,
    MESSAGES,
    ROW,
    SECONDS,
    STARTED,
    THUMBNAIL,
    WORKERS,
    located,
    seconds_column,
)
from qvl_batch.config import CaptionConfig
from qvl_batch.conversation import Message, single_turn, to_json
from qvl_batch.errors import ConfigError
from qvl_batch.input.source import Source
from qvl_batch.output.parts import Tally
from qvl_batch.pipeline.plan import Plan
from qvl_batch.report.confidence import BINS as BINS_OF_CONFIDENCE
from qvl_batch.report.confidence import KEPT, ConfidenceStats, probability
from qvl_batch.report.progress import ProgressLine
from qvl_batch.report.run_stats import BIN_SECONDS, BINS, EXAMPLES, RunStats, Timeline
from qvl_batch.report.sample import ABREAST, CHARACTERS, GAP, MOST_ABREAST, ROWS, SIDE, choose, sample_columns
from qvl_batch.report.summary import Report
from qvl_batch.report.utilization import Utilization
from qvl_batch.rows import RowSet
from qvl_batch.schema import ANSWER_FIELDS, CHOICES_FIELD, ID, Answer, Failure

PLAN = Plan(
    vision_workers=3, vision_threads=2, vision_cpus=1, decoder_workers=4, decoder_threads=1, decoder_cpus=1,
    slots=8, slot_bytes=1, slots_in_memory=9, block_bytes=1, calls_per_decoder=2, tasks_at_once=5,
)  # fmt: skip


def test_bins_are_few_and_keep_every_count_however_long_a_run():
    timeline, chance = Timeline("rows", "errors"), random.Random(1)  # noqa: S311
    events = sorted((chance.uniform(0, 10**6), chance.randrange(9)) for _ in range(5_000))
    events = [(0.0, 3), (0.1, 4), *events]
    for at, rows in events:
        timeline.add(at, rows=rows, errors=rows % 2)
        assert len(timeline.bins["rows"]) == len(timeline.bins["errors"]) <= BINS
    width = timeline.seconds_per_bin
    assert width == BIN_SECONDS * 2 ** math.ceil(math.log2(10**6 / BIN_SECONDS / BINS))
    expected = [0] * (int(events[-1][0] / width) + 1)
    for at, rows in events:
        expected[int(at / width)] += rows
    assert timeline.bins["rows"] == expected
    assert sum(timeline.bins["errors"]) == sum(rows % 2 for _, rows in events)
    assert timeline.record() == {"seconds_per_bin": width, **timeline.bins}


def test_a_jump_over_many_doublings_loses_nothing():
    timeline = Timeline("rows")
    timeline.add(1.0, rows=5)
    timeline.add(1e9, rows=7)
    assert timeline.bins["rows"][0] == 5
    assert sum(timeline.bins["rows"]) == 12
    assert len(timeline.bins["rows"]) <= BINS


def _source_with_rows_left(*left):
    """A source of files of so many rows, of which only some are left."""
    files = tuple(rows for rows, _ in left)
    done = RowSet(files)
    for file, (rows, each) in enumerate(left):
        done.add(file, 0, rows)
        for row in each:
            done.remove(file, row)
    return Source((), None, (), files, done)


def test_the_sample_is_of_rows_that_are_left_and_always_the_same():
    source = _source_with_rows_left((500, [*range(5, 9), *range(20, 420)]), (3, []), (3, [0]), (700, range(100, 700)))
    left = {(0, row) for row in [*range(5, 9), *range(20, 420)]} | {(2, 0)} | {(3, row) for row in range(100, 700)}
    sample = choose(source.rows, source.spans())
    assert len(sample) == ROWS
    assert sample <= left
    assert {file for file, _ in sample} >= {0, 3}
    assert choose(source.rows, source.spans()) == sample
    small = _source_with_rows_left((4, [2, 3]), (9, [8]))
    assert choose(small.rows, small.spans()) == {(0, 2), (0, 3), (1, 8)}
    assert choose(_source_with_rows_left().rows, _source_with_rows_left().spans()) == frozenset()


def test_only_the_sample_has_small_thumbnails_and_short_prompts():
    pixels = [np.random.default_rng(0).integers(0, 255, (672, 672, 3), np.uint8)]
    several = (Message("user", "a"), Message("assistant", "b"), Message("user", ("c", 0, "d")))
    asked = [single_turn("x" * 100_000, 1), single_turn("b", 1), None, single_turn("d", 1), several]
    messages = [each and to_json(each) for each in asked]
    table = pa.table({FILE: [0] * 5, ROW: range(5), MESSAGES: messages})
    images = [pixels, pixels, pixels, [], pixels]  # the fourth has failed
    columns = sample_columns(table, images, frozenset({(0, 0), (0, 2), (0, 3), (0, 4), (9, 1)}))
    thumbnails = columns[THUMBNAIL].to_pylist()
    assert [value is not None for value in thumbnails] == [True, False, True, False, True]
    assert thumbnails[0][:2] == b"\xff\xd8"
    assert len(thumbnails[0]) < 3 * SIDE**2 / 3
    assert columns[ASKED].to_pylist() == ["x" * CHARACTERS + "…", None, None, "d", "cd"]
    every = sample_columns(table, images, None)
    assert [value is not None for value in every[THUMBNAIL].to_pylist()] == [True, True, True, False, True]
    assert every[ASKED].to_pylist() == ["x" * CHARACTERS + "…", "b", None, "d", "cd"]


@pytest.mark.parametrize("count", [1, 2, ABREAST, 3 * ABREAST, SIDE * ABREAST + 1])
def test_images_of_a_row_stand_side_by_side_in_one_small_thumbnail(count):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    images = [np.full((200, 200, 3), colours[number % 3], np.uint8) for number in range(count)]
    table = pa.table({FILE: [0], ROW: [0], MESSAGES: [to_json(single_turn("?", count))]})
    data = sample_columns(table, [images], frozenset({(0, 0)}))[THUMBNAIL][0].as_py()
    shown = np.asarray(Image.open(io.BytesIO(data)), np.int16)
    count = min(count, MOST_ABREAST)
    width = SIDE * ABREAST // max(ABREAST, count)
    assert shown.shape == (width, count * width + (count - 1) * GAP, 3)
    if count < 2 * ABREAST:
        for number in range(count):
            middle = shown[width // 2, number * (width + GAP) + width // 2]
            assert np.abs(middle - colours[number % 3]).max() < 20


def _answered(first, answers, started=1e12):
    """A table of answers to rows `first`, ... of file 0, as it comes to the driver."""
    rows = len(answers)
    columns = {FILE: [0] * rows, ROW: range(first, first + rows), ID: [f"row-{first + i}" for i in range(rows)]}
    columns |= {f.name: pa.array([answer.record()[f.name] for answer in answers], f.type) for f in ANSWER_FIELDS}
    columns |= {
        LOCATIONS: pa.array([["https://host.example/a.png"]] * rows, COLUMNS[LOCATIONS].type),
        STARTED: [started] * rows,
        THUMBNAIL: [b"jpeg"] * rows,
        ASKED: ["why?"] * rows,
    }
    columns |= {column: [stage] * rows for stage, column in WORKERS.items()}
    columns |= {n: c for at, work in enumerate(SECONDS) for n, c in seconds_column(work, at + 1.0, rows).items()}
    return pa.table(columns)


def _arrived(stats, *tables):
    for table in tables:
        stats.add(located(table), Tally.of(table))
    return stats


YES, NO = Answer("yes", "stop", 9, 2), Answer.failed(Failure("image", "ImageError", "m" * 5_000))


def test_the_driver_keeps_the_sample_and_a_few_errors_of_each_kind():
    sample = frozenset({(0, 3), (0, 12), (0, 99)})
    other = Answer.failed(Failure("layout", "PromptError", "no"))
    stats = _arrived(
        RunStats(sample), _answered(10, [YES, other, NO]), *(_answered(at, [NO, YES]) for at in range(0, 10, 2))
    )
    assert [(row["id"], row["finish_reason"]) for row in stats.rows] == [("row-3", "stop"), ("row-12", "error")]
    assert stats.rows[0]["prompt"] == "why?"
    assert {kind: len(each) for kind, each in stats.examples.items()} == {
        "image: ImageError": EXAMPLES, "layout: PromptError": 1
    }  # fmt: skip
    assert stats.examples["layout: PromptError"] == [{"id": "row-11", "message": "no"}]
    assert all(len(each["message"]) == CHARACTERS + 1 for each in stats.examples["image: ImageError"])
    assert sum(stats.timeline.bins["rows"]) == 13
    assert sum(stats.timeline.bins["errors"]) == 7
    assert sum(stats.timeline.bins["answer_tokens"]) == 12
    assert stats.workers == {stage: {stage: 13} for stage in WORKERS}


def test_an_id_that_is_no_text_is_shown_as_far_as_it_can_be_read():
    ids = pa.array([b"\xff\xfe", b"a\xffb"]).view(pa.string())
    table = _answered(0, [NO, YES])
    table = table.set_column(table.column_names.index(ID), ID, ids)
    stats = _arrived(RunStats(frozenset({(0, 0), (0, 1)})), table)
    assert [row["id"] for row in stats.rows] == ["\ufffd\ufffd", "a\ufffdb"]
    assert [each["id"] for each in stats.examples["image: ImageError"]] == ["\ufffd\ufffd"]


def test_the_stages_of_a_run_have_their_work_and_their_time():
    stats = RunStats(frozenset())
    _arrived(stats, _answered(0, [YES] * 3, started=stats.began + 50), _answered(3, [YES], started=stats.began + 20))
    assert stats.seconds_to_first_image == pytest.approx(20)
    stages = stats.utilization(PLAN.threads, 120.0)
    found = {name: (stage.seconds, stage.threads, round(stage.duration, 3)) for name, stage in stages.items()}
    assert found == {
        "read": (2.0, 5, 120.0), "image": (4.0, 5, 120.0), "vision": (6.0, 6, 100.0), "decoder": (18.0, 4, 100.0)
    }  # fmt: skip
    assert stages["decoder"].parts == {"prefill": 8.0, "decode": 10.0}
    # No image was good enough for the graph to begin with: nothing can be said, and nothing fails.
    assert RunStats(frozenset()).utilization(PLAN.threads, 5.0)["vision"].busy == 0.0


def _report(**changes):
    tally = Tally(rows=3_600, answer_tokens=9, finish_reasons=Counter(stop=3_600))
    stages = {
        "vision": Utilization({"vision": 900.0}, 1, 1_000.0),
        "decoder": Utilization({"prefill": 1.0, "decode": 2.0}, 1, 30.0),
    }
    told = {"tally": tally, "seconds": 1_100.0, "workers_seconds": 100.0, "stages": stages}
    return Report("out", Tally(), **(told | changes))


def test_time_and_price_of_a_million_images_are_those_of_the_steady_rate():
    report = _report(price_per_hour=2.5)
    assert report.steady_images_per_second == 3.6
    assert report.hours_per_million == pytest.approx(1e6 / 3.6 / 3600)
    assert report.cost_per_million == pytest.approx(2.5 * 1e6 / 3.6 / 3600)
    assert "million   77.2 hours, 192.90 at 2.50 an hour" in str(report)
    assert "busy      vision 90%, decoder 10%" in str(report)
    record = report.record()
    assert (record["hours_per_million"], record["price_per_hour"], record["cost_per_million"]) == (77.16, 2.5, 192.901)
    assert record["stages"]["vision"]["busy"] == 0.9
    assert record["advice"].startswith("Vision is the bottleneck")


@pytest.mark.parametrize(
    ("rows", "failed", "seconds", "said"),
    [
        (8, 0, 1_000.0, False),
        (99, 0, 100.0, False),
        (150, 51, 100.0, False),
        (10_000, 0, 9.9, False),
        (150, 50, 10.0, True),
    ],
)
def test_of_a_million_images_nothing_is_said_after_few_rows_or_seconds(rows, failed, seconds, said):
    tally = Tally(rows=rows, finish_reasons=Counter(stop=rows - failed, error=failed))
    report = _report(tally=tally, seconds=seconds + 50.0, workers_seconds=50.0, price_per_hour=2.0)
    record = report.record()
    assert record["steady_images_per_second"] == pytest.approx(rows / seconds, abs=1e-3)
    assert "speed " in str(report)
    assert ("million " in str(report)) == said
    hours = rows and 1e6 / (rows / seconds) / 3600
    expected = (pytest.approx(hours, abs=1e-3), pytest.approx(2 * hours, abs=1e-3)) if said else (None, None)
    assert (record["hours_per_million"], record["cost_per_million"]) == expected


def test_without_a_price_or_without_rows_nothing_is_made_up():
    free = _report()
    assert (free.cost_per_million, "million   77.2 hours\n" in str(free)) == (None, True)
    assert _report(price_per_hour=0.0).cost_per_million == 0.0
    none = Report("out", Tally(rows=5), price_per_hour=1.0)
    assert (none.hours_per_million, none.cost_per_million, none.record()["stages"]) == (None, None, {})
    assert not {"busy", "million"} & set(str(none).split())


def _sure(first, *confidences, choices=None):
    """A table of answers of such confidence to rows `first`, ... of file 0; None for a row that failed."""
    answers = [NO if each is None else YES for each in confidences]
    table = _answered(first, answers).append_column("confidence", pa.array(confidences, pa.float64()))
    if choices is None:
        return table
    kind = CHOICES_FIELD.type
    return table.append_column(CHOICES_FIELD.name, pa.array([choices] * len(answers), kind))


def test_the_rows_that_the_model_is_least_sure_of_are_kept_in_whatever_order_they_come():
    chance = random.Random(2)  # noqa: S311
    values = [chance.random() for _ in range(500)] + [0.25, 0.25]
    places = list(range(0, len(values), 4))
    chance.shuffle(places)
    stats = _arrived(
        RunStats(frozenset({(0, 3)})), _sure(9_000, None, None), *(_sure(at, *values[at : at + 4]) for at in places)
    )
    least = sorted((value, at) for at, value in enumerate(values))[:ROWS]
    assert [(row["confidence"], row["id"]) for row in stats.confidence.least_sure] == [
        (value, f"row-{at}") for value, at in least
    ]
    assert stats.confidence.least_sure[0]["thumbnail"] == b"jpeg"
    assert stats.confidence.least_sure[0]["answer"] == "yes"
    assert [row["confidence"] for row in stats.rows] == [values[3]]
    record = stats.confidence.record()
    assert stats.confidence.answers == sum(record["histogram"]) == 502
    assert record["histogram"] == np.histogram(values, np.linspace(0, 1, 21))[0].tolist()
    assert record["mean"] == pytest.approx(np.mean(values), rel=1e-5)
    assert record["quantiles"]["0.05"] == pytest.approx(np.quantile(values, 0.05), rel=1e-5)


def test_of_many_answers_the_quantiles_are_those_of_a_sample():
    stats = ConfidenceStats()
    values = np.random.default_rng(3).permutation(np.linspace(0, 1, 4 * KEPT))
    for at in range(0, len(values), 1_000):
        stats.add(_sure(at, *values[at : at + 1_000]))
    record = stats.record()
    assert record["histogram"] == [len(values) // BINS_OF_CONFIDENCE] * BINS_OF_CONFIDENCE
    for share, value in record["quantiles"].items():
        assert value == pytest.approx(float(share), abs=0.02)
    assert len(stats.least_sure) == ROWS


def test_the_most_probable_choices_of_a_row_are_kept_and_cut_short():
    choices = [("x" * 5_000, 0.5), ("b", 0.3), ("c", 0.2)]
    (row,) = _arrived(RunStats(frozenset()), _sure(0, 0.5, choices=choices)).confidence.least_sure
    assert row["choice_probabilities"] == [("x" * CHARACTERS + "…", 0.5), ("b", 0.3)]


def test_without_confidence_nothing_is_said_of_it():
    stats = _arrived(RunStats(frozenset()), _answered(0, [YES]))
    assert (stats.confidence.answers, stats.confidence.least_sure) == (0, [])
    assert "sure" not in str(_report())
    stats = _arrived(RunStats(frozenset()), _sure(0, None))
    assert (stats.confidence.answers, stats.confidence.least_sure) == (0, [])


def test_the_summary_says_how_sure_the_model_is():
    quantiles = {"0.05": 3e-12, "0.5": 0.99996}
    report = _report(
        details={"confidence": {"mean": 0.9, "quantiles": quantiles, "histogram": [1] * 20}},
        tally=Tally(rows=100, finish_reasons=Counter(stop=90, abstain=9, error=1)),
    )
    assert "rows      100 (9 abstain, 1 error, 90 stop)" in str(report)
    assert "errors    1\n" in str(report)
    assert "sure      median confidence 0.9999, 5 % of the answers of this run below 3e-12\n" in str(report)
    assert [probability(value) for value in (0.0, 0.004, 0.05, 0.614, 0.98, 0.9912, 1.0, 1.0000001)] == [
        "0", "0.004", "0.05", "0.61", "0.98", "0.9912", "1", "1"
    ]  # fmt: skip


@pytest.mark.parametrize("price", [-0.01, math.nan, math.inf, -math.inf])
def test_a_price_is_a_number_from_0_on(price, tmp_path):
    with pytest.raises(ConfigError, match="--price-per-hour must be a number from 0 on, not"):
        CaptionConfig(bundle=tmp_path, input=("x",), output=tmp_path, price_per_hour=price)


@pytest.mark.parametrize("least", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_answers_abstain_below_a_probability(least, tmp_path):
    with pytest.raises(ConfigError, match=f"--abstain-below must be above 0 and at most 1, not {least}"):
        CaptionConfig(bundle=tmp_path, input=("x",), output=tmp_path, abstain_below=least)
    for good in (1e-9, 1.0):
        assert CaptionConfig(bundle=tmp_path, input=("x",), output=tmp_path, abstain_below=good).confidence


def test_without_a_terminal_progress_is_a_line_that_says_how_long_it_takes_still(capsys):
    progress = ProgressLine(3_000, None)
    progress.show(1_000, 2, 500.0)
    progress.show(1_100, 2, 550.0)  # too soon for another
    assert capsys.readouterr().err == "1,000 of 3,000 rows, 2.0 images/s, 2 errors, 16 min 40 s left\n"
