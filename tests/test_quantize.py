"""Reduced precision costs what is said of it, and no row depends on its neighbours."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from answers import ask, demo_rows
from conftest import QUESTIONS, ROOT, TINY, TRACES, exported
from onnx import numpy_helper
from reference import letterboxed

from export.comparison.config import CompareConfig
from export.comparison.run import compare
from export.config import ExportConfig
from export.names import module_of
from export.package import export_bundle
from export.precision import products
from export.rounding import to_int8
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL, FP32, VISION, is_in
from qvl_batch.decoder.decoder import NO_TOKEN, Decoder
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import ExportError
from qvl_batch.runtime.devices import processor
from qvl_batch.vision.encoder import VisionEncoder

#: Operator of the products; on the demo set, largest drift and answers that differ; bytes of weights over fp32's.
COSTS = {
    "int8": ("MatMulIntegerToFloat", 0.1, 1, 0.4),
    "int8wo": ("MatMulNBits", 0.1, 1, 0.4),
    "int4wo": ("MatMulNBits", 0.4, 2, 0.3),
}


@pytest.fixture(scope="module", params=["int8", "int4wo", pytest.param("int8wo", marks=pytest.mark.long)])
def reduced(request, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("reduced") / request.param, dtype=request.param)


def _operators(bundle, name):
    return [node.op_type for node in onnx.load(bundle.file(name), load_external_data=False).graph.node]


def test_every_product_is_reduced_and_nothing_else(reduced, tiny_bundle):
    operator, _, _, share = COSTS[reduced.manifest.dtype]
    for name, operators in ((VISION, ("MatMul",)), (DECODER, ("MatMul", "Gemm"))):
        before = _operators(tiny_bundle, name)
        after = _operators(reduced, name)
        assert after.count(operator) == sum(before.count(product) for product in operators)
        assert not {"MatMul", "Gemm"} & set(after)
        data = f"{name}.data"
        assert reduced.file(data).stat().st_size < share * tiny_bundle.file(data).stat().st_size
    assert DECODER_FULL not in reduced.manifest.files
    assert (reduced.manifest.dtype, reduced.manifest.vision_dtype) == (reduced.path.name,) * 2


@pytest.mark.long
def test_answers_cost_what_is_said(reduced, tmp_path):
    _, drift, differ, _ = COSTS[reduced.manifest.dtype]
    config = CompareConfig(
        bundle=reduced.path, checkpoint=TINY, input=(str(QUESTIONS),), output=tmp_path, layers=True, limit=16,
        max_drift=drift, min_agreement=1 - differ / 16,
    )  # fmt: skip
    outcome = compare(config)
    assert outcome.passed, str(outcome)
    assert outcome.summary["drift"]["vision"]["median"] > 1e-4
    assert all(
        depth["own"]["median"] > 1e-4
        for depth in outcome.summary["layers"]["depths"]
        if depth["name"] != "decoder.embed"
    )


@pytest.mark.parametrize("reduced", ["int8"], indirect=True)
def test_no_two_products_that_a_kernel_adds_first_come_to_more_than_16_bits_hold(reduced):
    for name in (VISION, DECODER):
        graph = onnx.load(reduced.file(name)).graph
        weights = {initializer.name: initializer for initializer in graph.initializer}
        levels = [weights[node.input[1]] for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
        assert len(levels) > 20
        for matrix in map(numpy_helper.to_array, levels):
            assert matrix.dtype == np.int8
            assert _most_of_a_pair(matrix) <= 2**15 - 1
        assert max(np.abs(numpy_helper.to_array(each).astype(int)).max() for each in levels) > 64


def _most_of_a_pair(levels):
    """Largest magnitude of two neighbours' products with activations of 0 to 255, (in, out)."""
    levels = np.pad(levels.astype(np.int64), ((0, len(levels) % 2), (0, 0)))
    pairs = levels.reshape(-1, 2, levels.shape[1])
    sums = [np.maximum(sign * pairs, 0).sum(axis=1).max() for sign in (1, -1)]
    return 255 * max(sums)


@pytest.mark.parametrize("inputs", [1, 2, 3, 64, 129])
@pytest.mark.parametrize("kind", ["normal", "one sign", "ties", "outliers", "zero"])
def test_weights_of_any_kind_are_rounded_so(inputs, kind):
    chance = np.random.default_rng(inputs)
    matrix = {
        "normal": lambda: chance.normal(size=(inputs, 40)),
        "one sign": lambda: -chance.random((inputs, 40)),
        "ties": lambda: chance.choice([-0.5, 0.5, 1.0], (inputs, 40)),
        "outliers": lambda: chance.normal(size=(inputs, 40)) * chance.choice([1, 1e3], (inputs, 40)),
        "zero": lambda: np.zeros((inputs, 40)),
    }[kind]().astype(np.float32)
    made = to_int8(matrix)
    assert _most_of_a_pair(made["int8"]) <= 2**15 - 1
    assert np.abs(made["int8"] * made["scale"] - matrix).max() <= 0.51 * made["scale"].max()


@pytest.fixture(scope="module")
def rows():
    return demo_rows(4)


