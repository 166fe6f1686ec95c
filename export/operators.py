"""The fused operators of ONNX Runtime in the exported graphs, as functions for the tracer.

Each emits one node (`torch.onnx.ops.symbolic*` tells the tracer its output's shape and dtype);
none computes anything in PyTorch. The plain graphs have none of them: see `export.standard`.

Definitions: onnxruntime/docs/ContribOperators.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DOMAIN = "com.microsoft"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in plain operators that ONNX Runtime fuses."""
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x.float() * scale).to(x.dtype)


def skip_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`total = update + residual`; returns `(rms_norm(total), total)`, both shaped as `residual`.

    The operator takes a bias too, but its CPU kernel with one is slower than an Add before it.
    """
    statistics = [*residual.shape[:-1], 1]
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::SkipSimplifiedLayerNormalization",
        [update, residual, weight],
        attrs={"epsilon": eps},
        dtypes=[residual.dtype, torch.float32, torch.float32, residual.dtype],
        shapes=[residual.shape, statistics, statistics, residual.shape],
        version=1,
    )
    return outputs[0], outputs[3]


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)` in one pass."""
    return _symbolic("QuickGelu", [x], {"alpha": 1.0}, x)


def rotary_embedding(x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate all heads of `x` (B, S, heads * head_dim) by tables (N, head_dim / 2).

    `rows` int64 (B, S) is each token's row in the tables. With shape (1,) it is the row of the
    first token, and the other tokens take the rows after it.
    """
    attrs = {"num_heads": heads, "rotary_embedding_dim": 0, "interleaved": 0}
    return _symbolic("RotaryEmbedding", [x, rows, cos, sin], attrs, x)


def multi_head_attention(q: Tensor, k: Tensor, v: Tensor, *, heads: int, lengths: Tensor | None = None) -> Tensor:
    """Attention; all of (B, S, heads * head_dim).

    `lengths` int32 (B,) says how many keys of each row there are; those after them are not attended to. Their scores
    are lowered by 10,000, so they must not exceed the others' by as much: let them repeat one of the others.
    """
    masked = [] if lengths is None else [None, lengths]
    return _symbolic("MultiHeadAttention", [q, k, v, *masked], {"num_heads": heads}, q)


@dataclass(frozen=True, slots=True)
class Operators:
    """Operators that a graph is made of: fused ones of ONNX Runtime, or standard ones. Each is as its namesake here."""

    silu: Callable[[Tensor], Tensor]
    skip_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rotary_embedding: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    multi_head_attention: Callable[..., Tensor]


FUSED = Operators(silu, skip_rms_norm, rotary_embedding, multi_head_attention)


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split (B, S, D) into (B, size, D) each; `torch.split` does not take sizes that depend on values."""
    outputs = torch.onnx.ops.symbolic_multi_out(
        "Split",
        [x, torch.stack([torch.scalar_tensor(size, dtype=torch.int64) for size in sizes])],
        attrs={"axis": 1},
        dtypes=[x.dtype] * len(sizes),
        shapes=[[x.shape[0], size, x.shape[2]] for size in sizes],
    )
    return list(outputs)


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: tuple[Tensor, Tensor],
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    heads: tuple[int, int],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention over the cache and the new tokens, which it appends to the cache.

    Args:
        query: (B, S, heads * head_dim), already rotated.
        key: (B, S, kv_heads * head_dim), already rotated.
        value: (B, S, kv_heads * head_dim).
        cache: past keys and values, each (B, kv_heads, L_max, head_dim).
        seqlens_k: int32 (B,), valid tokens of each row after this call, minus one.
        total_sequence_length: int32 scalar, the largest number of valid tokens (not minus one).
        heads: number of query heads and of key-value heads.

    Returns:
        (B, S, heads * head_dim), and the updated cache.
    """
    past_key, past_value = cache
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::GroupQueryAttention",
        [query, key, value, past_key, past_value, seqlens_k, total_sequence_length],
        attrs={"num_heads": heads[0], "kv_num_heads": heads[1]},
        dtypes=[query.dtype, past_key.dtype, past_value.dtype],
        shapes=[query.shape, past_key.shape, past_value.shape],
        version=1,
    )
    return outputs[0], (outputs[1], outputs[2])


def _symbolic(operator: str, inputs: Sequence[Tensor | None], attrs: Mapping[str, float], like: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{operator}", inputs, dict(attrs), dtype=like.dtype, shape=like.shape, version=1
    )
