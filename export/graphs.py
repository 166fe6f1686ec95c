"""Traces a checkpoint's model, and writes ONNX files and their weight files.

What enters: the checkpoint's weights and the layout contract. What leaves, in one directory: `vision.onnx`,
`decoder.onnx`, `decoder_guided.onnx`, `decoder_drawn.onnx` and, in fp32, the plain graphs `decoder_full.onnx` and, on
request, `vision_full.onnx`. Graphs of the same tower share one weight file.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.calibrated import Calibrated
from export.decoder import CachedDecoder, FullDecoder
from export.guided import guide
from export.half import to_half
from export.lazy import LazyWeights, decoder_parts, vision_parts, without_weights
from export.names import Tower, name_all
from export.precision import Precision
from export.progress import Progress, Update
from export.quantize import quantize
from export.vision import vision_tower
from export.weights import Weights
from qvl_batch.bundle.layout import Layout, Resolution
from qvl_batch.bundle.manifest import (
    DECODER,
    DECODER_DRAWN,
    DECODER_FULL,
    DECODER_GUIDED,
    HALVES,
    VISION,
    VISION_FULL,
    Dtype,
    GraphSpec,
    TensorSpec,
)
from qvl_batch.config import Device
from qvl_batch.errors import ExportError

OPSET = 21
#: Initializers smaller than this many bytes stay in the graph, where shape inference can read them.
EXTERNAL_BYTES = 1024
#: Alignment in bytes of each tensor in the weight file, so that it can be memory-mapped.
ALIGNMENT = 4096
#: Batch and tokens of the example input that the decoders are traced with. They differ from each other and from
#: 0 and 1: the tracer would make such dimensions constant.
TRACE_ROWS, TRACE_TOKENS = 3, 7


class Traces:
    """A cache of traced graphs. A graph depends on the model's config and on options, not on weights."""

    def __init__(self) -> None:
        self._traced: dict[str, ir.Model] = {}

    def once(self, trace: Callable[..., ir.Model], model: Any, *options: object) -> ir.Model:
        """The result of `trace(model, *options)`, traced once; a copy that the caller may change."""
        key = repr((trace.__name__, model.config.to_json_string(), options))
        if key not in self._traced:
            self._traced[key] = trace(model, *options)
        return self._traced[key].clone()


def export_vision(
    weights: Weights,
    layout: Layout,
    mean: list[float],
    std: list[float],
    precision: Precision,
    out: Path,
    progress: Progress,
    traces: Traces,
    calibrated: Calibrated,
    *,
    with_plain: bool = False,
) -> None:
    """Write `vision.onnx`, `with_plain` also `vision_full.onnx`, and one file with the weights of both."""
    with progress.step("vision graphs" if with_plain else "vision graph"):
        options = (weights.skeleton, layout.resolution, mean, std)
        graphs = {VISION: traces.once(trace_vision, *options, _traced_as(precision.vision))}
        if with_plain:
            graphs[VISION_FULL] = traces.once(trace_vision, *options, "fp32", "standard")
        lazy = LazyWeights(weights, vision_parts(weights.skeleton, std, precision.vision), calibrated.scales)
        for graph in graphs.values():
            lazy.fill(graph)
        _reduce(graphs[VISION], precision, "vision", calibrated)
    with progress.step("vision weights") as update:
        _write(graphs, out, update)


def export_decoders(
    weights: Weights,
    layout: Layout,
    precision: Precision,
    penalty: float,
    out: Path,
    progress: Progress,
    traces: Traces,
    calibrated: Calibrated,
    *,
    with_guided: bool = True,
) -> None:
    """Write `decoder.onnx`, `with_guided` also `decoder_guided.onnx` and `decoder_drawn.onnx`, in fp32 also
    `decoder_full.onnx`, and one file with the weights of all.
    """
    with progress.step("decoder graphs" if precision.has_full else "decoder graph"):
        dtype, model = _traced_as(precision.decoder), weights.skeleton
        graphs = {DECODER: traces.once(trace_decoder, model, layout, dtype, precision.device, penalty)}
        if precision.has_full:
            graphs[DECODER_FULL] = traces.once(trace_full_decoder, model, layout)
        lazy = LazyWeights(weights, decoder_parts(weights.skeleton, precision.decoder), calibrated.scales)
        for graph in graphs.values():
            lazy.fill(graph)
        _reduce(graphs[DECODER], precision, "decoder", calibrated)
        if with_guided:
            vocab_size = model.config.text_config.vocab_size
            graphs[DECODER_GUIDED] = guide(graphs[DECODER].clone(), vocab_size)
            graphs[DECODER_DRAWN] = guide(graphs[DECODER].clone(), vocab_size, drawn=True)
    with progress.step("decoder weights") as update:
        _write(graphs, out, update)


