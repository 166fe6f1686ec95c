"""Peak rates of a device, measured with PyTorch: matrix products, and copies within its memory."""

import statistics
import time
from collections.abc import Callable

import torch

#: Rows, inputs and outputs of matrix products; the fastest counts.
SHAPES = {
    "cuda": ((8192, 8192, 8192), (4096, 4096, 4096), (4808, 2048, 11008), (4608, 1280, 3420)),
    "cpu": ((1024, 1024, 1024),),
}
COPIED_BYTES = {"cuda": 1 << 32, "cpu": 1 << 26}
#: Calls timed together, so that a GPU is not idle between them, and number of such timings.
CALLS, REPEATS = 10, 5


class DeviceLimits:
    """Measures the limits of a device.

    Args:
        device: as torch names it.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        torch.empty(1, device=device)

    def name(self) -> str:
        """Name of the card."""
        return torch.cuda.get_device_name() if self._device == "cuda" else "CPU"

    def used_bytes(self) -> int:
        """Bytes of the card's memory that all processes use; 0 for a CPU."""
        if self._device == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def matrix_rate(self, dtype: str) -> float:
        """Operations per second of the matrix product in `dtype`, as torch names it, at the best of `SHAPES`."""
        speeds = []
        for rows, inputs, outputs in SHAPES[self._device]:
            a = torch.randn(rows, inputs, device=self._device, dtype=getattr(torch, dtype))
            b = torch.randn(inputs, outputs, device=self._device, dtype=getattr(torch, dtype))
            out = torch.empty(rows, outputs, device=self._device, dtype=getattr(torch, dtype))
            speeds.append(2.0 * rows * inputs * outputs / self._seconds(lambda: torch.mm(a, b, out=out)))  # noqa: B023
        return max(speeds)

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a copy that is larger than any cache."""
        source = torch.ones(COPIED_BYTES[self._device], dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._seconds(lambda: target.copy_(source))

    def _seconds(self, work: Callable[[], object]) -> float:
        work()
        self._wait()
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            for _ in range(CALLS):
                work()
            self._wait()
            seconds.append((time.perf_counter() - began) / CALLS)
        return statistics.median(seconds)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()
