"""Arrays where graphs read and write them: in host memory, or on a GPU.

What enters: shapes and element types. What leaves: `Buffer`s, to be bound to a graph by address.
A buffer on a GPU may have a side in host memory, which is copied there before a run and back after
it; the KV cache has none, and never leaves the card.

This module knows nothing of graphs.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qvl_batch.config import Device

#: Element types as ONNX names them, as NumPy holds them: bfloat16, which it does not know, as bits.
ELEMENTS: dict[str, Any] = {
    "float": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Buffer:
    """An array, contiguous, of `element` type at an `address`; `host` are its values in host memory, if any."""

    shape: tuple[int, ...]
    element: str
    device: Device
    address: int
    host: NDArray[Any] | None

    @property
    def values(self) -> NDArray[Any]:
        """Its side in host memory, of one that has it."""
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
        """Some of the rows, in place."""
        assert first + count <= self.shape[0]
        host = None if self.host is None else self.host[first : first + count]
        shape = (count, *self.shape[1:])
        return Buffer(shape, self.element, self.device, self.address + first * self.row_bytes, host)

    def shaped(self, shape: tuple[int, ...]) -> "Buffer":
        """As many of the first elements as a shape has, in place."""
        count = math.prod(shape)
        assert count * self.itemsize <= self.size
        host = None if self.host is None else self.host.reshape(-1)[:count].reshape(shape)
        return Buffer(shape, self.element, self.device, self.address, host)


class Memory(Protocol):
    """Where a graph's arrays are. The first two methods are all that a decoder needs to know."""

    @property
    def device(self) -> Device:
        """Where it is."""
        ...

    def zeros(self, shape: tuple[int, ...], element: str, *, on_host: bool = True) -> Buffer:
        """A new array; without `on_host`, one that nobody but graphs will look into."""
        ...

    def move(self, buffer: Buffer, source: int, target: int, length: int | None = None) -> None:
        """Copy row `source` to row `target`; of an array (N, A, L, ...), if asked for only the first `length` of L."""
        ...

    def upload(self, buffer: Buffer) -> None:
        """Let the device have the values that the host has."""
        ...

    def download(self, buffer: Buffer) -> None:
        """Let the host have the values that the device has, once `synchronize` returns."""
        ...

    def synchronize(self) -> None:
        """Wait for all of the above."""
        ...


class HostMemory:
    """Memory of this machine. Nothing is copied."""

    device: Device = "cpu"

    def zeros(self, shape: tuple[int, ...], element: str, *, on_host: bool = True) -> Buffer:
        """A new array, written at once, so that memory runs out at the start and not in the middle of a night."""
        del on_host
        return on_this_machine(np.full(shape, 0, ELEMENTS[element]), element)

    def move(self, buffer: Buffer, source: int, target: int, length: int | None = None) -> None:
        """As `Memory.move`."""
        part = slice(None) if length is None else (slice(None), slice(length))
        buffer.values[target][part] = buffer.values[source][part]

    def upload(self, buffer: Buffer) -> None:
        """Nothing."""

    def download(self, buffer: Buffer) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""


class Gpu(Protocol):
    """What is asked of a GPU: see `cuda.Cuda`."""

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
    """Memory of a GPU; what has a side in host memory has it where the GPU copies from it directly."""

    def __init__(self, card: Gpu, device: Device = "cuda") -> None:
        self.card, self.device = card, device

    def zeros(self, shape: tuple[int, ...], element: str, *, on_host: bool = True) -> Buffer:
        """A new array on the GPU.

        Raises:
            DeviceError: the card has no more memory.
        """
        dtype = np.dtype(ELEMENTS[element])
        size = max(math.prod(shape) * dtype.itemsize, 1)
        host = None
        if on_host:
            data = (ctypes.c_char * size).from_address(self.card.allocate_host(size))
            data.card = self.card  # whose memory lives as long as it does
            host = np.frombuffer(data, dtype, math.prod(shape)).reshape(shape)
            host[...] = 0
        return Buffer(shape, element, self.device, self.card.allocate(size), host)

    def move(self, buffer: Buffer, source: int, target: int, length: int | None = None) -> None:
        """As `Memory.move`."""
        size = buffer.row_bytes
        begins, goes = buffer.address + source * size, buffer.address + target * size
        if length is None:
            self.card.copy(goes, begins, size)
        else:
            pitch = size // buffer.shape[1]
            self.card.copy_rows(goes, begins, pitch, pitch // buffer.shape[2] * length, buffer.shape[1])

    def upload(self, buffer: Buffer) -> None:
        """Copy the host's side, if there is one."""
        if buffer.host is not None and buffer.host.ctypes.data != buffer.address:
            self.card.copy(buffer.address, buffer.host.ctypes.data, buffer.size)

    def download(self, buffer: Buffer) -> None:
        """Copy to the host's side, if there is one."""
        if buffer.host is not None and buffer.host.ctypes.data != buffer.address:
            self.card.copy(buffer.host.ctypes.data, buffer.address, buffer.size)

    def synchronize(self) -> None:
        """Wait for the card."""
        self.card.synchronize()


def on_this_machine(values: NDArray[Any], element: str | None = None) -> Buffer:
    """Values where they are, in host memory, for a graph to read there."""
    return Buffer(values.shape, element or element_of(values), "cpu", values.ctypes.data, values)


def element_of(values: NDArray[Any]) -> str:
    """ONNX's name of the type of an array's elements."""
    return next(name for name, dtype in ELEMENTS.items() if values.dtype == dtype)
