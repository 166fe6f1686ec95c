"""The job as a user runs it, Ray and all.

What ends it, and what it is by default, is a process of its own with a Ray of its own. Other jobs run in this process,
on one cluster: of the seconds that a job of few rows takes, most are Ray's to start.
"""

import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
import s3
from conftest import QUESTIONS, ROOT, TINY
from image_files import image_file
from output_folders import ANSWER_COLUMNS, read_answers, rows_by_id, shown_page
from PIL import Image
from reference import question
from soak import soak

import caption
from export.comparison.reference import PyTorch
from qvl_batch import Captioner
from qvl_batch.config import CaptionConfig
from qvl_batch.errors import InputError
from qvl_batch.forecast.memory import family
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.parts import PartRecord
from qvl_batch.pipeline.run import run

#: What `poison/sitecustomize.py` looks for.
POISON_FILE, POISON_IMAGE, POISON_PROMPT = b"ends whatever reads it", b"ends whatever decodes it", "End."
CAPTION = [sys.executable, "jobs/caption.py"]


def _caption(env, *options, check=True):
    command = [*CAPTION, *map(str, options)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=check, timeout=240)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
def test_the_demo_is_answered_right_and_as_pytorch_answers_it(
    every, tiny_bundle, tiny_checkpoint, demo, ray_env, tmp_path
):
    """PyTorch takes a second for a row, so a short run asks it about some."""
    output = tmp_path / "answers"
    result = _caption(
        ray_env, "--bundle", tiny_bundle.path, "--input", QUESTIONS, "--output", output, "--keep-columns", "expected",
        "--price-per-hour", 1.5,
    )  # fmt: skip
    rows = rows_by_id(output)
    assert list(rows[0]) == ["id", "expected", *ANSWER_COLUMNS]
    assert [row["id"] for row in rows] == [row["id"] for row in demo]
    expected = PyTorch(tiny_checkpoint).answer([question(row) for row in demo[::every]])
    assert [row["answer"] for row in rows[::every]] == [trace.text for trace in expected]
    right = sum(row["answer"] == row["expected"] for row in rows)
    assert right >= 0.9 * len(rows)
    assert {row["finish_reason"] for row in rows} == {"stop"}

    run, page, shown = shown_page(output)
    assert (run["rows"], run["finish_reasons"], run["errors"]) == (64, {"stop": 64}, {})
    assert run["answer_tokens"] == sum(row["answer_tokens"] for row in rows)
    assert run["bundle"]["sha256"] == tiny_bundle.sha256
    assert run["decoding"]["repetition_penalty"] == 1.0
    for line in ("rows      64 (64 stop)", "errors    0", f"answers   {output}"):
        assert line in result.stdout
    assert "images/s" in result.stderr

    assert set(run["stages"]) == {"read", "image", "vision", "decoder"}
    for stage in run["stages"].values():
        assert stage["seconds"] > 0
        assert 0 < stage["busy"] <= 1
    parts = run["stages"]["decoder"]["parts"].values()
    assert sum(part["seconds"] for part in parts) == pytest.approx(run["stages"]["decoder"]["seconds"], abs=0.01)
    assert [sum(run["timeline"][name]) for name in ("rows", "answer_tokens", "errors")] == [64, run["answer_tokens"], 0]
    rate = 64 / (run["seconds"] - run["workers_seconds"])
    assert run["steady_images_per_second"] == pytest.approx(rate, rel=1e-2)
    assert (run["price_per_hour"], run["hours_per_million"], run["cost_per_million"]) == (1.5, None, None)
    assert "busy      read " in result.stdout
    assert "million" not in result.stdout  # of which 64 rows say nothing
    assert "✓ All 64 rows answered" in page
    given = {row["id"]: (row["prompt"], answer["answer"]) for row, answer in zip(demo, rows, strict=True)}
    assert len({id_ for id_, *_ in shown}) == 24
    assert all((prompt, answer) == given[id_] and image for id_, prompt, answer, image in shown)


