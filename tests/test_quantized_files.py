"""Quantized checkpoints stand for the weights that they were made of, and AWQ's and GPTQ's integers are taken over."""

import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from conftest import QUESTIONS, ROOT, TINY, exported
from quantized import awq, fp8, gptq, in_groups, nf4, quantized
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration as Model

from export import half
from export.checkpoint import load_checkpoint
from export.comparison.config import CompareConfig
from export.comparison.run import compare
from export.names import module_of
from export.parity import BOUNDS
from export.quantized_files import METHODS
from export.rounding import from_blocks
from export.spelling import published_name
from export.stored_integers import PRODUCTS, stored_integers
from export.weights import EMBEDDING, HEAD
from qvl_batch.bundle.manifest import is_in
from qvl_batch.errors import ExportError

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS = {
    "awq": (AWQ, awq(32)),
    "awq of 128": (AWQ | {"group_size": 128}, awq(128)),
    "gptq": (GPTQ, gptq(32)),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(32, less=0)),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, gptq(64, bits=8)),
    "gptq out of order": (GPTQ | {"desc_act": True}, gptq(32, shuffled=True)),
    "fp8": (FP8 | {"modules_to_not_convert": ["visual", "lm_head"]}, fp8(32)),
    "nf4": (NF4, nf4()),
    "nf4, fp16": (NF4, nf4(dtype="float16")),
    "nf4 twice": (NF4 | {"bnb_4bit_use_double_quant": True}, nf4(nested=256)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_checkpoint_stands_for_its_values(name, tmp_path):
    values = quantized(tmp_path / "checkpoint", *FORMATS[name])
    found = load_checkpoint(tmp_path / "checkpoint").model.state_dict()
    original = load_file(TINY / "model.safetensors")
    changed = 0
    for own, tensor in found.items():
        expected = values[published_name(EMBEDDING if own == HEAD else own)]
        assert torch.equal(tensor, expected), own
        changed += own != HEAD and not torch.equal(expected, original[published_name(own)].float())
    assert changed == 28


def test_fp8_is_what_transformers_makes_of_it(tmp_path):
    quantized(tmp_path / "checkpoint", *FORMATS["fp8"])
    expected = Model.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).state_dict()
    found = load_checkpoint(tmp_path / "checkpoint").model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_blocks_at_the_edge_of_fp8_can_be_smaller():
    stored, values = fp8(32)(torch.randn(64, 96))
    cut = stored | {"weight": stored["weight"][:-5, :-7]}
    assert torch.equal(METHODS["fp8"].values(cut, FP8), values[:-5, :-7])


@pytest.mark.parametrize("name", ["awq", "awq of 128", "gptq", "gptq v2", "gptq of 8 bits"])
def test_integers_scales_and_zero_points_are_those_of_the_checkpoint(name, tmp_path):
    settings, store = FORMATS[name]
    values = quantized(tmp_path / "checkpoint", settings, store)
    original = load_file(TINY / "model.safetensors")
    bits, dtype = (8, "int8wo") if "8 bits" in name else (4, "int4wo")
    found = stored_integers(load_checkpoint(tmp_path / "checkpoint").weights, "fp32")
    assert found.dtype == dtype
    assert [product for product, own in found.dtypes.items() if own != dtype] == ["decoder.head"]
    assert len(found.rounded) == 28
    for (product, _), arrays in found.rounded.items():
        _, _, layer, *inner = product.split(".")
        weight = f"model.layers.{layer}.{PRODUCTS['.'.join(inner)]}.weight"
        assert np.array_equal(from_blocks(arrays, values[weight].shape[1]), values[weight].numpy().T)
        size = values[weight].shape[1] // arrays["scale"].shape[1]
        assert size == (64 if bits == 8 else settings["group_size"])
        levels, zeros, scales = in_groups(original[weight].float(), size, bits)
        assert np.array_equal(arrays["scale"], scales.float().numpy())
        assert np.array_equal(_halves(arrays[f"int{bits}"], bits).reshape(levels.shape), levels.numpy())
        assert np.array_equal(_halves(arrays["zero_points"], bits)[:, : zeros.shape[1]], zeros.numpy())


def _halves(packed, bits):
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


@pytest.mark.long
def test_a_bundle_of_the_checkpoints_integers_answers_as_its_weights_do(tmp_path):
    values = quantized(tmp_path / "checkpoint", *FORMATS["awq"])
    bundle = exported(
        tmp_path / "bundle", tmp_path / "checkpoint", dtype="checkpoint", layers_dtype=("decoder.head=int8wo",)
    )
    assert bundle.manifest.parity is not None
    assert bundle.manifest.dtype == "int4wo"
    assert bundle.manifest.layers_dtype == {"decoder.head": "int8wo"}
    assert bundle.manifest.vision_dtype == "fp32"
    graph = ir.load(bundle.path / "decoder.onnx").graph
    arrays = {
        part: graph.initializers[f"decoder.layers.2.mlp.down.{part}"].const_value.numpy()
        for part in ("int4", "scale", "zero_points")
    }
    down = "model.layers.2.mlp.down_proj.weight"
    assert np.array_equal(from_blocks(arrays, values[down].shape[1]), values[down].numpy().T)
    config = CompareConfig(
        checkpoint=tmp_path / "checkpoint",
        bundle=bundle.path,
        input=(str(QUESTIONS),),
        output=str(tmp_path / "out"),
        limit=8,
        min_agreement=0.75,
        max_drift=0.2,
    )
    outcome = compare(config)
    assert outcome.passed, outcome.summary


