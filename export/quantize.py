"""Reduced precision: products with constant weights, replaced in a traced graph.

What enters: a graph in fp32. What leaves, in place: the same graph, whose products have integer
weights, one scale for each output channel or block. Everything between the products (residual
stream, norms, rotary tables, softmax, embedding) stays fp32.

`int8` (weights and activations): every token has a scale of its own, its largest magnitude, so

    x ─ Abs ─ ReduceMax ─ Max(tiny) ─┬───────────────────────────────────────── Mul ─ product
     └────────────────────────────── Div ─ QuantizeLinear ─ MatMulIntegerToFloat ─┘

1. A row's result does not depend on the rows that share its batch, as it would with
   `DynamicQuantizeMatMul`, which has one scale for all of its input.
2. The few tokens of a language model whose states are a hundred times longer than the others'
   (Sun et al. 2024, arXiv 2402.17762) cost the others no precision.
3. Activations are unsigned with a constant zero point of 128 and weights signed: the pair that
   ONNX Runtime's x86 kernels run at full speed (signed pairs run sixteen times slower).

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
from qvl_batch.bundle import Dtype

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
        dtype: of the products; `fp32` changes nothing.
        layers: name of the layer that a weight belongs to, by the weight's name.
        keep: layers to leave in fp32.
    """
    if dtype == "fp32":
        return
    replace = _w8a8 if dtype == "int8" else partial(_weight_only, bits=4 if dtype == "int4wo" else 8)
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is None or weight.const_value is None or layers(str(weight.name)) in keep:
            continue
        matrix = weight.const_value.numpy()
        if node.op_type == "Gemm":
            matrix = matrix.T  # the head, stored (V, D) for the embedding
        tape = _Tape(model, str(weight.name))
        product = replace(tape, node.inputs[0], np.ascontiguousarray(matrix, np.float32))
        product.shape, product.type = node.outputs[0].shape, node.outputs[0].type
        name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, [product])
        product.name = name
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


class _Tape:
    """Nodes and initializers that take the place of one product."""

    def __init__(self, model: ir.Model, name: str) -> None:
        self._model, self._name = model, name
        self.nodes: list[ir.Node] = []

    def constant(self, suffix: str, value: Array, *, shared: bool = False) -> ir.Value:
        """An initializer of this product, or one that all products of the graph share."""
        name = f"quantize.{suffix}" if shared else f"{self._name}.{suffix}"
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
        self.nodes.append(node)
        return node.outputs[0]


def _w8a8(tape: _Tape, x: ir.Value, matrix: Array) -> ir.Value:
    scale = np.maximum(np.abs(matrix).max(axis=0), TINY) / LEVELS
    weights = tape.constant("int8", np.rint(matrix / scale).astype(np.int8))
    last = tape.constant("last_axis", np.array([-1]), shared=True)
    tiny = tape.constant("tiny", np.array(TINY, np.float32), shared=True)
    step = tape.constant("step", np.array(1 / LEVELS, np.float32), shared=True)
    middle = tape.constant("zero_point", np.array(ZERO_POINT, np.uint8), shared=True)
    scales = tape.constant("scale", scale.astype(np.float32))
    zeros = tape.constant("zero_points", np.zeros(len(scale), np.int8))
    # Products of one input repeat these nodes; ONNX Runtime merges them when it loads the graph.
    largest = tape.apply("Max", tape.apply("ReduceMax", tape.apply("Abs", x), last, keepdims=1), tiny)
    rounded = tape.apply("QuantizeLinear", tape.apply("Div", x, largest), step, middle)
    product = tape.apply("MatMulIntegerToFloat", rounded, weights, step, scales, middle, zeros, domain=DOMAIN)
    return tape.apply("Mul", product, largest)


def _weight_only(tape: _Tape, x: ir.Value, matrix: Array, *, bits: int) -> ir.Value:
    inputs, outputs = matrix.shape
    blocks = -(-inputs // BLOCK)
    padded = np.zeros((outputs, blocks * BLOCK), np.float32)
    padded[:, :inputs] = matrix.T
    padded = padded.reshape(outputs, blocks, BLOCK)
    middle = 2 ** (bits - 1)
    scale = np.maximum(np.abs(padded).max(axis=-1, keepdims=True), TINY) / (middle - 1)
    levels = (np.rint(padded / scale) + middle).astype(np.uint8)
    packed = levels if bits == 8 else levels[..., ::2] | (levels[..., 1::2] << 4)  # noqa: PLR2004
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    weights = tape.constant(f"int{bits}", packed)
    scales = tape.constant("scale", scale[..., 0].astype(np.float32))
    return tape.apply("MatMulNBits", x, weights, scales, domain=DOMAIN, **attributes)
