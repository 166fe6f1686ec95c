"""The vision tower as one graph: `pixels` in, `image_features` out.

What enters: uint8 `pixels` (B, H, W, 3), H = W = image size. What leaves: `image_features`
(B, T_img, D), in raster order of merged patches. Everything between is inside the graph:
rescaling, CLIP normalisation, patches in 2 x 2 merge groups, the window permutation, rotary
tables, blocks, merger, and the permutation's inverse.

Four optimizations over the checkpoint's own model, all exact: both temporal frames of a still image
are the same, so the patch embedding is one product with the sum of the two frames' weights; the
divisors of rescaling and normalisation are part of its weights; windows of equal length are one
batched attention; and everything but full attention runs on one part of the image after the other,
so that intermediate results stay in a CPU's caches. The mean is subtracted from the pixels
themselves: as a bias it would suffer cancellation in letterbox bars, which have that colour.

This module knows nothing of tokens or of files.
"""

from itertools import groupby, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from export.half import stream_unit
from export.layers import GatedMlp, Linear
from export.operators import multi_head_attention, rms_norm, rotary_embedding, skip_rms_norm
from qvl_batch.bundle.manifest import HALVES, Dtype

#: Epsilon of the vision tower's norms, a constant of transformers' `Qwen2_5_VLVisionBlock`.
NORM_EPS = 1e-6
#: Patches in one part. With all 2304 at once the graph takes 3 to 10 % longer in fp32 and 8 % longer in int8.
#: With half as many it runs up to 4 % faster still, but takes twice as long to load: ONNX Runtime packs the
#: weights of each part's products. A GPU runs all of them at once.
PATCHES_AT_ONCE = 576
#: `(count, length in patches)` of consecutive windows of equal length.
Windows = list[tuple[int, int]]


class VisionTower(nn.Module):
    """Exportable form of `Qwen2_5_VisionTransformerPretrainedModel` for one square image size.

    Args:
        visual: the checkpoint's vision tower.
        image_size: side in pixels, a multiple of patch size x merge size.
        mean, std: normalisation of the checkpoint's image processor, for values in 0 to 1.
        dtype: of its matrix products; it determines the residual stream's unit, see `export.decoder`.
    """

    mean: Tensor
    order: Tensor
    inverse: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        visual: Any,
        image_size: int,
        mean: list[float],
        std: list[float],
        dtype: Dtype = "fp32",
    ) -> None:
        super().__init__()
        config = visual.config
        self.patch, self.merge = config.patch_size, config.spatial_merge_size
        self.merged_side = image_size // (self.patch * self.merge)
        self.heads, self.hidden = config.num_heads, config.hidden_size
        self.unit = stream_unit(dtype)
        self.eps = NORM_EPS / self.unit**2
        self.full_blocks = set(config.fullatt_block_indexes)
        grid = torch.tensor([[1, image_size // self.patch, image_size // self.patch]])
        order, windows = window_order(grid, config)
        self.parts = split_windows(windows, len(order) * self.merge**2 if dtype in HALVES else PATCHES_AT_ONCE)
        self.register_buffer("order", order)
        self.register_buffer("inverse", torch.argsort(order))
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, self.merge))
        self.register_buffer("cos", self._ordered_half(cos))
        self.register_buffer("sin", self._ordered_half(sin))

        # Repeated for a whole patch: broadcasting three numbers takes eight times as long.
        self.register_buffer("mean", (255 * torch.tensor(mean)).repeat(self.patch**2))
        self.patch_embed = nn.Parameter(patch_weights(visual.patch_embed, std, self.unit))
        self.blocks = nn.ModuleList(Block(block, self.heads, dtype) for block in visual.blocks)
        self.merger_norm = visual.merger.ln_q.weight
        self.merger_in = Linear.of(visual.merger.mlp[0])
        self.merger_out = Linear.of(visual.merger.mlp[2]).in_unit(self.unit)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, T_img, D)."""
        sizes = [sum(count * length for count, length in part) for part in self.parts]
        tables = list(zip(_split(self.cos, sizes, 0), _split(self.sin, sizes, 0), strict=True))
        blocks = cast("list[Block]", self.blocks)
        hidden = [patches @ self.patch_embed for patches in _split(self._patches(pixels), sizes, 1)]
        normed = [rms_norm(x, blocks[0].norm1, self.eps) for x in hidden]
        for index, block in enumerate(blocks):
            qkv = [block.queries_keys_values(x, *table) for x, table in zip(normed, tables, strict=True)]
            if index in self.full_blocks:
                whole = (torch.cat(parts, dim=1) for parts in zip(*qkv, strict=True))
                attended = _split(multi_head_attention(*whole, heads=self.heads), sizes, 1)
            else:
                attended = [self._within(windows, *x) for windows, x in zip(self.parts, qkv, strict=True)]
            following = blocks[index + 1].norm1 if index + 1 < len(blocks) else self.merger_norm
            done = [block.after_attention(*x, following, self.eps) for x in zip(attended, hidden, strict=True)]
            normed, hidden = map(list, zip(*done, strict=True))
        merged = [self._merge(x) for x in normed]
        features = torch.cat(merged, dim=1).index_select(1, self.inverse)
        # A Div, which stays in fp32 in a graph in half precision; a Mul would not.
        return features if self.unit == 1 else features / (1 / self.unit)

    def _within(self, windows: Windows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within windows: queries, keys and values (B, n, D) each to (B, n, D)."""
        done: list[Tensor] = []
        start = 0
        for count, length in windows:
            span = slice(start, start + count * length)
            rows = (t[:, span].reshape(-1, length, t.shape[-1]) for t in (q, k, v))
            done.append(multi_head_attention(*rows, heads=self.heads).reshape(-1, count * length, q.shape[-1]))
            start = span.stop
        return torch.cat(done, dim=1)

    def _merge(self, normed: Tensor) -> Tensor:
        """(B, n, D) of whole merge groups to (B, n / merge**2, D of the decoder)."""
        groups = normed.reshape(-1, normed.shape[1] // self.merge**2, self.merge**2 * self.hidden)
        return self.merger_out(F.gelu(self.merger_in(groups)))

    def _patches(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, N, patch * patch * 3) minus the mean, in window order."""
        side, merge, patch = self.merged_side, self.merge, self.patch
        x = pixels.reshape(-1, side, merge, patch, side, merge, patch, 3)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, side**2, merge**2 * patch**2 * 3)
        x = x.index_select(1, self.order).reshape(-1, side**2 * merge**2, patch**2 * 3)
        return x.float() - self.mean

    def _ordered_half(self, table: Tensor) -> Tensor:
        """One half (the other is its copy) of a rotary table, in window order: (N, head_dim / 2)."""
        groups = table.reshape(self.merged_side**2, self.merge**2, -1)[self.order]
        return groups.reshape(-1, table.shape[-1])[:, : table.shape[-1] // 2].contiguous()


def patch_weights(patch_embed: Any, std: list[float], unit: int = 1) -> Tensor:
    """Weights of the patch embedding, for pixels of 0 to 255 minus the mean and a residual stream divided by `unit`.

    (D, C, frames, h, w) to (h * w * C, D), the frames added: pixels stay in (h, w, C) order.
    """
    weight: Tensor = patch_embed.proj.weight.sum(dim=2).permute(2, 3, 1, 0)
    divisor = unit * 255 * torch.tensor(std, device=weight.device)
    return (weight / divisor[:, None]).reshape(-1, weight.shape[-1])


class Block(nn.Module):
    """One vision block: attention within windows or over the whole image, then a gated MLP.

    Its matrix products are in `dtype`.
    """

    def __init__(self, block: Any, heads: int, dtype: Dtype = "fp32") -> None:
        super().__init__()
        self.heads, unit = heads, stream_unit(dtype)
        self.norm1, self.norm2 = block.norm1.weight, block.norm2.weight
        q, k, v = Linear.parts(block.attn.qkv, 3)
        out = block.attn.proj
        self.qkv = nn.ModuleList((q, k, v.with_bias(None)))
        # Attention weights add up to 1, so the values' bias passes through attention unchanged.
        self.proj = Linear(out.weight, out.bias + out.weight @ v.bias).in_unit(unit)
        self.mlp = GatedMlp(block.mlp, unit)

    def queries_keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed (B, n, D) and its part of the rotary tables to three (B, n, D)."""
        q, k, v = (linear(x) for linear in self.qkv)
        first = torch.zeros(1, dtype=torch.int64)
        return rotary_embedding(q, first, cos, sin, self.heads), rotary_embedding(k, first, cos, sin, self.heads), v

    def after_attention(self, attended: Tensor, hidden: Tensor, following: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Attention output and residual stream (B, n, D) to inputs of the next block: normed stream, and stream."""
        normed, hidden = skip_rms_norm(self.proj(attended), hidden, self.norm2, eps)
        return skip_rms_norm(self.mlp(normed), hidden, following, eps)


def window_order(grid: Tensor, config: Any) -> tuple[Tensor, Windows]:
    """Order of merge groups in which every window is contiguous, windows of equal length together.

    If the image's side is not a multiple of a window's, the windows at its edges are smaller, as in
    transformers. The order of windows does not matter to attention.

    Args:
        grid: (1, 3) int64, frames, patch rows and patch columns.
        config: the checkpoint's vision config.

    Returns:
        int64 (T_img,) of merge groups, and the windows.
    """
    index, bounds = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
    unit = config.spatial_merge_size**2
    edges = (bounds // unit).tolist()
    windows = [index[start:stop] for start, stop in pairwise(edges)]
    lengths = sorted({len(window) for window in windows}, reverse=True)
    by_length = [[w for w in windows if len(w) == length] for length in lengths]
    order = torch.cat([window for group in by_length for window in group])
    counts = [(len(group), length * unit) for group, length in zip(by_length, lengths, strict=True)]
    return order, counts


def split_windows(windows: Windows, patches: int) -> list[Windows]:
    """Split windows, in order, into parts of at most `patches` patches and at least one window."""
    parts: list[list[int]] = []
    for length in (length for count, length in windows for _ in range(count)):
        if not parts or sum(parts[-1]) + length > patches:
            parts.append([])
        parts[-1].append(length)
    return [[(len(list(equal)), length) for length, equal in groupby(part)] for part in parts]


def _split(x: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
    return list(torch.split(x, sizes, dim))
