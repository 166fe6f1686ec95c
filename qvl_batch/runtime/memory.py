"""Arrays that graphs read and write in place, in host memory or on a GPU.

What enters: shapes and element types. What leaves: `Buffer`s, to be bound to a graph by address. A buffer on a GPU can
have a host mirror, which is copied to the GPU before a run and back after it. The KV cache is device-only.

This module knows nothing of graphs.
"""

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qvl_batch.config import Device

#: NumPy's types of ONNX's element types; NumPy has no bfloat16, whose bits are stored as uint16.
ELEMENTS: dict[str, Any] = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "uint8": np.uint8,
    "bool": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Buffer:
    """A contiguous array of type `element` at `address` on `device`.

    `host` is the array itself in host memory, the host mirror of an array on a GPU, or None if that is device-only.
    """

    shape: tuple[int, ...]
    element: str
    device: Device
    address: int
    host: NDArray[Any] | None

    @property
    def values(self) -> NDArray[Any]:
        """The values in host memory; not for device-only buffers."""
        assert self.host is not None
        return self.host

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return int(np.dtype(ELEMENTS[self.element]).itemsize)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, along the first axis."""
        return math.prod(self.shape[1:]) * self.itemsize

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape) * self.itemsize

    def rows(self, first: int, count: int) -> "Buffer":
        """View of `count` rows from row `first` on."""
        assert first + count <= self.shape[0]
        host = None if self.host is None else self.host[first : first + count]
        shape = (count, *self.shape[1:])
        return Buffer(shape, self.element, self.device, self.address + first * self.row_bytes, host)

    def without_mirror(self) -> "Buffer":
        """The same array, of which a run copies nothing to the host."""
        return self if self.device == "cpu" else replace(self, host=None)

    def shaped(self, shape: tuple[int, ...]) -> "Buffer":
        """View of the first elements in another shape, which can be smaller."""
        count = math.prod(shape)
        assert count * self.itemsize <= self.size
        host = None if self.host is None else self.host.reshape(-1)[:count].reshape(shape)
        return Buffer(shape, self.element, self.device, self.address, host)


class Memory(Protocol):
    """Memory of a device: allocation, and copies between the device and host mirrors."""

    @property
    def device(self) -> Device:
        """The device."""
        ...

    def zeros(self, shape: tuple[int, ...], element: str, *, on_host: bool = True) -> Buffer:
        """Allocate an array of zeros, on a GPU with a host mirror unless `on_host` is false (device-only)."""
        ...

    def copy(self, buffer: Buffer, source: int, target: int, length: int | None = None) -> None:
        """Copy row `source` to row `target`; of an array (N, A, L, ...), if given, only the first `length` of L."""
        ...

    def upload(self, buffer: Buffer) -> None:
        """Copy the host mirror, if any, to the device."""
        ...

    def download(self, buffer: Buffer) -> None:
        """Copy from the device to the host mirror, if any; complete when `synchronize` returns."""
        ...

    def synchronize(self) -> None:
        """Wait for all copies."""
        ...


class HostMemory:
    """Host memory, where the graph reads and writes the values themselves: there are no mirrors to copy."""

    device: Device = "cpu"

    def zeros(self, shape: tuple[int, ...], element: str, *, on_host: bool = True) -> Buffer:
        """Allocate an array of zeros, written at once: if memory is too small, this fails at the start of a job."""
        del on_host
        return on_this_machine(np.full(shape, 0, ELEMENTS[element]), element)

    def copy(self, buffer: Buffer, source: int, target: int, length: int | None = None) -> None:
        """As `Memory.copy`."""
        part = slice(None) if length is None else (slice(None), slice(length))
        buffer.values[target][part] = buffer.values[source][part]

    def upload(self, buffer: Buffer) -> None:
        """Do nothing."""

    def download(self, buffer: Buffer) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""


class Gpu(Protocol):
    """The part of `cuda.Cuda` that is used here and by `session`."""

    stream: int

    @property
    def name(self) -> str: ...  # noqa: D102
    def ignore_captures(self) -> None: ...  # noqa: D102
    def allocate(self, size: int) -> int: ...  # noqa: D102
    def allocate_host(self, size: int) -> int: ...  # noqa: D102
    def copy(self, target: int, source: int, size: int) -> None: ...  # noqa: D102
    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None: ...  # noqa: D102
    def synchronize(self) -> None: ...  # noqa: D102


class CudaMemory:
    """Memory of a GPU. Host mirrors are in pinned memory, which the GPU copies from directly."""

    def __init__(self, card: Gpu, device: Device = "cuda") -> None:
        self.card, self.device = card, device

    def zeros(self, shape: tuple[int, ...], element: str, *, on_host: bool = True) -> Buffer:
        """Allocate an array of zeros on the GPU.

        Raises:
            DeviceError: the card is out of memory.
        """
        dtype = np.dtype(ELEMENTS[element])
        size = max(math.prod(shape) * dtype.itemsize, 1)
        host = None
        if on_host:
            data = (ctypes.c_char * size).from_address(self.card.allocate_host(size))
            data.card = self.card  # keeps the card alive, which frees the memory
            host = np.frombuffer(data, dtype, math.prod(shape)).reshape(shape)
            host[...] = 0
        return Buffer(shape, element, self.device, self.card.allocate(size), host)

    def copy(self, buffer: Buffer, source: int, target: int, length: int | None = None) -> None:
        """As `Memory.copy`."""
        size = buffer.row_bytes
        addresses = buffer.address + target * size, buffer.address + source * size
        if length is None:
            self.card.copy(*addresses, size)
        else:
            pitch = size // buffer.shape[1]
            self.card.copy_rows(*addresses, pitch, pitch // buffer.shape[2] * length, buffer.shape[1])

    def upload(self, buffer: Buffer) -> None:
        """As `Memory.upload`."""
        if buffer.host is not None and buffer.host.ctypes.data != buffer.address:
            self.card.copy(buffer.address, buffer.host.ctypes.data, buffer.size)

    def download(self, buffer: Buffer) -> None:
        """As `Memory.download`."""
        if buffer.host is not None and buffer.host.ctypes.data != buffer.address:
            self.card.copy(buffer.host.ctypes.data, buffer.address, buffer.size)

    def synchronize(self) -> None:
        """As `Memory.synchronize`."""
        self.card.synchronize()


def on_this_machine(values: NDArray[Any], element: str | None = None) -> Buffer:
    """Wrap an array in host memory, without a copy."""
    return Buffer(values.shape, element or element_of(values), "cpu", values.ctypes.data, values)


def element_of(values: NDArray[Any]) -> str:
    """ONNX's name of an array's element type."""
    return next(name for name, dtype in ELEMENTS.items() if values.dtype == dtype)
