"""The KV cache: one arena of slots, each the whole cache of one row.

Keys and values of a layer are arrays (N, kv_heads, L_max, head_dim). One slot is contiguous, so
a prefill is bound straight onto the slots it fills, and a decode step onto the first B slots.
Live rows therefore always hold the slots 0 to B - 1: when one ends, the last one moves into
its place.

Behind the slots are a few shelves of the same size, for the beginnings of rows that others share.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle import Manifest


class KvCache:
    """Arena of `slots` slots, and `shelves` behind them, for the decoder of `manifest`."""

    def __init__(self, manifest: Manifest, slots: int, shelves: int = 0) -> None:
        shape = manifest.decoder
        self.slots = slots
        size = (slots + shelves, shape.kv_heads, manifest.layout.max_seq_len, shape.head_dim)
        # Written now, so that memory runs out at the start and not in the middle of a night.
        self._arrays: dict[str, NDArray[Any]] = {
            f"{kind}.{layer}": np.full(size, 0, np.float32)
            for layer in range(shape.layers)
            for kind in ("key", "value")
        }

    def past(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """Slots `first` to `first + count - 1` under the graph's input names."""
        return {f"past_{name}": array[first : first + count] for name, array in self._arrays.items()}

    def present(self, first: int, count: int) -> dict[str, NDArray[Any]]:
        """The same memory under the graph's output names."""
        return {f"present_{name}": array[first : first + count] for name, array in self._arrays.items()}

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for array in self._arrays.values():
            array[target, :, :length] = array[source, :, :length]


def slot_bytes(manifest: Manifest) -> int:
    """Bytes of one slot in fp32: 2 x layers x kv_heads x L_max x head_dim x 4."""
    shape = manifest.decoder
    return 2 * shape.layers * shape.kv_heads * manifest.layout.max_seq_len * shape.head_dim * 4