def test_a_row_does_not_depend_on_its_neighbours(reduced, rows):
    vision, layout = VisionEncoder(reduced, threads=2), RowLayout(reduced)
    features = [vision.encode(letterboxed(row["image"]["bytes"])) for row in rows]
    prefill = [ask(layout, row["prompt"], f) for row, f in zip(rows, features, strict=True)]
    decoder = Decoder(reduced, 4, threads=2, keep_logits=True)
    decoder.prefill(0, prefill)
    together = [decoder.logits.copy()]
    decoder.step(np.array([5, 6, 7, 8]))
    together.append(decoder.logits.copy())
    for index, row in enumerate(prefill):
        decoder.prefill(0, [row])
        alone = [decoder.logits[0].copy()]
        decoder.step(np.array([5 + index]))
        alone.append(decoder.logits[0].copy())
        for step in range(2):
            # int4 and int8 weights alone take another kernel for one row; it rounds in another order.
            scale = np.abs(alone[step]).max()
            bound = 1e-5 if reduced.manifest.dtype == "int8" else 2e-2
            assert np.abs(together[step][index] - alone[step]).max() <= bound * scale


def test_a_row_that_is_not_finite_fails_alone(reduced, rows):
    vision, layout = VisionEncoder(reduced, threads=2), RowLayout(reduced)
    features = [vision.encode(letterboxed(row["image"]["bytes"])) for row in rows]
    prefill = [ask(layout, row["prompt"], f) for row, f in zip(rows, features, strict=True)]
    decoder = Decoder(reduced, 4, threads=2)
    whole = decoder.prefill(0, prefill), decoder.step(np.array([5, 6, 7, 8]))
    features[1][40, 3] = np.inf
    found = decoder.prefill(0, prefill), decoder.step(np.array([5, 6, 7, 8]))
    assert found[0][1] == NO_TOKEN
    for tokens, expected in zip(found, whole, strict=True):
        assert np.array_equal(np.delete(tokens, 1), np.delete(expected, 1))


def test_layers_and_single_products_can_be_left_in_fp32(tiny_checkpoint, tmp_path):
    layers = ("vision.patch_embed", "vision.blocks.1", "decoder.layers.2", "decoder.head")
    kept = (*layers, "decoder.layers.0.mlp.down", "vision.blocks.3.attention")
    config = ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", dtype="int8", fp32_layers=kept, skip_parity=True)
    assert export_bundle(config, traces=TRACES).layers_dtype == dict.fromkeys(kept, "fp32")
    bundle = Bundle.load(tmp_path / "bundle")
    nodes = [node for name in (VISION, DECODER) for node in ir.load(bundle.file(name)).graph]
    plain = {module_of(node) for node in nodes if node.op_type in ("MatMul", "Gemm")}
    assert plain == {each for each in products(tiny_checkpoint.weights.skeleton) if is_in(each, kept)}
    assert len(plain) == 16 + 1 + 4
    outcome = compare(
        CompareConfig(
            bundle=bundle.path, checkpoint=TINY, input=(str(QUESTIONS),), output=tmp_path / "out", limit=4, layers=True
        )
    )
    own = {depth["name"]: depth["own"]["median"] for depth in outcome.summary["layers"]["depths"]}
    assert {name for name, error in own.items() if error < 1e-5} == {*layers, "decoder.embed"}


@pytest.mark.long
def test_towers_can_differ_and_fp32_can_be_held_beside(tmp_path):
    config = ExportConfig(
        checkpoint=TINY, output=tmp_path / "bundle", dtype="int8wo", vision_dtype="fp32", with_fp32=True
    )
    manifest = export_bundle(config, traces=TRACES)
    exact = Bundle.load(tmp_path / "bundle").in_fp32()
    assert exact is not None
    assert (exact.manifest.dtype, exact.manifest.vision_dtype, exact.in_fp32()) == ("fp32", "fp32", None)
    assert exact.manifest.layout == manifest.layout
    assert {f"{FP32}/{name}" for name in exact.manifest.files} < manifest.files.keys()
    assert (manifest.dtype, manifest.vision_dtype) == ("int8wo", "fp32")
    assert DECODER_FULL not in manifest.files
    assert f"{FP32}/{DECODER_FULL}" in manifest.files
    parity = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["parity"]
    assert parity["features"] < 1e-4
    assert parity["logits"] > 1e-3