@pytest.fixture(scope="module", params=["awq", pytest.param("gptq of 8 bits", marks=pytest.mark.long)])
def for_a_gpu(request, tmp_path_factory):
    """Format of a checkpoint, where it is, and a bundle with its integers for a GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    quantized(folder / "checkpoint", *FORMATS[request.param])
    bundle = exported(folder / "bundle", folder / "checkpoint", dtype="checkpoint", device="cuda")
    return request.param, folder / "checkpoint", bundle


def test_on_a_gpu_integers_and_scales_are_the_same_too(for_a_gpu):
    name, _, bundle = for_a_gpu
    bits, size, dtype = (8, 64, "int8wo") if "8 bits" in name else (4, 32, "int4wo")
    assert (bundle.manifest.dtype, bundle.manifest.device, bundle.manifest.vision_dtype) == ("fp16", "cuda", "fp16")
    assert bundle.manifest.layers_dtype == {f"decoder.layers.{k}": dtype for k in range(4)}
    graph = ir.load(bundle.path / "decoder.onnx").graph
    original = load_file(TINY / "model.safetensors")
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    for node in products:
        module = module_of(node)
        _, _, layer, *inner = module.split(".")
        parts = [f"attention.{part}" for part in "qkv"] if inner[-1] == "qkv" else [".".join(inner)]
        weights = [original[f"model.layers.{layer}.{PRODUCTS[part]}.weight"].float() for part in parts]
        # One after the other in the order of outputs.
        stored = [in_groups(weight, size, bits) for weight in weights]
        levels, zeros, scales = (torch.cat(each) for each in zip(*stored, strict=True))
        found = {
            part: graph.initializers[f"{module}.{part}"].const_value.numpy()
            for part in (f"int{bits}", "scale", "zero_points")
        }
        assert np.array_equal(found["scale"], scales.numpy())
        assert found["scale"].dtype == np.float16
        assert np.array_equal(_halves(found[f"int{bits}"], bits).reshape(levels.shape), levels.numpy())
        assert np.array_equal(_halves(found["zero_points"], bits)[:, : zeros.shape[1]], zeros.numpy())
    assert len(products) == 4 * 5
    assert {v.dtype for name, v in graph.initializers.items() if name.endswith(".weight")} == {half.HALF["fp16"]}
    ort.InferenceSession(bundle.path / "decoder.onnx")  # the types of each node fit each other


def test_on_a_gpu_the_gate_has_the_bounds_of_half_precision(for_a_gpu):
    manifest = for_a_gpu[-1].manifest
    assert 0 < manifest.parity.logits < BOUNDS["fp16"].error == manifest.tolerance.logits
    assert 0 < manifest.parity.first_token_kl < BOUNDS["fp16"].first_token_kl
    assert manifest.parity.tokens_equal >= BOUNDS["fp16"].agreement * manifest.parity.tokens


@pytest.mark.long
def test_on_a_gpu_a_comparison_emulates_what_is_not_in_integers(for_a_gpu, tmp_path):
    _, checkpoint, bundle = for_a_gpu
    outcome = compare(
        CompareConfig(
            checkpoint=checkpoint, bundle=bundle.path, input=(str(QUESTIONS),), output=str(tmp_path), limit=4,
            layers=True, device="cpu", max_drift=0.01, min_agreement=1.0,
        )
    )  # fmt: skip
    assert outcome.passed, outcome.summary


def test_on_a_gpu_layers_can_be_in_floats_and_in_no_other_integers(tmp_path):
    quantized(tmp_path / "checkpoint", *FORMATS["awq"])
    options = {"dtype": "checkpoint", "device": "cuda", "skip_parity": True}
    kept = ("decoder.layers.1", "decoder.layers.2.mlp.down", "decoder.layers.3")
    _change_stored(tmp_path / "checkpoint", _in_floats("model.layers.3.mlp.down_proj"))
    with pytest.raises(ExportError, match="its tower is in fp16, and beside half precision only fp32 is possible"):
        exported(tmp_path / "no", tmp_path / "checkpoint", layers_dtype=("decoder.head=int8wo",), **options)
    bundle = exported(tmp_path / "bundle", tmp_path / "checkpoint", fp32_layers=kept, **options)
    for node in ir.load(bundle.path / "decoder.onnx").graph:
        if node.op_type in ("MatMul", "MatMulNBits"):
            assert (node.op_type == "MatMul") == is_in(module_of(node), kept), node
            assert node.inputs[0].dtype == (ir.DataType.FLOAT if node.op_type == "MatMul" else half.HALF["fp16"])


def _change_stored(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _in_floats(module):
    def change(tensors):
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{module}.{part}"]
        tensors[f"{module}.weight"] = load_file(TINY / "model.safetensors")[f"{module}.weight"]

    return change


def _tiny_scale(tensors):
    name = "model.layers.1.mlp.up_proj.scales"
    tensors[name] = tensors[name].bfloat16()
    tensors[name][0, 0] = 1.5 * 2.0**-30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _in_floats("model.layers.2.self_attn.k_proj"),
            r"keys and values of decoder.layers.2.attention are one product on a GPU, .*: give --dtype f",
        ),
        (
            _tiny_scale,
            r"decoder.layers.1.mlp.up has the scale 1.4e-09, which is not exact in fp16, .*: give --dtype bf16",
        ),
    ],
)
def test_what_a_gpu_cannot_have_is_named(change, message, tmp_path):
    quantized(tmp_path / "checkpoint", *FORMATS["awq"])
    _change_stored(tmp_path / "checkpoint", change)
    weights = load_checkpoint(tmp_path / "checkpoint").weights
    assert stored_integers(weights, "fp32").dtype == "int4wo"
    with pytest.raises(ExportError, match=message):
        stored_integers(weights, "fp16")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gptq out of order",
            r"weight cannot be taken over: its groups are not of neighbouring inputs \(desc_act\)",
        ),
        ("fp8", "--dtype checkpoint: fp8 has no integers; give the --dtype to round its weights to"),
        ("nf4", "--dtype checkpoint: bitsandbytes has no integers"),
    ],
)
def test_integers_that_a_bundle_cannot_have(name, message, device, tmp_path):
    quantized(tmp_path / "checkpoint", *FORMATS[name])
    with pytest.raises(ExportError, match=message):
        exported(tmp_path / "bundle", tmp_path / "checkpoint", dtype="checkpoint", device=device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the checkpoint has its weights in floats, so give the --dtype"),
        ({"adapter": TINY}, "keeps integers, to which --adapter cannot be added"),
        ({"sample": QUESTIONS}, "--sample is for weights that are rounded, and --dtype checkpoint keeps those"),
        ({"device": "cuda"}, "the checkpoint has its weights in floats, so give the --dtype"),
        ({"recipe": "auto"}, "--dtype is not possible with --recipe"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_the_checkpoints_integers(options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        exported(tmp_path / "bundle", TINY, dtype="checkpoint", **options)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "hqq"},
            r"is quantized \(hqq\); awq of 4 bits, gptq of 4 and 8, fp8, .*: export the checkpoint",
        ),
        (AWQ | {"version": "gemv"}, r"is quantized \(awq, version gemv\); "),
        (GPTQ | {"bits": 3}, r"is quantized \(gptq, bits 3\); "),
        (GPTQ | {"checkpoint_format": "marlin"}, r"is quantized \(gptq, checkpoint_format marlin\); "),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"is quantized \(bitsandbytes, load_in_4bit None\)"),
        ({"bits": 4}, r"is quantized \(unknown method\)"),
        ("int4", r"is quantized \(int4\)"),
    ],
    ids=str,
)
def test_other_quantizations_are_named_without_loading_torch(settings, message, tmp_path):
    quantized(tmp_path / "checkpoint", settings, awq(32))
    with pytest.raises(ExportError, match=message):
        load_checkpoint(tmp_path / "checkpoint")


def test_a_part_that_is_missing_or_does_not_fit_is_named(tmp_path):
    quantized(tmp_path / "checkpoint", *FORMATS["awq"])
    file = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.scales"
    save_file({each: tensor for each, tensor in tensors.items() if each != name}, file)
    with pytest.raises(ExportError, match=rf"up_proj.qweight has no {name} beside it: download the checkpoint again"):
        load_checkpoint(tmp_path / "checkpoint")
    save_file(tensors | {name: torch.ones(3, 384)}, file)
    with pytest.raises(
        ExportError, match=r"layers.1.mlp.up_proj.weight cannot be dequantized: 128 inputs are in 3 groups"
    ):
        load_checkpoint(tmp_path / "checkpoint").weights.module("model.language_model.layers.1")


def test_refusals_need_no_torch(tmp_path):
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "hqq"}}))
    program = (
        "import sys; from export.command import main\n"
        f"sys.argv = ['export', {str(tmp_path)!r}, '--output', {str(tmp_path / 'bundle')!r}]\n"
        "print(main(), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "1 False False\n"
    assert run.stderr.startswith(f"export: {tmp_path} is quantized (hqq)")
