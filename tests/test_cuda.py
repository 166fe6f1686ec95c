"""What a GPU would be asked to do, as far as that can be seen without one."""

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from answers import complete, demo_rows, feature_shape, requests_of
from checkpoints import penalised_checkpoint
from conftest import ROOT, exported, nodes_of
from quantized import awq, quantized
from shallow import make_shallow
from stand_in.build import PROVIDER, build, build_nvml

from export.config import ExportConfig
from export.half import emulated_graph
from export.package import export_bundle
from qvl_batch.bundle.manifest import DECODER, VISION
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder.decoder import PREFIX_ENTRIES, Decoder, PrefillRow
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.decoder.requests import Request
from qvl_batch.errors import BundleError, ConfigError, DeviceError
from qvl_batch.pipeline.capacity import Card, bytes_beside_slots, slots_on_card
from qvl_batch.pipeline.plan import make_plan
from qvl_batch.runtime.devices import has_cuda, open_cuda, resolve_device, resolve_vision_device
from qvl_batch.runtime.memory import CudaMemory
from qvl_batch.runtime.session import Session

GIB = 1 << 30


class CardOfHostMemory:
    """A stand-in for a GPU: its memory is this machine's, apart from what a program sees as its own."""

    stream = 4711

    def __init__(self):
        self.blocks, self.copied = {}, 0

    def allocate(self, size):
        block = (ctypes.c_char * size)()
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    allocate_host = allocate

    def _check(self, address, size):
        assert any(0 <= address - start <= len(block) - size for start, block in self.blocks.items())

    def copy(self, target, source, size):
        self._check(target, size)
        self._check(source, size)
        self.copied += size
        ctypes.memmove(target, source, size)

    def copy_rows(self, target, source, pitch, width, rows):
        for row in range(rows):
            self.copy(target + row * pitch, source + row * pitch, width)

    def synchronize(self):
        pass

    def ignore_captures(self):
        pass


@pytest.fixture(scope="module")
def half_bundle(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("cuda") / "bf16", dtype="bf16", skip_parity=True)


@pytest.fixture(scope="module")
def paired_requests(tiny_bundle):
    images = requests_of(tiny_bundle, demo_rows(6), 24)
    # Two prompts about each image, so that beginnings are kept and moved.
    return [
        Request(PrefillRow(asked.row.input_ids, request.row.images, request.row.features), 24, [b"%d" % number])
        for number, request in enumerate(images)
        for asked in images[:2]
    ]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A folder of stand-ins for CUDA's libraries."""
    missing = [tool for tool in ("gcc", "nm", "objdump") if shutil.which(tool) is None]
    if missing or not PROVIDER.is_file():
        pytest.skip(f"stand-ins for CUDA's libraries cannot be built here: no {(*missing, PROVIDER.name)[0]}")
    return build(tmp_path_factory.mktemp("libraries"))


