"""Weights that a checkpoint holds in few bits: AWQ, GPTQ, FP8 and bitsandbytes' 4 bits.

What enters: the files of the weights, and what config.json says of their quantization. What leaves: the same tensors by
the names of the model's parameters, in floats; and of AWQ and GPTQ the integers, in the form of `export.rounding`.

    AWQ     qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out): int32 of eight outputs, in the order
            of `AWQ_ORDER`. Lin et al. 2023, arXiv 2306.00978; the layout is AutoAWQ's "gemm".
    GPTQ    qweight (in / 8, out), qzeros (groups, out / 8), scales (groups, out), g_idx (in,): the group of each input.
            Zero points are stored less 1, except in the format "gptq_v2". Frantar et al. 2022, arXiv 2210.17323.
    FP8     weight (out, in) in float8, weight_scale_inv: one for each block, in spite of its name a factor.
    4 bits  weight (in * out / 2, 1) of indices into weight.quant_map, weight.absmax for each block, which is itself
            quantized if there is weight.nested_absmax. Dettmers et al. 2023, arXiv 2305.14314.

Activations are not rounded, whatever the checkpoint says of them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.checkpoint_files import method_of
from export.rounding import Array, packed
from export.tensor_files import TensorFiles
from qvl_batch.bundle.manifest import Dtype
from qvl_batch.errors import ExportError

Settings = Mapping[str, Any]
Parts = dict[str, Tensor]
#: Which output is in each 4 bits of an integer of AWQ, the lowest first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Blocks that ONNX Runtime's `MatMulNBits` takes: powers of two, from this on.
LEAST_BLOCK = 16
_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True)
class _Levels:
    """A weight in integers: `(levels - zeros[group]) * scales[group]`.

    Args:
        levels: (in, out).
        zeros: (groups, out).
        scales: (groups, out), in fp32.
        group: of each input, (in,).
    """

    levels: Tensor
    zeros: Tensor
    scales: Tensor
    group: Tensor

    def values(self) -> Tensor:
        """The weight (out, in): exact in fp32, since levels have at most 8 bits and scales 11."""
        return ((self.levels - self.zeros[self.group]) * self.scales[self.group]).t()

    def blocks(self, bits: int) -> dict[str, Array]:
        """The same as `export.rounding.to_blocks` has it, with zero points.

        Raises:
            ValueError: says why `MatMulNBits` cannot have these integers.
        """
        inputs, outputs = self.levels.shape
        groups = len(self.scales)
        size = inputs // groups
        if not torch.equal(self.group, torch.arange(inputs) // max(size, 1)):
            raise ValueError("its groups are not of neighbouring inputs (desc_act)")
        if size < LEAST_BLOCK or size & (size - 1):
            raise ValueError(f"its groups have {size} inputs; powers of two from {LEAST_BLOCK} on are possible")
        levels = self.levels.t().reshape(outputs, groups, size).to(torch.uint8).numpy()
        zeros = np.ascontiguousarray(self.zeros.t().to(torch.uint8).numpy())
        if groups % 2 and bits == 4:  # noqa: PLR2004  (two zero points in one byte)
            zeros = np.pad(zeros, ((0, 0), (0, 1)))
        scale = np.ascontiguousarray(self.scales.t().numpy())
        return {f"int{bits}": packed(levels, bits), "scale": scale, "zero_points": packed(zeros, bits)}


@dataclass(frozen=True, slots=True)
class _Method:
    """How a tool stores weights.

    Args:
        kind: type of the tensor that has a weight's bits, as safetensors names it.
        main: suffix of that tensor.
        needed: suffixes of tensors that must be beside it.
        optional: suffixes of those that can be.
        values: a weight (out, in) from its parts.
        levels: the integers, of methods whose integers a bundle can have.
    """

    kind: str
    main: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    values: Callable[[Parts, Settings], Tensor]
    levels: Callable[[Parts, Settings], _Levels] | None = None


class QuantizedFiles:
    """Tensors of a quantized checkpoint.

    Args:
        files: its tensors as they are stored.
        settings: `quantization_config` of its config.json, one that `check_folder` takes.

    Attributes:
        kinds: type of each tensor by the name that it has where nothing is quantized.

    Raises:
        ExportError: a part of a weight is missing.
    """

    def __init__(self, files: TensorFiles, settings: Settings) -> None:
        self._files, self._settings, self._method = files, settings, METHODS[method_of(settings)]
        self._parts: dict[str, dict[str, str]] = {}
        method = self._method
        for name, kind in files.kinds.items():
            if kind == method.kind and name.endswith(f".{method.main}"):
                stem = name.removesuffix(method.main)
                self._parts[f"{stem}weight"] = self._found(stem)
        used = {name for parts in self._parts.values() for name in parts.values()}
        self.kinds = {name: kind for name, kind in files.kinds.items() if name not in used}
        self.kinds |= dict.fromkeys(self._parts, "F32")

    def read(self, name: str) -> Tensor:
        """A tensor in floats.

        Raises:
            ExportError: its parts do not fit each other.
        """
        if name not in self._parts:
            return self._files.read(name)
        try:
            return self._method.values(self._read(name), self._settings)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise ExportError(f"{name} cannot be dequantized: {error}") from error

    def integers(self, name: str) -> tuple[Dtype, dict[str, Array]] | None:
        """The integers of a weight in blocks, None if it is stored in floats.

        Raises:
            ExportError: a bundle cannot have them.
        """
        if name not in self._parts:
            return None
        if self._method.levels is None:
            raise ExportError(
                f"--dtype checkpoint: {method_of(self._settings)} has no integers; give the --dtype to round its "
                "weights to"
            )
        bits = int(self._settings["bits"])
        try:
            return ("int4wo" if bits == 4 else "int8wo"), self._method.levels(  # noqa: PLR2004
                self._read(name), self._settings
            ).blocks(bits)
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"--dtype checkpoint: {name} cannot be taken over: {error}; give the --dtype to round its weights to"
            ) from error

    def _found(self, stem: str) -> dict[str, str]:
        """The parts of a weight: their names in the files by suffix."""
        method = self._method
        missing = next((suffix for suffix in method.needed if f"{stem}{suffix}" not in self._files.kinds), None)
        if missing:
            raise ExportError(f"{stem}{method.main} has no {stem}{missing} beside it: download the checkpoint again")
        optional = [suffix for suffix in method.optional if f"{stem}{suffix}" in self._files.kinds]
        return {suffix: f"{stem}{suffix}" for suffix in (method.main, *method.needed, *optional)}

    def _read(self, name: str) -> Parts:
        return {suffix: self._files.read(part) for suffix, part in self._parts[name].items()}


def _unpacked(packed_: Tensor, bits: int, dim: int) -> Tensor:
    """Integers that are in int32, the lowest bits first; the axis `dim` becomes 32 / bits times as long."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    split = packed_.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (packed_.dim() - dim - 1))
    levels: Tensor = (split & (2**bits - 1)).flatten(dim, dim + 1)
    return levels