def plain_vision(weights: Weights, layout: Layout, mean: list[float], std: list[float], traces: Traces) -> ir.Model:
    """The graph of `vision_full.onnx`, with weights that are computed when they are read."""
    graph = traces.once(trace_vision, weights.skeleton, layout.resolution, mean, std, "fp32", "standard")
    LazyWeights(weights, vision_parts(weights.skeleton, std, "fp32")).fill(graph)
    return graph


def plain_decoder(weights: Weights, layout: Layout, traces: Traces) -> ir.Model:
    """The graph of `decoder_full.onnx`, with weights that are computed when they are read."""
    graph = traces.once(trace_full_decoder, weights.skeleton, layout)
    LazyWeights(weights, decoder_parts(weights.skeleton, "fp32")).fill(graph)
    return graph


def trace_vision(
    model: Any,
    resolution: Resolution,
    mean: list[float],
    std: list[float],
    dtype: Dtype = "fp32",
    operators: Literal["fused", "standard"] = "fused",
) -> ir.Model:
    """The vision graph in fp32, for `dtype` or in standard operators; without weights if the model has none."""
    side, unit = resolution.image_size, resolution.unit
    tower = vision_tower(model.model.visual, side, mean, std, dtype, plain=operators == "standard")
    dynamic: dict[int, Any]
    if side is not None:
        shape, dynamic = (2, side, side, 3), {0: "B"}
    else:
        shape = (1, 5 * unit, 7 * unit, 3)
        dynamic = {axis: unit * torch.export.Dim(name) for axis, name in ((1, "rows"), (2, "columns"))}
    pixels = torch.zeros(shape, dtype=torch.uint8)
    return _trace("vision", tower, (pixels,), ["pixels"], ["image_features"], (dynamic,))


def trace_decoder(model: Any, layout: Layout, dtype: Dtype, device: Device, penalty: float = 1.0) -> ir.Model:
    """The decoder graph in fp32, structured for `dtype` and `device`; without weights if the model has none."""
    standard = device == "cuda" and dtype == "fp32"
    for_cuda = device == "cuda"
    decoder = CachedDecoder(
        model, layout.max_seq_len, dtype, standard_attention=standard, penalty=penalty, for_cuda=for_cuda
    )
    layers = len(decoder.layers)
    rows, tokens = TRACE_ROWS, TRACE_TOKENS
    length = layout.max_seq_len
    past = [torch.zeros(rows, decoder.kv_heads, length, decoder.head_dim) for _ in range(2 * layers)]
    example = (
        torch.zeros((rows, tokens), dtype=torch.int64),
        torch.zeros((3, rows, tokens), dtype=torch.int64),
        torch.zeros((rows, tokens), dtype=torch.int64),
        torch.zeros((rows, tokens, model.config.text_config.hidden_size)),
        torch.zeros((rows, tokens), dtype=torch.bool),
        torch.full((rows,), tokens - 1, dtype=torch.int32),
        torch.tensor(tokens, dtype=torch.int32),
        past,
        None if penalty == 1 else torch.zeros((rows, model.config.text_config.vocab_size), dtype=torch.bool),
    )
    seen = [] if penalty == 1 else ["seen"]
    cache_names = [f"{kind}.{i}" for i in range(layers) for kind in ("key", "value")]
    return _trace(
        "decoder",
        decoder,
        example,
        [
            "input_ids",
            "position_ids",
            "cache_position",
            "image_embeds",
            "image_mask",
            "seqlens_k",
            "total_sequence_length",
        ]
        + [f"past_{name}" for name in cache_names + seen],
        ["next_token", "logits"] + [f"present_{name}" for name in cache_names + seen],
        (
            {0: "B", 1: "S"},
            {1: "B", 2: "S"},
            {0: "B", 1: "S"},
            {0: "B", 1: "S"},
            {0: "B", 1: "S"},
            {0: "B"},
            {},
            [{0: "B"}] * len(past),
            {0: "B"} if seen else None,
        ),
    )


