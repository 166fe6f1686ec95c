"""A forecast as a user asks for it: what it says, what it writes, what it leaves alone, and its page in a browser."""

import fcntl
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import complaints, set_scheme, set_screen, show
from conftest import CONVERSATIONS, QUESTIONS, ROOT
from output_folders import rows_by_id
from selenium.webdriver.common.by import By

from qvl_batch.errors import OutputError
from qvl_batch.output.locks import LOCK
from qvl_batch.output.storage import folder_at

PLANNED = {"_plan.json", "_plan.html"}
BROKEN = 8


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """The demo's rows, some with a broken image, in two files of small groups."""
    folder = tmp_path_factory.mktemp("questions")
    rows = pq.read_table(QUESTIONS).to_pylist()
    for row in rows[:: len(rows) // BROKEN]:
        row["image"] = {"bytes": b"<html>", "path": None}
    table = pa.Table.from_pylist(rows, pq.read_schema(QUESTIONS))
    pq.write_table(table.slice(0, 40), folder / "a.parquet", row_group_size=8)
    pq.write_table(table.slice(40), folder / "b.parquet", row_group_size=8)
    return folder


def _options(bundle, source, output, *more):
    return ("--bundle", bundle.path, "--input", source, "--output", output, "--slots", 4, *more)


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _others(files):
    return {name: data for name, data in files.items() if name not in PLANNED}


def _plan(folder):
    plan = json.loads((folder / "_plan.json").read_text())
    return plan, plan["trials"][0]


def _holds(figures, value):
    return figures["low"] <= value <= figures["high"]


def test_a_forecast_holds_what_the_job_then_needs_and_writes_two_files(tiny_bundle, questions, job, tmp_path):
    output = tmp_path / "out"
    options = _options(tiny_bundle, questions, output, "--keep-columns", "expected", "--price-per-hour", 2)
    said = job(*options, "--plan", 32, "--max-error-rate", 0.01)
    assert {path.name for path in output.iterdir()} == PLANNED
    plan, trial = _plan(output)
    assert (plan["rows_left"], plan["rows_answered"], plan["sample"]["rows"]) == (64, 0, 32)
    assert plan["sample"]["by_size"]
    for line in ("rows      64 to answer; a random 32 of them were", "time      about ", "errors    ", "plan      "):
        assert line in said.stdout
    assert len(said.stdout.splitlines()) < 20
    assert "the job would stop: more than --max-error-rate 0.01" in said.stdout
    assert trial["cost"]["value"] == pytest.approx(2 * trial["hours"]["value"], rel=1e-3)
    assert [each["nodes"] for each in trial["nodes"]] == [1, 2, 4, 8, 16]
    assert trial["nodes"][4]["hours"]["value"] < trial["hours"]["value"]
    assert trial["nodes"][4]["cost"]["value"] > trial["cost"]["value"]
    assert trial["hours"]["value"] * 3600 > trial["workers_seconds"]
    assert trial["bottleneck"] in trial["stages"]
    assert {"driver", "vision", "decoder", "tasks", "all"} <= set(trial["memory_bytes"])
    assert trial["memory_bytes"]["all"] > trial["memory_bytes"]["decoder"] > 50e6

    job(*options)
    rows = rows_by_id(output)
    assert len(rows) == 64
    for name in ("prompt_tokens", "answer_tokens"):
        assert _holds(trial["tokens"][name]["total"], sum(row[name] or 0 for row in rows))
    seen = sum((row["seen_width"] or 0) * (row["seen_height"] or 0) // 28**2 for row in rows)
    assert _holds(trial["tokens"]["image_tokens"]["total"], seen)
    (kind,) = trial["errors"]
    assert kind == "image: ImageError"
    assert _holds(trial["errors"][kind]["rows"], BROKEN)
    assert _holds(trial["finish_reasons"]["stop"]["rows"], 64 - BROKEN)
    assert _holds(trial["finish_reasons"]["length"]["rows"], 0)
    assert _holds(trial["output_bytes"], sum(path.stat().st_size for path in output.glob("part-*.parquet")))
    # The job leaves the forecast; a new start deletes it.
    assert {path.name for path in output.iterdir()} >= PLANNED
    before = _files(output)
    assert "all 64 rows are answered already" in job(*options, "--plan", 32, status=1).stderr
    assert _files(output) == before


@pytest.mark.long
def test_answers_that_are_kept_are_those_of_the_job_and_it_goes_on_after_them(tiny_bundle, questions, job, tmp_path):
    output, whole = tmp_path / "out", tmp_path / "whole"
    options = _options(tiny_bundle, questions, output, "--limit", 24)
    said = job(*options, "--plan", 16, "--plan-keep")
    assert "kept      the answers to the sample are in the output" in said.stdout
    kept = rows_by_id(output)
    assert len(kept) == 16
    # A forecast of the rest: what is there stays, byte by byte.
    before = _files(output)
    said = job(*options, "--plan", 100)
    assert "rows      8 to answer (16 are answered); all of them were" in said.stdout
    assert _others(_files(output)) == _others(before)
    plan, trial = _plan(output)
    assert plan["sample"]["is_all"]
    said = job(*options)
    assert "16 rows are answered already, 8 are left" in said.stderr
    rows = rows_by_id(output)
    answered = sum(row["finish_reason"] == "stop" for row in rows if row not in kept)
    assert trial["finish_reasons"]["stop"]["rows"] == dict.fromkeys(("value", "low", "high"), answered)
    job(*_options(tiny_bundle, questions, whole, "--limit", 24))
    assert rows == rows_by_id(whole)
    # With --overwrite the forecast is of all rows, and deletes nothing; the job then deletes it.
    before = _files(output)
    said = job(*options, "--plan", 4, "--overwrite")
    assert "rows      24 to answer; a random 4 of them were" in said.stdout
    assert _others(_files(output)) == _others(before)
    job(*_options(tiny_bundle, questions, output, "--limit", 2), "--overwrite")
    assert not PLANNED & _files(output).keys()


@pytest.fixture(scope="module", params=[pytest.param("compared", marks=pytest.mark.long)])
def compared(native_bundle, tiny_bundle, cluster, tmp_path_factory):  # noqa: ARG001
    """A forecast of conversations with two limits, one of which changes answers, and hostile text."""
    from qvl_batch.config import CaptionConfig  # noqa: PLC0415
    from qvl_batch.forecast.run import forecast  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("compared")
    rows = pq.read_table(CONVERSATIONS).to_pylist()[:12]
    rows[0]["id"] = "<script>window.ran = true</script>"
    rows[1]["image"] = None
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(CONVERSATIONS)), folder / "rows.parquet")
    config = CaptionConfig(
        bundle=str(native_bundle.path),
        input=(str(folder / "rows.parquet"),),
        output=str(folder / "out"),
        messages_column="messages",
        slots=4,
        plan=12,
        plan_max_pixels=(28 * 28 * 4,),
        plan_bundles=(str(native_bundle.path.parent / "." / native_bundle.path.name) + "/",),
        price_per_hour=1.0,
    )
    return forecast(config), folder / "out"


