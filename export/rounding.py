"""Weights to integers: each to the nearest, or so that the outputs for given inputs change least.

What enters: the weight (in, out) of a product in fp32 and, for the second way, the second moment of its inputs. What
leaves: arrays in the form that the operators of `export.quantize` take.

The second way is GPTQ (Frantar et al. 2022, arXiv 2210.17323): weights are rounded one input after the other, and the
error that one makes in the outputs is subtracted from the weights of the inputs that are left, as far as inputs are
correlated. It was chosen over AWQ (Lin et al. 2023, arXiv 2306.00978), which scales the inputs that matter before it
rounds to nearest: GPTQ leaves the graph as it is, and on the tiny model divides the error of a product by seven. Inputs
are taken in the order of their power; scales are those of the weights before rounding, so that blocks stay where they
are.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvl_batch.bundle.manifest import Dtype

Array = NDArray[Any]
#: Inputs that share one scale in a weight-only product.
BLOCK = 64
#: Largest level of an int8 weight, and of the sum of two neighbours of the same sign: see `export.quantize`.
LEVELS, PAIR_LEVELS = 127, 128
TINY = float(np.finfo(np.float32).tiny)
#: Rounded weights, by product and dtype.
Rounded = dict[tuple[str, Dtype], dict[str, Array]]
#: Added to the diagonal of the second moment, as a share of its mean.
DAMPING = 0.01
#: Inputs after which the weights that are left are updated, and outputs that are rounded at once.
INPUTS_AT_ONCE, OUTPUTS_AT_ONCE = 128, 16384


def rounded(dtype: Dtype, weight: Array, second_moment: Tensor | None = None) -> dict[str, Array]:
    """A weight (in, out) in the integers of a dtype.

    Args:
        dtype: int8, int8wo or int4wo.
        weight: in fp32.
        second_moment: mean of x xᵀ over inputs (in, in), of which the outputs shall change least; None to round to
            nearest.
    """
    if dtype == "int8":
        return to_int8(weight, second_moment)
    return to_blocks(weight, 4 if dtype == "int4wo" else 8, second_moment)


def to_int8(weight: Array, second_moment: Tensor | None = None) -> dict[str, Array]:
    """Weights (in, out) as `int8` (in, out), with a `scale` (out,) for each output and `zero_points` of 0."""
    scale = np.maximum(_largest_in_pairs(weight), TINY) / LEVELS
    if second_moment is None:
        levels = np.rint(weight / scale)
    else:
        levels = _gptq(weight, scale[None], LEVELS, LEVELS, second_moment, pair=PAIR_LEVELS)
    return {"int8": levels.astype(np.int8), "scale": scale, "zero_points": np.zeros(len(scale), np.int8)}


def to_blocks(weight: Array, bits: int, second_moment: Tensor | None = None) -> dict[str, Array]:
    """Weights (in, out) in blocks of `BLOCK` inputs: `int4` or `int8`, and `scale` (out, blocks).

    Levels are uint8 (out, blocks, BLOCK), two of 4 bits in one; their zero point is 2 ** (bits - 1). The scale of a
    block has the sign with which its largest weight becomes the lowest level, of which there is one more than above.
    """
    inputs, outputs = weight.shape
    blocks = -(-inputs // BLOCK)
    padded = np.zeros((blocks * BLOCK, outputs), np.float32)
    padded[:inputs] = weight
    by_block = padded.reshape(blocks, BLOCK, outputs)
    largest = np.take_along_axis(by_block, np.abs(by_block).argmax(1)[:, None], 1)[:, 0]
    zero_point = 2 ** (bits - 1)
    scale = np.where(np.abs(largest) < TINY, TINY, largest) / -zero_point
    if second_moment is None:
        levels = np.rint(by_block / scale[:, None]).clip(-zero_point, zero_point - 1).reshape(padded.shape)
    else:
        levels = np.zeros_like(padded)
        levels[:inputs] = _gptq(weight, scale, zero_point, zero_point - 1, second_moment)
    unsigned = (levels + zero_point).astype(np.uint8).T.reshape(outputs, blocks, BLOCK)
    return {f"int{bits}": packed(unsigned, bits), "scale": np.ascontiguousarray(scale.T)}


def packed(levels: Array, bits: int) -> Array:
    """Levels in uint8, along the last axis two of 4 bits in one, the first in the lower bits."""
    return levels if bits == 8 else levels[..., ::2] | (levels[..., 1::2] << 4)  # noqa: PLR2004


def from_int8(made: Mapping[str, Array]) -> Array:
    """What the arrays of `to_int8` stand for, (in, out) in fp32."""
    weight: Array = (made["int8"] - made["zero_points"].astype(np.float32)) * made["scale"]
    return weight


def from_blocks(made: Mapping[str, Array], inputs: int) -> Array:
    """What the arrays of `to_blocks` stand for, (in, out) in fp32; blocks have any size, and zero points if there are.

    Args:
        made: the arrays.
        inputs: how many there are; the last block can have more.
    """
    bits = 4 if "int4" in made else 8
    levels, zeros = made[f"int{bits}"], made.get("zero_points")
    outputs, blocks, _ = levels.shape
    if bits == 4:  # noqa: PLR2004
        levels = _halves(levels)
        zeros = None if zeros is None else _halves(zeros)[:, :blocks]
    shift = np.float32(2 ** (bits - 1)) if zeros is None else zeros.astype(np.float32)[..., None]
    weight: Array = ((levels.astype(np.float32) - shift) * made["scale"][..., None]).reshape(outputs, -1).T[:inputs]
    return weight


def largest_pair(levels: Array) -> int:
    """Largest magnitude of the sum of two neighbours' levels (in, out) of the same sign."""
    padded = np.pad(levels.astype(np.int16), ((0, len(levels) % 2), (0, 0)))
    sums = [(sign * padded).clip(min=0).reshape(-1, 2, padded.shape[1]).sum(1).max() for sign in (1, -1)]
    return int(max(sums))


