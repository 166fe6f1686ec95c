"""A job answers rows of every kind of file as it answers those of parquet, and goes on where it stopped."""

import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT
from containers import arrow, delimited, jsonl, member, tar
from output_folders import rows_by_id

CAPTION = [sys.executable, "jobs/caption.py"]


def _plain(rows):
    return [{"id": row["id"], "image": row["image"]["bytes"], "prompt": row["prompt"]} for row in rows]


def _with_paths(folder, rows):
    (folder / "img").mkdir(exist_ok=True)
    for row in rows:
        (folder / "img" / f"{row['id']}.jpg").write_bytes(row["image"])
    return [row | {"image": f"img/{row['id']}.jpg"} for row in rows]


def _write_photos(path, rows):
    path.mkdir(exist_ok=True)
    for row in rows:
        (path / f"{row['id']}.jpg").write_bytes(row["image"])
        (path / f"{row['id']}.txt").write_text(row["prompt"])


def _members(rows):
    parts = (((f"{row['id']}.jpg", row["image"]), (f"{row['id']}.txt", row["prompt"].encode())) for row in rows)
    return [member(*part) for both in parts for part in both]


WRITE = {
    "rows.jsonl": lambda path, rows: path.write_bytes(jsonl(_with_paths(path.parent, rows))),
    "rows.csv.gz": lambda path, rows: path.write_bytes(
        pa.compress(delimited(_with_paths(path.parent, rows)), "gzip", asbytes=True)
    ),
    "rows.tar": lambda path, rows: path.write_bytes(tar(_members(rows))),
    "rows.arrow": lambda path, rows: path.write_bytes(arrow(pa.Table.from_pylist(rows), batch=3)),
    "photos": _write_photos,
}


def _answers(folder):
    """Answers by the ids of the demo."""
    return {Path(row["id"] or "").name.removesuffix(".jpg"): row["answer"] for row in rows_by_id(folder)}


@pytest.fixture(scope="module")
def expected(tiny_bundle, demo):
    """Answers to the demo's first rows."""
    from qvl_batch import Captioner  # noqa: PLC0415

    rows = demo[:20]
    with Captioner(tiny_bundle.path) as captioner:
        answers = captioner.caption([row["image"]["bytes"] for row in rows], [row["prompt"] for row in rows])
    return {row["id"]: answer.answer for row, answer in zip(rows, answers, strict=True)}


#: Of one kind of file and of a folder, all that a job does with both.
QUICK = ("rows.jsonl", "photos")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in WRITE]
)
def test_rows_of_every_kind_are_answered_and_a_job_goes_on(name, tiny_bundle, demo, expected, job, tmp_path):
    rows = _plain(demo[:7])
    folder = tmp_path / "in"
    folder.mkdir()
    WRITE[name](folder / name, rows)
    options = ["--bundle", tiny_bundle.path, "--output", tmp_path / "out"]
    if name in ("rows.jsonl", "rows.csv.gz"):
        options += ["--allow-images-from", folder]
    given = folder / (name if name == "photos" else f"*{name}")
    job(*options, "--input", given, "--limit", 3)
    assert len(_answers(tmp_path / "out")) == 3
    more = _plain(demo[7:9])
    WRITE[name](folder / (name if name == "photos" else f"more-{name}"), more)
    said = job(*options, "--input", given).stderr
    assert "3 rows are answered already, 6 are left" in said
    assert _answers(tmp_path / "out") == {row["id"]: expected[row["id"]] for row in demo[:9]}
    assert len(rows_by_id(tmp_path / "out")) == 9
    assert "9 rows are answered already, 0 are left" in job(*options, "--input", given).stderr


def test_a_bad_row_of_every_kind_costs_itself(tiny_bundle, demo, expected, job, tmp_path):
    rows = _plain(demo[:10])
    paths = _with_paths(tmp_path, rows)
    lines = jsonl(paths[:2]).splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(lines[0] + b"{\n" + lines[1])
    (tmp_path / "b.csv").write_bytes(delimited(paths[2:4]) + b"x,y\n")
    (tmp_path / "c.tar").write_bytes(tar([*_members(rows[4:6]), member("bad.jpg", type=b"2"), member("bad.txt")]))
    _write_photos(tmp_path / "photos", rows[6:8])
    (tmp_path / "photos" / "none.jpg").symlink_to("nowhere")
    (tmp_path / "photos" / "none.txt").write_text("What?")
    job(
        "--bundle", tiny_bundle.path, "--output", tmp_path / "out", "--allow-images-from", tmp_path,
        "--input", *(tmp_path / name for name in ("a.jsonl", "b.csv", "c.tar", "photos")),
    )  # fmt: skip
    found = sorted(
        (row["error_message"].split(" of ")[1].split(": ")[0], row["error_stage"])
        for row in rows_by_id(tmp_path / "out")
        if row["finish_reason"] == "error"
    )
    assert found == [
        (f"{tmp_path}/a.jsonl (line 2) cannot be read", "read"), (f"{tmp_path}/b.csv (line 4) cannot be read", "read"),
        (f"{tmp_path}/c.tar (sample 'bad') cannot be read", "image"),
        (f"{tmp_path}/photos/ (none.jpg) cannot be read", "image"),
    ]  # fmt: skip
    answers = _answers(tmp_path / "out")
    assert {id_: answer for id_, answer in answers.items() if answer} == {
        row["id"]: expected[row["id"]] for row in demo[:8]
    }


@pytest.mark.long
def test_a_job_over_all_kinds_that_is_killed_goes_on(tiny_bundle, demo, expected, ray_env, job, tmp_path):
    rows = _plain(demo[:20])
    for at, name in enumerate(WRITE):
        WRITE[name](tmp_path / name, rows[4 * at : 4 * at + 4])
    options = ["--bundle", tiny_bundle.path, "--output", tmp_path / "out", "--allow-images-from", tmp_path]
    options += ["--input", *(tmp_path / name for name in WRITE)]
    command = [*map(str, [*CAPTION, *options, "--limit", 11])]
    subprocess.run(command, cwd=ROOT, env=ray_env, capture_output=True, check=True, timeout=240)
    command = [*map(str, [*CAPTION, *options])]
    with subprocess.Popen(command, cwd=ROOT, env=ray_env, stderr=subprocess.PIPE, text=True) as killed:
        for line in killed.stderr:
            if " of 9 rows" in line:
                killed.send_signal(signal.SIGKILL)
                break
        killed.wait(60)
    job(*options)
    assert len(rows_by_id(tmp_path / "out")) == 20
    assert _answers(tmp_path / "out") == expected