def test_other_bundles_and_limits_answer_the_same_rows(compared):
    said, output = compared
    plan, first = _plan(output)
    same, small = plan["trials"][1:]
    assert same["compared"]["equal"]["value"] == same["compared"]["edit_similarity"]["value"] == 1
    assert small["name"] == f"--max-pixels {28 * 28 * 4}"
    assert small["max_pixels"] == 28 * 28 * 4
    assert small["compared"]["equal"]["value"] < 1
    assert 0 < small["compared"]["edit_similarity"]["value"] < 1
    assert small["tokens"]["image_tokens"]["total"]["value"] < first["tokens"]["image_tokens"]["total"]["value"]
    assert f"with      {small['name']}: " in said


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light")])
def test_the_page_shows_it_without_a_network(compared, chromium, width, scheme):
    _, output = compared
    plan, first = _plan(output)
    show(chromium, output / "_plan.html", width=width, scheme=scheme)
    assert complaints(chromium) == []
    assert chromium.execute_script("return window.ran") is None
    text = chromium.find_element(By.TAG_NAME, "body").text
    assert chromium.find_element(By.TAG_NAME, "h1").text.startswith("12 rows take ")
    assert "<script>window.ran = true</script>" in text
    for part in ("All rows that are left were answered", "Time and cost by number of machines", "peak memory"):
        assert part in text
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#nodes .whisker")) == 5
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#stages .lane")) == 4
    assert len(chromium.find_elements(By.CSS_SELECTOR, "#sample .card")) == 12
    trials = chromium.find_elements(By.CSS_SELECTOR, "#others tr")
    assert len(trials) == 1 + len(plan["trials"])
    differing = chromium.find_elements(By.CSS_SELECTOR, "#differing section")
    assert len(differing) == round(12 * (1 - plan["trials"][2]["compared"]["equal"]["value"])) > 0
    assert all(len(section.find_elements(By.CSS_SELECTOR, "table tr")) == 3 for section in differing)
    assert first["errors"]
    # Nothing is wider than the screen.
    assert chromium.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    set_screen(chromium, 1200, 900)
    set_scheme(chromium, "light")


