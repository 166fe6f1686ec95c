"""Quantized checkpoints stand for the weights that they were made of, and AWQ's and GPTQ's integers are taken over."""

import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import QUESTIONS, ROOT, TINY, exported
from quantized import awq, fp8, gptq, in_groups, nf4, quantized
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration as Model

from export.checkpoint import load_checkpoint
from export.comparison.config import CompareConfig
from export.comparison.run import compare
from export.quantized_files import METHODS
from export.rounding import from_blocks
from export.spelling import published_name
from export.stored_integers import PRODUCTS, stored_integers
from export.weights import EMBEDDING, HEAD
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
    found = stored_integers(load_checkpoint(tmp_path / "checkpoint").weights)
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
def test_integers_that_a_bundle_cannot_have(name, message, tmp_path):
    quantized(tmp_path / "checkpoint", *FORMATS[name])
    with pytest.raises(ExportError, match=message):
        exported(tmp_path / "bundle", tmp_path / "checkpoint", dtype="checkpoint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the checkpoint has its weights in floats, so give the --dtype"),
        ({"adapter": TINY}, "keeps integers, to which --adapter cannot be added"),
        ({"sample": QUESTIONS}, "--sample is for weights that are rounded, and --dtype checkpoint keeps those"),
        ({"device": "cuda"}, "--dtype checkpoint is for --device cpu, not for cuda"),
        ({"recipe": "auto"}, "--dtype is not possible with --recipe"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_the_checkpoints_integers(options, message, tmp_path):
    if "device" in options:
        quantized(tmp_path / "checkpoint", *FORMATS["awq"])
    checkpoint = tmp_path / "checkpoint" if "device" in options else TINY
    with pytest.raises(ExportError, match=message):
        exported(tmp_path / "bundle", checkpoint, dtype="checkpoint", **options)


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
