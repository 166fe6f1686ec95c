"""SmoothQuant: moves the range of activations into weights, channel by channel.

Xiao et al. 2022, arXiv 2211.10438. Where some channels of a product's input are much larger than the others, one scale
for all of a token, or of a block, leaves the others few levels; and their weights, as much smaller than others, few
levels too. Such a channel is divided by s where it is made (a norm, or a product), and its row of the weight is
multiplied by s:

    norm1 ──► attention.q, .k, .v     attention.v ──► attention.out     norm ──► fc1 (of the merger)
    norm2 ──► mlp.gate, .up           mlp.up ──► mlp.down

Every s is a power of two, so that a model in fp32 computes the same numbers with it and without. The head is left as it
is, since a tied one is the table of tokens.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from export.activations import Inputs
from export.layers import Linear
from export.rounding import BLOCK, LEVELS, TINY, from_blocks, from_int8, rounded
from qvl_batch.bundle.manifest import Dtype

#: Where channels are made, and the products that take them, within a module.
PATHS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("norm1", ("attention.q", "attention.k", "attention.v")),
    ("attention.v", ("attention.out",)),
    ("norm2", ("mlp.gate", "mlp.up")),
    ("mlp.up", ("mlp.down",)),
    ("norm", ("fc1",)),
)
#: Exponents of the range of activations that are tried; that of weights has the rest. 0.5 is the paper's.
STRENGTHS = (0.5, 0.75, 1.0)
#: Least and greatest exponent of a scale, next to the median channel's. A channel that is small in the sample can be
#: large in other rows, so it is not enlarged much.
EXPONENTS = (-3, 12)
#: Scales of channels (n,), by the name of the module or parameter that makes them.
Scales = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class ChannelPath:
    """Products that take the same channels, and what makes them."""

    source: str
    products: tuple[str, ...]
    channels: int
    #: Values of a head, where heads of queries share those that `attention.v` makes; else None.
    head_dim: int | None

    def at_inputs(self, scale: Tensor, inputs: int) -> Tensor:
        """Scales (channels,) at the inputs (in,) of the products."""
        if self.head_dim is None:  # the merger's inputs are those of several patches
            return scale.repeat(inputs // self.channels)
        return scale.reshape(-1, 1, self.head_dim).expand(-1, inputs // self.channels, -1).flatten()

    def at_channels(self, largest: Tensor) -> Tensor:
        """Largest magnitudes at inputs (in,) to those of channels."""
        if self.head_dim is None:
            return largest.reshape(-1, self.channels).amax(0)
        return largest.reshape(-1, len(largest) // self.channels, self.head_dim).amax(1).flatten()


def paths(module: nn.Module) -> list[ChannelPath]:
    """The paths within a module."""
    found: list[ChannelPath] = []
    for source, products in PATHS:
        try:
            made, *_ = attrgetter(source, *products)(module)
        except AttributeError:  # a module of another kind
            continue
        channels = made.weight.shape[1] if isinstance(made, Linear) else len(made)
        head_dim = attrgetter("attention.head_dim")(module) if source == "attention.v" else None
        found.append(ChannelPath(source, products, channels, head_dim))
    return found


def smooth(prefix: str, module: nn.Module, scales: Mapping[str, Any]) -> None:
    """Divide what is made and multiply the weights of what takes it, in place.

    Args:
        prefix: the module's name.
        module: with its weights.
        scales: of channels; those of other modules are ignored.
    """
    for path in paths(module):
        if f"{prefix}.{path.source}" not in scales:
            continue
        scale = torch.as_tensor(scales[f"{prefix}.{path.source}"])
        made = attrgetter(path.source)(module)
        with torch.no_grad():
            if isinstance(made, Linear):
                made.weight.div_(scale)
                if made.bias is not None:
                    made.bias.div_(scale)
            else:
                made.div_(scale)
            for product in path.products:
                weight = attrgetter(product)(module).weight
                weight.mul_(path.at_inputs(scale, len(weight))[:, None])


def find_scale(path: ChannelPath, weights: Sequence[Any], inputs: Inputs, dtypes: Collection[Dtype]) -> Tensor | None:
    """The scales (channels,) with which products in integers come closest to those in fp32; None for none.

    For several dtypes, those with the least geometric mean of their errors.

    Args:
        path: of the products.
        weights: (in, out) of each.
        inputs: that all of them take.
        dtypes: that the products have, or may have.
    """
    joined = torch.cat(tuple(weights), dim=1).detach()
    x = inputs.kept
    exact = x @ joined
    of_inputs = path.at_channels(inputs.largest).clamp(min=TINY)
    of_weights = path.at_channels(joined.abs().amax(1)).clamp(min=TINY)
    best, found = _log_error(x, joined, exact, dtypes), None
    for strength in STRENGTHS:
        logs = strength * of_inputs.log2() - (1 - strength) * of_weights.log2()
        scale = torch.exp2((logs - logs.median()).round().clamp(*EXPONENTS))
        each = path.at_inputs(scale, len(joined))
        error = _log_error(x / each, joined * each[:, None], exact, dtypes)
        if error < best:
            best, found = error, scale
    return found


def _log_error(x: Tensor, weight: Tensor, exact: Tensor, dtypes: Collection[Dtype]) -> float:
    return sum(math.log(max(_error(x, weight, exact, dtype), TINY)) for dtype in dtypes)


def _error(x: Tensor, weight: Tensor, exact: Tensor, dtype: Dtype) -> float:
    """Error of a product in integers. Inputs have a scale for each token, or for each token and block."""
    inputs = len(weight)
    padded = pad(x, (0, -inputs % BLOCK if dtype != "int8" else 0))
    blocks = padded.reshape(len(x), -1, padded.shape[1] if dtype == "int8" else BLOCK)
    step = blocks.abs().amax(-1, keepdim=True).clamp(min=TINY) / LEVELS
    made = rounded(dtype, weight.numpy())
    found = from_int8(made) if dtype == "int8" else from_blocks(made, inputs)
    levels = ((blocks / step).round() * step).reshape(padded.shape)[:, :inputs]
    return float((levels @ torch.from_numpy(np.ascontiguousarray(found)) - exact).norm())
