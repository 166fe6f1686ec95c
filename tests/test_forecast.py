"""A forecast's intervals hold what they promise, over many samples of populations that are known; and a sample has its
share of every file and of every size.
"""

import functools
import io
import math
import random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rapidfuzz.distance import Levenshtein
from scipy.stats import binom, t

from qvl_batch.config import CaptionConfig
from qvl_batch.distances import edit_similarity
from qvl_batch.errors import ConfigError
from qvl_batch.forecast import draw as draw_module
from qvl_batch.forecast.draw import PER_ROW, bytes_to_read, draw, drawn, spread
from qvl_batch.forecast.intervals import LEVEL, Design, Estimate, student
from qvl_batch.forecast.rows import SampledRow
from qvl_batch.forecast.size import PartSize, output_bytes
from qvl_batch.forecast.speed import batches_of, speed_of
from qvl_batch.forecast.text import ends, hours, ranged, share, size
from qvl_batch.forecast.trial import Arrival
from qvl_batch.images.pixels import DEFAULT_RULES
from qvl_batch.input.source import open_source
from qvl_batch.output.parts import parquet
from qvl_batch.rows import RowSet
from qvl_batch.schema import ANSWER_FIELDS, ID

SEEDS = 1000


def _bounds(trials, level=LEVEL):
    """How often an interval may hold the truth, if it does so with this probability: all but one time in 10,000."""
    return binom.ppf(0.5e-4, trials, level), binom.ppf(1 - 0.5e-4, trials, level)


@pytest.mark.parametrize("freedom", [3, 4, 7, 16, 100])
def test_quantiles_are_those_of_students_distribution(freedom):
    assert student(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=2e-3)


def _population(rows, chance):
    """Files with images of their own sizes, and what a row costs: it grows with its pixels, by a factor of chance."""
    files = np.sort(chance.integers(0, 7, rows))
    pixels = (1e5 * np.exp(chance.normal(0.2 * files, 0.6))).astype(int)
    return files, pixels, 0.001 * pixels * chance.gamma(4, 0.25, rows) + 20


def _drawn(population, files, pixels, rows, seed):
    chance = random.Random(seed)  # noqa: S311  (nothing secret)
    positions = spread(population, min(population, PER_ROW * rows), chance)
    places = [(int(files[at]), at) for at in positions]
    return drawn(population, places, {place: int(pixels[place[1]]) for place in places}, rows, chance)


@pytest.mark.parametrize(("population", "rows"), [(4000, 40), (4000, 200), (300, 101)])
def test_the_interval_of_a_total_holds_it_as_often_as_it_says(population, rows):
    files, pixels, costs = _population(population, np.random.default_rng(0))
    held, errors = 0, []
    for seed in range(SEEDS):
        sample = _drawn(population, files, pixels, rows, seed)
        total = sample.design.total([costs[row] for _, row in sample.places])
        held += total.low <= costs.sum() <= total.high
        errors.append(total.value / costs.sum() - 1)
    # Files are spread on purpose, which the interval does not count in: it may hold more often.
    low, _ = _bounds(SEEDS, LEVEL - 0.015)
    assert low <= held <= 0.99 * SEEDS
    # Without bias: the mean over samples is the truth.
    assert abs(np.mean(errors)) < 4 * np.std(errors) / math.sqrt(SEEDS)


def test_strata_by_size_make_intervals_narrower():
    files, pixels, costs = _population(4000, np.random.default_rng(0))
    width = {}
    for name, known in (("with", pixels), ("without", np.zeros_like(pixels))):
        samples = [_drawn(4000, files, known, 100, seed) for seed in range(100)]
        totals = [sample.design.total([costs[row] for _, row in sample.places]) for sample in samples]
        width[name] = np.mean([total.high - total.low for total in totals])
    assert width["with"] < 0.85 * width["without"]


@functools.cache
def _share(population, rows, found):
    """The share that so many rows of a sample say."""
    return Design(population, rows, (rows,), (0,) * rows).share([at < found for at in range(rows)])


@pytest.mark.parametrize("population", [250, 10_000])
@pytest.mark.parametrize("truth", [0.004, 0.02, 0.1, 0.5])
def test_the_interval_of_a_share_holds_it_as_often_as_it_says(truth, population):
    rows, failing = 200, round(truth * population)
    flags = np.arange(population) < failing
    chance = np.random.default_rng(1)
    held = 0
    for _ in range(SEEDS):
        found = flags[chance.choice(population, rows, replace=False)]
        estimate = _share(population, rows, int(found.sum()))
        held += estimate.low <= failing / population <= estimate.high
        assert estimate.low * population >= found.sum() - 1e-9
    low, _ = _bounds(SEEDS)
    assert held >= low


