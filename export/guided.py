"""The decoder graphs for guided answers, in which a mask says which tokens can come next, and for drawn ones, whose
next tokens are drawn in place of the most probable ones.

    logits ─ repetition penalty ─ + (0 or -inf) ─ scores ─┬─ top k ─ next_token
                                     │                    ├─ softmax ─ token_logprob
         allowed, one bit a token ───┘                    └─ gather ─ candidate_scores
                                                               └─ candidates

and for drawn answers                             scores ─┬─ top k ─ top_scores, top_tokens
                                                          └─ x inverse_temperature ─ log-sum-exp ─ scaled_total

They are the worker's decoder graph with more inputs and outputs, and share its weights. A job runs the one that it
needs, since ONNX Runtime computes outputs also if nobody takes them. B rows, V vocabulary, K candidates.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvl_batch.bundle.manifest import mask_bytes

FP32 = ir.DataType.FLOAT
#: Begins the names of what is added.
OWN = "guide."
#: Tokens of `top_tokens`. Of a model's distribution at temperature 1 they hold nearly everything; where they do not,
#: the worker draws from all scores.
TOP = 64


def guide(model: ir.Model, vocab_size: int, *, drawn: bool = False) -> ir.Model:
    """Add what guides answers. Scores are logits after the repetition penalty, -inf where a token is not allowed.

    Inputs: `allowed`, uint8 (B, `mask_bytes`): token t is bit t % 8 of byte t // 8; `candidates`, int64 (B, K), tokens.
    Outputs: `token_logprob`, float32 (B,), the log-probability of `next_token`; `candidate_scores`, float32 (B, K).

    For drawn answers also the input `inverse_temperature`, float32 (B, 1), and the outputs `scores`, float32 (B, V);
    `top_scores`, float32, and `top_tokens`, int64, both (B, `TOP`) or of the whole vocabulary if that is smaller: the
    largest scores, in descending order, and their tokens; `scaled_total`, float32 (B,), the log-sum-exp of scores x
    `inverse_temperature`.

    Each byte of the mask looks its 8 tokens up in a table, since operators on single bits have no CUDA kernels.

    Args:
        model: the decoder graph; changed in place.
        vocab_size: V.
        drawn: for drawn answers.
    """
    graph = model.graph
    (argmax,) = (node for node in graph if node.op_type in ("ArgMax", "TopK"))
    logits = argmax.inputs[0]
    assert logits is not None
    allowed = ir.Value(
        name="allowed", shape=ir.Shape(["B", mask_bytes(vocab_size)]), type=ir.TensorType(ir.DataType.UINT8)
    )
    candidates = ir.Value(name="candidates", shape=ir.Shape(["B", "K"]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.extend([allowed, candidates])
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = _constant(model, "table", np.where(bits, 0, -np.inf).astype(np.float32))
    nodes: list[ir.Node] = []

    def apply(
        operator: str, inputs: Sequence[ir.Value], results: int = 1, **attributes: int | ir.DataType
    ) -> list[ir.Value]:
        node = ir.node(operator, inputs, attributes=attributes, num_outputs=results)
        for at, value in enumerate(node.outputs):
            value.name = f"{OWN}{operator.lower()}.{len(nodes)}.{at}"
        nodes.append(node)
        return list(node.outputs)

    (index,) = apply("Cast", [allowed], to=ir.DataType.INT32)
    (by_byte,) = apply("Gather", [table, index], axis=0)
    (mask,) = apply("Reshape", [by_byte, _constant(model, "shape", np.array([0, -1]))])
    if vocab_size % 32:
        ends = [
            _constant(model, name, np.array([at])) for name, at in (("start", 0), ("stop", vocab_size), ("axis", 1))
        ]
        (mask,) = apply("Slice", [mask, *ends])
    if logits.dtype != FP32:
        (logits,) = apply("Cast", [logits], to=FP32)
    (scores,) = apply("Add", [logits, mask])
    axis = _constant(model, "axis", np.array([1]))
    (chosen,) = apply("GatherElements", [scores, candidates], axis=1)
    # On a CPU, ONNX Runtime's ReduceLogSumExp takes 20 times as long.
    (logprob,) = apply("Log", apply("ReduceMax", [*apply("Softmax", [scores], axis=1), axis], keepdims=0))
    _publish(graph, logprob, "token_logprob", ["B"])
    _publish(graph, chosen, "candidate_scores", ["B", "K"])
    argmax.replace_input_with(0, scores)
    if drawn:
        cold = ir.Value(name="inverse_temperature", shape=ir.Shape(["B", 1]), type=ir.TensorType(FP32))
        graph.inputs.append(cold)
        (scaled,) = apply("Mul", [scores, cold])
        (best,) = apply("ReduceMax", [scaled, axis], keepdims=0)
        (share,) = apply("ReduceMax", [*apply("Softmax", [scaled], axis=1), axis], keepdims=0)
        (total,) = apply("Sub", [best, *apply("Log", [share])])
        count = min(TOP, vocab_size)
        top = _constant(model, "top", np.array([count]))
        if argmax.op_type == "TopK":
            argmax.replace_input_with(1, top)
            top_scores, top_tokens = argmax.outputs
        else:
            top_scores, top_tokens = apply("TopK", [scores, top], results=2, axis=1)
        _publish(graph, scores, "scores", ["B", vocab_size])
        _publish(graph, top_scores, "top_scores", ["B", count])
        _publish(graph, top_tokens, "top_tokens", ["B", count], ir.DataType.INT64)
        _publish(graph, total, "scaled_total", ["B"])
    graph.insert_before(argmax, nodes)
    return model


def _publish(graph: ir.Graph, value: ir.Value, name: str, shape: Sequence[str | int], kind: ir.DataType = FP32) -> None:
    """Make a value an output of the graph."""
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(kind)
    graph.outputs.append(value)


def _constant(model: ir.Model, name: str, value: NDArray[np.generic]) -> ir.Value:
    """An initializer, created once."""
    known = model.graph.initializers.get(OWN + name)
    if known is not None:
        return known
    tensor = ir.tensor(value, name=OWN + name)
    made = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(made)
    return made
