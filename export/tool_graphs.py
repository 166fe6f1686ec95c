"""Plain graphs that a tool has quantized: takes over their integers.

What enters: the plain graph of a tower with the checkpoint's weights, and what a tool made of it. What leaves: for each
product its dtype, and its weight in the form that `export.quantize` puts into a worker's graph:

    MatMulNBits                             int4wo or int8wo, with the blocks and zero points of the tool
    MatMulInteger, or DequantizeLinear on   int8, with the scales and zero points of the tool for weights; activations
    a weight before a MatMul                have one scale for each token, as in all int8 bundles
    MatMul                                  fp32

A tool keeps the names of the plain graph: a product is known by its weight's. All else that a product depends on must
be as in the plain graph, its input and the parameters that are no products.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import onnx_ir as ir

from export.names import Tower, module_of
from export.precision import tower_of
from export.rounding import PAIR_LEVELS, TINY, Array, Rounded, from_blocks, from_int8, largest_pair
from qvl_batch.bundle.manifest import Dtype
from qvl_batch.errors import ExportError

#: Largest difference of a product's weight from the checkpoint's, relative to its length. Weights of 4 bits that were
#: rounded with care differ by 0.2; weights that a tool has scaled, or of another checkpoint, by more.
MOST_ERROR = 0.5
#: Operators that only change how values are written.
_ROUNDING = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"}
_NBITS: dict[int, Dtype] = {4: "int4wo", 8: "int8wo"}


@dataclass(frozen=True, slots=True)
class ToolGraph:
    """Products of a tower as a tool left them.

    Args:
        tower: which one.
        dtype: of the tower.
        dtypes: of all products.
        rounded: weights of those in integers.
        saturates: whether neighbours of int8 weights can exceed what kernels without VNNI add.
    """

    tower: Tower
    dtype: Dtype
    dtypes: dict[str, Dtype]
    rounded: Rounded
    saturates: bool


def load_tool_graph(path: Path) -> tuple[Tower, ir.Model]:
    """A graph, and the tower that it is of.

    Raises:
        ExportError: it cannot be read, or is not made of a plain graph.
    """
    try:
        model = ir.load(path)
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.numpy()
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ExportError(f"--from-quantized {path} cannot be read: {error}") from error
    except Exception as error:  # protobuf's own error has no public type
        raise ExportError(f"--from-quantized {path} is no ONNX graph: {error}") from error
    names = {module_of(node).split(".")[0] for node in model.graph}
    towers: list[Tower] = [tower for tower in ("vision", "decoder") if tower in names]
    if len(towers) != 1:
        raise ExportError(
            f"--from-quantized {path} has not the names of a plain graph: quantize `decoder_full.onnx` or "
            "`vision_full.onnx` of the checkpoint's fp32 bundle"
        )
    return towers[0], model


def read_tool_graph(path: Path, model: ir.Model, plain: ir.Model) -> ToolGraph:
    """The products of a tool's graph.

    Args:
        path: for messages.
        model: what the tool made.
        plain: of what it should be made, with the checkpoint's weights.

    Raises:
        ExportError: names the first node that cannot be taken over, and why.
    """
    dtypes: dict[str, Dtype] = {}
    rounded: Rounded = {}
    try:
        wanted = {name: node for node in plain.graph for name in [_weight_of(node)] if name is not None}
        found = {name: node for node in model.graph for name in [_weight_of(node)] if name is not None}
        # In the order of layers, since weights are read from files a layer at a time.
        for name, value in plain.graph.initializers.items():
            if name in wanted:
                product = module_of(wanted[name])
                dtype, made = _taken(found.get(name) or _without_weight(product, model), wanted[name])
                dtypes[product] = dtype
                if dtype != "fp32":
                    rounded[product, dtype] = made
            elif isinstance(value.const_value, ir.LazyTensor):  # constants of the tracer are not
                _check_parameter(model, name, value)
    except ExportError as error:
        raise ExportError(f"--from-quantized {path}: {error}") from error
    pairs = [largest_pair(made["int8"]) for (_, dtype), made in rounded.items() if dtype == "int8"]
    saturates = max(pairs, default=0) > PAIR_LEVELS
    return ToolGraph(tower_of(next(iter(dtypes))), most_common(dtypes), dtypes, rounded, saturates)


def most_common(dtypes: Mapping[str, Dtype]) -> Dtype:
    """The dtype of most products."""
    return Counter(dtypes.values()).most_common(1)[0][0]


def _weight_of(node: ir.Node) -> str | None:
    """Name that the weight of a product had in the plain graph; None if a node is no product with a weight."""
    if node.op_type not in ("MatMul", "MatMulNBits", "MatMulInteger"):
        return None
    stored = _stored(node)
    if stored is None:
        return None
    product, suffix, _ = str(stored.name).partition(".weight")
    return product + suffix if suffix else None


def _stored(node: ir.Node) -> ir.Value | None:
    """The initializer that a product's weight is in."""
    weight = node.inputs[1]
    producer = None if weight is None else weight.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        weight = producer.inputs[0]
    return weight if weight is not None and weight.const_value is not None else None


def _check_parameter(model: ir.Model, name: str, value: ir.Value) -> None:
    """Compare a parameter that is no weight of a product with the checkpoint's."""
    found = model.graph.initializers.get(name)
    if found is None or found.const_value is None:
        users = (
            f"{node.op_type} {node.name} has {each.name}"
            for node in model.graph
            for each in node.inputs
            if each is not None and str(each.name).startswith(name)
        )
        raise ExportError(
            f"{next(users, 'no node')} in place of {name}, which is in fp32 in a worker's graph: quantize products "
            "(op_types_to_quantize=['MatMul']) alone, in the plain graph as it is"
        )
    if not np.array_equal(_array(found), _array(value)):
        raise ExportError(
            f"{name} is not the checkpoint's: this is the graph of another checkpoint, or the tool has scaled it"
        )


