"""The decoder graph for guided answers: what a mask does not allow is never the next token.

    logits ─ repetition penalty ─ scores ─ + (0 or -inf) ─┬─ argmax ─ next_token
                                              │           ├─ log-sum-exp ─ token_logprob
                  allowed, one bit a token ───┘           └─ gather ─ candidate_scores
                                                                │
                                                 candidates ────┘

It is the worker's decoder graph with two inputs and two outputs more, and shares its weights. Jobs that guide no answer
run the other one. B rows, V vocabulary, K candidates.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvl_batch.bundle.manifest import mask_bytes

FP32 = ir.DataType.FLOAT
#: Begins the names of what is added.
OWN = "guide."


def guide(model: ir.Model, vocab_size: int) -> ir.Model:
    """Add inputs `allowed`, uint8 (B, `mask_bytes`): token t is bit t % 8 of byte t // 8; and `candidates`, int64
    (B, K), tokens. Add outputs `token_logprob`, float32 (B,), the log-probability of `next_token` among those that are
    allowed, after the repetition penalty; and `candidate_scores`, float32 (B, K), logits after both.

    Each byte of the mask looks its 8 tokens up in a table, since operators on single bits have no CUDA kernels.

    Args:
        model: the decoder graph; changed in place.
        vocab_size: V.
    """
    graph = model.graph
    (argmax,) = (node for node in graph if node.op_type == "ArgMax")
    scores = argmax.inputs[0]
    assert scores is not None
    allowed = ir.Value(
        name="allowed", shape=ir.Shape(["B", mask_bytes(vocab_size)]), type=ir.TensorType(ir.DataType.UINT8)
    )
    candidates = ir.Value(name="candidates", shape=ir.Shape(["B", "K"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.extend([allowed, candidates])
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = _constant(model, "table", np.where(bits, 0, -np.inf).astype(np.float32))
    nodes: list[ir.Node] = []

    def apply(operator: str, inputs: Sequence[ir.Value], **attributes: int | ir.DataType) -> ir.Value:
        node = ir.node(operator, inputs, attributes=attributes)
        node.outputs[0].name = f"{OWN}{operator.lower()}.{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    index = apply("Cast", [allowed], to=ir.DataType.INT32)
    by_byte = apply("Gather", [table, index], axis=0)
    mask = apply("Reshape", [by_byte, _constant(model, "shape", np.array([0, -1]))])
    if vocab_size % 32:
        ends = [
            _constant(model, name, np.array([at])) for name, at in (("start", 0), ("stop", vocab_size), ("axis", 1))
        ]
        mask = apply("Slice", [mask, *ends])
    if scores.dtype != FP32:
        scores = apply("Cast", [scores], to=FP32)
    masked = apply("Add", [scores, mask])
    axis = _constant(model, "axis", np.array([1]))
    best = apply("ReduceMax", [masked, axis], keepdims=0)
    total = apply("ReduceLogSumExp", [masked, axis], keepdims=0)
    logprob = apply("Sub", [best, total])
    chosen = apply("GatherElements", [masked, candidates], axis=1)
    for value, name, shape in ((logprob, "token_logprob", ["B"]), (chosen, "candidate_scores", ["B", "K"])):
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(FP32)
        graph.outputs.append(value)
    graph.insert_before(argmax, nodes)
    argmax.replace_input_with(0, masked)
    return model


def _constant(model: ir.Model, name: str, value: NDArray[np.generic]) -> ir.Value:
    """An initializer, created once."""
    known = model.graph.initializers.get(OWN + name)
    if known is not None:
        return known
    tensor = ir.tensor(value, name=OWN + name)
    made = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(made)
    return made
