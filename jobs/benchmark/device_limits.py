"""What a device can do at most, as PyTorch reaches it: matrix products, and copies within its memory."""

import statistics
import time
from collections.abc import Callable

import torch

#: Rows, inputs and outputs of products; the fastest counts.
SHAPES = {
    "cuda": ((8192, 8192, 8192), (4096, 4096, 4096), (4808, 2048, 11008), (4608, 1280, 3420)),
    "cpu": ((1024, 1024, 1024),),
}
COPIED_BYTES = {"cuda": 1 << 32, "cpu": 1 << 26}
#: Calls that are timed together, so that a GPU does not wait for the next, and times that this is done.
CALLS, REPEATS = 10, 5


class DeviceLimits:
    """Limits of a device.

    Args:
        device: as torch names it.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        torch.empty(1, device=device)

    def name(self) -> str:
        """Of the card."""
        return torch.cuda.get_device_name() if self._device == "cuda" else "CPU"

    def used_bytes(self) -> int:
        """Bytes of a card's memory that all processes together have; none of a CPU's."""
        if self._device == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def matrix_rate(self, dtype: str) -> float:
        """Operations a second of the matrix product in a type, as torch names it, at the best of `SHAPES`."""
        speeds = []
        for rows, inputs, outputs in SHAPES[self._device]:
            a = torch.randn(rows, inputs, device=self._device, dtype=getattr(torch, dtype))
            b = torch.randn(inputs, outputs, device=self._device, dtype=getattr(torch, dtype))
            out = torch.empty(rows, outputs, device=self._device, dtype=getattr(torch, dtype))
            speeds.append(2.0 * rows * inputs * outputs / self._seconds(lambda: torch.mm(a, b, out=out)))  # noqa: B023
        return max(speeds)

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of one copy that no cache holds."""
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
