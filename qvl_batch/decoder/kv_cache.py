"""The KV cache: one arena of slots, each the whole cache of one row.

Keys and values of a layer are arrays (N, kv_heads, L_max, head_dim). A slot is contiguous, so a prefill is bound
directly to the slots that it fills, and a decode step to the first B slots. Live rows therefore always occupy slots
0 to B - 1: when one ends, the last live row moves into its slot.

Prefix-cache entries follow the slots in the same arena and have the same size. Each holds the keys and values of a
prompt prefix that several rows share.

This module knows nothing of tokens, images, or of which rows are live.
"""

from qvl_batch.bundle.manifest import HALVES, Manifest
from qvl_batch.runtime.memory import Buffer, HostMemory, Memory


class KvCache:
    """Arena of slots and prefix-cache entries.

    Args:
        manifest: manifest of the bundle, for the decoder's sizes.
        slots: number of slots.
        prefix_entries: number of prefix-cache entries; their indices follow those of the slots.
        element: ONNX's name of the element type.
        memory: memory of the device that the decoder runs on; by default of the host.

    Raises:
        DeviceError: the device is out of memory.
    """

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
        """Slots `first` to `first + count - 1` by the graph's input names."""
        return {f"past_{name}": array.rows(first, count) for name, array in self._arrays.items()}

    def present(self, first: int, count: int) -> dict[str, Buffer]:
        """The same memory by the graph's output names."""
        return {f"present_{name}": array.rows(first, count) for name, array in self._arrays.items()}

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first `length` tokens from one slot or prefix-cache entry to another."""
        for array in self._arrays.values():
            self._memory.copy(array, source, target, length)


def slot_bytes(manifest: Manifest) -> int:
    """Bytes of one slot: 2 x layers x kv_heads x L_max x head_dim values of 4 bytes, in half precision of 2."""
    shape = manifest.decoder
    values = 2 * shape.layers * shape.kv_heads * manifest.layout.max_seq_len * shape.head_dim
    return values * (2 if manifest.dtype in HALVES else 4)