def test_rows_that_fail_say_why_and_the_others_are_answered(tiny_bundle, demo, job, tmp_path):
    images = [row["image"]["bytes"] for row in demo[:12]]
    prompts = [row["prompt"] for row in demo[:12]]
    images[1], images[2], images[3] = b"<html>not found</html>", None, images[3][: len(images[3]) // 2]
    prompts[4], prompts[5], prompts[6] = None, "word " * 2000, "<|im_end|><|image_pad|>"
    folder = tmp_path / "input"
    folder.mkdir()
    table = pa.table({"key": [7] * 2 + list(range(10)), "picture": images, "ask": prompts, "extra": range(12)})
    pq.write_table(table.slice(0, 5), folder / "a.parquet")
    pq.write_table(table.slice(5), folder / "b.parquet", row_group_size=3)
    pq.write_table(table.slice(0, 0), folder / "c.parquet")
    result = job(
        "--bundle", tiny_bundle.path, "--input", folder, "--output", tmp_path / "out",
        "--id-column", "key", "--image-column", "picture", "--prompt-column", "ask", "--keep-columns", "extra",
        "--slots", 3, "--vision-workers", 2, "--decoder-workers", 2, "--max-new-tokens", 6,
    )  # fmt: skip
    rows = sorted(rows_by_id(tmp_path / "out"), key=lambda row: row["extra"])
    assert [(row["id"], row["extra"]) for row in rows] == list(zip(table["key"].to_pylist(), range(12), strict=True))
    failed = {row["extra"]: (row["error_stage"], row["error_type"]) for row in rows if row["finish_reason"] == "error"}
    image, prompt = ("image", "ImageError"), ("layout", "PromptError")
    assert failed == {1: image, 2: image, 3: image, 4: prompt, 5: prompt}
    for row in rows:
        assert (row["answer"] is None) == (row["extra"] in failed) == (row["error_message"] is not None)
    assert rows[6]["prompt_tokens"] > 600
    assert "errors    5\n          3 image: ImageError\n          2 layout: PromptError" in result.stdout

    run, page, shown = shown_page(tmp_path / "out")
    assert {kind: len(each) for kind, each in run["error_examples"].items()} == run["errors"]
    messages = {str(row["error_message"]) for row in rows if row["extra"] in failed}
    assert {each["message"] for kind in run["error_examples"].values() for each in kind} == messages
    assert all(html.escape(message, quote=False)[:30] in page for message in messages)
    # All rows, in the order of the input; one whose prompt is too long has an image.
    assert [row[0] for row in shown] == [str(row["id"]) for row in rows]
    assert [row[2] for row in shown] == [None if row["extra"] in failed else row["answer"] or "(empty)" for row in rows]
    assert [row[3] for row in shown] == [row["extra"] not in (1, 2, 3, 4) for row in rows]
    assert shown[5][1] == ("word " * 2000)[:1000] + "…"
    assert "7 of 12 rows answered, 5 failed" in page
    assert run["plan"]["vision_workers"] == 2
    assert 0 < run["stages"]["vision"]["at_once"] <= 2  # on average: they need not start together
    assert run["stages"]["decoder"]["at_once"] == 2


def test_an_empty_input_gives_an_empty_answer(tiny_bundle, demo, call, tmp_path):
    pq.write_table(pa.Table.from_pylist(demo[:1]).slice(0, 0), tmp_path / "empty.parquet")
    call("--bundle", tiny_bundle.path, "--input", tmp_path / "empty.parquet", "--output", tmp_path / "out")
    (part,) = (tmp_path / "out").glob("part-*.parquet")
    assert pq.read_schema(part).names == ["id", *ANSWER_COLUMNS]
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["rows"] == 0
    assert "No rows to answer" in (tmp_path / "out" / "_report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--bundle": "nowhere"}, "is no bundle"),
        ({"--input": "nowhere"}, "--input nowhere: no file found that ends in .parquet, .pq, .jsonl, "),
        ({"--image-column": "picture"}, "no single column 'picture' (--image-column); it has id, image"),
        ({"--slots": "0"}, "--slots must be at least 1, not 0"),
        ({"--output": "LICENSE"}, "LICENSE cannot be written"),
        ({"--vision-cache": "LICENSE"}, "caption: --vision-cache LICENSE cannot be used: "),
        ({"--choices": "yes,,no"}, "--choices: choice 2 is ''; it must be text"),
        ({"--choices": "yes,no", "--regex": "yes"}, "--choices and --regex: an answer can only be one of them"),
        ({"--choices": ""}, "--choices: choice 1 is ''; it must be text"),
        ({"--regex": ""}, "--regex: the regular expression is ''; it must be text"),
        ({"--regex": "["}, "--regex: the regular expression cannot be followed"),
        ({"--regex": "[0-9]{200}"}, "takes 200 tokens, and there is room for 128"),
        ({"--json-schema": "nowhere.json"}, "--json-schema nowhere.json: No such file or directory"),
        ({"--json-schema": "LICENSE"}, "--json-schema LICENSE: the schema is not JSON"),
        ({"--temperature": "nan"}, "--temperature must be a number from 0 on, not nan"),
        ({"--temperature": "-1"}, "--temperature must be a number from 0 on, not -1.0"),
        ({"--temperature": "1", "--samples": "0"}, "--samples must be from 1 to 1,000, not 0"),
        ({"--temperature": "0", "--samples": "2"}, "--samples 2: at --temperature 0, all of them would be the same"),
        ({"--top-p": "0.9"}, "--top-p is for answers that are drawn: give --temperature too"),
        ({"--sampling-column": "image"}, "(--sampling-column) is struct<bytes: binary, path: string>; it must be"),
        ({"--stop": ""}, "--stop must not be empty"),
        ({"--stop": "x", "--choices": "a,b"}, "--choices and --stop: --choices says where an answer ends"),
        ({"--max-error-rate": "1"}, "--max-error-rate must be from 0 on and below 1, not 1.0"),
        ({"--bundle": "gs://bucket/bundle"}, "gs://bucket/bundle: "),
        ({"--bundle-cache-gb": "0"}, "--bundle-cache-gb must be a number above 0, not 0.0"),
        ({"--min-new-tokens": "0"}, "--min-new-tokens must be at least 1, not 0"),
        ({"--min-new-tokens": "200"}, "--min-new-tokens 200 is more than the --max-new-tokens 128"),
        ({"--min-new-tokens": "2", "--regex": "a"}, "--regex and --min-new-tokens: --regex says where an answer ends"),
        ({"--choices-column": "labels"}, "has no single column 'labels' (--choices-column)"),
        ({"--choices-column": "image"}, "is struct<bytes: binary, path: string>; it must be lists of strings"),
    ],
)
def test_a_job_that_cannot_be_done_says_so_in_one_line(options, message, refusal):
    *before, last = refusal(options)
    assert message in last
    assert not before


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("qvl_batch.errors.OutputError: /cache cannot be used: it is full", "/cache cannot be used: it is full"),
        ("RuntimeError: no memory: 4 GB", "a worker failed: RuntimeError: no memory: 4 GB"),
    ],
)
def test_a_worker_that_does_not_start_says_why(raised, said):
    from ray.exceptions import ActorDiedError, RayTaskError  # noqa: PLC0415  (takes a second)

    from qvl_batch.pipeline.cluster import job_error  # noqa: PLC0415

    trace = f'ray::MapWorker.__init__()\n  File "workers.py", line 63, in __init__\n{raised}'
    error = ActorDiedError(RayTaskError("__init__", trace, ValueError(), "ray::MapWorker", 7, "127.0.0.1"))
    assert str(job_error(error)) == said