def _awq(parts: Parts, settings: Settings) -> _Levels:
    bits = int(settings["bits"])
    # The place in an integer of each output.
    places = torch.tensor([AWQ_ORDER.index(output) for output in range(32 // bits)])

    def unpacked(name: str) -> Tensor:
        found = _unpacked(parts[name], bits, 1)
        return found.reshape(len(found), -1, len(places))[..., places].flatten(1)

    levels, scales = unpacked("qweight"), parts["scales"].float()
    return _Levels(levels, unpacked("qzeros"), scales, torch.arange(len(levels)) // _size(len(levels), len(scales)))


def _gptq(parts: Parts, settings: Settings) -> _Levels:
    bits = int(settings["bits"])
    levels, scales = _unpacked(parts["qweight"], bits, 0), parts["scales"].float()
    zeros = _unpacked(parts["qzeros"], bits, 1)
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros = (zeros + 1) & (2**bits - 1)
    group = parts.get("g_idx")
    if group is None:
        group = torch.arange(len(levels)) // _size(len(levels), len(scales))
    return _Levels(levels, zeros, scales, group.long())


def _size(inputs: int, groups: int) -> int:
    """Inputs of a group."""
    if inputs % groups:
        raise ValueError(f"{inputs} inputs are in {groups} groups")
    return inputs // groups


def _fp8(parts: Parts, settings: Settings) -> Tensor:
    weight, scale = parts["weight"].float(), parts["weight_scale_inv"]
    scale = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()  # uint8 are exponents
    if scale.dim() == 2 and scale.numel() > 1:  # noqa: PLR2004  (a matrix)
        block = settings.get("weight_block_size")
        if block is None:
            block = [-(-length // count) for length, count in zip(weight.shape, scale.shape, strict=True)]
        for dim, length in enumerate(weight.shape):
            if -(-length // block[dim]) != scale.shape[dim]:
                raise ValueError(f"{length} values are in {scale.shape[dim]} blocks of {block[dim]}")
            scale = scale.repeat_interleave(block[dim], dim).narrow(dim, 0, length)
    return weight * scale


def _bitsandbytes(parts: Parts, _: Settings) -> Tensor:
    stored = next((tensor for suffix, tensor in parts.items() if suffix.startswith(_STATE)), None)
    if stored is None:
        raise ValueError(f"there is no {_STATE}nf4")
    state = json.loads(bytes(stored.tolist()))
    scale = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_quant_map"].float()[scale.long()]
        scale = _in_blocks(nested, parts["weight.nested_absmax"], state["nested_blocksize"]) + state["nested_offset"]
    packed_ = parts["weight"].flatten()
    indices = torch.stack([packed_ >> 4, packed_ & 15], -1).flatten()  # the higher bits come first
    values = _in_blocks(parts["weight.quant_map"].float()[indices.long()], scale.float(), state["blocksize"])
    # Its layers compute with weights of this type.
    return values.to(getattr(torch, state["dtype"])).float()[: int(np.prod(state["shape"]))].reshape(state["shape"])


def _in_blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Values (n,) times the scale of the block of `size` that each is in."""
    return values * scales.repeat_interleave(size)[: len(values)]


METHODS: dict[str, _Method] = {
    "awq": _Method("I32", "qweight", ("qzeros", "scales"), (), lambda p, s: _awq(p, s).values(), _awq),
    "gptq": _Method("I32", "qweight", ("qzeros", "scales"), ("g_idx",), lambda p, s: _gptq(p, s).values(), _gptq),
    "fp8": _Method("F8_E4M3", "weight", ("weight_scale_inv",), ("activation_scale", "input_scale"), _fp8),
    "bitsandbytes": _Method(
        "U8",
        "weight",
        ("weight.absmax", "weight.quant_map"),
        ("weight.nested_absmax", "weight.nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4"),
        _bitsandbytes,
    ),
}
