"""A job takes its bundle and its input from a store, writes its answers there, and goes on there."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import QUESTIONS, ROOT
from s3 import KEYS, serving, variables

from qvl_batch.forecast.memory import family


@pytest.fixture(scope="module")
def store():
    with serving() as files:  # before the cluster, whose workers have this environment
        yield files


def _answers(store):
    tables = [pq.read_table(store.open(path)) for path in store.glob("data/out/part-*.parquet")]
    return {row["id"]: row["answer"] for table in tables for row in table.to_pylist()}


@pytest.mark.long
def test_bundle_input_and_answers_may_be_in_a_store(store, tiny_bundle, job, demo, tmp_path):
    store.put(str(tiny_bundle.path), "data/bundle", recursive=True)
    table = pq.read_table(QUESTIONS).slice(0, 6)
    for number in range(2):
        with store.open(f"data/in/{number}.parquet", "wb") as file:
            pq.write_table(table.slice(3 * number, 3), file, row_group_size=2)
    options = ["--bundle", "s3://data/bundle", "--bundle-cache", tmp_path, "--output", "s3://data/out"]
    options += ["--choices-column", "choices"]
    job(*options, "--input", "s3://data/in", "--limit", 2)
    assert len(_answers(store)) == 2
    with store.open("data/in/2.parquet", "wb") as file:
        pq.write_table(pq.read_table(QUESTIONS).slice(6, 2), file)
    said = job(*options, "--input", "s3://data/in/*.parquet")
    assert "2 rows are answered already, 6 are left" in said.stderr
    expected = {row["id"]: row["expected"] for row in demo[:8]}
    assert _answers(store).keys() == expected.keys()
    assert sum(answer == expected[name] for name, answer in _answers(store).items()) >= 6
    written = b"".join(store.cat_file(path) for path in store.glob("data/out/_*"))
    assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in written
    assert {file["path"] for file in json.loads(store.cat_file("data/out/_job.json"))["files"]} == {
        f"s3://data/in/{number}.parquet" for number in range(3)
    }
    store.pipe_file("data/in/1.parquet", store.cat_file("data/in/0.parquet"))
    said = job(*options, "--input", "s3://data/in", status=1)
    assert "s3://data/in/1.parquet has changed since this job began" in said.stderr
    assert fsspec.filesystem("s3").exists("data/out/_report.html")


@pytest.mark.long
def test_a_job_in_a_store_that_is_killed_goes_on(store, tiny_bundle, ray_env):
    rows = pa.concat_tables([pq.read_table(QUESTIONS)] * 3)
    for number in range(4):
        with store.open(f"data/killed/{number}.parquet", "wb") as file:
            pq.write_table(rows.slice(48 * number, 48).drop(["id"]), file, row_group_size=16)
    command = [sys.executable, "jobs/caption.py", "--bundle", tiny_bundle.path, "--input", "s3://data/killed"]
    command += ["--output", "s3://data/gone-on", "--keep-columns", "expected", "--choices-column", "choices"]
    job = {"cwd": ROOT, "env": ray_env | variables(), "stderr": subprocess.PIPE, "text": True}

    def parts():
        return store.glob("data/gone-on/part-*.parquet")

    with subprocess.Popen(command, start_new_session=True, **job) as process:
        while process.poll() is None and not parts():
            time.sleep(0.1)
        assert process.poll() is None, process.stderr.read()
        for each in family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    known = sum(pq.read_metadata(store.open(path)).num_rows for path in parts())
    said = subprocess.run(command, check=True, **job).stderr
    assert f"{known} rows are answered already, {len(rows) - known} are left" in said
    answers = pa.concat_tables([pq.read_table(store.open(path)) for path in parts()])
    assert sorted(answers["id"].to_pylist()) == sorted(
        f"s3://data/killed/{number}.parquet:{row}" for number in range(4) for row in range(48)
    )
    assert set(answers["finish_reason"].to_pylist()) == {"stop"}
    assert pc.mean(pc.equal(answers["answer"], answers["expected"])).as_py() > 0.9