def _without_weight(product: str, model: ir.Model) -> NoReturn:
    node = next((node for node in model.graph if module_of(node) == product), None)
    instead = "" if node is None else f" (there is {node.op_type} {node.name})"
    raise ExportError(
        f"product {product} cannot be taken over{instead}: those of a worker's graph are MatMul, MatMulNBits, "
        "MatMulInteger, and MatMul after DequantizeLinear"
    )


def _taken(node: ir.Node, product: ir.Node) -> tuple[Dtype, dict[str, Array]]:
    """Dtype and weight of a tool's node that takes the place of a product.

    Raises:
        ExportError: says why it cannot.
    """
    try:
        return _weight_in(node, product)
    except ValueError as error:
        raise ExportError(f"{node.op_type} {node.name} cannot be taken over: {error}") from error


def _weight_in(node: ir.Node, product: ir.Node) -> tuple[Dtype, dict[str, Array]]:
    source, wanted = node.inputs[0], product.inputs[0]
    while source is not None and (producer := source.producer()) is not None and producer.op_type in _ROUNDING:
        source = producer.inputs[0]
    if source is None or wanted is None or source.name != wanted.name:
        raise ValueError(
            f"its input is {source and source.name}, where the plain graph has {wanted and wanted.name}: the tool has "
            "put an operator between, or the plain graph is one of another --image-size"
        )
    exact = _array(product.inputs[1])
    dtype: Dtype
    made: dict[str, Array]
    stored, dtype, made = _array(_stored(node)), "fp32", {}
    if node.op_type == "MatMulNBits":
        dtype, made = _blocks(node, exact.shape)
        found = from_blocks(made, len(exact))
    elif stored.dtype.kind == "f":
        found = stored
    else:
        dtype, made = "int8", _channels(node, stored)
        found = from_int8(made)
    if found.shape != exact.shape:
        raise ValueError(f"its weight is {found.shape}, where the checkpoint's is {exact.shape}")
    error = float(np.linalg.norm(found - exact)) / max(float(np.linalg.norm(exact)), TINY)
    if not error <= (MOST_ERROR if made else 0):
        raise ValueError(
            f"its weight differs from the checkpoint's by {error:.0%}: this is the graph of another checkpoint, or the "
            "tool has changed more than precision"
        )
    return dtype, made


def _blocks(node: ir.Node, shape: tuple[int, ...]) -> tuple[Dtype, dict[str, Array]]:
    """Dtype and weight of a `MatMulNBits`."""
    bits, size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    if bits not in _NBITS:
        raise ValueError(f"it has {bits} bits; 4 and 8 are possible")
    values: list[ir.Value | None] = [*node.inputs[1:], None]
    packed, scale, zero_points = values[:3]
    if any(value is not None for value in values[3:]):
        raise ValueError("it has an order of groups or a bias, which are not supported")
    blocks = -(-shape[0] // size)
    made: dict[str, Array] = {f"int{bits}": _array(packed).reshape(shape[1], blocks, size * bits // 8)}
    made["scale"] = _array(scale).reshape(shape[1], blocks).astype(np.float32)
    if zero_points is not None:
        made["zero_points"] = _array(zero_points).reshape(shape[1], -1)
        if made["zero_points"].dtype != np.uint8:
            raise ValueError(f"its zero points are {made['zero_points'].dtype}; uint8 is possible")
    return _NBITS[bits], made


def _channels(node: ir.Node, stored: Array) -> dict[str, Array]:
    """Weight of a `MatMulInteger`, or of a `MatMul` after `DequantizeLinear`, as `to_int8` makes it."""
    if stored.dtype not in (np.int8, np.uint8):
        raise ValueError(f"its weight is {stored.dtype}; int8 and uint8 are possible")
    outputs = stored.shape[1]
    weight = node.inputs[1]
    dequantized = None if weight is None else weight.producer()
    if dequantized is not None:
        if "block_size" in dequantized.attributes and dequantized.attributes["block_size"].as_int():
            raise ValueError("its weight has scales for blocks; MatMulNBits is possible (QOperator)")
        scale, zero = [*dequantized.inputs[1:], None][:2]
        axis = dequantized.attributes["axis"].as_int() if "axis" in dequantized.attributes else 1
    else:
        name, zero, axis = str(node.inputs[1] and node.inputs[1].name), [*node.inputs[3:], None][0], 1
        scale = node.graph.initializers.get(name.replace("_quantized", "_scale")) if node.graph else None
        if scale is None:
            raise ValueError(f"there is no scale for {name}")
    scales = _array(scale).astype(np.float32)
    if scales.size > 1 and axis not in (1, -1):
        raise ValueError("its weight has a scale for each input; one for each output is possible")
    zeros = np.zeros(1, np.int64) if zero is None else _array(zero).astype(np.int64)
    offset = 128 if stored.dtype == np.uint8 else 0
    return {
        "int8": (stored.astype(np.int64) - offset).astype(np.int8),
        "scale": np.broadcast_to(scales.reshape(-1), outputs).copy(),
        "zero_points": np.broadcast_to((zeros - offset).astype(np.int8).reshape(-1), outputs).copy(),
    }


def _array(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    array: Array = value.const_value.numpy()
    return array
