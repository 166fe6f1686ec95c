"""What only a GPU can say: that it answers as a CPU does, holds what was planned, and says when it is full."""

import subprocess
import sys

import numpy as np
import pytest
from answers import complete, demo_rows, requests_of, turn
from conftest import QUESTIONS, ROOT, TINY, exported
from quantized import awq, gptq, quantized
from reference import letterboxed
from shallow import make_shallow

from export.config import ExportConfig
from export.half import emulated_graph
from export.package import export_bundle
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, VISION
from qvl_batch.captioner import Captioner
from qvl_batch.decoder.decoder import PREFIX_ENTRIES, Decoder
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.errors import DeviceError
from qvl_batch.pipeline.capacity import CARD_RESERVE, bytes_beside_slots, card_of_this_process
from qvl_batch.runtime.devices import memory_on, open_cuda
from qvl_batch.vision.encoder import VisionEncoder


def _missing():
    """What keeps this machine from running these tests, nothing if they can run."""
    try:
        open_cuda("a GPU's tests")
    except DeviceError as error:
        return str(error)
    return ""


MISSING = _missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
#: Least part of the demo's tokens, position by position, that half precision shares with a CPU's fp32.
AGREEMENT = {"bf16": 0.95, "fp16": 0.98}
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Bundles of the tiny checkpoint for a GPU, by type."""
    made = {}

    def bundle(dtype):
        if dtype not in made:
            output = tmp_path_factory.mktemp("gpu") / dtype
            made[dtype] = exported(output, dtype=dtype, device="cuda", skip_parity=True)
        return made[dtype]

    return bundle


@pytest.fixture(scope="module")
def on_cpu(tiny_bundle):
    """Requests and answers of all demo rows on the CPU, in fp32."""
    requests = requests_of(tiny_bundle, demo_rows(), NEW_TOKENS)
    return requests, complete(Decoder(tiny_bundle, 8, 2), tiny_bundle, requests)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", ["3b", "7b"])
def test_attention_of_published_shapes_is_what_was_emulated(shape, dtype, tmp_path):
    """The GPU takes other kernels for their number and size of heads than for the tiny model's."""
    checkpoint = make_shallow(tmp_path / "checkpoint", shape)
    export_bundle(ExportConfig(checkpoint=checkpoint, output=tmp_path / "bundle", dtype=dtype, skip_parity=True))
    bundle, bound = Bundle.load(tmp_path / "bundle"), {"bf16": 0.1, "fp16": 0.01}[dtype]
    emulated = {name: emulated_graph(bundle.file(name)) for name in (VISION, DECODER)}
    pixels = letterboxed(demo_rows(1)[0]["image"]["bytes"])
    expected = VisionEncoder(bundle, 8, graph=emulated[VISION]).encode(pixels)
    features = VisionEncoder(bundle, 1, "cuda").encode(pixels)
    assert np.abs(features - expected).max() <= bound * np.abs(expected).max()
    rows = [turn(bundle.manifest.layout, [5] * length, expected) for length in (3, 40, 9)]
    prefix = rows[1].images[0].stop
    decoders = [
        Decoder(bundle, 4, 8, graph=emulated[DECODER], keep_logits=True),
        Decoder(bundle, 4, 1, memory=memory_on("cuda"), keep_logits=True),
    ]
    for run in (
        lambda decoder: decoder.prefill(0, rows),
        *[lambda decoder: decoder.step(np.array([7, 8, 9]))] * 3,
        lambda decoder: (
            decoder.store_prefix(0, 0, prefix),
            decoder.prefill_part(3, rows[1], prefix, len(rows[1].input_ids), 0),
        ),
        *[lambda decoder: decoder.step(np.array([7, 8, 9, 10]))] * 3,
    ):
        for decoder in decoders:
            run(decoder)
        cpu, gpu = (decoder.logits for decoder in decoders)
        assert cpu.shape == gpu.shape
        assert np.abs(gpu - cpu).max() <= bound * np.abs(cpu).max()


def _answered_on_gpu(bundle, slots=8):
    requests = requests_of(bundle, demo_rows(), NEW_TOKENS, VisionEncoder(bundle, 1, "cuda"))
    return requests, complete(Decoder(bundle, slots, 1, memory=memory_on("cuda")), bundle, requests)


def test_in_fp32_every_demo_row_has_the_tokens_of_the_cpu(bundles, on_cpu):
    requests, answers = _answered_on_gpu(bundles("fp32"))
    for found, expected in zip(requests, on_cpu[0], strict=True):
        (features,), (right,) = found.row.features, expected.row.features
        assert np.abs(features - right).max() <= 1e-4 * np.abs(right).max()
    assert answers == on_cpu[1]


