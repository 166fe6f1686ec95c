"""The CUDA runtime calls that this project makes beside ONNX Runtime's own: memory, copies, a stream.

What enters: addresses and sizes in bytes. What leaves: the same, or a `DeviceError` with CUDA's error text.

This module knows nothing of graphs or of the meaning of the bytes.
"""

import ctypes
import weakref

from qvl_batch.errors import DeviceError

OUT_OF_MEMORY = 2
#: `cudaMemcpyDefault`: the direction is inferred from the addresses.
ANY_DIRECTION = 4
#: `cudaStreamNonBlocking`.
NON_BLOCKING = 1
#: `cudaStreamCaptureModeThreadLocal`.
THREAD_LOCAL = 1
#: Size of the name in `cudaDeviceProp`, and an upper bound of the size of the whole struct.
NAME_BYTES, PROPERTIES_BYTES = 256, 8192


class Cuda:
    """A GPU and a stream on it, in which all copies run in order.

    Allocated memory is freed with this object.

    Args:
        version: major version of the CUDA runtime that ONNX Runtime was built for.
        device: index of the GPU among those visible to this process.

    Raises:
        DeviceError: the library, the driver or the GPU is missing.
    """

    def __init__(self, version: int, device: int = 0) -> None:
        name = f"libcudart.so.{version}"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise DeviceError(
                f"the libraries of CUDA {version} cannot be loaded ({error}): "
                f"install them with pip install 'onnxruntime-gpu[cuda,cudnn]'"
            ) from error
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self.device = device
        self._call("cudaSetDevice", ctypes.c_int(device))
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(NON_BLOCKING))
        #: Handle of the stream, which ONNX Runtime runs in too.
        self.stream = stream.value or 0
        self._allocated: list[tuple[str, int]] = []
        # Not at exit: the driver frees all memory of a process that ends.
        weakref.finalize(self, _free, self._library, self._allocated).atexit = False

    @property
    def name(self) -> str:
        """Name of the card."""
        # The name is the first field of `cudaDeviceProp` in all versions of CUDA.
        properties = ctypes.create_string_buffer(PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, ctypes.c_int(self.device))
        return properties.raw[:NAME_BYTES].split(b"\0")[0].decode(errors="replace")

    def memory(self) -> tuple[int, int]:
        """Free and total memory of the card in bytes."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """Allocate `size` bytes on the GPU, zeroed; returns their address.

        Raises:
            DeviceError: the card is out of memory.
        """
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size))
        self._allocated.append(("cudaFree", address.value or 0))
        self._call("cudaMemsetAsync", address, ctypes.c_int(0), ctypes.c_size_t(size), ctypes.c_void_p(self.stream))
        return address.value or 0

    def allocate_host(self, size: int) -> int:
        """Allocate `size` bytes of pinned host memory, which the GPU accesses directly; returns their address."""
        address = ctypes.c_void_p()
        self._call("cudaHostAlloc", ctypes.byref(address), ctypes.c_size_t(size), ctypes.c_uint(0))
        self._allocated.append(("cudaFreeHost", address.value or 0))
        return address.value or 0

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy `size` bytes; either address can be in host memory."""
        self._call("cudaMemcpyAsync", _at(target), _at(source), ctypes.c_size_t(size), *self._in_stream())

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Copy the first `width` bytes of each of `rows` rows; rows are `pitch` bytes apart on both sides."""
        sizes = [ctypes.c_size_t(size) for size in (pitch, width, rows)]
        self._call(
            "cudaMemcpy2DAsync", _at(target), sizes[0], _at(source), sizes[0], sizes[1], sizes[2], *self._in_stream()
        )

    def ignore_captures(self) -> None:
        """Allow the calling thread to allocate while another thread captures a graph, which CUDA otherwise refuses."""
        self._call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(THREAD_LOCAL)))

    def synchronize(self) -> None:
        """Wait for all work in the stream."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def _in_stream(self) -> tuple[ctypes.c_int, ctypes.c_void_p]:
        return ctypes.c_int(ANY_DIRECTION), ctypes.c_void_p(self.stream)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:  # clear it, or CUDA would return it from the next call too, for instance to ONNX Runtime
            self._library.cudaGetLastError()
        if code == OUT_OF_MEMORY:
            raise out_of_memory()
        if code:
            raise DeviceError(f"{name} failed on the GPU: {self._library.cudaGetErrorString(code).decode()}")


def out_of_memory() -> DeviceError:
    """The error for a card that is out of memory."""
    return DeviceError(
        "the GPU has no memory left: lower --slots, run the vision tower on the CPU (--vision-device cpu), "
        "or stop other programs on the card"
    )


def _free(library: ctypes.CDLL, allocated: list[tuple[str, int]]) -> None:
    for call, address in allocated:
        getattr(library, call)(_at(address))


def _at(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