def test_fp32_beside_fp32_is_refused(tmp_path):
    with pytest.raises(ExportError, match="--with-fp32 needs a reduced --dtype or --vision-dtype"):
        export_bundle(ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", with_fp32=True))


def test_a_layer_that_is_not_there_is_named(tmp_path):
    config = ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", dtype="int8", fp32_layers=("decoder.layers.4",))
    with pytest.raises(
        ExportError, match=r"--fp32-layers decoder.layers.4: there is no such layer; .* decoder.layers.\*.mlp.gate, "
    ):
        export_bundle(config)


def test_layers_can_have_a_precision_of_their_own(tmp_path):
    config = ExportConfig(
        checkpoint=TINY, output=tmp_path / "bundle", dtype="int8wo", vision_dtype="fp32", fp32_layers=("decoder.head",),
        layers_dtype=(
            "decoder.layers.*.mlp=int4wo", "vision.blocks.2=int8", "decoder.layers.1.mlp.down=int8",
            "decoder.head=int8",
        ),
    )  # fmt: skip
    manifest = export_bundle(config, traces=TRACES)
    assert manifest.layers_dtype["decoder.layers.3.mlp"] == "int4wo"
    assert manifest.layers_dtype["decoder.head"] == "fp32"
    assert manifest.towers == "vision in fp32 (int8: 1), decoder in int8wo (fp32: 1, int4wo: 4, int8: 1)"
    assert manifest.vision_dtypes == {"fp32", "int8"}
    assert DECODER_FULL not in manifest.files
    assert manifest.parity is not None
    found = {
        module_of(node): (node.op_type, *(a.value for name, a in node.attributes.items() if name == "bits"))
        for name in (VISION, DECODER)
        for node in ir.load(tmp_path / "bundle" / name).graph
        if node.op_type in ("MatMul", "Gemm", "MatMulNBits", "MatMulIntegerToFloat")
    }
    expected = {
        "vision.blocks.1.mlp.up": ("MatMul",),
        "vision.blocks.2.attention.q": ("MatMulIntegerToFloat",),
        "decoder.layers.0.attention.out": ("MatMulNBits", 8),
        "decoder.layers.0.mlp.down": ("MatMulNBits", 4),
        "decoder.layers.1.mlp.up": ("MatMulNBits", 4),
        "decoder.layers.1.mlp.down": ("MatMulIntegerToFloat",),
        "decoder.head": ("Gemm",),
    }
    assert {module: found[module] for module in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_dtype": ("decoder.head",)}, "--layers-dtype decoder.head: write MODULE=DTYPE, with one of fp32, "),
        ({"layers_dtype": ("decoder.head=int2",)}, "--layers-dtype decoder.head=int2: write MODULE=DTYPE"),
        ({"layers_dtype": ("decoder.layers.9=int8",)}, "--layers-dtype decoder.layers.9=int8: there is no such layer"),
        ({"layers_dtype": ("decoder.layers.*.mpl=int8",)}, r"decoder.layers.\*.mpl=int8: there is no such layer"),
        ({"layers_dtype": ("decoder.head=bf16",)}, "its tower is in fp32, and beside half precision only fp32"),
        ({"dtype": "bf16", "layers_dtype": ("decoder.head=int8",)}, "its tower is in bf16, and beside half precision"),
        ({"device": "cuda", "layers_dtype": ("decoder.head=int8",)}, "--device cuda: int8 is for a decoder on the CPU"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_bundle(ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", **options))


EMULATOR = "qemu-x86_64"
#: A processor of the emulator, AMD's Zen 3: with AVX2, and without VNNI.
WITHOUT_VNNI = (EMULATOR, "-cpu", "EPYC-Milan")


@pytest.mark.long
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed (Debian: qemu-user)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is x86 that is emulated")
def test_answers_are_the_same_without_vnni(tmp_path):
    config = ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", dtype="int8", image_size=224)
    export_bundle(config, traces=TRACES)
    script = f"""if True:
        from answers import ask, demo_rows
        from qvl_batch import Captioner
        images, prompts = zip(*((row["image"]["bytes"], row["prompt"]) for row in demo_rows(8)))
        for answer in Captioner({str(tmp_path / "bundle")!r}).caption(images, prompts): print(answer.record())"""
    here = [sys.executable, "-c", script]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    said = [
        subprocess.run([*emulator, *here], env=env, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for emulator in ([], WITHOUT_VNNI)
    ]
    assert said[0] == said[1]
    answers = said[0].splitlines()
    assert len(answers) == 8
    assert all("'finish_reason': 'stop'" in answer for answer in answers)
    assert len(set(answers)) > 4


@pytest.mark.long
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed (Debian: qemu-user)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is x86 that is emulated")
def test_weights_that_saturate_without_vnni_are_refused_there(tmp_path, monkeypatch):
    def plain(matrix, _):
        scale = np.abs(matrix).max(axis=0) / 127
        zeros = np.zeros(len(scale), np.int8)
        return {"int8": np.rint(matrix / scale).astype(np.int8), "scale": scale, "zero_points": zeros}

    monkeypatch.setattr("export.rounding.to_int8", plain)  # no option asks for such weights
    config = ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", dtype="int8", image_size=224)
    if not has_vnni():
        with pytest.raises(ExportError, match="parity gate"):
            export_bundle(config, traces=TRACES)
        return
    export_bundle(config, traces=TRACES)
    command = [sys.executable, ROOT / "jobs" / "check.py", tmp_path / "bundle"]
    for emulator, status in (([], 0), (WITHOUT_VNNI, 1)):
        done = subprocess.run([*emulator, *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        assert ("✗" in done.stdout) == bool(status)


def has_vnni():
    return bool({"VNNI", "AVX-VNNI", "AMX"} & set(re.findall(r"[\w-]+", processor().partition("(")[2])))
