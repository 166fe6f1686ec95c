"""Attention, rotary embedding, norm and activation in standard ONNX operators, for the plain graphs.

What `export.operators` has as fused operators of ONNX Runtime: tools that quantize know only the standard ones.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from export.operators import Operators, rms_norm


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Grouped-query attention of (B, heads, S, head_dim) over (B, kv_heads, L, head_dim), softmax in fp32.

    `visible` bool (B, 1, S, L): the keys that each query attends to; None for all.
    """
    batch, heads, length, head_dim = q.shape
    q = q.reshape(batch, k.shape[1], -1, length, head_dim)
    scores = (q @ k[:, :, None].transpose(-1, -2) / math.sqrt(head_dim)).float()
    if visible is not None:
        scores = torch.where(visible[:, None], scores, torch.finfo(torch.float32).min)
    mixed = scores.softmax(-1).to(v.dtype) @ v[:, :, None]
    return mixed.reshape(batch, heads, length, head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, heads, S, head_dim) in two halves by (..., S, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _skip_rms_norm(update: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + update
    return rms_norm(total, weight, eps), total


def _rotary_embedding(x: Tensor, rows: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """As of `export.operators`, where every token has the row of its own place."""
    del rows
    return _joined(rotate(_by_heads(x, heads), cos, sin))


def _multi_head_attention(q: Tensor, k: Tensor, v: Tensor, *, heads: int, lengths: Tensor | None = None) -> Tensor:
    assert lengths is None, "no part of a plain graph has windows of several lengths"
    return _joined(attend(*(_by_heads(x, heads) for x in (q, k, v))))


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * head_dim) to (B, heads, S, head_dim)."""
    return x.reshape(x.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """The inverse of `_by_heads`."""
    return x.transpose(1, 2).flatten(2)


STANDARD = Operators(F.silu, _skip_rms_norm, _rotary_embedding, _multi_head_attention)
