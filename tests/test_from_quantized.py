"""A plain graph that a tool has quantized becomes a worker's bundle with the tool's integers, or is refused by name."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from answers import ask, complete, demo_rows, requests_of
from checkpoints import make_checkpoint
from conftest import QUESTIONS, TINY, TRACES, exported
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from reference import letterboxed

from export.calibration import CalibrationConfig, CalibrationReader, calibrate, decoder_feeds
from export.config import ExportConfig
from export.package import export_bundle
from export.rounding import from_blocks, from_int8
from export.tool_graphs import load_tool_graph
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL, VISION, VISION_FULL
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.distances import relative_error
from qvl_batch.errors import ExportError
from qvl_batch.vision.encoder import VisionEncoder

EXCLUDED = ["decoder.head/MatMul"]
DYNAMIC = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": EXCLUDED}


def _n_bits(source, output, bits, *, symmetric=False, block_size=32):
    tool = MatMulNBitsQuantizer(
        onnx.load(source), bits=bits, block_size=block_size, is_symmetric=symmetric, accuracy_level=4,
        nodes_to_exclude=EXCLUDED,
    )  # fmt: skip
    tool.process()
    tool.model.save_model_to_file(str(output), use_external_data_format=True)


def _static(source, output, rows):
    quantize_static(
        source, output, CalibrationReader(rows), per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, **DYNAMIC,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    config = {"input": (str(QUESTIONS),), "output": str(folder), "limit": 2, "pad_to": 640}
    calibrate(CalibrationConfig(bundle=tiny_bundle.path, **config))
    return folder


def _made(output, *graphs, **options):
    settings = {"skip_parity": True} | options
    export_bundle(ExportConfig(checkpoint=TINY, output=output, from_quantized=graphs, **settings), traces=TRACES)
    return Bundle.load(output)


#: How a tool makes a graph, dtype and operator of its products, and how far logits may be from the tool's: activations
#: of MatMulNBits are the same, those of int8 have scales of their own.
TOOLS = {
    "4 bits": (lambda *files: _n_bits(*files[:2], 4), "int4wo", "MatMulNBits", 5e-3),
    "4 bits, symmetric, long blocks": (
        lambda *files: _n_bits(*files[:2], 4, symmetric=True, block_size=128), "int4wo", "MatMulNBits", 5e-3,
    ),
    "8 bits": (lambda *files: _n_bits(*files[:2], 8), "int8wo", "MatMulNBits", 5e-3),
    "dynamic": (lambda *files: quantize_dynamic(*files[:2], **DYNAMIC), "int8", "MatMulIntegerToFloat", 0.1),
    "dynamic, unsigned, by channel": (
        lambda *files: quantize_dynamic(*files[:2], per_channel=True, weight_type=QuantType.QUInt8, **DYNAMIC),
        "int8", "MatMulIntegerToFloat", 0.1,
    ),
    "static": (_static, "int8", "MatMulIntegerToFloat", 1.0),
}  # fmt: skip


SHORT = ("4 bits", "static")


@pytest.mark.parametrize("tool", [pytest.param(each, marks=[pytest.mark.long] * (each not in SHORT)) for each in TOOLS])
def test_a_worker_has_the_integers_of_the_tool_and_its_answers(tiny_bundle, rows, tmp_path, tool):
    make, dtype, operator, drift = TOOLS[tool]
    make(tiny_bundle.file(DECODER_FULL), tmp_path / "tool.onnx", rows)
    bundle = _made(tmp_path / "bundle", tmp_path / "tool.onnx")
    assert bundle.manifest.dtype == dtype
    assert bundle.manifest.vision_dtype == "fp32"
    assert bundle.manifest.layers_dtype == {"decoder.head": "fp32"}
    name = "decoder.layers.2.mlp.down"
    (found,) = [found for module, found in _weights(bundle.file(DECODER), operator).items() if module == name]
    assert relative_error(found, _in_tool(tmp_path / "tool.onnx", name)) < 1e-6
    # The row's logits, by the tool's own graph and by the worker.
    vision, layout = VisionEncoder(bundle, threads=2), RowLayout(bundle)
    row = demo_rows(1)[0]
    prefill = ask(layout, row["prompt"], vision.encode(letterboxed(row["image"]["bytes"])))
    session = ort.InferenceSession(tmp_path / "tool.onnx")
    expected = session.run(None, decoder_feeds(prefill, bundle.manifest))[0][0, -1]
    decoder = Decoder(bundle, 1, threads=2, keep_logits=True)
    decoder.prefill(0, [prefill])
    assert 0 < relative_error(decoder.logits[0], expected) < drift


def _weights(path, operator):
    """Weights of all products in integers, (in, out) in fp32, by module."""
    graph = onnx.load(path).graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type != operator:
            continue
        module = node.name.split("/")[0]
        if operator == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            made = dict(
                zip((f"int{sizes['bits']}", "scale", "zero_points"), map(values.get, node.input[1:]), strict=False)
            )
            found[module] = from_blocks(made, sizes["K"])
        else:
            made = {"int8": values[node.input[1]], "scale": values[node.input[3]], "zero_points": values[node.input[5]]}
            found[module] = from_int8(made)
    return found


def _in_tool(path, module):
    """What the tool's own operators make of a weight: its product with the identity."""
    model = onnx.load(path)
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    levels = next(
        name for name in values if name.startswith(f"{module}.weight_Q") or name == f"{module}.weight_quantized"
    )
    (node,) = [node for node in model.graph.node if levels in node.input]
    if node.op_type != "MatMulNBits":
        scale, zero = (values[f"{module}.weight_{each}"].astype(np.float32) for each in ("scale", "zero_point"))
        return (values[levels].astype(np.float32) - zero) * scale
    sizes = {a.name: a.i for a in node.attribute}
    inputs = sizes["K"]
    exact = onnx.NodeProto()
    exact.CopyFrom(node)
    (level,) = [a for a in exact.attribute if a.name == "accuracy_level"]
    level.i = 1
    graph = helper.make_graph(
        [exact], "one", [helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, [inputs, inputs])],
        [helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)],
        [each for each in model.graph.initializer if each.name in node.input],
    )  # fmt: skip
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = ort.InferenceSession(alone.SerializeToString())
    return session.run(None, {node.input[0]: np.eye(inputs, dtype=np.float32)})[0]


