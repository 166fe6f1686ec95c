"""Reduced precision: replaces matrix products with constant weights in a traced graph.

What enters: a graph in fp32. What leaves, in place: the same graph, whose products have integer
weights with one scale for each output channel or block. Everything between the products (residual
stream, norms, rotary tables, softmax, embedding) stays in fp32.

`int8` (weights and activations): each token has its own scale, its largest magnitude:

    x ─┬─ ReduceMax ──────── Max(tiny) ─┬─────────────────────────────────────── Mul ─ product
       ├─ ReduceMin ─ Neg ───┘          │                                         │
       └─────────────────────────────── QuantizeLinear ─── MatMulIntegerToFloat ──┘

1. A row's result does not depend on the rows that share its batch, as it would with
   `DynamicQuantizeMatMul`, which has one scale for all of its input.
2. The few tokens of a language model whose states are a hundred times longer than the others'
   (Sun et al. 2024, arXiv 2402.17762) do not reduce the precision of the others.
3. Activations are unsigned with a constant zero point of 128 and weights signed: the combination that
   ONNX Runtime's x86 kernels run at full speed (signed by signed runs sixteen times slower).
4. Its kernels for x86 without VNNI add the products of inputs 2 i and 2 i + 1 in 16 bits (`VPMADDUBSW`),
   which saturates at 32,767. So each output's scale is chosen so that no two such weights of the same
   sign add up to more than 128: with activations of at most 255 that is 32,640, and the product is exact
   on any processor. This costs 0.4 of the 8 bits of a weight; weights of at most 63 would cost one.

`int8wo`, `int4wo` (weights only): `MatMulNBits` in blocks along the input. Activations are in fp32 in
the graph; the kernel rounds them to 8 bits in the same blocks (`accuracy_level` 4).

A graph in half precision can have integers too, which are then a checkpoint's own, with activations and scales in half
precision. Where a weight is divided by the unit of the residual stream (see `export.decoder`), here the product's input
is: scales in fp16 that were divided would lose bits.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from export.half import weight_unit
from export.names import module_of
from export.operators import DOMAIN
from export.rounding import LEVELS, TINY, Array, Rounded, rounded
from qvl_batch.bundle.manifest import HALVES, Dtype

#: Zero point of activations.
ZERO_POINT = 128
#: Attribute of `MatMulNBits`: 4 rounds activations to 8 bits.
ACCURACY_LEVEL = 4


def quantize(
    model: ir.Model, dtype_of: Callable[[str], Dtype], calibrated: Rounded, traced_for: Dtype = "fp32"
) -> None:
    """Quantize matrix products of `model` with a constant matrix.

    Args:
        model: changed in place.
        dtype_of: dtype of the product of a module; one that is not an integer leaves it as it is.
        calibrated: weights that were rounded already; the others are rounded to nearest.
        traced_for: dtype of what is no product; beside half precision, weights were rounded already.
    """
    tape = _Tape(model, calibrated, traced_for)
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.const_value is None or dtype_of(module_of(node)) not in PRODUCTS:
            continue
        product = PRODUCTS[dtype_of(module_of(node))](tape, node)
        product.shape, product.type = node.outputs[0].shape, node.outputs[0].type
        name, nodes = node.outputs[0].name, tape.take()
        for number, added in enumerate(nodes):
            added.name = f"{node.name}.{number}.{added.op_type}"
            added.outputs[0].name = f"{added.name}:0"
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, [product])
        product.name = name
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


class _Tape:
    """Collects the nodes that replace products, and initializers; what several products need is created once."""

    def __init__(self, model: ir.Model, calibrated: Rounded, traced_for: Dtype) -> None:
        self.traced_for = traced_for
        self._model, self._calibrated = model, calibrated
        self._nodes: list[ir.Node] = []
        self._of_weights: dict[str, list[ir.Value]] = {}
        #: Quantized activations and each token's largest magnitude, keyed by the activations in fp32.
        self.quantized: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def take(self) -> list[ir.Node]:
        """The nodes since the last call."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def of_weight(self, product: ir.Node, dtype: Dtype) -> list[ir.Value]:
        """Initializers for the weight of a product in integers."""
        module = module_of(product)
        if module not in self._of_weights:
            made = self._calibrated.get((module, dtype)) or rounded(dtype, _matrix(product))
            self._of_weights[module] = [self.constant(f"{module}.{suffix}", value) for suffix, value in made.items()]
        return self._of_weights[module]

    def constant(self, name: str, value: Array) -> ir.Value:
        """The initializer of this name, created if there is none."""
        known = self._model.graph.initializers.get(name)
        if known is not None:
            return known
        tensor = ir.tensor(value, name=name)
        initializer = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._model.graph.register_initializer(initializer)
        return initializer

    def apply(self, operator: str, *inputs: ir.Value, domain: str = "", **attributes: int) -> ir.Value:
        """Append a node; returns its output."""
        node = ir.node(operator, inputs, attributes=attributes, domain=domain)
        self._nodes.append(node)
        return node.outputs[0]


