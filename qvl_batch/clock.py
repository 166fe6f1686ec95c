"""Busy thread-seconds, summed over any number of threads and drained in portions."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Sums busy time over threads: two threads that work for a second add two seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time that the block takes, also if it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            with self._lock:
                self._seconds += took

    def take(self) -> float:
        """Return the seconds added since the last call, and reset: each second is returned once."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds
