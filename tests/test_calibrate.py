"""Confidence is measured by answers whose truth is known, and the threshold keeps its promise."""

import json
import math
import sys
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import complaints, luminance, set_scheme, set_screen, show
from make_demo import demo_rows
from scipy.stats import beta
from selenium.webdriver.common.by import By

import calibrate
from calibration.measures import histogram, reliability, risk, share
from calibration.page import render
from calibration.threshold import least_rows, shortest_between, threshold_of
from calibration.values import same
from qvl_batch.captioner import Captioner

HOSTILE = '<script>window.ran = true</script><img src=x onerror="window.ran = true"> "What" & \'why\'? \x1b[31m'
LONG = "W" * 20_000


# The threshold


def _tail(wrong, rows, target):
    """P(Bin(rows, 1 - target) <= wrong), exactly."""
    q = 1 - Fraction(target)
    return sum(math.comb(rows, each) * q**each * (1 - q) ** (rows - each) for each in range(wrong + 1))


def _by_hand(confidence, right, target, certainty):
    """The threshold's kept answers, by the definition: prefixes between different confidences, exact p-values."""
    pairs = sorted(zip(confidence, right, strict=True), reverse=True)
    total, kept = len(pairs), 0
    least = next(n for n in range(1, 10_000) if Fraction(target) ** n <= 1 - Fraction(certainty))
    for rows in range(max(least, total // 4), total + 1):
        if rows < total and pairs[rows - 1][0] == pairs[rows][0]:
            continue
        wrong = sum(not right for _, right in pairs[:rows])
        if _tail(wrong, rows, target) > 1 - Fraction(certainty):
            break
        kept = rows
    return kept


@pytest.mark.parametrize("values", [None, 7, 40])
def test_a_threshold_is_the_one_of_its_definition(values):
    rng, found = np.random.default_rng(3), set()
    for _ in range(60):
        count = int(rng.integers(1, 120))
        confidence = rng.beta(6, 1, count) if values is None else rng.integers(0, values, count) / values
        right = rng.random(count) < confidence ** rng.uniform(0.02, 0.5)
        target, certainty = rng.choice(["0.7", "0.875", "0.95"]), rng.choice(["0.75", "0.9375"])
        threshold = threshold_of(confidence, right, float(target), float(certainty))
        kept = _by_hand(confidence, right, target, certainty)
        assert threshold.rows == kept
        assert (threshold.confidence is None) == (threshold.reason is not None) == (kept == 0)
        if kept:
            assert (confidence >= threshold.confidence).sum() == kept
            assert right[confidence >= threshold.confidence].sum() == threshold.right
        found.add((kept > 0) + (kept == count))
    assert found == {0, 1, 2}


def test_it_takes_as_many_right_answers_as_tables_say():
    assert [least_rows(target, 0.95) for target in (0.9, 0.95, 0.99, 0.999)] == [29, 59, 299, 2995]
    assert least_rows(0.5, 0.9375) == 4
    ones = np.ones(299)
    assert threshold_of(ones, ones > 0, 0.99, 0.95).confidence == 0.0
    assert threshold_of(ones[1:], ones[1:] > 0, 0.99, 0.95).reason == (
        "299 labelled answers are needed at least, all right; there are 298"
    )
    wrong = np.arange(299) == 5
    assert threshold_of(ones, ~wrong, 0.99, 0.95).reason == (
        "the 299 most confident labelled answers have 1 wrong, and may have 0 at most"
    )


def test_a_threshold_is_short_and_parts_the_same_answers():
    assert shortest_between(0.7312, 0.7389) == 0.738
    assert shortest_between(0.29, 0.31) == 0.3
    assert shortest_between(-math.inf, 0.2) == 0.0
    assert shortest_between(0.999, 1.0) == 1.0
    for low in np.random.default_rng(0).random(200):
        high = np.nextafter(low, 1)
        assert shortest_between(low, high) == high


def _first_bad_group(rng, count):
    """Three confidences, whose second, at which tests begin, is nearly always right, and still the precision of every
    threshold below the target: 0.5, 0.899 and 0.7.
    """
    confidence = rng.choice([0.9, 0.8, 0.1], count, p=[0.1, 0.4, 0.5])
    return confidence, np.where(confidence == 0.9, 0.5, np.where(confidence == 0.8, 0.99875, 0.5))


#: Confidence of a row, and the probability that it is right: how models may be.
MODELS = {
    "calibrated": lambda rng, count: (confidence := rng.beta(6, 1, count), confidence),
    "overconfident": lambda rng, count: (confidence := rng.beta(6, 1, count), 0.6 + 0.38 * confidence**4),
    "just below the target": lambda rng, count: (rng.random(count), np.full(count, 0.899)),
    "precision that sinks and rises": lambda rng, count: (
        confidence := rng.random(count),
        0.9 + 0.09 * np.sin(9 * confidence) - 0.02,
    ),
    "a dip near the top": lambda rng, count: (
        confidence := rng.random(count),
        np.where((confidence > 0.85) & (confidence < 0.95), 0.7, 0.93),
    ),
    "the surest are wrong": lambda rng, count: (
        confidence := rng.random(count),
        np.where(confidence > 0.93, 0.4, 0.93),
    ),
    "few confidences": lambda rng, count: (
        confidence := rng.integers(1, 5, count) / 4,
        np.array([0.3, 0.85, 0.87, 0.93])[(4 * confidence).astype(int) - 1],
    ),
    "a better group at the start": _first_bad_group,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [60, 200])
def test_the_promise_is_kept_whatever_the_model_is_like(model, count):
    # The true precision of a threshold is that of 100,000 rows. In 400 samples, 34 broken promises would be more than 3
    # standard deviations above the 20 that are allowed.
    rng = np.random.default_rng(7)
    many, probability = MODELS[model](rng, 100_000)
    order = np.argsort(many)
    many, above = many[order], np.cumsum(probability[order][::-1])[::-1]
    broken = held = 0
    for _ in range(400):
        confidence, probabilities = MODELS[model](rng, count)
        right = rng.random(count) < probabilities
        threshold = threshold_of(confidence, right, 0.9, 0.95).confidence
        if threshold is not None:
            held += 1
            first = np.searchsorted(many, threshold)
            broken += above[first] / (len(many) - first) < 0.9 if first < len(many) else 0
    assert broken < 34
    assert held >= (100 if model == "calibrated" and count == 200 else 0)


def test_a_threshold_without_a_bound_breaks_the_promise():
    # So the test above would notice: the smallest threshold whose answers were right often enough, in the sample.
    rng, broken = np.random.default_rng(7), 0
    for _ in range(300):
        confidence, probability = MODELS["just below the target"](rng, 200)
        ranked = (rng.random(200) < probability)[np.argsort(-confidence)]
        broken += (np.cumsum(ranked) / np.arange(1, 201))[28:].max() >= 0.9
    assert broken > 100


@pytest.fixture(scope="module")
def real_pairs(tiny_bundle):
    """Confidence of the tiny model's answers to new questions, and whether they are right."""
    rows = demo_rows(160, seed=23)
    with Captioner(tiny_bundle.path, confidence=True) as captioner:
        answers = captioner.caption(
            [row["image"]["bytes"] for row in rows], [row["prompt"] for row in rows], max_new_tokens=48
        )
    right = [answer.answer == row["expected"] for answer, row in zip(answers, rows, strict=True)]
    return np.array([answer.confidence for answer in answers]), np.array(right)


def _check_real(confidence, right, target, least_held):
    """Samples of 150 from the answers, as if these were all rows that there are: what is promised is true of them. In
    1000 samples, 71 broken promises would be 3 standard deviations above the 50 that are allowed.
    """
    rng, broken, held = np.random.default_rng(5), 0, 0
    for _ in range(1000):
        some = rng.integers(0, len(right), 150)
        threshold = threshold_of(confidence[some], right[some], target, 0.95).confidence
        if threshold is not None and (confidence >= threshold).any():
            held += 1
            broken += right[confidence >= threshold].mean() < target
    assert broken < 71
    assert held >= least_held


@pytest.mark.long
def test_the_promise_is_kept_on_answers_of_a_real_model(real_pairs):
    confidence, right = real_pairs
    assert 0.8 < right.mean() < 1
    assert confidence[right].mean() > confidence[~right].mean() + 0.1
    _check_real(confidence, right, 0.95, 300)
    # One that the answers as a whole miss by little.
    _check_real(confidence, right, min(0.99, float(right.mean()) + 0.005), 0)


# Figures


def test_bins_have_equally_many_answers_and_equal_confidences_stay_together():
    confidence = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    right = np.array([0, 0, 1, 0, 1, 1, 1, 1]) > 0
    found = reliability(confidence, right, 4)
    assert [(each["low"], each["high"], each["count"], each["of"]) for each in found["bins"]] == [
        (0.1, 0.2, 0, 2), (0.3, 0.4, 1, 2), (0.5, 0.6, 2, 2), (0.7, 0.8, 2, 2)
    ]  # fmt: skip
    assert found["error"] == pytest.approx((0.15 + 0.15 + 0.45 + 0.25) / 4)
    tied = reliability(np.array([0.5] * 6 + [1.0] * 4), np.ones(10) > 0, 5)
    assert [each["of"] for each in tied["bins"]] == [6, 4]
    assert tied["error"] == pytest.approx(0.3)


def test_an_error_of_calibration_is_told_from_chance():
    rng = np.random.default_rng(1)
    confidence = rng.beta(6, 1, 400)
    exact = reliability(confidence, rng.random(400) < confidence, 10)
    over = reliability(confidence, rng.random(400) < confidence - 0.15, 10)
    assert exact["error"] < exact["error_by_chance"] == over["error_by_chance"] < over["error"]
    assert 0.01 < exact["error_by_chance"] < 0.08


def test_intervals_are_those_of_clopper_and_pearson():
    found = share(18, 20)
    assert found["interval"] == pytest.approx([beta.ppf(0.025, 18, 3), beta.ppf(0.975, 19, 2)])
    assert share(0, 20)["interval"] == pytest.approx([0, 1 - 0.025 ** (1 / 20)])


def test_the_area_is_the_mean_risk_of_all_thresholds():
    confidence = np.array([0.9, 0.8, 0.8, 0.7, 0.6])
    right = np.array([True, True, False, False, True])
    found = risk(confidence, right)
    points = [(each["confidence"], each["coverage"], each["risk"]) for each in found["curve"]]
    assert np.array(points) == pytest.approx(
        np.array([(0.9, 0.2, 0), (0.8, 0.6, 1 / 3), (0.7, 0.8, 0.5), (0.6, 1, 0.4)])
    )
    assert found["area"] == pytest.approx((0 + 1 / 3 + 1 / 3 + 0.5 + 0.4) / 5)
    assert found["of_all"] == pytest.approx(0.4)
    bars = histogram(np.array([0.5, 0.52, 1.0, 1 + 1e-9]), np.array([True, False, True, True]), 0.5)
    assert [(each["right"], each["wrong"]) for each in (bars[0], bars[1], bars[-1])] == [(1, 0), (0, 1), (2, 0)]


@pytest.mark.parametrize(
    ("value", "truth", "equal"),
    [
        ("red", "red", True), ("red", "Red", False), ("3", "3.0", False), (3, "3", True), (3, 3.0, True),
        (3, "three", False), (0.1, "0.10", True), ("2", 2, True), (True, "true", True), (True, 1, True),
        (False, "True", False), ("False", False, True), (None, "", False), (2**60 + 1, str(2**60), False),
        (1, "snan", False), (True, "yes", False),
    ],
)  # fmt: skip
def test_values_are_the_same_whatever_type_the_truth_was_kept_in(value, truth, equal):
    assert same(value, truth) is equal


# The command


def _part(folder, number=0, **columns):
    """A part of answers; its columns are those given, and what jobs write beside them."""
    rows = len(next(iter(columns.values())))
    reasons = pa.array(["stop"] * rows, pa.string())
    plain = {"id": [f"row-{number}-{at}" for at in range(rows)], "finish_reason": reasons}
    folder.mkdir(exist_ok=True)
    table = pa.table({name: pa.array(values) for name, values in (plain | columns).items()})
    pq.write_table(table, folder / f"part-000000-{number:012d}.parquet")


def _folder(folder, rows=600, labelled=300, **more):
    """Answers of which the surest two thirds are right; the first rows have a right answer, and some failed."""
    confidence = [1 - at % 300 / 300 for at in range(rows)]
    truth = ["yes" if at < labelled else None for at in range(rows)]
    answer = ["yes" if at % 300 < 200 else "no" for at in range(rows)]
    for at, reason in ((299, "error"), (rows - 1, "error")):
        answer[at] = confidence[at] = None
        more.setdefault("finish_reason", ["stop"] * rows)[at] = reason
    columns = {"answer": answer, "confidence": confidence, "expected": truth} | more
    for number in (0, rows // 2):
        some = slice(number, number + rows // 2)
        _part(folder, number, **{name: values[some] for name, values in columns.items()})
    return folder


def _run(monkeypatch, capsys, answers, *options):
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--answers", *map(str, (answers, *options))])
    status = calibrate.main()
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def _record(folder):
    return json.loads((folder / "calibration.json").read_text())


def test_the_command_finds_the_threshold_and_says_what_it_covers(tmp_path, monkeypatch, capsys):
    answers = _folder(tmp_path / "answers", prompt=["Is it?"] * 600)
    status, out, err = _run(monkeypatch, capsys, answers, "--target-precision", 0.9, "--next-rows", 3)
    record = _record(answers / "_calibration")
    assert (status, err) == (0, "")
    # 200 right answers, then wrong ones: 10 wrong of 210 are the most that show 0.9, by the exact binomial.
    kept = max(rows for rows in range(200, 299) if _tail(rows - 200, rows, "0.9") <= Fraction("0.05"))
    assert 205 < kept < 220
    threshold = record["threshold"]
    assert (threshold["rows"], threshold["right"]) == (kept, 200)
    assert 1 - kept / 300 < threshold["confidence"] <= 1 - (kept - 1) / 300
    assert (threshold["of_labelled"]["count"], threshold["of_labelled"]["of"]) == (kept, 300)
    assert (threshold["of_all"]["count"], threshold["of_all"]["of"]) == (2 * kept, 600)
    assert [record[name] for name in ("rows", "failed", "answered", "labelled", "labelled_failed")] == [
        600, 2, 598, 300, 1
    ]  # fmt: skip
    assert (record["accuracy"]["count"], record["accuracy"]["of"]) == (200, 299)
    assert [row["id"] for row in record["next"]["below_threshold"]] == [f"row-300-{kept + at}" for at in range(3)]
    assert [row["id"] for row in record["next"]["least_sure"]] == ["row-300-298", "row-300-297", "row-300-296"]
    assert record["next"]["least_sure"][0] == {
        "id": "row-300-298", "prompt": "Is it?", "answer": "no", "confidence": pytest.approx(1 - 298 / 300)
    }  # fmt: skip
    assert f"threshold {threshold['confidence']!r}: from it on, at least 0.9 of answers are right" in out
    assert f"covers    {kept} of 300 labelled rows ({kept / 3:.1f}%), {2 * kept} of all 600" in out
    assert (answers / "_calibration" / "calibration.html").is_file()
    assert pq.read_table(answers).num_rows == 600  # readers of the folder pass over what begins with `_`


def test_no_threshold_is_said_plainly_and_by_the_exit_status(tmp_path, monkeypatch, capsys):
    answers = _folder(tmp_path / "answers")
    status, out, _ = _run(monkeypatch, capsys, answers, "--output", tmp_path / "out")
    assert status == 1
    assert "threshold none: the 299 most confident labelled answers have 99 wrong, and may have 0 at most\n" in out
    assert "covers" not in out
    record = _record(tmp_path / "out")
    assert record["threshold"]["confidence"] is None
    assert record["threshold"]["least_labelled"] == 299
    assert record["threshold"]["of_all"]["count"] == 0
    assert record["next"]["below_threshold"] == []
    assert len(record["next"]["least_sure"]) == 24
    few = _folder(tmp_path / "few", rows=300, labelled=100)
    assert "299 labelled answers are needed at least, all right; there are 100" in _run(monkeypatch, capsys, few)[1]


def test_a_calibration_is_replaced_only_if_that_is_asked_for(tmp_path, monkeypatch, capsys):
    answers, easy = _folder(tmp_path / "answers"), ("--target-precision", 0.6)
    assert _run(monkeypatch, capsys, answers, *easy)[0] == 0
    status, _, err = _run(monkeypatch, capsys, answers, *easy)
    assert (status, err) == (
        1,
        f"calibrate: {answers}/_calibration holds a calibration already: give another --output, or --overwrite\n",
    )
    assert _run(monkeypatch, capsys, answers, *easy, "--overwrite")[0] == 0
    err = _run(monkeypatch, capsys, answers, *easy, "--output", answers)[2]
    assert "give another --output" in err
    assert not (answers / "calibration.json").exists()
    (tmp_path / "file").touch()
    assert "cannot be written" in _run(monkeypatch, capsys, answers, *easy, "--output", tmp_path / "file")[2]


def test_answers_that_abstained_count_and_those_that_were_cut_off_do_not(tmp_path, monkeypatch, capsys):
    # The former have their whole answer; the confidence of the latter is that of their beginning.
    reasons = [("stop", "abstain", "length", "error")[at % 4] for at in range(200)]
    answer = ["yes" if reason != "error" else None for reason in reasons]
    _part(tmp_path, answer=answer, confidence=[0.9] * 200, expected=["yes"] * 200, finish_reason=reasons)
    _, out, _ = _run(monkeypatch, capsys, tmp_path, "--target-precision", 0.9)
    assert "rows      200, 50 failed, 50 cut off; 200 have a right answer" in out
    assert "100 of 100 answers compared" in out
    assert "covers    100 of 200 labelled rows (50.0%), 100 of all 200 (50.0%)" in out
    page = (tmp_path / "_calibration" / "calibration.html").read_text()
    assert "50 others cut off" in page
    assert "No row has to abstain. 100 of all 200 rows are left to people." in page


FIELDS = ("color", "count", "inside.big")


@pytest.fixture
def parsed(tmp_path):
    """Answers of a JSON schema, with a confidence of each of their values."""
    rows = 120
    right = [at % 40 > 1 for at in range(rows)]
    values = [
        {"color": "red", "count": 3 if fine else 4, "note": "x", "inside": {"big": fine}, "sizes": [1]}
        for fine in right
    ]
    sure = [
        {"color": 0.5, "count": 0.9 if fine else 0.1, "inside": {"big": 0.8}, "sizes": [0.5]} for fine in right
    ]  # fmt: skip
    values[5] = sure[5] = None
    _part(
        tmp_path,
        answer=[None if value is None else "{}" for value in values],
        parsed=values,
        parsed_confidence=sure,
        confidence=[0.01] * rows,
        finish_reason=["error" if value is None else "stop" for value in values],
        expected=["red"] * rows,
        how_many=["3"] * rows,
        as_struct=[{"count": 3.0, "inside": {"big": "true"}}] * rows,
        listed=[[1]] * rows,
    )
    return tmp_path


@pytest.mark.parametrize(
    ("field", "expected", "right"),
    [
        ("color", "expected", 119), ("count", "how_many", 113), ("count", "as_struct", 113),
        ("inside.big", "as_struct", 113),
    ],
)  # fmt: skip
def test_a_field_is_calibrated_by_its_own_confidence(field, expected, right, parsed, monkeypatch, capsys):
    options = ("--field", field, "--expected-column", expected, "--target-precision", 0.9)
    status, out, err = _run(monkeypatch, capsys, parsed, *options)
    assert (status, err) == (0, "")
    assert f"{right} of 119 answers compared" in out
    record = _record(parsed / f"_calibration-{field}")
    assert record["mean_confidence"] > 0.4
    assert record["field"] == field


def test_what_a_field_answered_is_shown_as_json(parsed, monkeypatch, capsys):
    table = pq.read_table(parsed / "part-000000-000000000000.parquet")
    known = pa.array(["3"] * 60 + [None] * 60)
    pq.write_table(
        table.drop_columns("how_many").append_column("how_many", known), parsed / "part-000000-000000000000.parquet"
    )
    _run(monkeypatch, capsys, parsed, "--field", "inside.big", "--expected-column", "how_many")
    shown = _record(parsed / "_calibration-inside.big")["next"]["least_sure"]
    assert {row["answer"] for row in shown} == {"true", "false"}
    assert shown[0]["confidence"] == 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--field", "colour"), "parsed has no field colour (--field); fields with a confidence: color, count, "),
        (("--field", "note"), "field note (--field) has no confidence of one value; fields that have one: color,"),
        (("--field", "inside"), "field inside (--field) has no confidence of one value; fields that have one: color,"),
        (("--field", "sizes"), "field sizes (--field) has no confidence of one value; fields that have one: color,"),
        (("--field", "color", "--expected-column", "listed"), "int64>, not values like those of the field"),
        (("--field", "color", "--expected-column", "as_struct"), ", not values like those of the field"),
        (("--expected-column", "as_struct"), ", not strings or integers"),
        (("--field", ""), "--field is empty"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_calibrated_is_named(options, message, parsed, monkeypatch, capsys):
    status, _, err = _run(monkeypatch, capsys, parsed, *options)
    assert status == 1
    assert err.startswith("calibrate: ")
    assert message in err
    assert err.count("\n") == 1


A_ROW = {"answer": ["a"], "confidence": [0.5], "expected": ["a"]}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"answer": ["a"], "expected": ["a"]}, (), "has no column confidence: answer again with --confidence"),
        (A_ROW, ("--expected-column", "x"), "has no column 'x' (--expected-column), but id, finish_reason, answer"),
        (A_ROW, ("--expected-column", "x"), "keep it with --keep-columns when you answer"),
        (A_ROW | {"expected": [None]}, (), "column 'expected' (--expected-column) is null in all 1 rows"),
        (A_ROW | {"finish_reason": ["error"]}, (), "none of the 1 rows of"),
        (A_ROW, ("--field", "x"), "no column parsed for --field x: answer again with --json-schema and --confidence"),
        (A_ROW | {"parsed": [{"x": 1}]}, ("--field", "x"), "no column parsed_confidence for --field x: answer again"),
        ({"other": ["a"]}, (), "is not a file of answers"),
        ({name: pa.array(values).slice(1) for name, values in A_ROW.items()}, (), "holds no answers"),
        (None, (), "holds no answers"),
        (None, ("--target-precision", 1), "--target-precision must be between 0 and 1, not 1.0"),
        (None, ("--target-precision", "nan"), "--target-precision must be between 0 and 1, not nan"),
        (None, ("--certainty", 0), "--certainty must be between 0 and 1, not 0.0"),
        (None, ("--bins", 0), "--bins must be at least 1, not 0"),
        (None, ("--next-rows", -1), "--next-rows must be at least 0, not -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_said_in_a_line(columns, options, message, tmp_path, monkeypatch, capsys):
    if columns is not None:
        _part(tmp_path, **columns)
    status, out, err = _run(monkeypatch, capsys, tmp_path, *options)
    assert (status, out) == (1, "")
    assert err.startswith("calibrate: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_damaged_part_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "part-000000-000000000000.parquet").write_bytes(b"PAR1")
    assert f"calibrate: {tmp_path} cannot be read: " in _run(monkeypatch, capsys, tmp_path)[2]


# The page


@pytest.fixture
def page(chromium, tmp_path, monkeypatch, capsys):
    """A page full of what strangers wrote, in the browser."""
    prompts = [HOSTILE, LONG, "", "כמה?"] * 150
    answers = _folder(tmp_path / "answers", prompt=prompts, id=[f"{at} {HOSTILE}" for at in range(600)])
    assert _run(monkeypatch, capsys, answers, "--target-precision", 0.9)[0] == 0
    show(chromium, answers / "_calibration" / "calibration.html")
    yield chromium, _record(answers / "_calibration")
    assert complaints(chromium) == []


def test_the_page_says_the_threshold_first_and_what_the_sample_must_be(page):
    driver, record = page
    threshold = record["threshold"]["confidence"]
    heading = driver.find_element(By.TAG_NAME, "h1")
    assert heading.text == f"✓ From confidence {threshold} on, at least 90 % of answers are right"
    assert heading.location["y"] < 100
    text = driver.find_element(By.TAG_NAME, "body").text
    assert f"jobs/caption.py --abstain-below {threshold}" in text
    assert "must be a random sample of the rows that the threshold is for" in text
    assert "66.9%" in driver.find_element(By.CLASS_NAME, "figures").text
    for name in ("below_threshold", "least_sure"):
        rows = driver.find_elements(By.CSS_SELECTOR, f"#{name} tr")[1:]
        assert [row.text.split()[-1] for row in rows] == [f"{row['confidence']:.4g}" for row in record["next"][name]]
        assert len(rows) == 24


def test_the_page_runs_and_loads_nothing(page):
    driver, _ = page
    assert driver.execute_script("return window.ran") is None
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert driver.find_elements(By.TAG_NAME, "script") == []
    assert driver.find_elements(By.TAG_NAME, "img") == []
    assert "\x1b" not in driver.page_source


def test_the_page_fits_any_screen_in_the_light_and_the_dark(page):
    driver, _ = page
    assert luminance(driver, "body", "backgroundColor") > luminance(driver, "body", "color")
    for width in (1200, 390):
        set_screen(driver, width, 844)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        beyond = """return [...document.querySelectorAll('main *, header *')].filter((element) =>
            element.getBoundingClientRect().right > window.innerWidth + 1).map((element) => element.outerHTML)"""
        assert driver.execute_script(beyond) == []
    set_scheme(driver, "dark")
    for selector in ("body", ".advice", ".figures div"):
        assert luminance(driver, selector, "color") - luminance(driver, "body", "backgroundColor") > 250


def test_the_charts_show_the_figures(page):
    driver, record = page

    def places(chart, selector):
        """Centres of elements in the box of a chart, in shares of its width and height."""
        script = """const box = document.querySelector(arguments[0] + ' .box').getBoundingClientRect();
            return [...document.querySelectorAll(arguments[0] + ' ' + arguments[1])].map((element) => {
                const at = element.getBoundingClientRect();
                return [(at.x + at.width / 2 - box.x) / box.width, (box.bottom - at.y - at.height / 2) / box.height,
                    at.height / box.height]; })"""
        return np.array(driver.execute_script(script, chart, selector))

    bins = record["reliability"]["bins"]
    assert len(bins) == 10
    expected = [(each["confidence"], each["share"]) for each in bins]
    assert places("#reliability", ".point")[:, :2] == pytest.approx(np.array(expected), abs=0.02)
    heights = [each["interval"][1] - each["interval"][0] for each in bins]
    assert places("#reliability", ".interval")[:, 2] == pytest.approx(np.array(heights), abs=0.02)
    assert len(places("#reliability", ".off")) / 2 == 8
    threshold = record["threshold"]
    assert places("#risk", ".kept")[0, 0] == pytest.approx(threshold["rows"] / 299, abs=0.02)
    assert places("#histogram", ".kept")[0, 0] == pytest.approx(threshold["confidence"], abs=0.02)
    assert places("#risk", ".allowed")[0, 1] == pytest.approx(0.1 / 0.4, abs=0.02)
    most = 15  # of the axis
    assert places("#histogram", "rect.right")[-1, 2] == pytest.approx(record["histogram"][-1]["right"] / most, abs=0.02)


def test_a_page_without_a_threshold_says_what_it_takes(tmp_path, monkeypatch, capsys):
    answers = _folder(tmp_path / "answers", rows=300, labelled=100)
    _run(monkeypatch, capsys, answers)
    source = render(_record(answers / "_calibration"))
    assert "<h1>✗ No threshold is shown to reach 99 %</h1>" in source
    assert "It takes 299 labelled answers at least" in source
    assert 'class="kept"' not in source
    assert "Just below the threshold" not in source
