"""The bench compares equal work only, and says who failed; the whole of it is a long test."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

import bench
from benchmark.host import Host
from benchmark.memory import PeakMemory
from benchmark.rows import Peer, Rows
from benchmark.situations import MEAN_TOKENS, MOST_TOKENS, SKEW_ROWS, _skewed_lengths
from qvl_batch.errors import ConfigError, JobError


def test_a_contender_answers_from_its_own_process():
    with Host("rows", "benchmark.rows", "Rows", [b"a", b"b"], ["x", "y"]) as host:
        assert host.call("part", 1, 2) == Rows([b"b"], ["y"])
        assert host.seconds("part", 0, 1) >= 0
        assert host.peak_memory() > 1e6
        with pytest.raises(RuntimeError, match=r"rows failed: (.|\n)*no attribute 'nothing'"):
            host.call("nothing")
        assert host.call("part", 0, 1) == Rows([b"a"], ["x"])
        host._process.kill()
        with pytest.raises(RuntimeError, match="rows ended: exit status -9"):
            host.call("part", 0, 1)


def test_a_contender_that_cannot_be_made_says_why():
    with pytest.raises(RuntimeError, match=r"nobody failed: (.|\n)*No module named 'benchmark.nobody'"):
        Host("nobody", "benchmark.nobody", "Nobody")


def test_peak_memory_counts_what_was_started():
    held = 200_000_000
    with PeakMemory() as memory:
        script = f"import time; held = b'x' * {held}; time.sleep(1.5)"
        subprocess.run([sys.executable, "-c", script], check=True)
    assert held < memory.peak < held + 10**10


class _Fake:
    def __init__(self, tokens, answers):
        self._results = {"prompt_tokens": tokens, "answer": answers}

    def call(self, method, _):
        return self._results[method]


def test_only_equal_work_is_compared():
    rows = Rows([b""], ["x"])
    equal = {name: _Fake([9], [[1, 2]]) for name in (bench.FP32, bench.HF_FP32)}
    reduced = {bench.REDUCED: _Fake([9], [[1, 3]])}
    assert bench._check(equal | reduced, rows) == {bench.FP32: [1, 1], bench.HF_FP32: [1, 1], bench.REDUCED: [0, 1]}
    with pytest.raises(JobError, match="only 0 of 1 answers of qvl-batch fp32"):
        bench._check(equal | {bench.FP32: _Fake([9], [[1, 3]])}, rows)
    with pytest.raises(JobError, match="only 0 of 1 answers of OpenVINO GenAI fp32"):
        bench._check(equal | {bench.OV_FP32: _Fake([9], [[7, 7]])}, rows)
    with pytest.raises(JobError, match="not of the same tokens"):
        bench._check(equal | {bench.HF_FP32: _Fake([8], [[1, 2]])}, rows)


def test_ratios_are_over_the_best_of_each_peer():
    speed = {bench.FP32: 3.0, bench.REDUCED: 5.0, bench.HF_FP32: 1.0, bench.HF_BF16: 2.0}
    assert bench._ratios(speed) == {"hf_fp32": 3.0, "hf": 2.5}
    assert bench._ratios(speed | {bench.OV_FP32: 2.0, bench.OV_OWN: 1.0})["openvino"] == 2.5


def test_the_fastest_batch_stays(monkeypatch):
    class Quick(Peer):
        prompt_tokens = _images = _vision = _answer = lambda *_: []

    peer = Quick(1)
    monkeypatch.setattr("benchmark.rows.seconds", lambda _: {1: 3.0, 4: 1.0, 8: 2.0}[peer.batch])
    assert set(peer.choose_batch(Rows([b""] * 9, ["x"] * 9))) == {1, 4, 8}
    assert peer.batch == 4


def test_skewed_lengths_are_what_they_are_called():
    lengths = _skewed_lengths(SKEW_ROWS)
    assert lengths.max() == MOST_TOKENS
    assert 0.8 * MEAN_TOKENS < lengths.mean() < 1.2 * MEAN_TOKENS


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rows": 0}, "--rows must be at least 1"), ({"against": ("openvino",)}, r"venv/bin/python is missing; `make op")],
)
def test_what_cannot_be_measured_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        bench.BenchConfig(bundle=tmp_path, checkpoint=TINY, openvino=tmp_path, **options)


@pytest.mark.long
def test_the_bench_measures_the_tiny_model(tiny_bundle, ray_env, tmp_path):
    command = [sys.executable, "jobs/bench.py", "--bundle", tiny_bundle.path, "--checkpoint", TINY]
    command += ["--rows", 8, "--rounds", 1, "--new-tokens", 4, "--ray-rows", 16, "--output", tmp_path]
    subprocess.run(list(map(str, command)), cwd=ROOT, env=ray_env, check=True)
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert set(figures["ratios"]) == {
        "hf_fp32", "hf", "vision_peak", "prefill_peak", "decode_bandwidth", "skew", "skew_with_prefill",
        "four_prompts", "second_prompt", "ray", "rows_10x_time", "rows_10x_memory",
    }  # fmt: skip
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert (tmp_path / "bench.svg").read_text().count("<rect") == 4