def test_libraries_of_cuda_are_found_wherever_pip_installed_them(libraries, tmp_path):
    installed, driver = tmp_path / "path" / "nvidia", tmp_path / "system"
    found = []
    for name, folder in (("libcudart", "cu13"), ("libcudnn", "cudnn")):
        (library,) = libraries.glob(f"{name}.so.*[0-9]")
        (installed / folder / "lib").mkdir(parents=True)
        found.append(shutil.copy(library, installed / folder / "lib"))
    driver.mkdir()
    command = [shutil.which("gcc"), "-shared", "-x", "c", "/dev/null", "-o", driver / "libcuda.so.1"]
    subprocess.run(command, check=True)
    script = """if True:
        from pathlib import Path
        from qvl_batch.runtime.devices import open_cuda
        print(open_cuda("--device cuda").name)
        print(*(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line))"""
    env = os.environ | {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"}
    command = [sys.executable, "-c", script]
    name, loaded = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    assert name == "Stand-in"
    assert set(map(str, found)) <= set(loaded.split())


@pytest.mark.long
def test_rows_in_memory_apart_are_answered_the_same(half_bundle, paired_requests):
    graph = emulated_graph(half_bundle.file(DECODER))
    expected = complete(Decoder(half_bundle, 3, 2, graph=graph), half_bundle, paired_requests)
    memory = CudaMemory(CardOfHostMemory(), device="cpu")
    decoder = Decoder(half_bundle, 3, 2, graph=graph, memory=memory)
    assert complete(decoder, half_bundle, paired_requests) == expected
    assert len({completion.token_ids[0] for completion in expected}) > 1


def test_a_step_copies_tokens_and_their_places_and_nothing_else(half_bundle, paired_requests):
    card = CardOfHostMemory()
    memory = CudaMemory(card, device="cpu")
    decoder = Decoder(half_bundle, 4, 2, graph=emulated_graph(half_bundle.file(DECODER)), memory=memory)
    decoder.prefill(0, [paired_requests[0].row])
    before, blocks = card.copied, len(card.blocks)
    decoder.step(np.array([5]))
    assert card.copied - before == 8 + 24 + 8 + 4 + 8  # token, positions, place, length, next token
    assert len(card.blocks) == blocks


def test_slots_of_the_cache_are_where_they_should_be(half_bundle):
    memory = CudaMemory(CardOfHostMemory())
    buffer = memory.zeros((5, 2, 8, 4), "bfloat16", on_host=False)
    assert (buffer.row_bytes, buffer.size) == (128, 640)
    part = buffer.rows(2, 3)
    assert (part.shape, part.address, part.host) == ((3, 2, 8, 4), buffer.address + 256, None)
    whole = (ctypes.c_uint16 * 320).from_address(buffer.address)
    array = np.frombuffer(whole, np.uint16).reshape(5, 2, 8, 4)
    array[3] = np.arange(64).reshape(2, 8, 4)
    memory.copy(buffer, 3, 1, 5)
    assert np.array_equal(array[1, :, :5], array[3, :, :5])
    assert not array[1, :, 5:].any()
    manifest = half_bundle.manifest
    shape = manifest.decoder
    assert slot_bytes(manifest) == 2 * shape.layers * shape.kv_heads * 1024 * shape.head_dim * 2


@pytest.fixture(scope="module")
def fp32_bundle(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("cuda") / "fp32", device="cuda", skip_parity=True)


@pytest.mark.long
def test_a_decoder_in_fp32_for_a_gpu_answers_as_the_one_for_a_cpu(tiny_bundle, fp32_bundle, paired_requests):
    assert fp32_bundle.manifest.device == "cuda"
    expected = complete(Decoder(tiny_bundle, 3, 2), tiny_bundle, paired_requests)
    assert complete(Decoder(fp32_bundle, 3, 2), fp32_bundle, paired_requests) == expected


def test_sessions_ask_for_one_stream_no_tf32_and_captured_steps(half_bundle, monkeypatch):
    asked = []

    def session(*_, providers):
        asked.extend(providers)
        return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"])

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    Session(half_bundle.file(DECODER), 1, memory=CudaMemory(CardOfHostMemory()), captures=True)
    (name, options), second = asked
    assert (name, second) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["user_compute_stream"] == "4711"
    assert (options["use_tf32"], options["enable_cuda_graph"]) == ("0", "1")


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "found"),
    [
        ("auto", "cuda", "bf16", "cuda"),
        ("auto", "cpu", "fp32", "cpu"),
        ("cuda", "cuda", "fp32", "cuda"),
        ("cpu", "cuda", "bf16", "--device cpu: this bundle's decoder is in bf16 and made for cuda"),
    ],
)
def test_the_decoder_runs_where_it_was_made_for(requested, device, dtype, found, tiny_bundle):
    manifest = dataclasses.replace(tiny_bundle.manifest, device=device, dtype=dtype)
    if found.startswith("--"):
        with pytest.raises(DeviceError, match=found):
            resolve_device(requested, manifest)
    else:
        assert resolve_device(requested, manifest) == found