def test_a_cluster_that_is_not_there_is_named(tiny_bundle, ray_env, tmp_path):
    options = ["--bundle", tiny_bundle.path, "--input", QUESTIONS, "--output", tmp_path / "out"]
    result = _caption(ray_env | {"RAY_ADDRESS": "127.0.0.1:1"}, *options, check=False)
    assert result.returncode == 1
    assert "caption: no Ray cluster at RAY_ADDRESS=127.0.0.1:1" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_answers_are_not_overwritten_unasked(tiny_bundle, call, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "part-000000-000000000000.parquet").write_bytes(b"precious")
    options = ["--bundle", tiny_bundle.path, "--input", QUESTIONS, "--output", output, "--limit", 1]
    assert "no _job.json that says which job they belong to" in call(*options, status=1).stderr
    assert "is damaged, or not a file of answers, and" in call(*options, "--overwrite", status=1).stderr
    (held,) = output.glob("part-*")
    assert held.read_bytes() == b"precious"


def test_the_input_is_not_overwritten(tmp_path):
    path = tmp_path / "part-0.parquet"
    path.write_bytes(QUESTIONS.read_bytes())
    with pytest.raises(InputError, match="only files of the output folder"):
        run(CaptionConfig(bundle=tmp_path, input=(str(tmp_path),), output=str(tmp_path), overwrite=True))
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_cannot_be_read_are_error_rows_and_the_others_are_answered(tiny_bundle, demo, job, tmp_path):
    path, output = tmp_path / "damaged.parquet", tmp_path / "out"
    pq.write_table(pa.Table.from_pylist(demo[:12]), path, row_group_size=6, compression="zstd")
    data = bytearray(path.read_bytes())
    for name, at in (("id", 0), ("image.bytes", 1)):
        chunk = pq.read_metadata(path).row_group(0).column(at)
        assert chunk.path_in_schema == name
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    options = ["--bundle", tiny_bundle.path, "--input", path, "--output", output]
    result = job(*options, "--max-new-tokens", 4)
    assert "errors    6\n          6 read: RecordError" in result.stdout
    rows = sorted(read_answers(output).to_pylist(), key=lambda row: row["id"] or "")
    assert [row["id"] for row in rows] == [None] * 6 + sorted(row["id"] for row in demo[6:12])
    assert all(f"row {place} of {path} (row group 0)" in row["error_message"] for place, row in enumerate(rows[:6]))
    assert all(row["answer"] for row in rows[6:])


