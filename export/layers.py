"""Layers that vision tower and decoder share, with weights in the layout of the graph.

What enters: layers of transformers' model. What leaves: modules that compute the same.

Weights are stored (in, out), so that a graph multiplies without transposing. For a CPU, products of
the same input (queries, keys and values) are not fused: their output would have to be split, and that
copy costs more than fusing saves (4 % of the vision graph, measured). On a GPU every operator of a
decode step is a kernel launch, so there the decoder's are fused.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.operators import silu


class Scope(nn.Module):
    """A module whose call runs a function; the nodes of a graph that are traced in it are named after it."""

    def forward(self, run: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """The result of `run(self, ...)`."""
        return run(self, *inputs, **options)


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
        """`count` layers whose concatenated outputs are the output of `linear`."""
        biases = [None] * count if linear.bias is None else linear.bias.chunk(count)
        return [cls(weight, bias) for weight, bias in zip(linear.weight.chunk(count), biases, strict=True)]

    @classmethod
    def joined(cls, linears: Sequence[nn.Linear]) -> "Linear":
        """One layer whose output is the concatenation of theirs."""
        biases = tuple(linear.bias for linear in linears if linear.bias is not None)
        return cls(torch.cat(tuple(linear.weight for linear in linears)), torch.cat(biases) if biases else None)

    def in_unit(self, unit: int) -> "Linear":
        """The same layer with its output divided by `unit`, a power of two: exact, except for subnormals."""
        return Linear(self.weight.t() / unit, None if self.bias is None else self.bias / unit)

    def with_bias(self, bias: Tensor | None) -> "Linear":
        """The same product with another bias."""
        return Linear(self.weight.t(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x)) / unit`; `up` is divided, so that the inner states are too."""

    __call__: Callable[..., Tensor]

    def __init__(self, mlp: Any, unit: int = 1) -> None:
        super().__init__()
        self.gate, self.up = Linear.of(mlp.gate_proj), Linear.of(mlp.up_proj).in_unit(unit)
        down = Linear.of(mlp.down_proj)
        self.down = down.with_bias(None if down.bias is None else down.bias / unit)

    def forward(self, x: Tensor, silu: Callable[[Tensor], Tensor] = silu) -> Tensor:
        """(..., D) to (..., D)."""
        return self.down(silu(self.gate(x)) * self.up(x))