@pytest.mark.parametrize(
    ("requested", "dtype", "found"),
    [
        ("auto", "fp32", "cpu"), ("cuda", "fp32", "cuda"), ("auto", "fp16", "cuda"), ("auto", "int8", "cpu"),
        ("cuda", "int8", "--vision-device cuda: this bundle's vision tower is in int8, which runs on cpu"),
        ("cpu", "bf16", "--vision-device cpu: this bundle's vision tower is in bf16, which runs on cuda"),
    ],
)  # fmt: skip
def test_the_vision_tower_runs_where_its_precision_does(requested, dtype, found, tiny_bundle):
    manifest = dataclasses.replace(tiny_bundle.manifest, vision_dtype=dtype)
    if found.startswith("--"):
        with pytest.raises(DeviceError, match=found):
            resolve_vision_device(requested, manifest)
    else:
        assert resolve_vision_device(requested, manifest) == found


@pytest.mark.skipif(has_cuda(), reason="this machine has an NVIDIA driver")
def test_no_gpu_is_an_error_that_says_what_is_missing():
    with pytest.raises(DeviceError, match=r"--device cuda: there is no NVIDIA driver on this machine .libcuda.so.1"):
        open_cuda("--device cuda")


GPUS = """
import os, sys
from qvl_batch.errors import DeviceError
from qvl_batch.pipeline.capacity import card_of_this_process
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
for visible in sys.argv[1:]:
    os.environ.update({"CUDA_VISIBLE_DEVICES": visible} if visible != "unset" else {})
    try:
        print(card_of_this_process())
    except DeviceError as error:
        print(error)
"""


def _cards(libraries, *visible):
    """The card, or the error, of a process to which those are visible, one after another."""
    env = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", GPUS, *visible]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()


LARGE, SMALL = "Stand-in, 75.2 of 85.9 GB free", "Small stand-in, 21.5 of 25.8 GB free"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in for NVML cannot be built here: no gcc")
def test_a_decoders_card_is_the_first_that_its_process_may_see(tmp_path):
    found = _cards(build_nvml(tmp_path), "unset", "1", "GPU-5b", "1,0", "GPU-5a,GPU-5b")
    assert found == [LARGE, SMALL, SMALL, SMALL, LARGE]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the stand-in for NVML cannot be built here: no gcc")
def test_a_card_that_is_not_there_is_named_and_the_next_question_is_answered(tmp_path):
    asked = ("7", "GPU-5c", "7,0", "")
    *refused, card = _cards(build_nvml(tmp_path), *asked, "0")
    for visible, said in zip(asked, refused, strict=True):
        assert f"GPU '{visible.split(',')[0]}'" in said
    assert ["Not Found" in said for said in refused] == [False, True, False, True]
    assert card == LARGE


@pytest.mark.skipif(has_cuda(), reason="this machine has an NVIDIA driver")
def test_without_a_driver_no_card_is_found_and_the_driver_is_named(tmp_path):
    (said,) = _cards(tmp_path, "unset")
    assert "NVML Shared Library Not Found" in said
    assert "install the NVIDIA driver" in said


def _plan_on_cards(bundle, cards, vision_device="cpu", **options):
    config = CaptionConfig(bundle=bundle.path, input=("x",), output=str(ROOT), **options)
    return make_plan(config, bundle.manifest, nodes_of(16), cards, vision_device)


def test_slots_are_what_a_card_holds_beside_weights_and_work(half_bundle):
    manifest, card = half_bundle.manifest, Card("H100", 3 * GIB, 4 * GIB)
    slots = slots_on_card(card, manifest, vision_too=True)
    taken = bytes_beside_slots(manifest, vision_too=True)
    held = taken + (slots + PREFIX_ENTRIES) * slot_bytes(manifest)
    assert held <= card.free - 0.05 * card.total < held + slot_bytes(manifest)
    assert slots_on_card(card, manifest, vision_too=False) > slots
    plan = _plan_on_cards(half_bundle, [Card("H100", 70 * GIB, 80 * GIB), card])
    assert (plan.slots, plan.decoder_workers, plan.card) == (128, 2, card)
    assert "a GPU (H100, 3.2 of 4.3 GB free) and 128 slots of 1.0 MB" in str(plan)
    joined = _plan_on_cards(half_bundle, [card], "cuda")
    assert joined.is_joined
    assert "vision on the same GPU" in str(joined)
    assert joined.threads["vision"] == 2