def trace_full_decoder(model: Any, layout: Layout) -> ir.Model:
    """The full decoder graph; without weights if the model has none."""
    resolution = layout.resolution
    side = None if resolution.image_size is None else resolution.image_size // resolution.unit
    decoder = FullDecoder(model, side)
    shape = (TRACE_ROWS, TRACE_TOKENS)
    ids = torch.zeros(shape, dtype=torch.int64)
    embeds = torch.zeros((*shape, model.config.text_config.hidden_size))
    example: tuple[Tensor, ...] = (ids, torch.ones_like(ids), embeds)
    names = ["input_ids", "attention_mask", "image_embeds"]
    axes: tuple[dict[int, str], ...] = ({0: "B", 1: "S"},) * 3
    if side is None:
        example, names = (*example, torch.zeros((3, *shape), dtype=torch.int64)), [*names, "position_ids"]
        axes = (*axes, {1: "B", 2: "S"})
    return _trace("decoder", decoder, example, names, ["logits"], axes)


def _reduce(graph: ir.Model, precision: Precision, tower: Tower, calibrated: Calibrated) -> None:
    """Reduce the precision of a tower's graph in fp32, in place."""
    quantize(graph, precision.of, calibrated.rounded, _traced_as(precision.of_tower(tower)))
    to_half(graph, precision.of_tower(tower), precision.of)


def _traced_as(dtype: Dtype) -> Dtype:
    """The dtype to trace for: integer graphs are quantized from the one in fp32."""
    return dtype if dtype in HALVES else "fp32"


def graph_spec(path: Path) -> GraphSpec:
    """Names, element types and shapes of a graph's inputs and outputs.

    Raises:
        ExportError: `onnx.checker` refuses the graph.
    """
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name} is not valid ONNX: {error}") from error
    graph = ir.load(path).graph
    return GraphSpec(
        inputs={value.name: _tensor_spec(value) for value in graph.inputs},
        outputs={value.name: _tensor_spec(value) for value in graph.outputs},
    )


def _trace(
    tower: Tower,
    module: nn.Module,
    example: tuple[Tensor | list[Tensor] | None, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic: tuple[Any, ...],
) -> ir.Model:
    with _quiet():
        program = torch.onnx.export(
            without_weights(module).eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    model: ir.Model = program.model
    name_all(model, tower)
    # The tracer attaches the Python stack to every node, with paths of this machine.
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    return model


def _write(graphs: dict[str, ir.Model], out: Path, update: Update) -> None:
    """Write graphs, and one file beside them with their large initializers, which they share by name."""
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, graph in graphs.items():
        for value in graph.graph.initializers.values():
            if value.const_value is None or value.const_value.nbytes < EXTERNAL_BYTES:
                continue
            known = tensors.setdefault(str(value.name), value.const_value)
            if known is not value.const_value and not _same(known, value.const_value):
                raise ExportError(f"{name}: initializer {value.name} differs from the other graph's")
    by_name = _write_tensors(tensors, out / f"{next(iter(graphs))}.data", update)
    for name, graph in graphs.items():
        for value in graph.graph.initializers.values():
            if value.name in by_name:
                value.const_value = by_name[value.name]
        proto = ir.to_proto(graph)
        # Tools that transpose a weight in place would leave its old shape here.
        kept = [value for value in proto.graph.value_info if value.name not in graph.graph.initializers]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
        onnx.save(proto, out / name)


def _write_tensors(tensors: dict[str, ir.TensorProtocol], path: Path, update: Update) -> dict[str, ir.ExternalTensor]:
    """Write tensors one after the other; each is computed only when it is written."""
    written: dict[str, ir.ExternalTensor] = {}
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            update(f"{len(written) + 1} of {len(tensors)} arrays, {file.tell() / 1e9:.1f} GB")
            file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
            offset = file.tell()
            file.write(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data)
            length = file.tell() - offset
            written[name] = ir.ExternalTensor(
                path.name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape), name=name, base_dir=path.parent
            )
    return written


def _same(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.numpy() == b.numpy()).all())


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    assert value.shape is not None
    return TensorSpec(value.dtype.name.lower(), tuple(d if isinstance(d, int) else str(d) for d in value.shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings about its own internals; errors are still raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