@pytest.mark.parametrize("sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_job_that_is_stopped_keeps_its_answers_and_goes_on(sent, tiny_bundle, demo, ray_env, job, tmp_path):
    table = pa.Table.from_pylist([row | {"id": f"{again}-{row['id']}"} for again in range(2) for row in demo[:40]])
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=50)
    output = tmp_path / "out"
    options = ["--bundle", tiny_bundle.path, "--input", tmp_path / "big.parquet", "--output", output]
    with subprocess.Popen(
        [*map(str, [*CAPTION, *options])], cwd=ROOT, env=ray_env, stderr=subprocess.PIPE, text=True
    ) as stopped:
        for line in stopped.stderr:
            if " of 80 rows" in line:
                break
        os.kill(stopped.pid, sent)
        rest = stopped.stderr.read()
        assert stopped.wait(timeout=30) == 130
    before = rows_by_id(output)
    last = rest.strip().splitlines()[-1]
    assert last == f"caption: stopped; {len(before)} of 80 rows are answered; continue with the same command"
    assert 0 < len(before) < 80
    assert not {"_run.json", "_report.html"} & {path.name for path in output.iterdir()}

    other = job(*options, "--max-new-tokens", 9, status=1)
    assert "with another --max-new-tokens (128 there, 9 now)" in other.stderr
    result = job(*options)
    assert f"resuming  {len(before)} rows are answered already, {80 - len(before)} are left" in result.stderr
    assert f"rows      80 (80 stop)\n          {len(before)} of them by earlier runs" in result.stdout
    rows = rows_by_id(output)
    assert [row["id"] for row in rows] == sorted(table["id"].to_pylist())
    answers = {row["id"]: row["answer"] for row in rows}
    assert all(answers[row["id"]] == row["answer"] for row in before)
    assert all(len({answers[f"{again}-{row['id']}"] for again in range(2)}) == 1 for row in demo[:40])
    run, page, shown = shown_page(output)
    left = 80 - len(before)
    assert (run["rows"], run["rows_of_this_run"], sum(run["timeline"]["rows"])) == (80, left, left)
    assert f"{len(before)} rows were answered by earlier runs" in page
    ids = {row[0] for row in shown}
    assert len(ids) == min(24, left)
    assert not ids & {row["id"] for row in before}
    written = {name: (output / name).read_bytes() for name in ("_run.json", "_report.html")}
    result = job(*options, "--price-per-hour", 7)
    assert "resuming  80 rows are answered already, 0 are left" in result.stderr
    assert "workers" not in result.stderr
    assert {name: (output / name).read_bytes() for name in written} == written


@pytest.mark.usefixtures("cluster")
def test_a_job_that_is_stopped_ends_its_stages_first(tiny_bundle, tmp_path):
    """As long as the exception is held, so are the generators: what is not ended by then would outlive Ray."""
    config = CaptionConfig(bundle=tiny_bundle.path, input=(str(QUESTIONS),), output=str(tmp_path / "out"))
    with pytest.raises(KeyboardInterrupt, match="0 of 64 rows") as held:
        run(config, is_stopped=lambda: True)
    assert held.tb
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("StreamingExecutor")]


def test_a_job_on_which_no_stage_goes_on_is_ended_with_what_to_do(job, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 0.03)
    said = job("--bundle", tiny_bundle.path, "--input", QUESTIONS, "--output", tmp_path / "out", status=1)
    assert "caption: no stage went on for 0.0005 minutes" in said.stderr
    assert said.stderr.endswith("; the same command goes on from here\n")