def test_too_much_for_a_card_is_refused_with_what_would_do(half_bundle):
    small = Card("T4", 2 * GIB, 2 * GIB)
    with pytest.raises(DeviceError, match=r"the GPU .T4, 1.1 of 2.1 GB free. is too small: .*--vision-device cpu"):
        _plan_on_cards(half_bundle, [dataclasses.replace(small, free=GIB)], "cuda")
    with pytest.raises(ConfigError, match=r"--slots 9999: beside weights and activations, \d+ fit on the GPU .T4, "):
        _plan_on_cards(half_bundle, [small], slots=9999)
    with pytest.raises(ConfigError, match="--decoder-workers 2: a decoder takes a GPU, and there are 1"):
        _plan_on_cards(half_bundle, [small], decoder_workers=2)


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        (
            "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of 8",
            DeviceError,
            "the GPU has no memory left: lower --slots",
        ),
        ("CUDA failure 2: out of memory ; GPU=0", DeviceError, "the GPU has no memory left: lower --slots"),
        ("INVALID_ARGUMENT : unexpected shape", BundleError, "unexpected shape"),
    ],
)
def test_a_full_card_is_known_by_what_onnx_runtime_says(said, error, message, half_bundle, monkeypatch):
    def session(*_, **__):
        raise RuntimeError(said)

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    with pytest.raises(error, match=message):
        Session(half_bundle.file(DECODER), 1, memory=CudaMemory(CardOfHostMemory()))


@pytest.fixture(scope="module")
def asked_of_a_gpu(libraries):
    def report(bundle):
        command = [sys.executable, ROOT / "tests" / "stand_in" / "report.py", bundle]
        env = os.environ | {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(ROOT)}
        return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)

    return report


def _stays_on_the_gpu(report):
    for graph in (DECODER, VISION):
        assert set(report["nodes"][graph]) == {"CUDAExecutionProvider", "copies"}
        assert not report["nodes"][graph]["copies"]
    # Token, place, length and next token, of two rows and then of one.
    crossed = [(step["crossings"], step["crossed_bytes"]) for step in report["steps"]]
    assert crossed == [(5, 52 * rows) for rows in (2, 2, 2, 2, 1, 1)]
    # Captured when first run, and played back from then on.
    assert [step["captures"] for step in report["steps"]] == [1, 0, 0, 0, 1, 0]
    assert all(step["launches"] == 1 for step in report["steps"])


