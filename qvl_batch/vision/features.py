"""Features of images: each image goes through the vision graph once, however many rows ask about it.

What enters: pixels and keys of images, from any thread. What leaves: features, from the latest in
memory, from a folder of kept ones, or from the graph; or a `Failure`.

This module knows nothing of rows but their images.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.layout import Features
from qvl_batch.clock import Clock
from qvl_batch.errors import NumericError
from qvl_batch.schema import Failure
from qvl_batch.vision.cache import VisionCache
from qvl_batch.vision.encoder import VisionEncoder

Pixels = NDArray[np.uint8]
#: Images whose features are kept in memory, for rows of one image that are near each other.
RECENT = 16


class ImageFeatures:
    """Features of images; threads may share it.

    Args:
        vision: the graph.
        kept: folder of features that outlive this process, None for none.
        at_once: images that are encoded at a time.
    """

    def __init__(self, vision: VisionEncoder, kept: VisionCache | None = None, at_once: int = 1) -> None:
        self._vision, self._kept = vision, kept
        self._runs = ThreadPoolExecutor(at_once, "qvl-vision")
        self._recent: dict[bytes, Future[Features]] = {}
        self._lock = threading.Lock()
        #: Runs while a thread works on an image.
        self.clock = Clock()

    def of(self, images: Sequence[Pixels | Failure], keys: Sequence[bytes | None]) -> list[Features | Failure]:
        """Float32 features (T_img, D) of each image, in order; failures stay where they are.

        Args:
            images: uint8 pixels (H, W, 3), or why there are none.
            keys: of images, None for failures.

        Raises:
            OutputError: the folder cannot be written.
        """
        begun = [
            image if isinstance(image, Failure) else self._begin(image, cast("bytes", key))
            for image, key in zip(images, keys, strict=True)
        ]
        try:
            return [_features_or_failure(row) if isinstance(row, Future) else row for row in begun]
        except KeyboardInterrupt:  # the interpreter would encode what is queued before it ends
            for row, key in zip(begun, keys, strict=True):
                if isinstance(row, Future) and row.cancel():
                    self._forget(cast("bytes", key))
            raise

    def close(self) -> None:
        """Let go of the threads when what was asked is encoded."""
        self._runs.shutdown()

    def stop(self) -> None:
        """Let go of the threads when the images that they work on are encoded; others are cancelled."""
        self._runs.shutdown(cancel_futures=True)

    def _begin(self, image: Pixels, key: bytes) -> "Future[Features]":
        with self._lock:
            if key not in self._recent:
                if len(self._recent) == RECENT:
                    self._recent.pop(next(iter(self._recent)))
                self._recent[key] = self._runs.submit(self._find, image, key)
            return self._recent[key]

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._recent.pop(key, None)

    def _find(self, image: Pixels, key: bytes) -> Features:
        try:
            with self.clock.running():
                found = self._kept.get(key) if self._kept else None
                if found is None:
                    found = self._vision.encode(image)
                    if self._kept:
                        self._kept.put(key, found)
                return found
        except NumericError:
            raise
        except BaseException:  # a full disk or memory, which says nothing of the image
            self._forget(key)
            raise


def _features_or_failure(future: "Future[Features]") -> Features | Failure:
    try:
        return future.result()
    except NumericError as error:
        return Failure.of(error)
