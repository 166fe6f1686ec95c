"""Where the patches of an image of any size are in the vision graph.

What enters: pixels (1, H, W, 3) of a size that is known only when the graph runs. What leaves: the parts of the image
that the graph computes one after the other, and attention over them. Only patches of the image are in a part, window by
window. Windows at the image's edges are smaller than the others; for attention, patches are copied into batches:

1. On a CPU a part has one batch, whose smaller windows are filled up with keys that are masked.
2. A GPU's fast kernels take no mask. There the image is one part of four batches of windows of equal length: complete
   ones, those at the right edge, at the lower edge, and in the corner. So that no batch is empty, each has one window
   more, of copies of the first merge group, whose results are dropped.

All of it follows from H and W by operations on integers. This module knows nothing of weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from export.operators import split


@dataclass(frozen=True, slots=True)
class NativeGrid:
    """What is the same for images of all sizes.

    Args:
        patch: side of a patch in pixels.
        merge: side of a merge group in patches.
        window: side of a window in merge groups.
        parts: parts of an image; 1 for a GPU, whose kernels also get no masks.
    """

    patch: int
    merge: int
    window: int
    parts: int

    @property
    def unit(self) -> int:
        """Patches of a merge group."""
        return self.merge**2

    @property
    def slots(self) -> int:
        """Merge groups of a complete window."""
        return self.window**2


@dataclass(frozen=True, slots=True)
class _Batch:
    """Windows that attention computes at once.

    Args:
        groups: merge group in each slot of each window, int64 (w * slots,).
        shape: number of windows, and patches of a window.
        lengths: patches of each window that are not masked, int32 (w,); None for all.
    """

    groups: Tensor
    shape: tuple[int, int]
    lengths: Tensor | None


@dataclass(frozen=True, slots=True)
class _Part:
    """Consecutive windows with `n` merge groups together.

    Args:
        order: index of each merge group in the image's raster order, int64 (n,).
        patches: number of patches, 4 n.
        batches: their windows.
        slots: slot of each merge group in the batches, int64 (n,).
    """

    order: Tensor
    patches: int
    batches: list[_Batch]
    slots: Tensor


class NativeArrangement:
    """Arrangement of one image: windows in raster order, in parts of about equally many windows.

    An image may have fewer windows than there are parts. Since kernels of a GPU refuse empty tensors, a part without
    windows has a spare one, of a copy of the image's first merge group. Such parts come last. No patch of the image
    attends to them, and they are dropped in the end.

    Args:
        grid: what is the same for all images.
        pixels: (1, H, W, 3).
        frequencies: of the rotary embedding, (head_dim / 4,).
    """

    def __init__(self, grid: NativeGrid, pixels: Tensor, frequencies: Tensor) -> None:
        self._grid, self._frequencies = grid, frequencies
        pitch = grid.patch * grid.merge
        self._rows, self._columns = pixels.shape[1] // pitch, pixels.shape[2] // pitch
        x = pixels.reshape(self._rows, grid.merge, grid.patch, self._columns, grid.merge, grid.patch, 3)
        self._groups = x.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, grid.unit * grid.patch**2 * 3)
        side = grid.window
        self._down, self._across = (self._rows + side - 1) // side, (self._columns + side - 1) // side
        heights = (self._rows - side * torch.arange(self._down)).clamp(max=side)
        widths = (self._columns - side * torch.arange(self._across)).clamp(max=side)
        row, column = torch.arange(self._rows)[:, None], torch.arange(self._columns)
        #: Of each merge group in raster order, its place in its window and in the image in window order.
        self._in_window = ((row % side) * widths[column // side] + column % side).flatten()
        before = (row // side) * side * self._columns + (column // side) * side * heights[row // side]
        self._place = before.flatten() + self._in_window
        self._order = self._placed(torch.arange(self._rows * self._columns))
        #: Number of merge groups of each window.
        self._lengths = (heights[:, None] * widths).flatten()
        self._parts = [self._whole()] if grid.parts == 1 else self._divided()

    @property
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """As of `Arrangement`."""
        merge = self._grid.merge
        within = torch.cartesian_prod(torch.arange(merge), torch.arange(merge))
        tables: list[tuple[Tensor, Tensor]] = []
        for part in self._parts:
            row = part.order // self._columns
            first = merge * torch.stack((row, part.order - self._columns * row), dim=-1)
            places = (first[:, None] + within).reshape(-1, 2, 1)
            angles = (places.float() * self._frequencies).flatten(1)
            tables.append((angles.cos(), angles.sin()))
        return tables

    def patches(self, mean: Tensor) -> list[Tensor]:
        """As of `Arrangement`."""
        pixels = (self._groups.index_select(0, part.order) for part in self._parts)
        return [x.reshape(1, -1, len(mean)).float() - mean for x in pixels]

    def within(self, part: int, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """As of `Arrangement`."""
        width = q.shape[-1]
        groups = [x.reshape(-1, self._grid.unit * width) for x in (q, k, v)]
        done: list[Tensor] = []
        for batch in self._parts[part].batches:
            rows = (x.index_select(0, batch.groups).reshape(*batch.shape, width) for x in groups)
            attended = attend(*rows, lengths=batch.lengths)
            done.append(attended.reshape(-1, self._grid.unit * width))
        return torch.cat(done).index_select(0, self._parts[part].slots).reshape(1, -1, width)

    def over_all(
        self, q: list[Tensor], k: list[Tensor], v: list[Tensor], attend: Callable[..., Tensor]
    ) -> list[Tensor]:
        """As of `Arrangement`."""
        if len(self._parts) == 1:
            return [attend(q[0], k[0], v[0])]
        patches = self._rows * self._columns * self._grid.unit
        keys, values = (torch.cat(parts, dim=1)[:, :patches] for parts in (k, v))
        attended = attend(torch.cat(q, dim=1), keys, values)
        return split(attended, [part.patches for part in self._parts])

    def in_raster_order(self, merged: list[Tensor]) -> Tensor:
        """As of `Arrangement`."""
        return torch.cat(merged, dim=1).index_select(1, self._place)

    def _placed(self, values: Tensor) -> Tensor:
        """Values of merge groups (T_img,) from raster order to window order."""
        return torch.zeros_like(values).scatter(0, self._place, values)

    def _divided(self) -> list[_Part]:
        """Parts, each with one batch of masked windows."""
        parts, slots, windows = self._grid.parts, self._grid.slots, self._down * self._across
        row, column = torch.arange(self._rows)[:, None], torch.arange(self._columns)
        window = (row // self._grid.window) * self._across + column // self._grid.window
        # The spare window, of the image's first group, is after the image's own windows.
        spare = torch.full((1,), slots) * windows
        order, slot = F.pad(self._order, (0, 1)), self._placed(window.flatten() * slots + self._in_window)
        slot, lengths = torch.cat((slot, spare)), F.pad(self._lengths, (0, 1), value=1)
        edges = F.pad(lengths.cumsum(0), (1, 0))
        # Masked keys repeat the window's last group, since `multi_head_attention` wants masked scores to be bounded.
        groups = edges[:-1, None] + torch.minimum(torch.arange(slots), lengths[:, None] - 1)

        number = torch.arange(parts + 1)
        bounds = torch.maximum(number * windows // parts, number.clamp(max=windows))
        first, stop = bounds[:-1], torch.maximum(bounds[1:], bounds[:-1] + 1)
        made: list[_Part] = []
        counts = zip((stop - first).tolist(), (edges[stop] - edges[first]).tolist(), strict=True)
        for part, (w, n) in enumerate(counts):
            own = first[part] + torch.arange(w)
            members = edges[first[part]] + torch.arange(n)
            batch = _Batch(
                groups=(groups[own] - edges[first[part]]).flatten(),
                shape=(w, slots * self._grid.unit),
                lengths=(lengths[own] * self._grid.unit).int(),
            )
            own_slots = slot[members] - first[part] * slots
            made.append(_Part(order[members], n * self._grid.unit, [batch], own_slots))
        return made

    def _whole(self) -> _Part:
        """One part of the whole image, with batches of windows of equal length."""
        side = self._grid.window
        starts = self._lengths.cumsum(0) - self._lengths
        down, across = self._rows // side, self._columns // side
        height, width = _scalar(self._rows - side * down), _scalar(self._columns - side * across)
        at_bottom, at_right = height.clamp(max=1), width.clamp(max=1)
        height, width = height.clamp(min=1), width.clamp(min=1)
        numbers = torch.stack((_scalar(down * across), down * at_right, across * at_bottom, at_bottom * at_right))
        lengths = torch.stack((_scalar(side**2), side * width, height * side, height * width))
        # First row and column of each batch's windows, and whether it has one of them in a row or as many as fit.
        corners = [(0, 0, False), (0, across, True), (down, 0, False), (down, across, True)]
        fit = _scalar(across).clamp(min=1)

        batches: list[_Batch] = []
        members: list[Tensor] = []
        slots: list[Tensor] = []
        taken = 0
        sizes = zip(numbers.tolist(), lengths.tolist(), corners, strict=True)
        for number, length, (top, left, is_column) in sizes:
            # Said to the tracer, which cannot know it.
            check = cast("Callable[[bool], None]", torch._check)  # noqa: SLF001  (documented, in spite of its name)
            check(number >= 0)
            check(length > 0)
            index = torch.arange(number)
            row, column = (index, 0) if is_column else (index // fit, index % fit)
            window = (top + row) * self._across + left + column
            groups = starts[window][:, None] + torch.arange(length)
            members.append(groups.flatten())
            slots.append(taken + torch.arange(number * length))
            with_spare = F.pad(groups, (0, 0, 0, 1)).flatten()
            batches.append(_Batch(with_spare, (number + 1, length * self._grid.unit), None))
            taken += (number + 1) * length
        place = torch.zeros_like(self._place).scatter(0, torch.cat(members), torch.cat(slots))
        return _Part(self._order, self._rows * self._columns * self._grid.unit, batches, place)


def _scalar(value: int) -> Tensor:
    """A number that the tracer knows by its name alone."""
    return torch.scalar_tensor(value, dtype=torch.int64)
