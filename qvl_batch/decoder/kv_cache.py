"""The KV cache: one arena of slots, each the whole cache of one row.

Keys and values of a layer are arrays (N, kv_heads, L_max, head_dim). One slot is contiguous, so
a prefill is bound straight onto the slots it fills, and a decode step onto the first B slots.
Live rows therefore always hold the slots 0 to B - 1: when one ends, the last one moves into
its place.

Behind the slots are a few prefix_entries of the same size, for the beginnings of rows that others share.
"""

from qvl_batch.bundle.manifest import HALVES, Manifest
from qvl_batch.runtime.memory import Buffer, HostMemory, Memory


class KvCache:
    """Arena of `slots` slots, and `prefix_entries` behind them, of `element` type, for the decoder of `manifest`."""

    def __init__(
        self,
        manifest: Manifest,
        slots: int,
        prefix_entries: int = 0,
        element: str = "float",
        memory: Memory | None = None,
    ) -> None:
        shape = manifest.decoder
        self.slots = slots
        self._memory: Memory = memory or HostMemory()
        size = (slots + prefix_entries, shape.kv_heads, manifest.layout.max_seq_len, shape.head_dim)
        self._arrays: dict[str, Buffer] = {
            f"{kind}.{layer}": self._memory.zeros(size, element, on_host=False)
            for layer in range(shape.layers)
            for kind in ("key", "value")
        }

    def past(self, first: int, count: int) -> dict[str, Buffer]:
        """Slots `first` to `first + count - 1` under the graph's input names."""
        return {f"past_{name}": array.rows(first, count) for name, array in self._arrays.items()}

    def present(self, first: int, count: int) -> dict[str, Buffer]:
        """The same memory under the graph's output names."""
        return {f"present_{name}": array.rows(first, count) for name, array in self._arrays.items()}

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for array in self._arrays.values():
            self._memory.move(array, source, target, length)


def slot_bytes(manifest: Manifest) -> int:
    """Bytes of one slot: 2 x layers x kv_heads x L_max x head_dim, times 2 in half precision and else 4."""
    shape = manifest.decoder
    values = 2 * shape.layers * shape.kv_heads * manifest.layout.max_seq_len * shape.head_dim
    return values * (2 if manifest.dtype in HALVES else 4)
