"""Layers that vision tower and decoder share, with their weights laid out for the graph.

Weights are stored (in, out), so that a graph multiplies without transposing. Products of one
input stay apart for a CPU: joined, they would have to be split again, and that copy takes longer
than one product saves (4 % of the vision graph, measured). On a GPU a decode step is as many
launches as operators, so there the decoder's are joined. What enters are layers of transformers'
model; what leaves computes the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.operators import silu


class Linear(nn.Module):
    """`nn.Linear` with its weight stored (in, out), so that the graph multiplies without transposing."""

    __call__: Callable[..., Tensor]

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.t().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Linear":
        """The same layer."""
        return cls(linear.weight, linear.bias)

    @classmethod
    def parts(cls, linear: nn.Linear, count: int) -> "list[Linear]":
        """`count` layers whose outputs together are those of `linear`."""
        biases = [None] * count if linear.bias is None else linear.bias.chunk(count)
        return [cls(weight, bias) for weight, bias in zip(linear.weight.chunk(count), biases, strict=True)]

    @classmethod
    def joined(cls, linears: Sequence[nn.Linear]) -> "Linear":
        """One layer whose output is theirs, one behind the other."""
        biases = tuple(linear.bias for linear in linears if linear.bias is not None)
        return cls(torch.cat(tuple(linear.weight for linear in linears)), torch.cat(biases) if biases else None)

    def in_unit(self, unit: int) -> "Linear":
        """The same layer with outputs in a larger unit, a power of two: exact, short of the smallest numbers."""
        return Linear(self.weight.t() / unit, None if self.bias is None else self.bias / unit)

    def with_bias(self, bias: Tensor | None) -> "Linear":
        """The same product with another bias."""
        return Linear(self.weight.t(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`, in `unit` from the inner states on."""

    __call__: Callable[..., Tensor]

    def __init__(self, mlp: Any, unit: int = 1) -> None:
        super().__init__()
        self.gate, self.up = Linear.of(mlp.gate_proj), Linear.of(mlp.up_proj).in_unit(unit)
        down = Linear.of(mlp.down_proj)
        self.down = down.with_bias(None if down.bias is None else down.bias / unit)

    def forward(self, x: Tensor, silu: Callable[[Tensor], Tensor] = silu) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(silu(self.gate(x)) * self.up(x))