@pytest.mark.long
def test_both_towers_at_once_pass_the_gate_and_answer(tmp_path):
    exact = exported(tmp_path / "fp32", with_vision_full=True)
    for name in (VISION_FULL, DECODER_FULL):
        _n_bits(exact.file(name), tmp_path / name, 8)
    graphs = (tmp_path / VISION_FULL, tmp_path / DECODER_FULL)
    with pytest.raises(ExportError, match="or the plain graph is one of another --image-size"):
        _made(tmp_path / "other", *graphs, image_size=224)
    bundle = _made(tmp_path / "bundle", *graphs, skip_parity=False)
    assert (bundle.manifest.dtype, bundle.manifest.vision_dtype) == ("int8wo", "int8wo")
    assert bundle.manifest.parity is not None
    assert 1e-4 < bundle.manifest.parity.features < 0.05
    assert len(_weights(bundle.file(VISION), "MatMulNBits")) == len({*_weights(tmp_path / VISION_FULL, "MatMulNBits")})
    answers = [
        [each.token_ids for each in complete(Decoder(b, 4, threads=2), b, requests_of(b, demo_rows(4), 8))]
        for b in (bundle, exact)
    ]
    assert sum(first == second for first, second in zip(*answers, strict=True)) >= 3


def _changed(source, output, change):
    model = onnx.load(source)
    change(model.graph)
    onnx.save(model, output)
    return output


def _scale_norm(graph):
    """As a tool does that moves scales into norms."""
    (norm,) = [each for each in graph.initializer if each.name == "decoder.layers.1.norm2"]
    norm.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(norm), norm.name))


def _scale_weight(graph):
    (weight,) = [each for each in graph.initializer if each.name == "decoder.layers.1.mlp.up.weight_scales"]
    weight.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(weight), weight.name))


