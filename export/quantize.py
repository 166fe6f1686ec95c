"""Reduced precision: products with constant weights, replaced in a traced graph.

What enters: a graph in fp32. What leaves, in place: the same graph, whose products have integer
weights, one scale for each output channel or block. Everything between the products (residual
stream, norms, rotary tables, softmax, embedding) stays fp32.

`int8` (weights and activations): every token has a scale of its own, its largest magnitude, so

    x ─┬─ ReduceMax ──────── Max(tiny) ─┬─────────────────────────────────────── Mul ─ product
       ├─ ReduceMin ─ Neg ───┘          │                                         │
       └─────────────────────────────── QuantizeLinear ─── MatMulIntegerToFloat ──┘

1. A row's result does not depend on the rows that share its batch, as it would with
   `DynamicQuantizeMatMul`, which has one scale for all of its input.
2. The few tokens of a language model whose states are a hundred times longer than the others'
   (Sun et al. 2024, arXiv 2402.17762) cost the others no precision.
3. Activations are unsigned with a constant zero point of 128 and weights signed: the pair that
   ONNX Runtime's x86 kernels run at full speed (signed pairs run sixteen times slower).
4. Its kernels for x86 without VNNI add the products of inputs 2 i and 2 i + 1 in 16 bits (`VPMADDUBSW`),
   which saturate at 32,767. So an output's scale lets no two such weights of one sign come to more
   than 128 together: with activations of at most 255 that is 32,640, and the product is exact on any
   processor. It costs 0.4 of the 8 bits of a weight; weights of at most 64 would cost one.

`int8wo`, `int4wo` (weights only): `MatMulNBits` in blocks along the input, activations in fp32
for the caller; the kernel rounds them to 8 bits in the same blocks (`accuracy_level` 4).
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.operators import DOMAIN
from qvl_batch.bundle.manifest import Dtype

Array = NDArray[Any]
#: Inputs that share a scale in a weight-only product.
BLOCK = 64
LEVELS, ZERO_POINT = 127, 128
#: Weight-only products round activations to 8 bits too: `MatMulNBits`' attribute of that name.
ACCURACY_LEVEL = 4
TINY = float(np.finfo(np.float32).tiny)


def quantize(model: ir.Model, dtype: Dtype, layers: Callable[[str], str], keep: Collection[str]) -> None:
    """Quantize every product of `model` with a constant matrix, but for those of layers in `keep`.

    Args:
        model: changed in place.
        dtype: of the products; what is no integer changes nothing.
        layers: name of the layer that a weight belongs to, by the weight's name.
        keep: layers to leave in fp32.
    """
    if not dtype.startswith("int"):
        return
    tape = _Tape(model)
    quantized = _w8a8 if dtype == "int8" else partial(_weight_only, bits=4 if dtype == "int4wo" else 8)
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.const_value is None or layers(str(weight.name)) in keep:
            continue
        # The weight of a Gemm is the head, stored (V, D) for the embedding.
        product = quantized(tape, node.inputs[0], weight, transposed=node.op_type == "Gemm")
        product.shape, product.type = node.outputs[0].shape, node.outputs[0].type
        name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.take(), node.outputs, [product])
        product.name = name
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


class _Tape:
    """Nodes that take the place of products, and initializers; what several products need is made once."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._nodes: list[ir.Node] = []
        self._of_weights: dict[str, list[ir.Value]] = {}
        #: Activations as 8 bits, and the largest magnitude of each token, by the activations.
        self.rounded: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def take(self) -> list[ir.Node]:
        """The nodes since the last time."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def of_weight(
        self, weight: ir.Value, make: Callable[[Array], dict[str, Array]], *, transposed: bool
    ) -> list[ir.Value]:
        """What is made of a weight (in, out), as initializers."""
        name = str(weight.name)
        if name not in self._of_weights:
            assert weight.const_value is not None
            matrix = weight.const_value.numpy()
            made = make(np.ascontiguousarray(matrix.T if transposed else matrix, np.float32))
            self._of_weights[name] = [self.constant(f"{name}.{suffix}", value) for suffix, value in made.items()]
        return self._of_weights[name]

    def constant(self, name: str, value: Array) -> ir.Value:
        """An initializer, one for each name."""
        known = self._model.graph.initializers.get(name)
        if known is not None:
            return known
        tensor = ir.tensor(value, name=name)
        initializer = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._model.graph.register_initializer(initializer)
        return initializer

    def apply(self, operator: str, *inputs: ir.Value, domain: str = "", **attributes: int) -> ir.Value:
        """A node; returns its output."""
        node = ir.node(operator, inputs, attributes=attributes, domain=domain)
        self._nodes.append(node)
        return node.outputs[0]


def _w8a8(tape: _Tape, x: ir.Value, weight: ir.Value, *, transposed: bool) -> ir.Value:
    weights, scales, zeros = tape.of_weight(weight, _to_int8, transposed=transposed)
    step = tape.constant("quantize.step", np.array(1 / LEVELS, np.float32))
    middle = tape.constant("quantize.zero_point", np.array(ZERO_POINT, np.uint8))
    if x not in tape.rounded:
        tape.rounded[x] = _round(tape, x, step, middle)
    rounded, largest = tape.rounded[x]
    product = tape.apply("MatMulIntegerToFloat", rounded, weights, step, scales, middle, zeros, domain=DOMAIN)
    return tape.apply("Mul", product, largest)


def _to_int8(matrix: Array) -> dict[str, Array]:
    scale = np.maximum(_largest_in_pairs(matrix), TINY) / LEVELS
    levels = np.rint(matrix / scale).astype(np.int8)
    return {"int8": levels, "scale": scale.astype(np.float32), "zero_points": np.zeros(len(scale), np.int8)}


def _largest_in_pairs(matrix: Array) -> Array:
    """Of each output (out,), the largest magnitude of a weight, or of two weights of one sign that a kernel adds first.

    Their levels add up to 127 before they are rounded, and so to at most 128 after it.
    """
    first, second = matrix[::2], matrix[1::2]
    sums = [np.clip(sign * first[: len(second)], 0, None) + np.clip(sign * second, 0, None) for sign in (1, -1)]
    largest: Array = np.maximum.reduce([np.abs(matrix).max(axis=0), *(each.max(axis=0, initial=0) for each in sums)])
    return largest


def _round(tape: _Tape, x: ir.Value, step: ir.Value, middle: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Activations (B, S, in) as uint8, and the largest magnitude of each token (B, S, 1)."""
    last = tape.constant("quantize.last", np.array([-1]))  # an axis, and the shape of a vector
    tiny = tape.constant("quantize.tiny", np.array(TINY, np.float32))
    lowest = tape.apply("Neg", tape.apply("ReduceMin", x, last, keepdims=1))
    largest = tape.apply("Max", tape.apply("ReduceMax", x, last, keepdims=1), lowest, tiny)
    match list(x.shape or ()):
        case [_, int(tokens), int(inputs)] if tokens > 1:
            # As the rows of a matrix, QuantizeLinear takes a scale for each. Where the number of tokens
            # is not known either, as in the decoder, a step would lose more by it than prefill wins.
            rows = tape.apply("Reshape", x, tape.constant(f"quantize.rows.{inputs}", np.array([-1, inputs])))
            steps = tape.apply("Mul", tape.apply("Reshape", largest, last), step)
            middles = tape.apply("Expand", middle, tape.apply("Shape", steps))
            levels = tape.apply("QuantizeLinear", rows, steps, middles, axis=0)
            shape = tape.constant(f"quantize.tokens.{tokens}.{inputs}", np.array([-1, tokens, inputs]))
            return tape.apply("Reshape", levels, shape), largest
        case _:
            return tape.apply("QuantizeLinear", tape.apply("Div", x, largest), step, middle), largest


def _weight_only(tape: _Tape, x: ir.Value, weight: ir.Value, *, transposed: bool, bits: int) -> ir.Value:
    packed, scales = tape.of_weight(weight, partial(_to_blocks, bits=bits), transposed=transposed)
    assert weight.shape is not None
    inputs, outputs = weight.shape[::-1] if transposed else weight.shape
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    return tape.apply("MatMulNBits", x, packed, scales, domain=DOMAIN, **attributes)


def _to_blocks(matrix: Array, bits: int) -> dict[str, Array]:
    inputs, outputs = matrix.shape
    blocks = -(-inputs // BLOCK)
    padded = np.zeros((outputs, blocks * BLOCK), np.float32)
    padded[:, :inputs] = matrix.T
    padded = padded.reshape(outputs, blocks, BLOCK)
    middle = 2 ** (bits - 1)
    scale = np.maximum(np.abs(padded).max(axis=-1, keepdims=True), TINY) / (middle - 1)
    levels = (np.rint(padded / scale) + middle).astype(np.uint8)
    packed = levels if bits == 8 else levels[..., ::2] | (levels[..., 1::2] << 4)  # noqa: PLR2004
    return {f"int{bits}": packed, "scale": scale[..., 0].astype(np.float32)}
