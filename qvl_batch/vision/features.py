"""Features of images: each image runs through the vision graph once, however many rows ask about it.

What enters: pixels and keys of images, from any thread. What leaves: features, float32 (T_img, D), from the most recent
in memory, from the cache on disk, or from the graph; or a `Failure`.

This module knows nothing of rows but their images.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from qvl_batch.bundle.layout import Features, Pixels
from qvl_batch.clock import Clock
from qvl_batch.errors import NumericError, PromptError
from qvl_batch.schema import Failure, first_failure
from qvl_batch.vision.cache import VisionCache
from qvl_batch.vision.encoder import VisionEncoder

#: Images whose features stay in memory, for rows about the same image that are close together in the input, and most
#: bytes of these features.
RECENT, RECENT_BYTES = 16, 256_000_000


class ImageFeatures:
    """Features of images. Thread-safe.

    Args:
        vision: the vision graph.
        cache: features on disk, None for none.
        at_once: images encoded at a time, each in a thread of its own.
    """

    def __init__(self, vision: VisionEncoder, cache: VisionCache | None = None, at_once: int = 1) -> None:
        self._vision, self._cache = vision, cache
        self._pool = ThreadPoolExecutor(at_once, "qvl-vision")
        self._recent: dict[bytes, Future[Features]] = {}
        self._lock = threading.Lock()
        #: Busy thread-seconds of encoding and cache access.
        self.clock = Clock()

    def of(self, images: Sequence[Pixels], keys: Sequence[bytes]) -> list[Features | Failure]:
        """Features of each image, float32 (T_img, D), in order; or why there are none.

        Args:
            images: pixels, uint8 (H, W, 3).
            keys: keys of the images.

        Raises:
            OutputError: the cache on disk cannot be written.
        """
        begun = list(map(self._begin, images, keys))
        try:
            return list(map(_features_or_failure, begun))
        except KeyboardInterrupt:  # the interpreter would encode all queued images before it exits
            for future, key in zip(begun, keys, strict=True):
                if future.cancel():
                    self._forget(key)
            raise

    def of_rows(
        self, images: Sequence[Sequence[Pixels]], keys: Sequence[Sequence[bytes]]
    ) -> list[list[Features] | Failure]:
        """Features of the images of each row, in order; or the first failure of a row. Images that leave no room for
        an answer are not encoded.

        Args:
            images: of each row, pixels, uint8 (H, W, 3).
            keys: of each row, keys of the images.

        Raises:
            OutputError: the cache on disk cannot be written.
        """
        refused = list(map(self._refused, images))
        rows = zip(images, keys, refused, strict=True)
        fitting = [pair for row, ids, failure in rows if failure is None for pair in zip(row, ids, strict=True)]
        found = iter(self.of([image for image, _ in fitting], [key for _, key in fitting]))
        return [failure or _of_row(list(islice(found, len(row)))) for row, failure in zip(images, refused, strict=True)]

    def close(self) -> None:
        """Encode what is queued, then end the threads."""
        self._pool.shutdown()

    def stop(self) -> None:
        """Cancel what is queued, and end the threads after the images that they are encoding."""
        self._pool.shutdown(cancel_futures=True)

    def _refused(self, images: Sequence[Pixels]) -> Failure | None:
        try:
            self._vision.layout.check_room(list(map(self._vision.tokens, images)))
        except PromptError as error:
            return Failure.of(error)
        return None

    def _begin(self, image: Pixels, key: bytes) -> "Future[Features]":
        with self._lock:
            if key not in self._recent:
                tokens = self._vision.tokens(image)
                most = max(1, min(RECENT, RECENT_BYTES // (4 * tokens * self._vision.hidden_size)))
                while len(self._recent) >= most:
                    self._recent.pop(next(iter(self._recent)))
                self._recent[key] = self._pool.submit(self._look_up_or_encode, image, tokens, key)
            return self._recent[key]

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._recent.pop(key, None)

    def _look_up_or_encode(self, image: Pixels, tokens: int, key: bytes) -> Features:
        try:
            with self.clock.running():
                features = self._cache.get(key, tokens) if self._cache else None
                if features is None:
                    features = self._vision.encode(image)
                    if self._cache:
                        self._cache.put(key, features)
                return features
        except NumericError:
            raise
        except BaseException:  # such as a full disk or no memory: not the image's fault, so it can be tried again
            self._forget(key)
            raise


def _features_or_failure(future: "Future[Features]") -> Features | Failure:
    try:
        return future.result()
    except NumericError as error:
        return Failure.of(error)


def _of_row(results: list[Features | Failure]) -> list[Features] | Failure:
    return first_failure(results) or [each for each in results if not isinstance(each, Failure)]