def _insert(graph):
    """As a tool does that scales activations on their way."""
    (node,) = [node for node in graph.node if node.name.startswith("decoder.layers.1.mlp.up/")]
    graph.node.insert(0, helper.make_node("Neg", [node.input[0]], ["scaled"], name="a_tools_own"))
    node.input[0] = "scaled"


def _unname(graph):
    for node in graph.node:
        node.ClearField("name")


def _order_groups(graph):
    (node,) = [node for node in graph.node if node.name.startswith("decoder.layers.1.mlp.up/")]
    graph.initializer.append(numpy_helper.from_array(np.zeros(128, np.int32), "order"))
    node.input.append("order")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_scale_norm, r"decoder.layers.1.norm2 is not the checkpoint's: .* the tool has scaled it"),
        (
            _scale_weight,
            r"MatMulNBits decoder.layers.1.mlp.up/MatMul_Q4 cannot be taken over: its weight differs .* by 2\d\d%",
        ),
        (
            _insert,
            r"mlp.up/MatMul_Q4 cannot be taken over: its input is scaled, where the plain graph has decoder.layers.1",
        ),
        (_order_groups, r"mlp.up/MatMul_Q4 cannot be taken over: it has an order of groups or a bias"),
    ],
)
def test_what_cannot_be_taken_over_is_named(tiny_bundle, tmp_path, change, message):
    _n_bits(tiny_bundle.file(DECODER_FULL), tmp_path / "tool.onnx", 4)
    with pytest.raises(ExportError, match=message) as raised:
        _made(tmp_path / "bundle", _changed(tmp_path / "tool.onnx", tmp_path / "changed.onnx", change))
    assert str(raised.value).startswith(f"--from-quantized {tmp_path / 'changed.onnx'}: ")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_a_table_of_tokens_in_integers_is_named(tiny_bundle, tmp_path):
    quantize_dynamic(tiny_bundle.file(DECODER_FULL), tmp_path / "tool.onnx")
    with pytest.raises(ExportError, match=r"Gather decoder.embed/Gather.* in place of decoder.embed.weight, .*MatMul"):
        _made(tmp_path / "bundle", tmp_path / "tool.onnx")


def test_graphs_of_other_kinds_are_refused(tiny_bundle, tmp_path):
    text, own = tmp_path / "text.onnx", tiny_bundle.file(DECODER_FULL)
    text.write_text("no graph")
    tool = tmp_path / "tool.onnx"
    _n_bits(own, tool, 4)
    unnamed = _changed(own, tmp_path / "unnamed.onnx", _unname)
    for path, message in {
        text: r"text.onnx is no ONNX graph",
        tmp_path / "nothing.onnx": r"nothing.onnx",
        unnamed: r"has not the names of a plain graph: quantize `decoder_full.onnx`",
    }.items():
        with pytest.raises(ExportError, match=message):
            load_tool_graph(path)
    with pytest.raises(ExportError, match="the decoder is also that of another graph; give one of them"):
        _made(tmp_path / "bundle", tool, tool)
    for options, message in (
        ({"dtype": "int8"}, "--dtype int8: the graph of --from-quantized says the precision of the decoder"),
        ({"fp32_layers": ("decoder.head",)}, "--fp32-layers and --sample are not possible with --from-quantized"),
        ({"sample": QUESTIONS}, "--sample are not possible with --from-quantized"),
    ):
        with pytest.raises(ExportError, match=message):
            _made(tmp_path / "bundle", tool, **options)


def test_a_graph_of_another_checkpoint_is_refused(tiny_bundle, tmp_path):
    _n_bits(tiny_bundle.file(DECODER_FULL), tmp_path / "tool.onnx", 4)
    other = make_checkpoint(tmp_path / "other", text={}, vision={})
    with pytest.raises(ExportError, match="is not the checkpoint's: this is the graph of another checkpoint"):
        export_bundle(
            ExportConfig(checkpoint=other, output=tmp_path / "bundle", from_quantized=(tmp_path / "tool.onnx",)),
            traces=TRACES,
        )
