"""Half precision is half where it may be, and answers like the checkpoint, also one that fp16 by itself cannot hold."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from answers import complete, demo_rows, requests_of
from conftest import QUESTIONS, TINY, TRACES, exported
from reference import letterboxed, question
from safetensors.torch import load_file, save_file

import export.half
from export import half
from export.checkpoint import load_checkpoint
from export.comparison.config import CompareConfig
from export.comparison.reference import PyTorch
from export.comparison.run import compare
from export.config import ExportConfig
from export.half import emulated, emulated_graph, to_half
from export.names import module_of
from export.package import export_bundle
from export.parity import refuse_beyond_bounds
from export.precision import Precision
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL, VISION, Parity, is_in
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import BundleError, ExportError, NumericError
from qvl_batch.vision.encoder import VisionEncoder

ROWS = demo_rows(12)
#: In fp32 in every graph: the residual stream and its norms, rotation, and what picks a token.
FP32 = {"SkipSimplifiedLayerNormalization", "RotaryEmbedding", "Pow", "ReduceMean", "ArgMax", "Where", "Sub"}
IN_HALF = {"MatMul", "Gemm", "GroupQueryAttention", "MultiHeadAttention", "QuickGelu"}
#: Kullback-Leibler divergence of the first token, cosine and agreement as README and gate have them, with room.
COSTS = {"bf16": (2e-3, 0.999), "fp16": (2e-5, 0.9999)}
FLOATS = {ir.DataType.FLOAT, *half.HALF.values()}


def _exported_in(tmp_path_factory, dtype, **options):
    return exported(tmp_path_factory.mktemp("half") / dtype, dtype=dtype, **options)


@pytest.fixture(scope="module", params=["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def in_half(request, tmp_path_factory):
    return _exported_in(tmp_path_factory, request.param)


def _emulated_texts(bundle):
    """Tokens of the first rows, both graphs emulated."""
    graphs = {name: emulated_graph(bundle.file(name)) for name in (VISION, DECODER)}
    vision, layout = VisionEncoder(bundle, 2, graph=graphs[VISION]), RowLayout(bundle)
    decoder = Decoder(bundle, 3, 2, graph=graphs[DECODER])
    completions = complete(decoder, bundle, requests_of(bundle, ROWS, 32, vision))
    return [layout.text(completion.token_ids) for completion in completions]


@pytest.fixture(scope="module")
def said_by_pytorch(tiny_checkpoint):
    return [trace.text for trace in PyTorch(tiny_checkpoint).answer([question(row) for row in ROWS])]


def _types(values):
    return {value.dtype for value in values if value is not None and value.dtype in FLOATS}


def test_graphs_are_in_half_precision_node_by_node(in_half):
    wanted = half.HALF[in_half.manifest.dtype]
    for name in (VISION, DECODER):
        graph = ir.load(in_half.file(name)).graph
        seen = set()
        for node in graph:
            types = _types([*node.inputs, *node.outputs])
            if node.op_type in FP32 or node.name.startswith("vision.patch_embed/"):
                assert types <= {ir.DataType.FLOAT}, node
            elif node.op_type in IN_HALF:
                assert types == {wanted}, node
            seen.add(node.op_type)
        assert {"SkipSimplifiedLayerNormalization", "RotaryEmbedding", "MatMul", "QuickGelu"} <= seen
        matrices = (value for name, value in graph.initializers.items() if name.endswith(".weight"))
        weights = {v.name: v.dtype for v in matrices if v.name != "vision.patch_embed.weight"}
        assert set(weights.values()) == {wanted}
    assert {wanted} == {v.dtype for n, v in graph.initializers.items() if n == "decoder.embed.weight"}


def test_inputs_and_outputs_are_in_fp32_but_for_the_cache(in_half):
    kinds = {"bf16": "bfloat16", "fp16": "float16"}
    for name in (VISION, DECODER):
        spec = in_half.manifest.graphs[name]
        for tensor, found in (spec.inputs | spec.outputs).items():
            is_cache = tensor.startswith(("past_", "present_"))
            if found.dtype not in ("int64", "int32", "uint8", "bool"):
                assert found.dtype == (kinds[in_half.manifest.dtype] if is_cache else "float"), tensor
    assert (in_half.manifest.device, DECODER_FULL in in_half.manifest.files) == ("cuda", False)


def test_the_gate_says_what_it_costs(in_half):
    parity = in_half.manifest.parity
    kl, cosine = COSTS[in_half.manifest.dtype]
    assert 0 < parity.first_token_kl < kl
    assert cosine < parity.feature_cosine < 1
    assert parity.agreement > 0.97


def test_answers_are_those_of_pytorch(in_half, said_by_pytorch):
    assert _emulated_texts(in_half) == said_by_pytorch


@pytest.mark.long
def test_a_comparison_emulates_it_layer_by_layer(in_half, tmp_path):
    config = CompareConfig(
        bundle=in_half.path, checkpoint=TINY, input=(str(QUESTIONS),), output=tmp_path, limit=4, layers=True,
        max_drift=0.05, device="cpu",
    )  # fmt: skip
    outcome = compare(config)
    assert outcome.passed, str(outcome)
    own = [depth["own"]["median"] for depth in outcome.summary["layers"]["depths"] if depth["name"] != "decoder.embed"]
    assert all(1e-5 < error < 0.05 for error in own[1:])


def test_emulation_rounds_where_the_graph_holds_a_half():
    values = [ir.Value(name=n, shape=ir.Shape([4, 4]), type=ir.TensorType(ir.DataType.FLOAT)) for n in ("x", "y")]
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    tensor = ir.tensor(weight, name="w.weight")
    w = ir.Value(name="w.weight", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    node = ir.node("MatMul", [values[0], w], outputs=[values[1]])
    graph = ir.Graph([values[0]], [values[1]], nodes=[node], initializers=[w], name="g", opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    to_half(model, "bf16", lambda _: "bf16")
    session = ort.InferenceSession(ir.to_proto(emulated(model)).SerializeToString())
    x = np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    found = session.run(None, {"x": x})[0]

    def rounded(v):
        return v.astype(ml_dtypes.bfloat16).astype(np.float32)

    assert np.array_equal(found, rounded(rounded(x) @ rounded(weight)))
    assert not np.array_equal(found, x @ weight)


@pytest.mark.long
def test_layers_can_be_left_in_fp32(tmp_path):
    kept = ("vision.blocks.1", "decoder.layers.2", "decoder.head")
    config = ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", dtype="bf16", fp32_layers=kept)
    assert export_bundle(config, traces=TRACES).layers_dtype == dict.fromkeys(kept, "fp32")
    for name in (VISION, DECODER):
        products = [n for n in ir.load(tmp_path / "bundle" / name).graph if n.op_type in ("MatMul", "Gemm")]
        for node in products:
            in_fp32 = is_in(module_of(node), [*kept, "vision.patch_embed"])
            assert _types([*node.inputs, *node.outputs]) == {ir.DataType.FLOAT if in_fp32 else half.HALF["bf16"]}


#: By which the residual streams of a checkpoint are made longer, so that fp16 does not hold them.
LONGER = 2048


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """The tiny checkpoint with longer states: the same function, as norms take the length out again."""
    folder = tmp_path_factory.mktemp("overflowing") / "checkpoint"
    shutil.copytree(TINY, folder)
    tensors = load_file(TINY / "model.safetensors")
    adds = ("o_proj.weight", "down_proj.weight", "down_proj.bias", "attn.proj.weight", "attn.proj.bias")
    for name in tensors:
        if name.endswith((*adds, "patch_embed.proj.weight", "merger.mlp.2.weight", "merger.mlp.2.bias")):
            tensors[name] = tensors[name].float() * LONGER
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float() * LONGER
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def test_pure_fp16_cannot_answer_it(overflowing):
    checkpoint = load_checkpoint(overflowing)
    asked, side = question(ROWS[0]), PyTorch(checkpoint)
    inputs = side.inputs([asked], [side.input_ids(asked)])
    inputs["pixel_values"] = inputs["pixel_values"].half()
    with torch.inference_mode():
        logits = checkpoint.model.half()(**inputs).logits
    assert not torch.isfinite(logits[0, -1]).all()


@pytest.mark.long
def test_our_fp16_answers_it(overflowing, said_by_pytorch, tmp_path_factory):
    assert _emulated_texts(_exported_in(tmp_path_factory, "fp16", checkpoint=overflowing)) == said_by_pytorch


@pytest.mark.long
def test_without_its_larger_unit_fp16_says_so_and_answers_nothing(overflowing, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(export.half, "FP16_UNIT", 1)
    with pytest.raises(ExportError, match="parity gate: values in the graphs are not finite"):
        _exported_in(tmp_path_factory, "fp16", checkpoint=overflowing, traces=None)
    bundle = _exported_in(tmp_path_factory, "fp16", checkpoint=overflowing, traces=None, skip_parity=True)
    vision = VisionEncoder(bundle, 2, graph=emulated_graph(bundle.file(VISION)))
    with pytest.raises(NumericError, match="the image features are not finite"):
        vision.encode(letterboxed(ROWS[0]["image"]["bytes"]))


def test_weights_that_fp16_does_not_hold_are_named(tmp_path):
    checkpoint = Path(shutil.copytree(TINY, tmp_path / "checkpoint"))
    tensors = load_file(TINY / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"] = torch.full_like(
        tensors["model.layers.1.mlp.gate_proj.weight"], 1e5, dtype=torch.float32
    )
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"decoder.layers.1.mlp.gate.weight has values up to 1e\+05, which float16"):
        export_bundle(
            ExportConfig(checkpoint=checkpoint, output=tmp_path / "bundle", dtype="fp16", vision_dtype="fp32"),
            traces=TRACES,
        )


EXACT = Parity(0.0, 0.0, 96, 96, 0.0, 1.0)


@pytest.mark.parametrize(
    ("figure", "value", "message"),
    [
        ("features", 0.2, "vision features are off by 2.00e-01 of their largest magnitude .allowed: 1e-01"),
        ("feature_cosine", 0.99, "an image token's features have cosine 0.990000 .allowed: 0.999"),
        ("logits", np.nan, "logits are off by nan"),
        ("first_token_kl", 0.1, "the first token's distribution diverges by 1.00e-01 nats .allowed: 5e-02"),
        ("tokens_equal", 80, "80 of 96 greedy tokens are equal .allowed: 90%"),
    ],
)
def test_the_gate_refuses_each_figure_that_is_out_of_bounds(figure, value, message):
    precision = Precision("bf16", "bf16", device="cuda")
    refuse_beyond_bounds(EXACT, precision)
    parity = Parity(*(value if name == figure else getattr(EXACT, name) for name in Parity.__slots__))
    with pytest.raises(ExportError, match=message):
        refuse_beyond_bounds(parity, precision)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16", "device": "cpu"}, "--dtype bf16 is for --device cuda, not for cpu"),
        ({"dtype": "int8", "device": "cuda"}, "--dtype int8 is for --device cpu, not for cuda"),
    ],
)
def test_a_device_that_does_not_run_it_is_refused(options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_bundle(ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", **options))


def test_pure_half_precision_is_refused_by_the_worker(in_half, tmp_path):
    path = Path(shutil.copytree(in_half.path, tmp_path / "bundle"))
    model = ir.load(path / DECODER)
    (embeds,) = (value for value in model.graph.inputs if value.name == "image_embeds")
    embeds.dtype = half.HALF[in_half.manifest.dtype]
    cast = ir.node("Cast", [embeds], {"to": ir.DataType.FLOAT})
    for use in list(embeds.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, cast.outputs[0])
    model.graph.insert_before(next(iter(model.graph)), cast)
    bundle = Bundle(path, in_half.manifest)
    with pytest.raises(BundleError, match="has no residual stream in fp32: export the checkpoint again"):
        Decoder(bundle, 1, 1, graph=_cast_free(model))


def _cast_free(model):
    """The graph with everything but its input `image_embeds` emulated, so that a CPU loads it."""
    (embeds,) = (value for value in model.graph.inputs if value.name == "image_embeds")
    kind = embeds.dtype
    graph = ir.from_proto(ir.to_proto(emulated(model)))
    (embeds,) = (value for value in graph.graph.inputs if value.name == "image_embeds")
    embeds.dtype = kind
    return ir.to_proto(graph).SerializeToString()
