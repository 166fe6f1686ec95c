"""Half precision: converts a graph in fp32 so that a GPU's matrix units can run it.

What enters: a traced graph in fp32. What leaves, in place: the same graph with matrix products and
their biases, attention, and the operators between two products (the gate of an MLP) in fp16 or
bf16. The residual stream, norms, rotary embedding, softmax (inside the attention operators) and the
choice of the token stay in fp32. So does the patch embedding, which is 2 % of the vision tower's
work and takes pixels.

In fp16 the residual stream is divided by a constant (see `export.decoder`), since Qwen2.5-VL was
trained in bf16 and has hidden states that overflow fp16.

`emulated` makes such a graph run on a CPU, which has no products in half precision: it computes in
fp32 and rounds every value that is in half precision in the graph. A GPU's results differ only by
the order of the sums inside a product; where weights are in integers, also by their own rounding.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.names import EMBEDDING, HEAD, PATCHES, module_of
from qvl_batch.bundle.manifest import HALVES, Dtype
from qvl_batch.errors import ExportError

FP32 = ir.DataType.FLOAT
HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
TYPES: dict[ir.DataType, Any] = {FP32: np.float32, HALF["fp16"]: np.float16, HALF["bf16"]: ml_dtypes.bfloat16}
#: Divisor of the residual stream in fp16. States up to two million fit; values below 2e-6 are lost, which does not
#: matter next to them.
FP16_UNIT = 32
PRODUCTS, ATTENTION = {"MatMul", "Gemm"}, {"GroupQueryAttention", "MultiHeadAttention"}
#: The product of weights in integers; beside half precision it has activations and scales in it.
NBITS = "MatMulNBits"
#: Operators that are in half precision if all their consumers are, and operators that are if their inputs are.
LIKE_CONSUMERS = {"Split"}
LIKE_INPUTS = {"Add", "QuickGelu", "Mul", "Gelu", "Reshape", "Slice", "Split", "Concat", "Gather", "GatherElements"}


def stream_unit(dtype: Dtype) -> int:
    """Number that the residual stream of a tower in `dtype` is divided by."""
    return FP16_UNIT if dtype == "fp16" else 1


def weight_unit(product: str, dtype: Dtype) -> int:
    """Number that the weight of a decoder's product is divided by, so that its output is in the stream's unit."""
    return stream_unit(dtype) if product.endswith((".attention.out", ".mlp.up")) else 1


def to_half(model: ir.Model, dtype: Dtype, dtype_of: Callable[[str], Dtype]) -> None:
    """Convert matrix products, attention and the operators between them to half precision.

    Args:
        model: changed in place.
        dtype: fp16 or bf16; any other leaves the graph as it is.
        dtype_of: dtype of the product of a module: `dtype`, or fp32.
    """
    if dtype not in HALVES:
        return
    half = HALF[dtype]
    nodes = _nodes_in_half(model, lambda module: module != PATCHES and dtype_of(module) == dtype)
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
                value.type = ir.TensorType(half)  # a new object, since clones of a graph share their values' types
    for index, value in enumerate(model.graph.outputs):
        # Outputs are in fp32, except the KV cache, which only attention reads.
        producer = value.producer()
        if _is_half(value) and producer is not None and producer.op_type not in ATTENTION:
            model.graph.outputs[index] = casts.as_output(value, FP32)


def emulated_graph(path: Path) -> bytes:
    """The graph of a file, emulated and serialized; its weights stay in the file beside it."""
    graph: bytes = ir.to_proto(emulated(ir.load(path))).SerializeToString()
    return graph


def emulated(model: ir.Model) -> ir.Model:
    """A graph that computes in fp32 what `model` computes in half precision; inputs and outputs are in fp32 too.

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


def _nodes_in_half(model: ir.Model, is_half: Callable[[str], bool]) -> set[ir.Node]:
    chosen: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type in PRODUCTS:
            is_constant = cast("ir.Value", node.inputs[1]).name in model.graph.initializers
            if is_constant and is_half(module_of(node)):
                chosen.add(node)
        elif node.op_type in (*ATTENTION, NBITS) or _is_embedding_in_half(node, is_half):
            chosen.add(node)
        elif node.op_type in LIKE_INPUTS:
            sources = [value.producer() for value in node.inputs if value is not None and value.dtype == FP32]
            producers = [producer for producer in sources if producer is not None]
            if producers and chosen.issuperset(producers):
                chosen.add(node)
    # One cast of the input, instead of one for each output.
    for node in model.graph:
        if node.op_type in LIKE_CONSUMERS and all(use.node in chosen for value in node.outputs for use in value.uses()):
            chosen.add(node)
    return chosen


def _is_embedding_in_half(node: ir.Node, is_half: Callable[[str], bool]) -> bool:
    """Whether a node is an embedding lookup, in half precision unless a tied head keeps the table in fp32.

    A table in fp32 would be cast in every run.
    """
    table = node.inputs[0]
    if node.op_type != "Gather" or table is None or table.name != EMBEDDING:
        return False
    is_tied = any(use.node.op_type in PRODUCTS for use in table.uses())
    return not is_tied or is_half(HEAD)


class _Casts:
    """Inserts casts into a graph, one for each value and type."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def of(self, value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        """`value` in another type; a new cast is inserted before the node `before`."""
        if (value, to) not in self._made:
            self._made[value, to] = self._cast(value, to)
            self._graph.insert_before(before, cast("ir.Node", self._made[value, to].producer()))
        return self._made[value, to]

    def round(self, value: ir.Value) -> None:
        """Make a value in half precision fp32, and give its consumers a copy rounded to half precision."""
        uses, producer, half = list(value.uses()), value.producer(), cast("ir.DataType", value.dtype)
        rounded = self._cast(value, half)
        value.type = ir.TensorType(FP32)
        if producer is None:
            self._graph.insert_before(next(iter(self._graph)), cast("ir.Node", rounded.producer()))
        else:
            rounded.name, value.name = value.name, f"{value.name}.exact"
            self._graph.insert_after(producer, cast("ir.Node", rounded.producer()))
        for use in uses:
            use.node.replace_input_with(use.idx, rounded)
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = rounded

    def as_output(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        """An output in another type, under its own name."""
        output = self._cast(value, to)
        node = cast("ir.Node", output.producer())
        node.name = f"{value.name}.output"  # one of this type can be there for a node, too
        output.name, value.name = value.name, f"{value.name}.half"
        self._graph.append(node)
        return output

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], {"to": to})
        output = node.outputs[0]
        node.name = output.name = f"{value.name}.as_{to.name.lower()}"
        output.shape, output.type = value.shape, ir.TensorType(to)
        return output


def _retype(value: ir.Value, to: ir.DataType) -> None:
    """Change the type of a graph's input or weight; weights are rounded when they are written."""
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