def test_the_interval_of_a_share_is_not_much_too_wide():
    rows, held, trials = 200, 0, 4000
    chance = np.random.default_rng(2)
    for _ in range(trials):
        truth = chance.uniform(0.005, 0.5)
        estimate = _share(10**9, rows, int(chance.binomial(rows, truth)))
        held += estimate.low <= truth <= estimate.high
    # Counts are whole, so that an interval which never holds it too rarely does so too often on average.
    low, _ = _bounds(trials)
    assert low <= held <= 0.98 * trials


def test_all_rows_are_no_sample():
    design = Design.of_all(3)
    assert design.total([1, 2, 6]) == Estimate(9, 9, 9)
    share_of = design.share([True, False, False])
    assert share_of.low == share_of.high == pytest.approx(1 / 3)
    # The same formula, with nothing left to chance.
    assert Design(3, 3, (1, 2), (0, 1, 1)).total([1, 2, 6]) == Estimate(9, 9, 9)


def test_a_sample_that_is_too_small_has_no_interval_and_none_leaves_out_what_was_seen():
    few = Design(1000, 4, (4,), (0,) * 4)
    assert few.freedom == 3
    assert few.mean([0, 0, 0, 1000]).low == 1  # the mean of all, if no other row has any
    assert Design(1000, 3, (3,), (0,) * 3).mean([1, 2, 3]) == Estimate(2)
    # None of 4 failed: that says little.
    assert few.share([False] * 4).low == 0
    assert few.share([False] * 4).high > 0.4
    assert few.share([True] * 4).low < 0.6


ROW = SampledRow((0, 0), "a", "?", None, "yes", "stop", None, 100, 2, 64, 10_000, 30)


def _trial(chance, tokens, slots=4, scale=0.02):
    """A trial of rows whose vision takes time by their image tokens, and its rows."""
    rows = [
        SampledRow((0, at), at, "?", None, "yes", "stop", None, 100, 2, int(each), 10_000, 30)
        for at, each in enumerate(tokens)
    ]
    tables = [rows[at : at + 8] for at in range(0, len(rows), 8)]
    seconds = [scale * sum(row.image_tokens for row in table) * chance.gamma(25, 1 / 25) for table in tables]
    begins = 12 + np.cumsum([0, *seconds])
    # Two tables are decoded while the next is in vision; the last ones come when it has ended.
    arrivals = [Arrival(begins[at + 1] + 3, begins[at], [row.place for row in each]) for at, each in enumerate(tables)]
    busy = {"read": 1.0, "image": 0.1, "vision": 2 * sum(seconds), "prefill": 0.2, "decode": 0.3}
    threads = {"read": 1, "image": 1, "vision": 2, "decoder": 1}
    end = arrivals[-1].at + 2
    plan = SimpleNamespace(threads=threads)
    return SimpleNamespace(
        arrivals=arrivals, busy=busy, seconds=end, workers_seconds=12.0, plan=plan, rows_at_once=slots
    ), rows


def test_the_interval_of_the_time_holds_it_as_often_as_it_says():
    population, rows, scale, seeds = 20_000, 160, 0.02, 400
    chance = np.random.default_rng(3)
    tokens = chance.integers(16, 900, population)
    truth = scale * tokens.sum()
    held = 0
    for _ in range(seeds):
        chosen = tokens[np.sort(chance.choice(population, rows, replace=False))]
        trial, sampled = _trial(chance, chosen, scale=scale)
        speed = speed_of(trial, sampled, Design(population, rows, (rows,), (0,) * rows), 5.0)
        assert speed.why_no_interval is None
        assert speed.once >= 17
        held += speed.left.low <= truth <= speed.left.high
    # The two errors have the degrees of freedom of the smaller one: such an interval is a little too wide.
    low, _ = _bounds(seeds)
    assert low <= held <= 0.995 * seeds


def test_more_machines_divide_what_rows_take_and_not_the_start():
    trial, rows = _trial(np.random.default_rng(4), [500] * 160)
    speed = speed_of(trial, rows, Design(16_000, 160, (160,), (0,) * 160), 5.0)
    one, four = speed.on(1), speed.on(4)
    assert four.value - speed.once == pytest.approx((one.value - speed.once) / 4)
    assert four.low - speed.once == pytest.approx((one.low - speed.once) / 4)
    # A hundred times as many rows take a hundred times as long as these did, but for start-up and ramps.
    assert one.value - speed.once == pytest.approx(100 * (160 * 500 * 0.02), rel=0.1)


def test_the_time_of_all_rows_is_that_of_the_trial():
    trial, rows = _trial(np.random.default_rng(4), [500] * 160)
    speed = speed_of(trial, rows, Design.of_all(160), 5.0)
    assert speed.on(1) == Estimate(*[pytest.approx(trial.seconds + 5.0)] * 3)


def test_a_time_from_too_few_tables_has_no_interval_and_counts_the_ramps_in():
    trial, rows = _trial(np.random.default_rng(5), [500] * 40)
    speed = speed_of(trial, rows, Design(4000, 40, (40,), (0,) * 40), 5.0)
    assert "give more rows to --plan" in speed.why_no_interval
    assert speed.left == Estimate(pytest.approx(100 * (trial.seconds - 12)))
    # Slots that 160 rows fill once show no steady state.
    trial, rows = _trial(np.random.default_rng(5), [500] * 160, slots=128)
    assert speed_of(trial, rows, Design(4000, 160, (160,), (0,) * 160), 5.0).why_no_interval


def test_batches_leave_out_filling_and_draining():
    trial, rows = _trial(np.random.default_rng(6), [500] * 160)
    work = {row.place: 1.0 for row in rows}
    batches = batches_of(trial.arrivals, work, 4)
    since, last = trial.arrivals[0].at, trial.arrivals[-1].started
    assert 0 < sum(seconds for seconds, _ in batches) <= last - since
    assert sum(amount for _, amount in batches) == sum(
        len(each.places) for each in trial.arrivals[1:] if each.at <= last
    )


def test_rows_that_all_fail_have_a_time_too():
    trial, rows = _trial(np.random.default_rng(7), [500] * 160)
    trial.busy = dict.fromkeys(trial.busy, 0.0)
    speed = speed_of(trial, rows, Design(1600, 160, (160,), (0,) * 160), 5.0)
    assert 0 < speed.on(1).value < math.inf


SCHEMA = pa.schema([pa.field(ID, pa.int64()), *ANSWER_FIELDS])


def _answers(chance, rows):
    words = ["a", "red", "circle", "small", "green", "box", "left", "of", "the", "blue"]
    answers = [" ".join(chance.choice(words, chance.integers(3, 30))) for _ in range(rows)]
    counts = {name: chance.integers(1, 99, rows) for name in ("prompt_tokens", "answer_tokens")}
    same = {"answer": answers, "finish_reason": ["stop"] * rows, **counts, ID: np.arange(rows)}
    return pa.table(
        {
            field.name: pa.array(same.get(field.name, [None if "error" in field.name else 672] * rows), field.type)
            for field in SCHEMA
        }
    )


@pytest.mark.parametrize(("population", "rows"), [(600, 60), (5000, 200), (90, 60)])
def test_the_interval_of_the_size_holds_that_of_the_parts(population, rows):
    held, trials = 0, 20
    for seed in range(trials):
        chance = np.random.default_rng(seed)
        everything = _answers(chance, population)
        real = sum(len(parquet(everything.slice(at, 1024))) for at in range(0, population, 1024))
        chosen = everything.take(np.sort(chance.choice(population, rows, replace=False)))
        nbytes = [chosen.slice(at, 1).nbytes for at in range(rows)]
        design = Design(population, rows, (rows,), (0,) * rows)
        estimate = output_bytes(chosen, nbytes, design, Estimate(8.0, 7.0, 9.0))
        held += estimate.low <= real <= estimate.high
        assert estimate.low <= estimate.value <= estimate.high
    assert held >= binom.ppf(1e-4, trials, LEVEL)


def test_the_bytes_of_a_part_are_those_that_were_measured():
    answers = _answers(np.random.default_rng(0), 64)
    part = PartSize.of(answers)
    assert part.part(64, part.power) == part.own + part.of_rows
    assert 0 < part.power <= 1
    assert PartSize.of(answers.slice(0, 1)).power == 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four files of rows, with images of three sizes; every tenth cannot be read."""
    folder = tmp_path_factory.mktemp("photos")

    def image(side):
        buffer = io.BytesIO()
        Image.new("RGB", (side, side)).save(buffer, "PNG")
        return buffer.getvalue()

    kinds = [image(20), image(200), image(600)]
    for number, rows in enumerate((100, 100, 150, 50)):
        images = [b"no image" if at % 10 == 0 else kinds[at % 3] for at in range(rows)]
        table = pa.table({"id": range(rows), "image": images, "prompt": ["?"] * rows})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=10)
    return open_source(CaptionConfig(bundle="b", input=(str(folder),), output=str(folder / "out")))


def test_every_file_and_every_size_has_its_share_of_the_sample(photos):
    sample = draw(photos, 40, (), DEFAULT_RULES)
    assert sample.by_size
    assert len(set(sample.places)) == 40
    files = np.bincount([file for file, _ in sample.places])
    assert np.abs(files - [10, 10, 15, 5]).max() <= 2
    broken = sum(row % 10 == 0 for _, row in sample.places)
    small, middle, large = (sum(row % 10 != 0 and row % 3 == kind for _, row in sample.places) for kind in range(3))
    assert abs(broken - 4) <= 2
    assert max(abs(each - 12) for each in (small, middle, large)) <= 4
    assert draw(photos, 40, (), DEFAULT_RULES) == sample
    assert draw(photos, 40, (), DEFAULT_RULES, seed=1).places != sample.places


def test_only_rows_that_are_left_are_drawn_and_only_drawn_ones_are_read(photos):
    done = RowSet(file.rows for file in photos.files)
    done.add(0, 0, 100)
    done.add(2, 20, 150)
    left = photos.without(done)
    sample = draw(left, 30, (), DEFAULT_RULES)
    assert sample.design.population == 170
    assert all(file in (1, 3) or (file == 2 and row < 20) for file, row in sample.places)
    spans = [(file, row) for file, (start, stop) in sample.of(left).spans() for row in range(start, stop)]
    assert spans == sorted(sample.places)
    everything = draw(left, 170, (), DEFAULT_RULES)
    assert everything.design.is_all
    assert len(everything.places) == 170


def test_sizes_are_left_to_chance_where_reading_them_would_take_long(photos, monkeypatch):
    places = [(0, 0), (0, 9), (0, 10), (3, 49)]
    bytes_of_a_row = photos.files[0].size / 100
    assert bytes_to_read(photos, places) == pytest.approx(30 * bytes_of_a_row, rel=0.3)
    monkeypatch.setattr(draw_module, "MOST_READ", 0)
    said = []
    sample = draw(photos, 40, (), DEFAULT_RULES, said.append)
    assert not sample.by_size
    assert "sizes are left to chance" in said[0]
    assert (len(sample.places), sample.design.candidates) == (40, 40)


def test_an_odd_number_of_rows_is_drawn_too(photos):
    for rows in (2, 3, 41):
        assert len(draw(photos, rows, (), DEFAULT_RULES).places) == rows


@pytest.mark.parametrize("alphabet", ["ab", "aé😀 "])
def test_edit_similarity_is_that_of_the_library(alphabet):
    chance = random.Random(0)  # noqa: S311  (nothing secret)
    for _ in range(300):
        one, other = ("".join(chance.choices(alphabet, k=chance.randrange(12))) for _ in range(2))
        assert edit_similarity(one, other) == pytest.approx(Levenshtein.normalized_similarity(one, other))


def test_figures_are_written_as_they_are_read():
    figures = {"value": 2.0, "low": 1.5, "high": 2.25}
    assert ranged(figures, hours) == "2 h (1 h 30 min to 2 h 15 min)"
    assert ranged(figures | {"low": None, "high": None}, hours) == "about 2 h"
    assert ranged(figures | {"low": 2.0, "high": 2.0}, hours) == "2 h"
    assert ends(figures | {"low": None}, hours) is None
    assert [size(each) for each in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 kB", "2.5 GB"]
    assert [share(each) for each in (0, 0.0123, 0.5, 1)] == ["0 %", "1.2 %", "50 %", "100 %"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": 0}, "--plan must be at least 2 rows, not 0"),
        ({"plan": 1}, "--plan must be at least 2 rows, not 1"),
        ({"plan_keep": True}, "--plan-keep is for a forecast: give --plan too"),
        ({"plan_bundles": ("b",)}, "--plan-bundles is for a forecast"),
        ({"plan": 20, "plan_bundles": (" ",)}, "--plan-bundles must not be empty"),
        ({"plan": 20, "plan_max_pixels": (0,)}, "--plan-max-pixels must be at least 1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CaptionConfig(bundle="b", input=("i",), output="o", **options)
