"""The twin in fp32 that a bundle in reduced precision may hold, loaded when a row first needs it."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from qvl_batch.bundle.loading import Bundle

Made = TypeVar("Made")


class InFp32(Generic[Made]):
    """What is made of a bundle in fp32, when it is first asked for; threads may share it.

    Args:
        bundle: that may hold its checkpoint in fp32 too.
        make: of the bundle in fp32.
    """

    def __init__(self, bundle: Bundle, make: Callable[[Bundle], Made]) -> None:
        self._bundle, self._make = bundle, make
        #: None until it is asked for, and where there is no bundle in fp32.
        self.made: Made | None = None
        self._lock = threading.Lock()

    def get(self) -> Made | None:
        """The same for all who ask; None where there is no bundle in fp32."""
        with self._lock:
            bundle = self._bundle.in_fp32() if self.made is None else None
            if bundle is not None:
                self.made = self._make(bundle)
            return self.made