def test_nothing_is_forecast_beside_a_job_that_runs(tiny_bundle, questions, call, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    with folder_at(output).held():
        said = call(*_options(tiny_bundle, questions, output, "--plan", 8), status=1)
    assert "another job is writing to" in said.stderr
    assert {path.name for path in output.iterdir()} == {LOCK}
    # One that has ended leaves its lock file, which is in nobody's way.
    folder_at(output).put({"_plan.json": b"{}"})
    assert {path.name for path in output.iterdir()} == {LOCK, "_plan.json"}


def test_a_folder_that_another_process_holds_takes_no_file(tmp_path):
    folder = folder_at(tmp_path)
    folder.put({})
    assert list(tmp_path.iterdir()) == []
    with (tmp_path / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another job is writing"):
            folder.put({"_plan.json": b"{}"})
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--plan": "0"}, "--plan must be at least 2 rows, not 0"),
        ({"--plan": "1"}, "--plan must be at least 2 rows, not 1"),
        ({"--input": "nowhere"}, "--input nowhere: no file found"),
        ({"--bundle": "nowhere"}, "is no bundle"),
        ({"--plan-bundles": "nowhere"}, "is no bundle"),
        ({"--plan-max-pixels": "200704"}, "--max-pixels 200704: this bundle shows every image as a square"),
        ({"--output": "LICENSE"}, "LICENSE cannot be written"),
    ],
)
def test_a_forecast_that_cannot_be_made_says_so_in_one_line(options, message, refusal, tmp_path):
    assert message in refusal({"--plan": "8"} | options)[-1]
    assert not (tmp_path / "out").exists()


def test_an_empty_input_and_answers_of_another_bundle_are_refused(tiny_bundle, questions, call, job, tmp_path):
    pq.write_table(pq.read_table(QUESTIONS).slice(0, 0), tmp_path / "empty.parquet")
    said = call(*_options(tiny_bundle, tmp_path / "empty.parquet", tmp_path / "out", "--plan", 8), status=1)
    assert "--plan: the input has no rows, so there is nothing to forecast" in said.stderr
    assert not (tmp_path / "out").exists()
    job(*_options(tiny_bundle, questions, tmp_path / "other", "--limit", 2))
    before = _files(tmp_path / "other")
    said = call(*_options(tiny_bundle, questions, tmp_path / "other", "--plan", 8, "--prompt", "?"), status=1)
    assert "holds answers with another --prompt" in said.stderr
    assert _files(tmp_path / "other") == before


@pytest.mark.long
def test_a_forecast_that_is_stopped_writes_nothing(tiny_bundle, questions, ray_env, tmp_path):
    command = [sys.executable, "jobs/caption.py"]
    command += map(str, _options(tiny_bundle, questions, tmp_path / "out", "--plan", 60, "--plan-keep"))
    with subprocess.Popen(command, cwd=ROOT, env=ray_env, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if " of 60 rows" in line:
                break
        process.terminate()
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "caption: stopped; nothing is written; continue with the same command"
    assert not any((tmp_path / "out").glob("*"))