@pytest.mark.parametrize("dtype", AGREEMENT)
def test_in_half_precision_nearly_all_tokens_are_those_of_the_cpu(dtype, bundles, on_cpu, record_property):
    _, answers = _answered_on_gpu(bundles(dtype))
    pairs = [(found.token_ids, expected.token_ids) for found, expected in zip(answers, on_cpu[1], strict=True)]
    same = sum(a == b for found, expected in pairs for a, b in zip(found, expected, strict=False))
    count = sum(max(len(found), len(expected)) for found, expected in pairs)
    rows = sum(found == expected for found, expected in pairs)
    record_property(f"{dtype} agreement", f"{same}/{count} tokens, {rows}/{len(pairs)} rows")
    print(f"{dtype}: {same} of {count} tokens and {rows} of {len(pairs)} rows are those of fp32 on the CPU")
    assert same >= AGREEMENT[dtype] * count


@pytest.mark.parametrize(
    ("settings", "store"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, awq(32)),
        ({"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False}, gptq(64, bits=8)),
    ],
)
def test_with_a_checkpoints_integers_nearly_all_tokens_are_those_emulated(settings, store, tmp_path):
    quantized(tmp_path / "checkpoint", settings, store)
    bundle = exported(tmp_path / "bundle", tmp_path / "checkpoint", dtype="checkpoint", device="cuda")
    vision = VisionEncoder(bundle, 8, graph=emulated_graph(bundle.file(VISION)))
    requests = requests_of(bundle, demo_rows(), NEW_TOKENS, vision)
    expected = complete(Decoder(bundle, 8, 8, graph=emulated_graph(bundle.file(DECODER))), bundle, requests)
    _, answers = _answered_on_gpu(bundle)  # the decoder reproduces the known answers first
    pairs = [(found.token_ids, right.token_ids) for found, right in zip(answers, expected, strict=True)]
    same = sum(a == b for found, right in pairs for a, b in zip(found, right, strict=False))
    assert same >= AGREEMENT["fp16"] * sum(max(len(found), len(right)) for found, right in pairs)


def test_captured_steps_answer_as_others_do(bundles, monkeypatch):
    _, captured = _answered_on_gpu(bundles("bf16"), slots=5)
    monkeypatch.setattr("qvl_batch.decoder.decoder.HALVES", ())
    _, plain = _answered_on_gpu(bundles("bf16"), slots=5)
    # Not all: a step that is not captured divides a shorter cache among the GPU's cores, and adds in another order.
    assert sum(a == b for a, b in zip(captured, plain, strict=True)) >= AGREEMENT["bf16"] * len(plain)


def test_memory_is_what_was_planned(bundles):
    bundle = bundles("bf16")
    memory = memory_on("cuda")
    before = memory.card.memory()[0]
    slots = 64
    decoder = Decoder(bundle, slots, 1, memory=memory)
    complete(decoder, bundle, requests_of(bundle, demo_rows(16), NEW_TOKENS, VisionEncoder(bundle, 1, "cuda")))
    taken = before - memory.card.memory()[0]
    assert taken <= bytes_beside_slots(bundle.manifest, vision_too=True) + (slots + PREFIX_ENTRIES) * slot_bytes(
        bundle.manifest
    )


def test_a_full_card_is_an_error_that_names_the_option(bundles):
    bundle = bundles("bf16")
    memory = memory_on("cuda")
    slots = memory.card.memory()[1] // slot_bytes(bundle.manifest)
    with pytest.raises(DeviceError, match="the GPU has no memory left: lower --slots"):
        Decoder(bundle, slots, 1, memory=memory)


def test_the_driver_and_cuda_see_the_same_card():
    card = card_of_this_process()
    cuda = open_cuda("--device cuda")
    assert cuda.name in card.name or card.name in cuda.name
    assert abs(card.total - cuda.memory()[1]) < CARD_RESERVE * card.total


def test_the_captioner_answers_on_the_gpu(bundles):
    row = demo_rows(1)[0]
    with Captioner(bundles("bf16").path, device="cuda", vision_device="cuda") as captioner:
        answer = captioner.caption([row["image"]["bytes"]], [row["prompt"]])[0]
    assert answer.finish_reason == "stop"
    assert answer.answer == row["expected"]


def test_the_comparison_runs_on_the_gpu(bundles, tmp_path):
    command = [sys.executable, "jobs/compare.py", "--bundle", bundles("bf16").path, "--checkpoint", TINY]
    command += ["--input", QUESTIONS, "--limit", 8, "--device", "cuda", "--output", tmp_path / "comparison"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
