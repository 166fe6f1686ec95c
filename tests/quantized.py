"""The tiny checkpoint in few bits, as the tools of each format store it.

The integers come from plain rounding; what matters is how they are stored. The packing was compared with that of
AutoAWQ 0.2.9 (`dequantize_gemm`) and AutoGPTQ 0.7.1 (`QuantLinear`).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Which output AutoAWQ has in each 4 bits of an integer, the lowest first.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
#: The sixteen values of NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

#: `(weight (out, in))` to the tensors beside each other in files, by suffix, and the values that they stand for.
Store = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def quantized(path: Path, settings: dict[str, Any], store: Store, base: Path = TINY) -> dict[str, Tensor]:
    """Write the tiny checkpoint, or another one, with the products of its decoder's layers stored by `store`.

    Returns:
        All weights, as they are in published files, in the values that they stand for.
    """
    shutil.copytree(base, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    tensors, values = {}, {}
    for name, tensor in [weight for file in base.glob("*.safetensors") for weight in load_file(file).items()]:
        values[name] = tensor.float()
        if name.startswith("model.") and name.endswith("_proj.weight"):
            stored, values[name] = store(tensor.float())
            stem = name.removesuffix("weight")
            tensors |= {
                stem + suffix: each.clone(memory_format=torch.contiguous_format) for suffix, each in stored.items()
            }
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return values


def in_groups(weight: Tensor, size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels (out, in), zero points and scales (out, groups) of weights rounded to nearest in groups of inputs."""
    groups = weight.reshape(len(weight), -1, size)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-6).half()
    zeros = torch.round(-low / scales.float()).clamp(0, 2**bits - 1)
    levels = torch.round(groups / scales.float()[..., None] + zeros[..., None]).clamp(0, 2**bits - 1)
    return levels.reshape(weight.shape).int(), zeros.int(), scales


def from_groups(levels: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """What they stand for."""
    size = levels.shape[1] // scales.shape[1]
    return (levels - zeros.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)


def _in_int32(columns: list[Tensor], bits: int) -> Tensor:
    """Columns of levels in one column of int32, the first in the lowest bits."""
    total = sum(column.long() << (bits * place) for place, column in enumerate(columns))
    assert isinstance(total, Tensor)
    return total.to(torch.int32)


def awq(size: int) -> Store:
    """AutoAWQ's "gemm", in groups of `size`."""

    def packed(matrix: Tensor) -> Tensor:
        eights = range(0, matrix.shape[1], 8)
        return torch.stack([_in_int32([matrix[:, at + output] for output in AWQ_ORDER], 4) for at in eights], 1)

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        levels, zeros, scales = in_groups(weight, size, 4)
        stored = {"qweight": packed(levels.t()), "qzeros": packed(zeros.t()), "scales": scales.t()}
        return stored, from_groups(levels, zeros, scales)

    return store


def gptq(size: int, bits: int = 4, *, less: int = 1, shuffled: bool = False) -> Store:
    """AutoGPTQ's layout; `less` is what zero points are stored less, `shuffled` puts inputs in groups out of order."""
    per = 32 // bits

    def packed(matrix: Tensor) -> Tensor:
        """(rows, columns) to (rows / per, columns)."""
        return torch.stack([_in_int32(list(matrix[at : at + per]), bits) for at in range(0, len(matrix), per)])

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        inputs = weight.shape[1]
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(inputs)
        levels, zeros, scales = in_groups(weight[:, order], size, bits)
        values, own, group = torch.empty_like(weight), torch.empty_like(levels), torch.empty(inputs, dtype=torch.int32)
        values[:, order], own[:, order] = from_groups(levels, zeros, scales), levels
        group[order] = torch.arange(inputs, dtype=torch.int32) // size
        stored_zeros = packed((zeros - less) % 2**bits).t()
        return {"qweight": packed(own.t()), "qzeros": stored_zeros, "scales": scales.t(), "g_idx": group}, values

    return store


def fp8(block: int) -> Store:
    """DeepSeek's layout, as transformers has it: blocks of `block` by `block`."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = (length // block for length in weight.shape)
        blocks = weight.reshape(rows, block, columns, block)
        scale = blocks.abs().amax((1, 3)) / 448
        levels = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        values = (levels.float() * scale[:, None, :, None]).reshape(weight.shape)
        return {"weight": levels.reshape(weight.shape), "weight_scale_inv": scale}, values

    return store


def nf4(size: int = 64, dtype: str = "bfloat16", *, nested: int = 0) -> Store:
    """bitsandbytes' layout; `nested` is the size of blocks of scales that are quantized too, 0 if they are not."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks = weight.reshape(-1, size)
        scale = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": size, "dtype": dtype, "shape": list(weight.shape)}
        stored: dict[str, Tensor] = {"weight.quant_map": NF4}
        if nested:
            offset = float(scale.mean())
            table = torch.linspace(-1, 1, 256)
            of_nested = torch.stack([part.sub(offset).abs().max() for part in scale.split(nested)])
            relative = (scale - offset) / of_nested.repeat_interleave(nested)[: len(scale)]
            levels = (relative[:, None] - table).abs().argmin(1)
            scale = table[levels] * of_nested.repeat_interleave(nested)[: len(scale)] + offset
            stored |= {"weight.nested_absmax": of_nested, "weight.nested_quant_map": table}
            stored["weight.absmax"] = levels.to(torch.uint8)
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
        else:
            stored["weight.absmax"] = scale
        indices = ((blocks / scale[:, None])[..., None] - NF4).abs().argmin(-1)
        values = (NF4[indices] * scale[:, None]).to(getattr(torch, dtype)).float().reshape(weight.shape)
        pairs = indices.flatten().to(torch.uint8)
        stored["weight"] = ((pairs[::2] << 4) | pairs[1::2])[:, None]
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return stored | {"weight.quant_state.bitsandbytes__nf4": text}, values

    return store