def _halves(packed: Array) -> Array:
    """Two values of 4 bits of each byte, the lower first, along the last axis."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def _largest_in_pairs(weight: Array) -> Array:
    """For each output (out,), the largest magnitude of a weight, or of the sum of a pair of weights of the same sign.

    A pair is what a kernel adds in 16 bits. With this scale its levels add up to at most 127 before rounding, and so
    to at most 128 after it.
    """
    first, second = weight[::2], weight[1::2]
    sums = [np.clip(sign * first[: len(second)], 0, None) + np.clip(sign * second, 0, None) for sign in (1, -1)]
    largest: Array = np.maximum.reduce([np.abs(weight).max(axis=0), *(each.max(axis=0, initial=0) for each in sums)])
    return largest.astype(np.float32)


def _gptq(weight: Array, scale: Array, below: int, above: int, second_moment: Tensor, pair: int | None = None) -> Array:
    """Levels (in, out) from -below to above.

    Args:
        weight: (in, out).
        scale: (blocks, out); an input's block is its index over the length of a block.
        below: magnitude of the lowest level.
        above: the highest level.
        second_moment: of the inputs, (in, in).
        pair: bound on the sum of the levels of the same sign of two neighbours, 2 i and 2 i + 1.
    """
    order, factor = _factor(second_moment)
    inputs, outputs = weight.shape
    block = inputs if len(scale) == 1 else BLOCK
    levels = torch.zeros((inputs + 1, outputs))  # the last input of an odd number has a neighbour of zeros
    for first in range(0, outputs, OUTPUTS_AT_ONCE):
        part = slice(first, first + OUTPUTS_AT_ONCE)
        left = torch.from_numpy(weight[:, part])[order].clone()
        scales = torch.from_numpy(np.ascontiguousarray(scale[:, part]))
        for start in range(0, inputs, INPUTS_AT_ONCE):
            stop = min(start + INPUTS_AT_ONCE, inputs)
            errors = torch.empty((stop - start, left.shape[1]))
            for at in range(start, stop):
                index = int(order[at])
                own = scales[index // block]
                rounded = (left[at] / own).round().clamp(-below, above)
                if pair is not None:
                    beside = levels[index ^ 1, part]
                    rounded = torch.clamp(rounded, -pair - beside.clamp(max=0), pair - beside.clamp(min=0))
                levels[index, part] = rounded
                error = (left[at] - rounded * own) / factor[at, at]
                errors[at - start] = error
                left[at + 1 : stop] -= factor[at, at + 1 : stop, None] * error
            left[stop:] -= factor[start:stop, stop:].T @ errors
    found: Array = levels[:inputs].numpy()
    return found


def _factor(second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs in the order of their power, and the upper triangular U with UᵀU = H⁻¹ of the damped second moment H in
    this order: what remains of the errors of each input in those after it.
    """
    moment = second_moment.clone()
    diagonal = moment.diagonal()
    diagonal += DAMPING * diagonal.mean() + TINY
    order = diagonal.argsort(descending=True, stable=True)
    # With the order reversed, H = LLᵀ; so H = RRᵀ with R upper triangular, and U = R⁻¹.
    lower = torch.linalg.cholesky(moment[order][:, order].flip(0, 1))
    identity = torch.eye(len(lower))
    return order, torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
