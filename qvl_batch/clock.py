"""Seconds of work, added up by any number of threads and taken away in portions."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Runs while somebody works, and twice as fast while two do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time that the block takes, whatever ends it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            with self._lock:
                self._seconds += took

    def take(self) -> float:
        """Seconds since the last call; each second is given once."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds
