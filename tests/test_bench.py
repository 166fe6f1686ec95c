"""The bench compares equal work only, and says who failed; the whole of it is a long test."""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import QUESTIONS, ROOT, TINY, exported
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import bench
from benchmark import answers, gpu, limits, native
from benchmark.bundle_rows import BundleRows
from benchmark.contenders import FP32, HF_BF16, HF_FP32, NATIVE, OV_FP32, OV_OWN, REDUCED, check_equal_work
from benchmark.figures import read_rows
from benchmark.host import Host
from benchmark.image_sets import LEAST_PIXELS, MOST_PIXELS, mixed, mixed_sizes, squares
from benchmark.ours import Ours, prefill_groups
from benchmark.rows import Peer, Rows
from benchmark.situations import MEAN_TOKENS, MOST_TOKENS, SKEW_ROWS, _skewed_lengths
from export.checkpoint import load_checkpoint
from qvl_batch.bundle.layout import Resolution
from qvl_batch.bundle.loading import Bundle
from qvl_batch.decoder.decoder import PrefillRow
from qvl_batch.errors import ConfigError, JobError
from qvl_batch.forecast.memory import PeakMemory, family
from qvl_batch.images.pixels import decode_image
from qvl_batch.runtime.devices import has_cuda
from qvl_batch.schema import Answer, Failure

#: Sizes of images of a native bundle, as wide as those of the tiny checkpoint.
ANY_SIZE = Resolution(28, None, 56 * 56, 3000 * 28 * 28)


def test_a_contender_answers_from_its_own_process():
    with Host("rows", "benchmark.rows", "Rows", [b"a", b"b"], ["x", "y"]) as host:
        assert host.call("part", 1, 2) == Rows([b"b"], ["y"])
        assert host.seconds("part", 0, 1) >= 0
        assert host.peak_memory() > 1e6
        with pytest.raises(RuntimeError, match=r"rows failed: (.|\n)*no attribute 'nothing'"):
            host.call("nothing")
        assert host.call("part", 0, 1) == Rows([b"a"], ["x"])
        *_, contender = family(os.getpid())
        os.kill(contender, signal.SIGKILL)
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


# Functions of the bench are called here: a whole run takes minutes, and its figures cannot be chosen.
def test_only_equal_work_is_compared():
    rows = Rows([b""], ["x"])
    equal = {name: _Fake([9], [[1, 2]]) for name in (FP32, HF_FP32)}
    reduced = {REDUCED: _Fake([9], [[1, 3]])}
    assert check_equal_work(equal | reduced, rows) == {
        FP32: [1, 1],
        HF_FP32: [1, 1],
        REDUCED: [0, 1],
    }
    with pytest.raises(JobError, match="only 0 of 1 answers of qvl-batch fp32"):
        check_equal_work(equal | {FP32: _Fake([9], [[1, 3]])}, rows)
    with pytest.raises(JobError, match="only 0 of 1 answers of OpenVINO GenAI fp32"):
        check_equal_work(equal | {OV_FP32: _Fake([9], [[7, 7]])}, rows)
    with pytest.raises(JobError, match="different numbers of tokens"):
        check_equal_work(equal | {HF_FP32: _Fake([8], [[1, 2]])}, rows)
    with pytest.raises(JobError, match="only 0 of 1 answers of qvl-batch fp32, native"):
        check_equal_work(equal | {NATIVE: _Fake([9], [[1, 3]])}, rows)


def test_ratios_are_over_the_best_of_each_peer():
    speed = {FP32: 3.0, REDUCED: 5.0, HF_FP32: 1.0, HF_BF16: 2.0}
    assert bench.ratios_of({FP32: 3.0, HF_FP32: 1.0}) == {"hf_fp32": 3.0}
    assert bench.ratios_of(speed) == {"hf_fp32": 3.0, "hf": 2.5}
    assert bench.ratios_of(speed | {OV_FP32: 2.0, OV_OWN: 1.0})["openvino"] == 2.5


def test_a_native_bundle_is_compared_by_images_and_by_their_tokens():
    mix = f"{NATIVE}, mixed sizes"
    speed, tokens = {FP32: 4.0, NATIVE: 3.0, mix: 5.0}, {FP32: 400.0, NATIVE: 300.0, mix: 380.0}
    assert native.ratios_of(speed, tokens) == {"native_over_fixed": 0.75, "mixed_over_fixed": 0.95}
    peers = {f"{name}, mixed sizes": 2.0 for name in (HF_FP32, OV_FP32)}
    ratios = native.ratios_of(speed | peers, tokens | peers)
    assert (ratios["hf_mixed"], ratios["openvino_mixed"]) == (2.5, 2.5)


def test_the_mix_has_images_from_tiny_to_a_megapixel_and_the_mean_of_a_square():
    sizes = mixed_sizes(64, ANY_SIZE, 576)
    assert sizes == mixed_sizes(64, ANY_SIZE, 576)
    tokens = np.array([width * height / 28**2 for width, height in sizes])
    assert all(width % 28 == height % 28 == 0 for width, height in sizes)
    assert LEAST_PIXELS / 28**2 <= tokens.min() < 20
    assert 1200 < tokens.max() <= MOST_PIXELS / 28**2
    for count in (8, 16, 32, 64):  # a part of the rows is like all of them
        assert tokens[:count].mean() == pytest.approx(576, rel=0.12)
    assert tokens.mean() == pytest.approx(576, rel=0.02)
    assert min(width / height for width, height in sizes) < 0.5
    assert max(width / height for width, height in sizes) > 2


def test_a_bundle_of_few_sizes_cannot_answer_the_mix():
    with pytest.raises(ConfigError, match="--native-bundle takes images of 3136 to 200704 pixels, which is no range"):
        mixed_sizes(4, replace(ANY_SIZE, max_pixels=256 * 28**2), 576)


def test_all_contenders_see_the_pixels_of_the_files(tiny_bundle, demo, tmp_path):
    rows = read_rows(tiny_bundle.path, QUESTIONS, 3, tmp_path)
    layout = replace(tiny_bundle.manifest.layout, resolution=ANY_SIZE)
    any_size = BundleRows(replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, layout=layout)))
    square, mix = squares(rows, tiny_bundle.manifest.layout.resolution), mixed(rows, ANY_SIZE, 576)
    assert square.image_tokens == 3 * 576
    for images in (square, mix):
        seen = any_size.images(images.rows)
        files = [np.asarray(decode_image(file)) for file in images.rows.files]
        assert all(np.array_equal(*pair) for pair in zip(seen, files, strict=True))
        sizes, lengths = any_size.work(images.rows)
        assert images.image_tokens == sum(height * width for height, width in sizes) / 28**2
        text = [len(any_size.tokens(prompt, (0, 0)).input_ids) for prompt in images.rows.prompts]
        assert lengths == [image // 28**2 + rest for image, rest in zip(map(math.prod, sizes), text, strict=True)]
    assert BundleRows(tiny_bundle).images(square.rows)[0].shape == (672, 672, 3)
    assert rows.prompts == square.rows.prompts == mix.rows.prompts == [row["prompt"] for row in demo[:3]]


def test_rows_that_are_prefilled_together_are_few_short_and_alike():
    rows = [PrefillRow([0] * length) for length in (500, 30, 1500, 520, 31, 490, 700, 29)]
    groups = prefill_groups(rows, 2, 1024)
    assert [[len(row.input_ids) for row in group] for group in groups] == [
        [29, 30], [31], [490, 500], [520], [700], [1500],
    ]  # fmt: skip


def test_stages_prefill_rows_as_the_engine_does(tiny_bundle, tmp_path):
    engine = Ours(tiny_bundle.path, 4, 2)
    rows = read_rows(tiny_bundle.path, QUESTIONS, 3, tmp_path)
    batch = sorted(engine.encode(rows), key=lambda row: len(row.input_ids))
    answers = engine.decode([engine.request(row) for row in batch])
    assert engine.prefill(batch).tolist() == [answer[0] for answer in answers]
    engine.decoder.prefill_tokens = 256  # each row is longer
    assert engine.prefill(batch).tolist() == [answer[0] for answer in answers]


def test_features_come_in_the_order_of_the_images(native_bundle, tmp_path):
    engine = Ours(native_bundle.path, 1, 1)
    rows = read_rows(native_bundle.path, QUESTIONS, 4, tmp_path)
    sides = (56, 112, 28, 84)
    images = [image[:side, :side] for image, side in zip(engine.rows.images(rows), sides, strict=True)]
    for image, features in zip(images, engine.encode_images(images), strict=True):
        assert np.array_equal(features, engine.vision.encode(image))


def test_the_fastest_batch_stays(monkeypatch):
    class Quick(Peer):
        prompt_tokens = _images = _vision = _answer = lambda *_: []

    peer = Quick(1)
    monkeypatch.setattr("benchmark.rows.seconds", lambda _: {1: 3.0, 4: 1.0, 8: 2.0}[peer.batch])
    assert set(peer.choose_batch(Rows([b""] * 9, ["x"] * 9))) == {1, 4, 8}
    assert peer.batch == 4


def test_skewed_lengths_are_what_they_are_called():
    # Private, since answering rows of these lengths takes hours.
    lengths = _skewed_lengths(SKEW_ROWS)
    assert lengths.max() == MOST_TOKENS
    assert 0.8 * MEAN_TOKENS < lengths.mean() < 1.2 * MEAN_TOKENS


class _Answers:
    """Gives each row as many tokens as it is said to have, and no more than it may."""

    def __init__(self, tokens):
        self._tokens, self.calls = tokens, []

    def answer(self, rows, most):
        self.calls.append(([row.conversation[0].text for row in rows], most))
        tokens = [self._tokens[row.conversation[0].text] for row in rows]
        return [SimpleNamespace(failure=None, answer_tokens=min(each, most)) for each in tokens]


#: What a kind of answers is to know of a bundle whose images are squares.
SQUARES = SimpleNamespace(layout=SimpleNamespace(resolution=SimpleNamespace(image_size=None)))


def test_several_answers_are_compared_with_one_of_rows_with_an_image():
    resolution = SimpleNamespace(image_size=56, grid=lambda height, width: (height // 28, width // 28))
    manifest = SimpleNamespace(layout=SimpleNamespace(resolution=resolution), decoder=SimpleNamespace(hidden_size=8))
    kind = answers.KINDS["four_samples"]
    (four,), (one,) = kind.rows(["a"], manifest), kind.beside.rows(["a"], manifest)
    assert (four.sampling.samples, one.sampling.samples) == (4, 1)
    assert four.images[0].features.shape == (4, 8)
    assert np.array_equal(four.images[0].features, one.images[0].features)
    assert answers.KINDS["guided"].beside == answers.Kind()


def test_a_kind_of_answers_is_compared_with_free_text_of_as_many_tokens(monkeypatch):
    took = iter([3.0, 6.0, 8.0, 4.0, 1.0, 5.0])  # in the first round, free text comes first

    def seconds(call):
        call()
        return next(took)

    monkeypatch.setattr("benchmark.answers.seconds", seconds)
    own, free = _Answers({"a": 5, "b": 7, "c": 5}), _Answers(dict.fromkeys("abc", 99))
    kind = answers.Kind(tokens=64)
    figures, ratio = answers.beside(kind, (own, free), ["a", "b", "c"], SQUARES, rounds=3)
    assert ratio == 0.5  # of 3 / 6, 4 / 8 and 1 / 5
    assert (figures["tokens"], figures["rows"]) == (5, 3)
    assert (figures["rows_per_second"], figures["free_rows_per_second"]) == (3 / 6, 3 / 3)
    assert own.calls == [(["a", "b", "c"], 64), *[(["a", "c", "a"], 5)] * 4]
    assert free.calls == [(["a", "c", "a"], 5)] * 4


def test_answers_of_other_lengths_and_failed_rows_are_not_compared():
    own, free = _Answers({"a": 5}), _Answers({"a": 4})
    with pytest.raises(JobError, match="answers to the same rows do not all have 5 tokens"):
        answers.beside(answers.Kind(), (own, free), ["a"], SQUARES, rounds=1)
    failed = SimpleNamespace(answer=lambda *_: [Answer.failed(Failure("answer", "TruncatedError", "cut off"))])
    with pytest.raises(JobError, match="a row fails: cut off"):
        answers.beside(answers.Kind(), (failed, free), ["a"], SQUARES, rounds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rows": 0}, "--rows must be at least 1"), ({"against": ("openvino",)}, r"venv/bin/python is missing; `make op")],
)
def test_what_cannot_be_measured_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        bench.BenchConfig(bundle=tmp_path, checkpoint=TINY, openvino=tmp_path, **options)


def test_a_native_bundle_is_compared_with_one_of_squares_of_the_same_checkpoint(tiny_bundle, tmp_path):
    fixed = tiny_bundle.manifest
    any_size = replace(fixed, layout=replace(fixed.layout, resolution=ANY_SIZE))
    few_sizes = replace(fixed, layout=replace(fixed.layout, resolution=replace(ANY_SIZE, max_pixels=672**2)))
    other = replace(any_size, source=replace(fixed.source, sha256="0"))
    manifests = {
        "fixed": fixed, "native": any_size, "int8": replace(any_size, dtype="int8"), "few": few_sizes, "other": other,
    }  # fmt: skip
    for name, manifest in manifests.items():
        (tmp_path / name).mkdir()
        manifest.write(tmp_path / name)
    native.check_pair(tmp_path / "fixed", tmp_path / "native")
    for name, message in {
        "fixed": "--native-bundle .*fixed takes squares: export it with --image-size native",
        "int8": "--native-bundle .*int8 is not in fp32",
        "few": "--native-bundle takes images of 3136 to 451584 pixels",
        "other": "--native-bundle .*other is not of the same checkpoint",
    }.items():
        config = bench.BenchConfig(bundle=tmp_path / "fixed", native_bundle=tmp_path / name, checkpoint=TINY)
        with pytest.raises(ConfigError, match=message):
            bench.bench(config, Console())
    with pytest.raises(ConfigError, match=r"--bundle .*native does not take squares"):
        native.check_pair(tmp_path / "native", tmp_path / "native")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "--slots must be at least 1"),
        ({"checkpoint": TINY}, "--bundle and --checkpoint belong together"),
        ({"slots": 4, "step_rows": (1, 8)}, "--step-rows must be from 1 to --slots, which is 4"),
    ],
)
def test_what_a_gpu_cannot_measure_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        gpu.GpuBenchConfig(**options)


@pytest.mark.skipif(has_cuda(), reason="this machine has an NVIDIA driver")
def test_without_a_gpu_nothing_is_made_for_one(tmp_path):
    command = [sys.executable, "jobs/bench.py", "--device", "cuda", "--output", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("bench: --device cuda: ")
    assert not (tmp_path / "out").exists()


def test_what_a_contender_takes_of_a_card_is_what_grows_while_it_works(monkeypatch):
    class Used:
        now = 100

        def call(self, _):
            return self.now

    class Grows:
        def __init__(self, *_):
            Used.now += 7

        def call(self, method):
            Used.now += 5
            return method

        seconds = call

    monkeypatch.setattr("benchmark.gpu.Host", Grows)
    with ExitStack() as stack:
        stack.enter_context = lambda made: made
        contender = gpu.OnCard(Used(), stack, "x", "y", "z")
        Used.now += 1000  # somebody else's
        assert contender.call("answer") == "answer"
        assert contender.seconds("answer") == "answer"
    assert contender.held == 17


def test_a_peer_that_does_not_fit_is_tried_no_larger():
    class Large(Peer):
        prompt_tokens = _images = _vision = lambda *_: []

        def _answer(self, rows, *_):
            if len(rows) > 4:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return [[]] * len(rows)

    peer = Large(1)
    assert set(peer.choose_batch(Rows([b""] * 16, ["x"] * 16))) == {1, 4}
    with pytest.raises(RuntimeError, match="out of memory"):
        Large(1, batches=(8,)).choose_batch(Rows([b""] * 16, ["x"] * 16))


def test_operations_of_the_vision_tower_are_those_that_pytorch_counts():
    checkpoint = load_checkpoint(TINY)
    visual, config = checkpoint.model.model.visual, checkpoint.config
    checkpoint.model.set_attn_implementation("eager")  # its products are counted
    sizes = [(224, 224), (140, 196), (28, 252)]
    counts = []
    for height, width in sizes:
        grid = torch.tensor([[1, height // 14, width // 14]])
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            visual(torch.zeros(height * width // 14**2, 2 * 3 * 14**2), grid)
        second_frame = 2 * height * width * 3 * config.vision_config.hidden_size
        counts.append(counter.get_total_flops() - second_frame)
        assert limits.vision_operations(config, [(height, width)]) == counts[-1]
    assert limits.vision_operations(config, sizes) == sum(counts) / 3


def test_operations_of_a_prefill_are_those_that_pytorch_counts():
    checkpoint = load_checkpoint(TINY)
    checkpoint.model.set_attn_implementation("eager")
    counts = []
    for length in (7, 30):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            checkpoint.model(input_ids=torch.ones((1, length), dtype=torch.int64), logits_to_keep=1)
        counts.append(counter.get_total_flops())
    assert limits.prefill_operations(checkpoint.config, [7, 30]) == sum(counts) / 2


def test_a_step_reads_weights_and_cache_and_no_table(tiny_bundle):
    shape = tiny_bundle.manifest.decoder
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4
    weights = limits.step_bytes(tiny_bundle, 0, 600)
    assert limits.step_bytes(tiny_bundle, 3, 600) - weights == 3 * 600 * cache
    layer = shape.hidden_size * (2 * shape.hidden_size + 2 * shape.kv_heads * shape.head_dim)
    products = shape.layers * (layer + 3 * shape.hidden_size * shape.intermediate_size)
    assert 1 < weights / (4 * (products + shape.vocab_size * shape.hidden_size)) < 1.02


@pytest.mark.long
def test_the_model_for_a_gpu_is_made_and_exported_once(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmark.gpu.require_cuda", lambda _: 13)
    config = gpu.GpuBenchConfig(shape="bench", output=tmp_path)
    checkpoint, bundle, cpu_vision = gpu.prepare(config, Console())  # what follows in `bench` needs a GPU
    assert {checkpoint.parent, bundle.parent, cpu_vision.parent} == {tmp_path}
    towers = [(m.dtype, m.vision_dtype) for m in (Bundle.load(path).manifest for path in (bundle, cpu_vision))]
    assert towers == [("bf16", "bf16"), ("bf16", "fp32")]
    (cpu_vision / "bundle.json").unlink()  # as if it had been stopped there
    made = bundle.stat().st_mtime_ns
    assert gpu.prepare(config, Console()) == (checkpoint, bundle, cpu_vision)
    assert bundle.stat().st_mtime_ns == made
    assert Bundle.load(cpu_vision).manifest.vision_dtype == "fp32"


@pytest.mark.parametrize("option", ["bundle", "cpu_vision_bundle"])
def test_a_bundle_for_the_cpu_is_not_measured_as_one_for_a_gpu(option, tiny_bundle, monkeypatch):
    def manifest(path):
        return SimpleNamespace(manifest=SimpleNamespace(device="cuda")) if path == TINY else tiny_bundle

    monkeypatch.setattr("benchmark.gpu.Bundle", SimpleNamespace(load=manifest))
    bundles = {"bundle": TINY, "cpu_vision_bundle": TINY} | {option: tiny_bundle.path}
    message = f"--{option.replace('_', '-')} {tiny_bundle.path} is made for the CPU: export it with --dtype bf16"
    with pytest.raises(ConfigError, match=message):
        gpu.bench(gpu.GpuBenchConfig(checkpoint=TINY, **bundles), Console())


@pytest.mark.long
def test_the_bench_for_a_gpu_runs_on_whatever_the_bundle_is_for(tiny_bundle, tmp_path):
    config = gpu.GpuBenchConfig(
        rows=8, cpu_vision_rows=4, new_tokens=4, rounds=1, slots=8, step_rows=(1, 8), output=tmp_path
    )
    figures = gpu.measured(config, TINY, tiny_bundle.path, tiny_bundle.path, Console())
    json.dumps(figures)
    assert set(figures["ratios"]) == {"hf", "hf_cpu_vision", "vision_peak", "prefill_peak", "step_1", "step_8"}
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    assert set(figures["images_per_second"]) == {*gpu.OURS, *gpu.PEERS.values()}


@pytest.mark.long
def test_what_was_measured_of_a_card_is_kept_if_a_peer_fails(tiny_bundle, tmp_path, monkeypatch):
    def fail(*_):
        raise JobError("out of memory")

    monkeypatch.setattr(gpu, "_peers", fail)  # no option makes it fail
    config = gpu.GpuBenchConfig(rows=4, new_tokens=4, rounds=1, slots=4, step_rows=(1,), at_once=(1,), output=tmp_path)
    with pytest.raises(JobError, match="out of memory"):
        gpu.measured(config, TINY, tiny_bundle.path, None, Console())
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert set(figures["ratios"]) == {"vision_peak", "prefill_peak", "step_1"}
    assert figures["limits"]["copy_gb_per_second"] > 0
    assert figures["versions"]


@pytest.mark.long
def test_the_bench_measures_the_tiny_model(tiny_bundle, ray_env, tmp_path):
    own_sizes = exported(tmp_path / "native", image_size="native")
    command = [sys.executable, "jobs/bench.py", "--bundle", tiny_bundle.path, "--checkpoint", TINY]
    command += ["--native-bundle", own_sizes.path, "--output", tmp_path]
    command += ["--rows", 8, "--rounds", 1, "--new-tokens", 4, "--ray-rows", 16]
    subprocess.run(list(map(str, command)), cwd=ROOT, env=ray_env, check=True)
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert set(figures["ratios"]) == {
        "hf_fp32", "vision_peak", "prefill_peak", "decode_bandwidth", "skew", "skew_with_prefill", "four_prompts",
        "second_prompt", "ray", "rows_10x_time", "rows_10x_memory",
        "native_over_fixed", "mixed_over_fixed", "hf_mixed",
    }  # fmt: skip
    assert all(ratio > 0 for ratio in figures["ratios"].values())
    equal = figures["native"]["answers_equal_to_reference"]
    assert equal[NATIVE] == equal[f"{NATIVE}, mixed sizes"] == [8, 8]
    assert figures["native"]["mean_image_tokens"]["squares"] == 576
    assert set(figures["native"]["operations_per_image_token"]) == {"squares", "mixed"}
    assert (tmp_path / "bench.svg").read_text().count("<rect") == 3


def test_rows_of_a_bench_are_repeated_and_none_of_its_output(tiny_bundle, tmp_path):
    rows = read_rows(tiny_bundle.path, QUESTIONS, 70, tmp_path)
    assert len(rows) == 70
    assert rows.part(0, 6) == rows.part(64, 70)


def test_rows_of_a_bench_have_one_image_and_a_prompt(demo, tmp_path):
    files = [row["image"]["bytes"] for row in demo[:2]]
    images, prompts = [files, files[:1], files[1:], None, files[1:]], ["What?", " ", "Which?", "Where?", None]
    table = pa.table({"id": list("abcde"), "image": images, "prompt": prompts})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = read_rows(tmp_path, tmp_path / "rows.parquet", 2, tmp_path / "out")
    assert rows == Rows([files[1], files[1]], ["Which?", "Which?"])
    pq.write_table(table.slice(0, 2), tmp_path / "none.parquet")
    with pytest.raises(JobError, match=r"none\.parquet has no row with one image and a prompt"):
        read_rows(tmp_path, tmp_path / "none.parquet", 2, tmp_path / "out")
