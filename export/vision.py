"""The vision tower as one graph: `pixels` in, `image_features` out.

What enters: uint8 `pixels` (B, H, W, 3). What leaves: `image_features` (B, T_img, D), in raster order of merged
patches. Everything between is inside the graph: rescaling, CLIP normalisation, patches in 2 x 2 merge groups, the
window permutation, rotary tables, blocks, merger, and the permutation's inverse.

There are two graphs with the same blocks. That for one square size (`SquareTower`) takes any batch, and has the
permutation, the tables and the lengths of windows as constants. That for any size (`NativeTower`) takes one image, and
computes them from its height and width (`export.native`).

Four optimizations over the checkpoint's own model, all exact: both temporal frames of a still image
are the same, so the patch embedding is one product with the sum of the two frames' weights; the
divisors of rescaling and normalisation are part of its weights; windows of equal length are one
batched attention; and everything but full attention runs on one part of the image after the other,
so that intermediate results stay in a CPU's caches. The mean is subtracted from the pixels
themselves: as a bias it would suffer cancellation in letterbox bars, which have that colour.

This module knows nothing of tokens or of files.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from itertools import groupby, pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from export.half import stream_unit
from export.layers import GatedMlp, Linear, Scope
from export.native import NativeArrangement, NativeGrid
from export.operators import FUSED, rms_norm
from export.standard import STANDARD
from qvl_batch.bundle.manifest import HALVES, Dtype

#: Epsilon of the vision tower's norms, a constant of transformers' `Qwen2_5_VLVisionBlock`.
NORM_EPS = 1e-6
#: Patches in one part. With all 2304 at once the graph takes 3 to 10 % longer in fp32 and 8 % longer in int8.
#: With half as many it runs up to 4 % faster still, but takes twice as long to load: ONNX Runtime packs the
#: weights of each part's products. A GPU runs all of them at once.
PATCHES_AT_ONCE = 576
#: Parts of an image of any size, if it is not for a GPU.
NATIVE_PARTS = 4
#: `(count, length in patches)` of consecutive windows of equal length.
Windows = list[tuple[int, int]]
#: Attention of all queries over all keys, (B, S, heads * head_dim) each.
Attend = Callable[..., Tensor]


class Arrangement(Protocol):
    """Where the patches of an image are: in parts of whole windows, one window after the other."""

    @property
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """Rotary tables of each part, (n, head_dim / 2)."""

    def patches(self, mean: Tensor) -> list[Tensor]:
        """Pixels of each part minus the mean, (B, n, patch * patch * 3)."""

    def within(self, part: int, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attention within the windows of a part: (B, n, D) each to (B, n, D)."""

    def over_all(self, q: list[Tensor], k: list[Tensor], v: list[Tensor], attend: Attend) -> list[Tensor]:
        """Attention over the whole image: (B, n, D) of each part to (B, n, D) of each part."""

    def in_raster_order(self, merged: list[Tensor]) -> Tensor:
        """Merge groups of each part, (B, n / merge**2, D), to those of the image, (B, T_img, D)."""


