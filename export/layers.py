"""Layers that vision tower and decoder share, with their weights laid out for the graph.

Weights are stored (in, out), so that a graph multiplies without transposing. Products of one
input stay apart: joined, they would have to be split again, and on a CPU that copy takes longer
than one product saves (4 % of the vision graph, measured). What enters are layers of
transformers' model; what leaves computes the same.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


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
        return list(map(cls, linear.weight.chunk(count), biases))

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

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
