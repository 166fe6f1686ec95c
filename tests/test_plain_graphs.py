"""Tools that quantize take the plain graphs, of checkpoints with a tied and with an untied head."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import untied
from conftest import QUESTIONS, TINY, exported
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.calibration import CalibrationConfig, CalibrationReader, calibrate
from export.config import ExportConfig
from export.package import export_bundle
from qvl_batch.bundle.manifest import DECODER_FULL, VISION_FULL, part_names
from qvl_batch.distances import relative_error
from qvl_batch.errors import ExportError

#: Largest drift that a tool may cost, of either graph. Static ranges hold for all tokens of a tensor, and the decoder's
#: first tokens are a hundred times longer than the others: so much is lost there by design.
TOOLS = {
    "dynamic": (0.3, lambda source, output, _: quantize_dynamic(source, output)),
    "dynamic by channel": (0.3, lambda source, output, _: quantize_dynamic(source, output, per_channel=True)),
    "static MinMax": (2.0, quantize_static),
    "static MinMax, products": (
        2.0,
        lambda source, output, rows: quantize_static(source, output, rows, **PRODUCTS),
    ),
    "static percentile": (
        2.0,
        lambda source, output, rows: quantize_static(
            source, output, rows, calibrate_method=CalibrationMethod.Percentile, **PRODUCTS
        ),
    ),
    "MatMulNBits 4": (0.5, lambda source, output, _: _n_bits(source, output, 4)),
    "MatMulNBits 8": (0.05, lambda source, output, _: _n_bits(source, output, 8)),
    "quant_pre_process": (1e-4, lambda source, output, _: quant_pre_process(source, output)),
    "quant_pre_process, weights outside": (
        1e-4,
        lambda source, output, _: quant_pre_process(source, output, save_as_external_data=True),
    ),
}
#: One of each sort, for a short run.
QUICK = ("dynamic", "static MinMax", "MatMulNBits 4")
#: On x86, ONNX Runtime's fast kernels take unsigned activations and signed weights.
PRODUCTS = {
    "op_types_to_quantize": ["MatMul"],
    "per_channel": True,
    "activation_type": QuantType.QUInt8,
    "weight_type": QuantType.QInt8,
}


def _n_bits(source, output, bits):
    tool = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=32, accuracy_level=4)
    tool.process()
    tool.model.save_model_to_file(str(output), use_external_data_format=True)


#: With a head of its own, and the plain vision graph; to export it takes half a minute.
UNTIED = pytest.param("untied", marks=pytest.mark.long)


@pytest.fixture(scope="module", params=["tied", UNTIED])
def plain(request, tiny_bundle, tmp_path_factory):
    """A bundle, and a folder to calibrate its plain graphs on."""
    folder, bundle = tmp_path_factory.mktemp("plain"), tiny_bundle
    if request.param == "untied":
        bundle = exported(folder / "bundle", untied(folder / "checkpoint"), image_size=224, with_vision_full=True)
    length = bundle.manifest.layout.resolution.max_tokens + 64
    rows = CalibrationConfig(
        bundle=bundle.path, input=(str(QUESTIONS),), output=str(folder / "rows"), limit=6, pad_to=length
    )
    assert calibrate(rows) == 6
    return bundle, folder / "rows"


def _run(path, feeds):
    session = ort.InferenceSession(path)
    return [session.run(None, each)[0] for each in feeds]


@pytest.mark.parametrize(
    "tool", [pytest.param(tool, marks=() if tool in QUICK else pytest.mark.long) for tool in TOOLS]
)
@pytest.mark.parametrize(
    ("plain", "graph"),
    [("tied", "decoder"), *(pytest.param("untied", tower, marks=pytest.mark.long) for tower in ("decoder", "vision"))],
    indirect=["plain"],
)
def test_tools_that_quantize_take_the_plain_graphs(graph, tool, plain, tmp_path):
    bundle, rows = plain
    source, output = bundle.file(f"{graph}_full.onnx"), tmp_path / "quantized.onnx"
    bound, quantize = TOOLS[tool]
    quantize(source, output, CalibrationReader(rows, graph))
    feeds = list(iter(CalibrationReader(rows, graph, rows=3).get_next, None))
    found, expected = _run(output, feeds), _run(source, feeds)
    drift = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
    assert drift < bound
    if bound > 1e-4:
        assert drift > 1e-4
        before, after = (_products(path) for path in (source, output))
        assert len(after) < len(before) or {"DequantizeLinear"} <= {
            node.op_type for node in onnx.load(output, load_external_data=False).graph.node
        }


def _products(path):
    """Products with a constant matrix."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {value.name for value in graph.initializer}
    return [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants]


