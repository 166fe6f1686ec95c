"""A job takes its bundle and its input from a store, writes its answers there, and goes on there."""

import json

import fsspec
import pyarrow.parquet as pq
import pytest
from conftest import QUESTIONS
from s3 import KEYS, serving


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