def _matrix(product: ir.Node) -> Array:
    """The weight of a product, (in, out) in fp32."""
    weight = product.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    matrix = weight.const_value.numpy()
    # The weight of a Gemm is that of a tied head, stored (V, D) for the embedding.
    return np.ascontiguousarray(matrix.T if product.op_type == "Gemm" else matrix, np.float32)


def _w8a8(tape: _Tape, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    weights, scales, zeros = tape.of_weight(node, "int8")
    step = tape.constant("quantize.step", np.array(1 / LEVELS, np.float32))
    zero_point = tape.constant("quantize.zero_point", np.array(ZERO_POINT, np.uint8))
    if x not in tape.quantized:
        tape.quantized[x] = _quantize_activations(tape, x, step, zero_point)
    quantized, largest = tape.quantized[x]
    product = tape.apply("MatMulIntegerToFloat", quantized, weights, step, scales, zero_point, zeros, domain=DOMAIN)
    return tape.apply("Mul", product, largest)


def _quantize_activations(tape: _Tape, x: ir.Value, step: ir.Value, zero_point: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Activations (B, S, in) as uint8, and the largest magnitude of each token (B, S, 1)."""
    last = tape.constant("quantize.last", np.array([-1]))  # the last axis, and the shape of a vector
    tiny = tape.constant("quantize.tiny", np.array(TINY, np.float32))
    lowest = tape.apply("Neg", tape.apply("ReduceMin", x, last, keepdims=1))
    largest = tape.apply("Max", tape.apply("ReduceMax", x, last, keepdims=1), lowest, tiny)
    match list(x.shape or ()):
        case [_, int(tokens), int(inputs)] if tokens > 1:
            # As rows of a matrix, so that QuantizeLinear can take a scale for each. Where the number of tokens is
            # dynamic, as in the decoder, this would cost a decode step more than prefill gains.
            rows = tape.apply("Reshape", x, tape.constant(f"quantize.rows.{inputs}", np.array([-1, inputs])))
            steps = tape.apply("Mul", tape.apply("Reshape", largest, last), step)
            zero_points = tape.apply("Expand", zero_point, tape.apply("Shape", steps))
            levels = tape.apply("QuantizeLinear", rows, steps, zero_points, axis=0)
            shape = tape.constant(f"quantize.tokens.{tokens}.{inputs}", np.array([-1, tokens, inputs]))
            return tape.apply("Reshape", levels, shape), largest
        case _:
            return tape.apply("QuantizeLinear", tape.apply("Div", x, largest), step, zero_point), largest


def _weight_only(tape: _Tape, node: ir.Node, dtype: Dtype, bits: int) -> ir.Value:
    x, weight = node.inputs[:2]
    assert x is not None
    assert weight is not None
    assert weight.shape is not None
    packed, *others = tape.of_weight(node, dtype)
    assert packed.shape is not None
    inputs, outputs = weight.shape[::-1] if node.op_type == "Gemm" else weight.shape
    block = packed.shape[2] * 8 // bits
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": block}
    if tape.traced_for not in HALVES:
        attributes["accuracy_level"] = ACCURACY_LEVEL
    unit = weight_unit(module_of(node), tape.traced_for)
    if unit > 1:
        divided = tape.apply("Mul", x, tape.constant("quantize.unit", np.array(1 / unit, np.float32)))
        divided.shape, divided.type = x.shape, x.type
        x = divided
    return tape.apply("MatMulNBits", x, packed, *others, domain=DOMAIN, **attributes)


#: What replaces a product: `(tape, node)` to the value that the product has.
PRODUCTS: dict[Dtype, Callable[[_Tape, ir.Node], ir.Value]] = {
    "int8": _w8a8,
    "int8wo": partial(_weight_only, dtype="int8wo", bits=8),
    "int4wo": partial(_weight_only, dtype="int4wo", bits=4),
}
