"""Layers that vision tower and decoder share, with their weights laid out for the graph.

Weights are stored (in, out), so that a graph multiplies without transposing, and those that
multiply the same input stand side by side, so that it multiplies once. What enters are layers of
transformers' model; what leaves computes the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Linear(nn.Module):
    """`nn.Linear` with its weight stored (in, out), so that the graph multiplies without transposing."""

    __call__: Callable[..., Tensor]

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        self.weight = nn.Parameter(torch.cat(weights).t().contiguous())
        self.bias = nn.Parameter(torch.cat(biases)) if biases else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class GatedMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`, gate and up in one product."""

    __call__: Callable[..., Tensor]

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = Linear(mlp.gate_proj, mlp.up_proj)
        self.down = Linear(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