@pytest.mark.parametrize(
    ("option", "command"),
    [
        ([], "the same command"),
        (["--overwrite"], "the same command without --overwrite"),
        (["--retry-errors"], "the same command"),
    ],
)
def test_a_job_that_is_stopped_says_what_goes_on(option, command, monkeypatch, capsys):
    def run(*_, **__):
        raise KeyboardInterrupt("2 of 9 rows are answered")

    monkeypatch.setitem(sys.modules, "qvl_batch.pipeline.run", SimpleNamespace(run=run))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["caption.py", "--bundle", "b", "--input", "i", "--output", "o", *option])
    assert caption.main() == 130
    assert capsys.readouterr().err == f"caption: stopped; 2 of 9 rows are answered; continue with {command}\n"


@pytest.mark.long
def test_images_that_were_refused_are_answered_once_they_are_allowed(tiny_bundle, demo, job, tmp_path):
    whole = demo[0]["image"]["bytes"]
    files = [whole, whole[: len(whole) * 2 // 3], image_file(Image.new("RGB", (1000, 1000)))]
    rows = [{"id": place, "image": file, "prompt": demo[0]["prompt"]} for place, file in enumerate(files)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    options = ["--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", tmp_path / "answers"]
    options += ["--max-new-tokens", 2]
    job(*options, "--max-image-pixels", 999_999)
    first = rows_by_id(tmp_path / "answers")
    messages = [row["error_message"] for row in first]
    assert messages[0] is None
    assert "--allow-truncated shows the rest" in messages[1]
    assert messages[2] == "the image has 1,000,000 pixels; the limit is 999,999 (--max-image-pixels)"
    job(*options, "--allow-truncated", "--retry-errors")
    second = rows_by_id(tmp_path / "answers")
    assert not any(row["error_message"] for row in second)
    assert second[0] == first[0]


@pytest.mark.long
def test_samples_that_use_few_of_their_bits_are_named_once(tiny_bundle, demo, ray_env, tmp_path):
    dark = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    files = [image_file(Image.fromarray(dark // part)) for part in range(1, 13)]
    rows = [{"id": place, "image": file, "prompt": demo[0]["prompt"]} for place, file in enumerate(files)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    options = ["--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", tmp_path / "answers"]
    result = _caption(ray_env, *options, "--max-new-tokens", 2)
    assert result.stderr.count("16-bit samples are all below 4,096") == 1
    assert not any(row["error_message"] for row in rows_by_id(tmp_path / "answers"))


def test_rows_added_to_the_input_are_answered_and_failed_ones_again(tiny_bundle, demo, job, tmp_path):
    folder, output = tmp_path / "input", tmp_path / "out"
    (folder / "images").mkdir(parents=True)
    options = ["--bundle", tiny_bundle.path, "--input", folder, "--output", output]
    options += ["--allow-images-from", os.path.relpath(folder / "images", ROOT)]
    named = [row | {"image": {"bytes": None, "path": f"images/{row['id']}"}} for row in demo[:3]]
    for row in demo[:2]:
        (folder / "images" / row["id"]).write_bytes(row["image"]["bytes"])
    pq.write_table(pa.Table.from_pylist(named), folder / "b.parquet")
    result = job(*options)
    assert "errors    1\n          1 image: ImageError" in result.stdout
    rows = rows_by_id(output)
    assert [row["id"] for row in rows] == [row["id"] for row in demo[:3]]
    assert "cannot be read: FileNotFoundError" in rows[2]["error_message"]
    assert rows[2]["error_location"] == f"images/{demo[2]['id']}"
    (listed,) = pq.read_table(output / "_unreadable.parquet").to_pylist()
    assert listed == {name: rows[2].get(name) for name in listed} | {"file": str(folder / "b.parquet"), "row": 2}
    assert f"1 could not be read: {output}/_unreadable.parquet" in result.stdout
    record, page, _ = shown_page(output)
    assert record["unreadable"] == {"rows": 1, "list": "_unreadable.parquet", "first": [listed]}
    assert "Could not be read" in page

    (folder / "images" / demo[2]["id"]).write_bytes(demo[2]["image"]["bytes"])
    pq.write_table(pa.Table.from_pylist(demo[3:5]), folder / "a.parquet")
    result = job(*options, "--retry-errors")
    assert "resuming  2 rows are answered already, 3 are left" in result.stderr
    assert "rows      5 (5 stop)\n          2 of them by earlier runs\nerrors    0" in result.stdout
    rows = rows_by_id(output)
    assert [row["id"] for row in rows] == [row["id"] for row in demo[:5]]
    assert all(row["answer"] for row in rows)
    assert not (output / "_unreadable.parquet").exists()


def test_small_files_of_answers_are_merged_at_the_end_and_ctrl_c_leaves_that_to_the_next_run(
    tiny_bundle, demo, job, tmp_path, monkeypatch
):
    monkeypatch.setattr("qvl_batch.output.writer.ROWS_PER_FILE", 1)  # a file for each table
    monkeypatch.setattr("qvl_batch.output.compaction.FEWEST", 2)
    monkeypatch.setattr("qvl_batch.output.compaction.ROWS_PER_FILE", 16)
    rows = [demo[32] | {"image": {"bytes": None, "path": "none.png"}}, *demo[:32]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    output = tmp_path / "out"
    options = ["--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", output]
    options += ["--allow-images-from", tmp_path, "--max-new-tokens", 4]

    def records():
        return [PartRecord.read(LocalFolder(output), path.name) for path in output.glob("part-*")]

    config = CaptionConfig(
        bundle=tiny_bundle.path, input=(str(tmp_path / "rows.parquet"),), output=str(output),
        allow_images_from=(str(tmp_path),), max_new_tokens=4,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt, match="33 rows are answered"):
        run(config, is_stopped=lambda: any(record.unread for record in records()))
    assert pq.read_table(output / "_unreadable.parquet")["error_location"].to_pylist() == ["none.png"]
    with pytest.raises(KeyboardInterrupt, match="all 33 rows are answered, not all small parts are merged"):
        run(config, is_stopped=lambda: any(record.replaces for record in records()))
    before = {path.name for path in output.glob("part-*")}
    answers = rows_by_id(output)
    assert sorted(row["id"] for row in answers) == sorted(row["id"] for row in rows)
    written = {name: (output / name).read_bytes() for name in ("_run.json", "_report.html", "_unreadable.parquet")}
    assert json.loads(written["_run.json"])["rows"] == 33

    result = job(*options)
    assert "resuming  33 rows are answered already, 0 are left" in result.stderr
    merged = re.search(r"^compacted (\d+) parts into (\d)$", result.stderr, re.MULTILINE)
    after = {path.name for path in output.glob("part-*")}
    assert len(before) - len(after) == int(merged[1]) - int(merged[2]) > 0
    assert rows_by_id(output) == answers
    assert {name: (output / name).read_bytes() for name in written} == written
    assert "compacted" not in job(*options).stderr
    (output / "_unreadable.parquet").unlink()  # as after a crash
    job(*options)
    assert pq.read_table(output / "_unreadable.parquet")["error_location"].to_pylist() == ["none.png"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tiny_bundle", "native_bundle"])
def test_a_job_that_is_killed_again_and_again_answers_every_row_once(kind, ray_env, tmp_path, request):
    bundle = request.getfixturevalue(kind)
    outcome = soak(bundle.path, 2, 1, tmp_path, ray_env, latest=8.0)
    assert outcome.killed.total() == 2
    assert outcome.passed, str(outcome)


@contextmanager
def _submitting(env, programs):
    """Submits commands to a cluster as `ray start` makes it, which finds Python and its packages in a folder of
    programs; gives a function of options of the submission and of the command, which returns what is said.
    """
    env = env | {"RAY_AUTH_MODE": "token", "PATH": f"{programs}:{env['PATH']}"}
    ray = str(programs / "ray")
    subprocess.run([ray, "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    port, dashboard = _free_port(), _free_port()
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", "--dashboard-host=127.0.0.1",
         f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0", "--disable-usage-stats"],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    def submit(options, *command):
        whole = [ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", "."]
        whole += [*options, "--", *map(str, command)]
        for _ in range(60):
            result = subprocess.run(whole, cwd=ROOT, env=env, check=False, capture_output=True, text=True, timeout=400)
            said = result.stdout + result.stderr
            # Until the cluster has started.
            if not ("Failed to connect to Ray" in said or "No available agent" in said):
                break
            time.sleep(1)
        assert result.returncode == 0, said
        return said

    yield submit
    for process in family(head.pid):  # asked to end, it takes half a minute
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    head.wait(timeout=60)


def test_a_job_that_goes_wrong_stops_and_keeps_its_answers(tiny_bundle, demo, job, tmp_path):
    images = [row["image"]["bytes"] for row in demo[:4]] + [b"<html>not found</html>"] * 600
    prompts = [row["prompt"] for row in demo[:4]] + ["What?"] * 600
    pq.write_table(pa.table({"id": range(604), "image": images, "prompt": prompts}), tmp_path / "rows.parquet")
    options = ["--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", tmp_path / "out"]
    result = job(*options, "--max-error-rate", 0.25, status=1)
    found = re.search(r"([\d,]+) of ([\d,]+) rows failed, more than --max-error-rate 0.25: (.*)", result.stderr)
    failed, rows = int(found[1]), int(found[2])
    assert rows >= 200
    assert failed > 0.25 * rows
    assert re.match(r"\d+ image: ImageError \(\d+: the bytes are no image of .*\. Answers are kept; mend", found[3])
    kept = read_answers(tmp_path / "out")
    assert len(kept) == rows
    assert kept["error_type"].to_pylist().count("ImageError") == failed
    result = job(*options)
    assert "rows      604 (600 error, 4 stop)" in result.stdout


def _metrics():
    """Of this project's jobs on the cluster of this process: sums by name and by one label."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = Counter()
    for name, inside, value in re.findall(r"^ray_(qvl_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', inside))
        label = next((labels[each] for each in ("finish_reason", "kind", "stage") if each in labels), "")
        found[name, label] += float(value)
    return found


def _settled_metrics():
    """The same, once nothing of earlier jobs comes any more."""
    before = None
    while before != (before := _metrics()):
        time.sleep(2)
    return before


@pytest.mark.long
def test_ray_shows_metrics_of_a_job(tiny_bundle, demo, job, tmp_path):
    rows = [dict(row) for row in demo[:6]]
    rows[4]["image"] = {"bytes": b"<html>", "path": None}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    before, loads, ended = _settled_metrics(), Counter(), threading.Event()

    def watch():  # what a decoder says is there as long as it is
        while not ended.wait(0.2):
            shown = _metrics().items()
            loads.update({name: value for (name, _), value in shown if "slots" in name or "vision" in name})

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = tmp_path / "out"
    job("--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", output, "--slots", 4)
    ended.set()
    watcher.join()
    answers = read_answers(output)
    expected = {
        ("qvl_rows_total", "stop"): 5,
        ("qvl_rows_total", "error"): 1,
        ("qvl_errors_total", "image: ImageError"): 1,
        ("qvl_answer_tokens_total", ""): pc.sum(answers["answer_tokens"]).as_py(),
        ("qvl_prompt_tokens_total", ""): pc.sum(answers["prompt_tokens"]).as_py(),
        ("qvl_worker_rows_total", "decoder"): 6,
    }
    for _ in range(30):
        found = _metrics()
        if {key: found[key] - before[key] for key in expected} == expected:
            break
        time.sleep(0.5)
    assert {key: found[key] - before[key] for key in expected} == expected
    assert {"qvl_slots", "qvl_slots_busy", "qvl_vision_workers"} <= set(loads)
    assert loads["qvl_slots"] % 4 == 0


@pytest.fixture
def submit(ray_env, tmp_path):
    """Submits a script, with variables of its environment, to a cluster whose Python is that of the tests."""
    with _submitting(ray_env | {"HOME": str(tmp_path)}, Path(sys.executable).parent) as submit:
        yield lambda *script, **variables: submit(
            ["--runtime-env-json", json.dumps({"env_vars": variables})], "python", *script
        )


@pytest.mark.long
def test_a_cluster_with_nothing_but_ray_answers_with_bundle_and_input_in_a_store(tiny_bundle, demo, ray_env, tmp_path):
    alone = tmp_path / "ray-alone"
    subprocess.run([sys.executable, "-m", "venv", alone], check=True)
    install = [alone / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint"]
    subprocess.run([*install, "requirements.lock", "ray[default]", "virtualenv"], cwd=ROOT, check=True)
    env = {name: value for name, value in ray_env.items() if name != "PYTHONPATH"} | {"HOME": str(tmp_path)}
    for package in ("qvl_batch", "onnxruntime"):
        command = [alone / "bin" / "python", "-c", f"import {package}"]
        found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
        assert b"ModuleNotFoundError" in found.stderr
    with s3.serving() as store, _submitting(env | s3.variables(), alone / "bin") as submit:
        store.put(str(tiny_bundle.path), "data/bundle", recursive=True)
        store.put(str(QUESTIONS), "data/photos/questions.parquet")
        said = submit(
            ["--runtime-env", "jobs/runtime-env.yaml"], "python", "jobs/caption.py", "--bundle", "s3://data/bundle",
            "--input", "s3://data/photos", "--limit", 8, "--output", "s3://data/answers",
        )  # fmt: skip
        (tmp_path / "out").mkdir()
        store.get("data/answers/", f"{tmp_path / 'out'}/", recursive=True)
    assert "rows      8 (8 stop)" in said
    assert [row["answer"] for row in rows_by_id(tmp_path / "out")] == [row["expected"] for row in demo[:8]]
    assert (tmp_path / ".cache" / "qvl-batch" / "bundles").is_dir()


@pytest.mark.long
def test_a_job_submitted_to_a_cluster_answers_all_rows_but_those_that_end_its_workers(
    tiny_bundle, demo, submit, tmp_path
):
    rows = [dict(row) for row in demo[:24]]
    # A stage later, some rows earlier: none waits for another.
    for place, poison in ((21, POISON_FILE), (12, POISON_IMAGE)):
        rows[place]["image"] = {"bytes": rows[place]["image"]["bytes"] + poison, "path": None}
    rows[2]["prompt"] = POISON_PROMPT
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=12)
    said = submit(
        "jobs/caption.py", "--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet",
        "--output", tmp_path / "out", PYTHONPATH=os.pathsep.join([str(ROOT / "tests" / "poison"), str(ROOT)]),
    )  # fmt: skip
    assert "rows      24 (3 error, 21 stop)" in said
    answers = {row["id"]: row for row in rows_by_id(tmp_path / "out")}
    failed = {id_: (row["error_stage"], row["error_type"]) for id_, row in answers.items() if row["error_stage"]}
    stages = {21: "read", 12: "image", 2: "decode"}
    assert failed == {rows[place]["id"]: (stage, "WorkerLostError") for place, stage in stages.items()}, said
    assert len(answers) == 24
    right = sum(answers[row["id"]]["answer"] == row["expected"] for row in rows)
    assert right >= 20


@pytest.mark.long
def test_comparisons_can_be_submitted_to_a_cluster(tiny_bundle, submit, tmp_path):
    said = submit(
        "jobs/compare.py", "--bundle", tiny_bundle.path, "--checkpoint", TINY, "--input", QUESTIONS,
        "--output", tmp_path / "comparison", "--limit", 3,
    )  # fmt: skip
    assert "equal     3 of 3 answers" in said
    assert (tmp_path / "comparison" / "report.html").is_file()


@pytest.mark.long
@pytest.mark.parametrize("nodes", [2, 4])
def test_work_spreads_over_nodes_and_answers_stay(nodes, tiny_bundle, ray_env, tmp_path):
    with subprocess.Popen(
        [sys.executable, "tests/cluster.py", str(nodes)],
        cwd=ROOT, env=ray_env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as cluster:  # fmt: skip
        address = next(line for line in cluster.stdout if ":" in line).strip()
        options = ["--bundle", tiny_bundle.path, "--input", QUESTIONS, "--output", tmp_path / "out"]
        options += ["--vision-workers", nodes, "--decoder-workers", nodes, "--slots", 8]
        result = _caption(ray_env | {"RAY_ADDRESS": address}, *options)
        cluster.stdin.close()
    assert f"{nodes} vision workers of 1 thread, {nodes} decoders of 1 thread" in result.stdout + result.stderr
    run = json.loads((tmp_path / "out" / "_run.json").read_text())
    for stage in ("vision", "decoder"):
        rows = run["rows_of_workers"][stage]
        assert len(rows) == nodes
        assert sum(rows.values()) == 64
    names = [name for rows in run["rows_of_workers"].values() for name in rows]
    assert len({name.split("/")[1] for name in names}) == nodes
    with Captioner(tiny_bundle.path) as captioner:
        demo = pq.read_table(QUESTIONS)
        images = [image["bytes"] for image in demo["image"].to_pylist()]
        expected = captioner.caption(images, demo["prompt"].to_pylist())
    assert [row["answer"] for row in rows_by_id(tmp_path / "out")] == [answer.answer for answer in expected]