def test_every_node_runs_on_the_gpu_and_only_tokens_cross_the_bus(half_bundle, asked_of_a_gpu):
    report = asked_of_a_gpu(half_bundle.path)
    _stays_on_the_gpu(report)
    # Of a decoder layer. Few, since in a step each is a launch that takes as long as its work.
    layer = {"MatMul": 5, "Split": 2, "RotaryEmbedding": 1, "GroupQueryAttention": 1, "QuickGelu": 1}
    nodes = report["nodes"][DECODER]["CUDAExecutionProvider"]
    assert {name: nodes[name] for name in layer} == {name: 4 * count for name, count in layer.items()}
    assert nodes["Cast"] <= 4 * 6 + 5
    assert report["nodes"][VISION]["CUDAExecutionProvider"]["MultiHeadAttention"] == 4
    shape = half_bundle.manifest.decoder
    assert report["moved"]["moved_bytes"] % (2 * shape.layers * shape.kv_heads * shape.head_dim * 2) == 0
    assert not report["moved"]["crossings"]
    assert report["features"] == [[1, *feature_shape(half_bundle.manifest)]]
    assert (report["last_error"], report["not_freed"]) == (0, 0)
    _attention_is_fused(report)
    # Rows of whatever lengths take no more than the decoder had when it started.
    assert report["memory"]["added"] == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "dtype", "in_steps", "in_vision"),
    [
        ("3b", "bf16", r"grp8_bf1610kernel_mha", "attention_kernel_batched"),
        ("3b", "fp16", r"grp8_fp1610kernel_mha", "flash_fwd"),
        ("7b", "bf16", "flash_fwd_splitkv", "attention_kernel_batched"),
    ],
)
def test_attention_of_published_shapes_is_fused(shape, dtype, in_steps, in_vision, tmp_path, asked_of_a_gpu):
    checkpoint = make_shallow(tmp_path / "checkpoint", shape)
    export_bundle(ExportConfig(checkpoint=checkpoint, output=tmp_path / "bundle", dtype=dtype, skip_parity=True))
    report = asked_of_a_gpu(tmp_path / "bundle")
    _stays_on_the_gpu(report)
    _attention_is_fused(report, in_steps, in_vision)
    memory = report["memory"]
    assert memory["added"] == 0
    assert 0.75 * memory["planned"] <= memory["decoder"] + memory["vision"] <= memory["planned"]


@pytest.mark.long
def test_a_checkpoints_integers_stay_on_the_gpu(tmp_path, asked_of_a_gpu):
    base, checkpoint = make_shallow(tmp_path / "base", "3b"), tmp_path / "checkpoint"
    quantized(checkpoint, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, awq(128), base)
    bundle = exported(tmp_path / "bundle", checkpoint, dtype="checkpoint", device="cuda", skip_parity=True)
    report = asked_of_a_gpu(bundle.path)
    _stays_on_the_gpu(report)
    assert report["nodes"][DECODER]["CUDAExecutionProvider"]["MatMulNBits"] == 2 * 5
    # Of one row by kernels that read integers; of many, each weight is written in fp16 first.
    for run, kernel in {
        "prefill": "Dequantize4Bits",
        "step": "Float4BitsKernelM1",
        "rest": "Float4BitsKernelM1",
    }.items():
        assert any(re.search(kernel, name) for name in report["kernels"][run]), run
    memory = report["memory"]
    assert memory["added"] == 0
    assert 0.75 * memory["planned"] <= memory["decoder"] + memory["vision"] <= memory["planned"]


def _attention_is_fused(report, in_steps="flash_fwd_splitkv", in_vision="attention_kernel_batched"):
    """And none of it cuDNN's, which has not even been asked: the stand-in's has no attention."""
    wanted = {"prefill": "flash_fwd", "step": in_steps, "rest": "flash_fwd_splitkv", "vision": in_vision}
    for run, kernel in wanted.items():
        names = report["kernels"][run]
        assert any(re.search(kernel, name) for name in names), (run, names)
        assert not any("softmax" in name.lower() for name in names), (run, names)


@pytest.mark.long
def test_so_they_do_with_a_repetition_penalty_in_fp16(tmp_path, asked_of_a_gpu):
    checkpoint = penalised_checkpoint(tmp_path / "checkpoint", 1.05)
    bundle = exported(tmp_path / "bundle", checkpoint=checkpoint, dtype="fp16", skip_parity=True)
    _stays_on_the_gpu(asked_of_a_gpu(bundle.path))


@pytest.mark.long
def test_in_fp32_nothing_is_captured(fp32_bundle, asked_of_a_gpu):
    report = asked_of_a_gpu(fp32_bundle.path)
    assert not any(step["captures"] + step["launches"] for step in report["steps"])
    # Shapes alone are put together on the host.
    assert set(report["nodes"][DECODER]["CPUExecutionProvider"]) == {"Concat"}
    assert not any(report["nodes"][graph]["copies"] for graph in (DECODER, VISION))
