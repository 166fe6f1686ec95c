"""The fp32 bundle that a bundle in reduced precision can contain, loaded when a row first needs it."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from qvl_batch.bundle.loading import Bundle

Runner = TypeVar("Runner")


class Fp32Fallback(Generic[Runner]):
    """An encoder or engine over the bundle's fp32 graphs, loaded on first use. Thread-safe.

    Args:
        bundle: a bundle, with or without its checkpoint in fp32.
        load: makes the encoder or engine from the fp32 bundle.
    """

    def __init__(self, bundle: Bundle, load: Callable[[Bundle], Runner]) -> None:
        self._bundle, self._load = bundle, load
        #: None before the first use, and if there is no fp32 bundle.
        self.loaded: Runner | None = None
        self._lock = threading.Lock()

    def get(self) -> Runner | None:
        """Load it if it is not loaded yet; None if there is no fp32 bundle."""
        with self._lock:
            bundle = self._bundle.in_fp32() if self.loaded is None else None
            if bundle is not None:
                self.loaded = self._load(bundle)
            return self.loaded