class VisionTower(nn.Module, ABC):
    """Exportable form of `Qwen2_5_VisionTransformerPretrainedModel`. Subclasses say where the patches are.

    Args:
        visual: the checkpoint's vision tower.
        mean, std: normalisation of the checkpoint's image processor, for values in 0 to 1.
        dtype: of its matrix products; it determines the residual stream's unit, see `export.decoder`.
        plain: use standard operators only, and do not divide the image into parts.
    """

    mean: Tensor

    def __init__(
        self, visual: Any, mean: list[float], std: list[float], dtype: Dtype = "fp32", *, plain: bool = False
    ) -> None:
        super().__init__()
        self.operators = STANDARD if plain else FUSED
        #: Whether an image is one part: a GPU runs all patches at once, and tools want each weight in one product.
        self.is_whole = plain or dtype in HALVES
        config = visual.config
        self.patch, self.merge = config.patch_size, config.spatial_merge_size
        self.heads, self.hidden = config.num_heads, config.hidden_size
        self.unit = stream_unit(dtype)
        self.eps = NORM_EPS / self.unit**2
        self.full_blocks = set(config.fullatt_block_indexes)

        # Repeated for a whole patch: broadcasting three numbers takes eight times as long.
        self.register_buffer("mean", (255 * torch.tensor(mean)).repeat(self.patch**2))
        self.patch_embed = Linear(patch_weights(visual.patch_embed, std, self.unit).t(), None)
        self.blocks = cast("list[Block]", nn.ModuleList(Block(block, dtype) for block in visual.blocks))
        self.merger = Merger(visual.merger, dtype)

    @abstractmethod
    def arranged(self, pixels: Tensor) -> Arrangement:
        """Where the patches of images (B, H, W, 3) are."""

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, T_img, D)."""
        image = self.arranged(pixels)
        tables = image.tables
        hidden = [self.patch_embed(patches) for patches in image.patches(self.mean)]
        normed = [rms_norm(x, self.blocks[0].norm1, self.eps) for x in hidden]
        for index, block in enumerate(self.blocks):
            following = self.blocks[index + 1].norm1 if index + 1 < len(self.blocks) else self.merger.norm
            attended = block.attention(self._attention, image, normed, tables, is_full=index in self.full_blocks)
            done = [block(self._after_attention, *x, following) for x in zip(attended, hidden, strict=True)]
            normed, hidden = map(list, zip(*done, strict=True))
        features = image.in_raster_order([self._merge(x) for x in normed])
        # A Div, which stays in fp32 in a graph in half precision; a Mul would not.
        return features if self.unit == 1 else features / (1 / self.unit)

    def _attention(
        self,
        attention: "Attention",
        image: Arrangement,
        normed: list[Tensor],
        tables: list[tuple[Tensor, Tensor]],
        *,
        is_full: bool,
    ) -> list[Tensor]:
        """Attention within windows or over the whole image: (B, n, D) of each part to (B, n, D) of each part."""
        qkv = [self._queries_keys_values(attention, x, *table) for x, table in zip(normed, tables, strict=True)]
        attend = partial(self.operators.multi_head_attention, heads=self.heads)
        if not is_full:
            return [image.within(part, *x, attend) for part, x in enumerate(qkv)]
        q, k, v = map(list, zip(*qkv, strict=True))
        return image.over_all(q, k, v, attend)

    def _queries_keys_values(
        self, attention: "Attention", x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed (B, n, D) and its part of the rotary tables to three (B, n, D)."""
        first, rotary = torch.zeros(1, dtype=torch.int64), self.operators.rotary_embedding
        q, k, v = attention.q(x), attention.k(x), attention.v(x)
        return rotary(q, first, cos, sin, self.heads), rotary(k, first, cos, sin, self.heads), v

    def _after_attention(
        self, block: "Block", attended: Tensor, hidden: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention output and residual stream (B, n, D) to inputs of the next block: normed stream, and stream."""
        skip_rms_norm = self.operators.skip_rms_norm
        normed, hidden = skip_rms_norm(block.attention.out(attended), hidden, block.norm2, self.eps)
        return skip_rms_norm(block.mlp(normed, self.operators.silu), hidden, following, self.eps)

    def _merge(self, normed: Tensor) -> Tensor:
        """(B, n, D) of whole merge groups to (B, n / merge**2, D of the decoder)."""
        return self.merger(normed.reshape(-1, normed.shape[1] // self.merge**2, self.merge**2 * self.hidden))


class SquareTower(VisionTower):
    """The tower for images of one square size.

    Args:
        visual: the checkpoint's vision tower.
        image_size: side in pixels, a multiple of patch size x merge size.
        mean, std, dtype, plain: as of `VisionTower`.
    """

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
        *,
        plain: bool = False,
    ) -> None:
        super().__init__(visual, mean, std, dtype, plain=plain)
        self.merged_side = image_size // (self.patch * self.merge)
        grid = torch.tensor([[1, image_size // self.patch, image_size // self.patch]])
        order, windows = window_order(grid, visual.config)
        self.parts = split_windows(windows, len(order) * self.merge**2 if self.is_whole else PATCHES_AT_ONCE)
        self.register_buffer("order", order)
        self.register_buffer("inverse", torch.argsort(order))
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, self.merge))
        self.register_buffer("cos", self._ordered_half(cos))
        self.register_buffer("sin", self._ordered_half(sin))

    def arranged(self, pixels: Tensor) -> "SquareArrangement":
        """As of `VisionTower`."""
        return SquareArrangement(self, pixels)

    def _ordered_half(self, table: Tensor) -> Tensor:
        """One half (the other is its copy) of a rotary table, in window order: (N, head_dim / 2)."""
        groups = table.reshape(self.merged_side**2, self.merge**2, -1)[self.order]
        return groups.reshape(-1, table.shape[-1])[:, : table.shape[-1] // 2].contiguous()


class SquareArrangement:
    """Arrangement of square images of a known size: windows of equal length are together."""

    def __init__(self, tower: SquareTower, pixels: Tensor) -> None:
        self._tower, self._pixels = tower, pixels
        self._sizes = [sum(count * length for count, length in part) for part in tower.parts]

    @property
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """As of `Arrangement`."""
        cos, sin = (torch.split(table, self._sizes) for table in (self._tower.cos, self._tower.sin))
        return list(zip(cos, sin, strict=True))

    def patches(self, mean: Tensor) -> list[Tensor]:
        """As of `Arrangement`."""
        side, merge, patch = self._tower.merged_side, self._tower.merge, self._tower.patch
        x = self._pixels.reshape(-1, side, merge, patch, side, merge, patch, 3)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, side**2, merge**2 * patch**2 * 3)
        x = x.index_select(1, self._tower.order).reshape(-1, side**2 * merge**2, patch**2 * 3)
        return self._split(x.float() - mean)

    def within(self, part: int, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """As of `Arrangement`."""
        done: list[Tensor] = []
        start = 0
        for count, length in self._tower.parts[part]:
            span = slice(start, start + count * length)
            rows = (t[:, span].reshape(-1, length, t.shape[-1]) for t in (q, k, v))
            done.append(attend(*rows).reshape(-1, count * length, q.shape[-1]))
            start = span.stop
        return torch.cat(done, dim=1)

    def over_all(self, q: list[Tensor], k: list[Tensor], v: list[Tensor], attend: Attend) -> list[Tensor]:
        """As of `Arrangement`."""
        return self._split(attend(*(torch.cat(parts, dim=1) for parts in (q, k, v))))

    def in_raster_order(self, merged: list[Tensor]) -> Tensor:
        """As of `Arrangement`."""
        return torch.cat(merged, dim=1).index_select(1, self._tower.inverse)

    def _split(self, x: Tensor) -> list[Tensor]:
        return list(torch.split(x, self._sizes, dim=1))


class NativeTower(VisionTower):
    """The tower for one image of any size; its height and width are multiples of patch size x merge size.

    Args:
        visual: the checkpoint's vision tower.
        mean, std, dtype, plain: as of `VisionTower`.
    """

    frequencies: Tensor

    def __init__(
        self, visual: Any, mean: list[float], std: list[float], dtype: Dtype = "fp32", *, plain: bool = False
    ) -> None:
        super().__init__(visual, mean, std, dtype, plain=plain)
        window = visual.config.window_size // (self.patch * self.merge)
        self.grid = NativeGrid(self.patch, self.merge, window, 1 if self.is_whole else NATIVE_PARTS)
        rotary = visual.rotary_pos_emb
        assert rotary.attention_scaling == 1
        self.register_buffer("frequencies", rotary.inv_freq.clone())

    def arranged(self, pixels: Tensor) -> NativeArrangement:
        """As of `VisionTower`."""
        return NativeArrangement(self.grid, pixels, self.frequencies)


def vision_tower(
    visual: Any,
    image_size: int | None,
    mean: list[float],
    std: list[float],
    dtype: Dtype = "fp32",
    *,
    plain: bool = False,
) -> VisionTower:
    """The tower for squares of one size, or, if that is None, for one image of any; other arguments as of both."""
    if image_size is None:
        return NativeTower(visual, mean, std, dtype, plain=plain)
    return SquareTower(visual, image_size, mean, std, dtype, plain=plain)


def patch_weights(patch_embed: Any, std: list[float], unit: int = 1) -> Tensor:
    """Weights of the patch embedding, for pixels of 0 to 255 minus the mean and a residual stream divided by `unit`.

    (D, C, frames, h, w) to (h * w * C, D), the frames added: pixels stay in (h, w, C) order.
    """
    weight: Tensor = patch_embed.proj.weight.sum(dim=2).permute(2, 3, 1, 0)
    divisor = unit * 255 * torch.tensor(std, device=weight.device)
    return (weight / divisor[:, None]).reshape(-1, weight.shape[-1])


class Attention(Scope):
    """Projections of one block's attention, with matrix products in `dtype`."""

    def __init__(self, attention: Any, dtype: Dtype) -> None:
        super().__init__()
        self.q, self.k, v = Linear.parts(attention.qkv, 3)
        self.v, out = v.with_bias(None), attention.proj
        # Attention weights add up to 1, so the values' bias passes through attention unchanged.
        self.out = Linear(out.weight, out.bias + out.weight @ v.bias).in_unit(stream_unit(dtype))
        self.head_dim = int(attention.head_dim)


class Block(Scope):
    """Weights of one vision block, with matrix products in `dtype`."""

    def __init__(self, block: Any, dtype: Dtype = "fp32") -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1.weight, block.norm2.weight
        self.attention = Attention(block.attn, dtype)
        self.mlp = GatedMlp(block.mlp, stream_unit(dtype))


class Merger(nn.Module):
    """Merge groups to the decoder's embeddings, with matrix products in `dtype`."""

    __call__: Callable[..., Tensor]

    def __init__(self, merger: Any, dtype: Dtype = "fp32") -> None:
        super().__init__()
        self.norm = merger.ln_q.weight
        self.fc1, self.fc2 = Linear.of(merger.mlp[0]), Linear.of(merger.mlp[2]).in_unit(stream_unit(dtype))

    def forward(self, groups: Tensor) -> Tensor:
        """Normed (..., merge**2 * D) to (..., D of the decoder)."""
        return self.fc2(F.gelu(self.fc1(groups)))


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
