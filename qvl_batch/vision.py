"""Images to features: the vision graph of a bundle, a few images at a time.

What enters: uint8 pixels (H, W, 3), as `images.fit_image` makes them. What leaves: float32
features (T_img, D) for each, or a `NumericError` in place of features that mean nothing.

This module knows nothing of prompts or of where images come from.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle import VISION, Bundle
from qvl_batch.errors import BundleError, NumericError
from qvl_batch.runtime import Session

Features = NDArray[np.float32]


class VisionEncoder:
    """The vision graph of a bundle.

    Args:
        bundle: where the graph is.
        threads: threads that one operator may use.
        at_once: images that are encoded at a time, each with so many threads.
    """

    def __init__(self, bundle: Bundle, threads: int, at_once: int = 1) -> None:
        self.layout = bundle.manifest.layout
        self._runs = ThreadPoolExecutor(at_once, "qvl-vision")
        self._session = Session(bundle.file(VISION), threads)
        expected = list(bundle.manifest.feature_shape)
        found = self._session.outputs.get("image_features", [])[1:]
        if found != expected:
            raise BundleError(f"{bundle.path / VISION} gives features of shape {found}, the contract says {expected}")

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> list[Features | NumericError]:
        """Features of each image, or what is wrong with them, in order."""
        return [_checked(features) for features in self._runs.map(self._encode, images)]

    def _encode(self, image: NDArray[np.uint8]) -> Features:
        """One a run: on a CPU, more in one take more memory and longer each."""
        features: Features = self._session.run(["image_features"], {"pixels": image[None]})[0][0]
        return features


def _checked(features: Features) -> Features | NumericError:
    """Non-finite features overflowed; all-equal ones come of a norm that lost everything."""
    if not np.isfinite(features).all():
        return NumericError("the image features are not finite", stage="vision")
    if features.min() == features.max():
        return NumericError("the image features are all the same", stage="vision")
    return features
