"""Half precision: a graph in fp32, changed so that a GPU's matrix units can run it.

What enters: a traced graph in fp32. What leaves, in place: the same graph, in which products with
their biases, attention, and what lies between two of them (the gate of an MLP) are in fp16 or
bf16. The residual stream, norms, rotary embedding, softmax (inside the attention operators)
and what picks a token stay in fp32, as does the patch embedding, which is 2 % of the vision tower's
work and takes pixels.

In fp16 the residual stream is in a larger unit than the checkpoint's (see `export.decoder`), as
Qwen2.5-VL was trained in bf16 and has states that fp16 does not hold.

`emulated` undoes none of this, and yet runs on a CPU, which has no such products: it computes in
fp32 and rounds wherever the graph holds a half. That is what a GPU does too, but for the order of
the sums inside a product.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeGuard, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvl_batch.bundle.manifest import HALVES, Dtype
from qvl_batch.errors import ExportError

FP32 = ir.DataType.FLOAT
HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
TYPES: dict[ir.DataType, Any] = {FP32: np.float32, HALF["fp16"]: np.float16, HALF["bf16"]: ml_dtypes.bfloat16}
#: Of the residual stream in fp16. States up to two million fit, and what is lost below 2e-6 is nothing to them.
FP16_UNIT = 32
PRODUCTS, ATTENTION = {"MatMul", "Gemm"}, {"GroupQueryAttention", "MultiHeadAttention"}
#: Operators that are in half precision if all who read them are, and others if what they take is.
MOVING = {"Split"}
PASSING = {"Add", "QuickGelu", "Mul", "Gelu", "Reshape", "Slice", "Split", "Concat", "Gather", "GatherElements"}
#: Prefixes of what is in fp32 always.
ALWAYS_FP32 = ("patch_embed",)
#: Names of the embedding, of which the second is that of a tied head.
EMBEDDINGS = ("weights.embed", "weights.head")


def stream_unit(dtype: Dtype) -> int:
    """Unit of the residual stream of a tower in `dtype`."""
    return FP16_UNIT if dtype == "fp16" else 1


def to_half(model: ir.Model, dtype: Dtype, layers: Callable[[str], str], keep: Collection[str]) -> None:
    """Change products, attention and what is between them to half precision.

    Args:
        model: changed in place.
        dtype: a half, or another, which changes nothing.
        layers: name of the layer that a weight belongs to, by the weight's name.
        keep: layers whose products stay in fp32.
    """
    if dtype not in HALVES:
        return
    half = HALF[dtype]
    nodes = _nodes_in_half(model, layers, keep)
    casts = _Casts(model)
    for node in list(model.graph):
        wanted = half if node in nodes else FP32
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in TYPES and value.dtype != wanted:
                if value.producer() is None and all(use.node in nodes for use in value.uses()):
                    _retype(value, wanted)
                else:
                    node.replace_input_with(index, casts.of(value, wanted, before=node))
        if node in nodes:
            for value in filter(_is_fp32, node.outputs):
                value.type = ir.TensorType(half)  # anew, since a graph shares types with its clones
    for index, value in enumerate(model.graph.outputs):
        # But for the cache, which only attention reads.
        producer = value.producer()
        if _is_half(value) and producer is not None and producer.op_type not in ATTENTION:
            model.graph.outputs[index] = casts.as_output(value, FP32)


def emulated_graph(path: Path) -> bytes:
    """The graph of a file, emulated; its weights are still those beside the file."""
    graph: bytes = ir.to_proto(emulated(ir.load(path))).SerializeToString()
    return graph


def emulated(model: ir.Model) -> ir.Model:
    """A graph that computes in fp32 what `model` computes in half precision, its inputs and outputs in fp32 too.

    Args:
        model: changed in place.
    """
    casts = _Casts(model)
    nodes = [node for node in model.graph if node.op_type != "Cast"]
    for value in filter(_is_half, model.graph.inputs):
        casts.round(value)
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if _is_half(value):
                node.replace_input_with(index, casts.of(value, FP32, before=node))
        for value in filter(_is_half, node.outputs):
            casts.round(value)
    for index, value in enumerate(model.graph.outputs):
        if _is_half(value):
            model.graph.outputs[index] = casts.as_output(value, FP32)
    return model


def _is_fp32(value: ir.Value) -> bool:
    return bool(value.dtype == FP32)


def _is_half(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return value is not None and value.dtype in HALF.values()


def _nodes_in_half(model: ir.Model, layers: Callable[[str], str], keep: Collection[str]) -> set[ir.Node]:
    chosen: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type in PRODUCTS:
            weight = str(cast("ir.Value", node.inputs[1]).name)
            is_constant = weight in model.graph.initializers
            if is_constant and not weight.startswith(ALWAYS_FP32) and layers(weight) not in keep:
                chosen.add(node)
        elif node.op_type in ATTENTION or _is_embedding_in_half(node, layers, keep):
            chosen.add(node)
        elif node.op_type in PASSING:
            made = [value.producer() for value in node.inputs if value is not None and value.dtype == FP32]
            computed = [producer for producer in made if producer is not None]
            if computed and chosen.issuperset(computed):
                chosen.add(node)
    # One cast before it, instead of one for each output.
    for node in model.graph:
        if node.op_type in MOVING and all(use.node in chosen for value in node.outputs for use in value.uses()):
            chosen.add(node)
    return chosen


def _is_embedding_in_half(node: ir.Node, layers: Callable[[str], str], keep: Collection[str]) -> bool:
    """Whether a node looks up an embedding, unless that is also a head in fp32: it would be cast in every run."""
    table = node.inputs[0]
    if node.op_type != "Gather" or table is None or table.name not in EMBEDDINGS:
        return False
    is_tied = any(use.node.op_type in PRODUCTS for use in table.uses())
    return not is_tied or layers(str(table.name)) not in keep


class _Casts:
    """Casts in a graph, one for each value and type."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        """`value` in another type; a cast that is new stands before a node."""
        if (value, to) not in self._made:
            self._made[value, to] = self._cast(value, to)
            self._graph.insert_before(before, cast("ir.Node", self._made[value, to].producer()))
        return self._made[value, to]

    def round(self, value: ir.Value) -> None:
        """Let a value in half precision be in fp32, and all that read it have it rounded to what it was."""
        readers, producer, half = list(value.uses()), value.producer(), cast("ir.DataType", value.dtype)
        rounded = self._cast(value, half)
        value.type = ir.TensorType(FP32)
        if producer is None:
            self._graph.insert_before(next(iter(self._graph)), cast("ir.Node", rounded.producer()))
        else:
            rounded.name, value.name = value.name, f"{value.name}.exact"
            self._graph.insert_after(producer, cast("ir.Node", rounded.producer()))
        for use in readers:
            use.node.replace_input_with(use.idx, rounded)
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = rounded

    def as_output(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """An output in another type, under its own name."""
        output = self._cast(value, to)
        output.name, value.name = value.name, f"{value.name}.half"
        self._graph.append(cast("ir.Node", output.producer()))
        return output

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        output = ir.node("Cast", [value], {"to": to}).outputs[0]
        output.name, output.shape, output.type = f"{value.name}.as_{to.name.lower()}", value.shape, ir.TensorType(to)
        return output


def _retype(value: ir.Value, to: ir.DataType) -> None:
    """Give a graph's input or weight another type; weights are rounded when they are written."""
    tensor, name = value.const_value, str(value.name)
    value.type = ir.TensorType(to)
    if tensor is None:
        return

    def make() -> ir.TensorProtocol:
        return ir.tensor(_rounded(tensor.numpy(), to, name), to, name=name)

    value.const_value = ir.LazyTensor(make, to, tensor.shape, name=name)


def _rounded(values: NDArray[Any], to: ir.DataType, name: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        rounded: NDArray[Any] = values.astype(TYPES[to])
    if np.isinf(rounded).any():
        raise ExportError(
            f"{name} has values up to {np.abs(values).max():.3g}, which {to.name.lower()} does not hold: export with "
            "--dtype bf16, or leave its layer in fp32 (--fp32-layers)"
        )
    return rounded