def test_products_are_left_out_by_the_names_of_their_modules(plain, tmp_path):
    bundle, _ = plain
    names = [node.name for node in _products(bundle.file(DECODER_FULL))]
    assert {"decoder.layers.3.mlp.gate/MatMul", "decoder.layers.0.attention.q/MatMul", "decoder.head/MatMul"} < {*names}
    assert len(names) == len(set(names)) == 4 * 7 + 1
    kept = [name for name in names if name.startswith(("decoder.layers.1.", "decoder.head"))]
    quantize_dynamic(bundle.file(DECODER_FULL), tmp_path / "quantized.onnx", nodes_to_exclude=kept)
    assert {node.name for node in _products(tmp_path / "quantized.onnx")} == {*kept}


def test_every_node_is_named_after_a_part_of_the_model(plain):
    bundle, _ = plain
    for name in bundle.manifest.graphs:
        graph = onnx.load(bundle.file(name), load_external_data=False).graph
        nodes = [node.name for node in graph.node]
        assert len(set(nodes)) == len(nodes)
        assert all(nodes)
        tower = name.split(".")[0].split("_")[0]
        modules = {node.split("/")[0] for node in nodes}
        parts = {part for part in part_names(4, 4) if part.startswith(f"{tower}.")}
        assert parts <= {".".join(module.split(".")[: 3 if "s." in module else 2]) for module in modules}
        # Tools that change a weight's shape would leave its old one here.
        assert not {value.name for value in graph.value_info} & {value.name for value in graph.initializer}


@pytest.mark.parametrize("plain", [UNTIED], indirect=True)
def test_the_plain_vision_graph_has_standard_operators_and_the_same_weights(plain):
    bundle, rows = plain
    graph = onnx.load(bundle.file(VISION_FULL), load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}
    assert bundle.file(VISION_FULL).stat().st_size < 200_000
    feeds = list(iter(CalibrationReader(rows, "vision", rows=2).get_next, None))
    for found, expected in zip(*(_run(bundle.file(name), feeds) for name in ("vision.onnx", VISION_FULL)), strict=True):
        assert relative_error(found, expected) < 1e-5


@pytest.mark.long
def test_images_of_any_size_have_a_plain_vision_graph_too(tmp_path):
    bundle = exported(tmp_path / "bundle", image_size="native", with_vision_full=True)
    assert {node.domain for node in onnx.load(bundle.file(VISION_FULL), load_external_data=False).graph.node} == {""}
    chance = np.random.default_rng(0)
    for sides in ((1, 1), (3, 11), (4, 4), (9, 5), (16, 2)):
        pixels = chance.integers(0, 256, (1, 28 * sides[0], 28 * sides[1], 3), dtype=np.uint8)
        found, expected = (_run(bundle.file(name), [{"pixels": pixels}])[0] for name in ("vision.onnx", VISION_FULL))
        assert relative_error(found, expected) < 1e-5


def test_a_plain_vision_graph_is_for_one_in_fp32(tmp_path):
    config = ExportConfig(checkpoint=TINY, output=tmp_path / "bundle", dtype="int8", with_vision_full=True)
    with pytest.raises(ExportError, match="--with-vision-full is for a vision tower in fp32, and this one is in int8"):
        export_bundle(config)
