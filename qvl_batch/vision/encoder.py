"""An image to features: the vision graph of a bundle.

What enters: pixels, uint8 (H, W, 3), from `images.pixels.see`. What leaves: features, float32 (T_img, D), finite
and not all the same. If they are not, the image is encoded again in fp32, provided that the bundle contains the
checkpoint in fp32; if that does not help, it fails with a `NumericError`. A machine that computes the graph wrongly is
refused.

This module knows nothing of prompts or of where images come from.
"""

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.fp32 import Fp32Fallback
from qvl_batch.bundle.known_answers import Figure, KnownAnswers, known_figures, refuse_wrong
from qvl_batch.bundle.layout import Features, Pixels
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import VISION, Tolerance
from qvl_batch.config import Device
from qvl_batch.errors import BundleError, NumericError
from qvl_batch.runtime.devices import machine_of, memory_on
from qvl_batch.runtime.session import Session


class VisionEncoder:
    """The vision graph of a bundle. Thread-safe.

    Args:
        bundle: contains the graph.
        threads: threads for one operator.
        device: where the graph runs.
        graph: ONNX file contents to load in place of the bundle's graph.
        prove: check the graph against the bundle's known answers, which takes the time of one image.

    Raises:
        BundleError: the graph cannot be loaded, or breaks the contract.
        DeviceError: the device cannot be used, is out of memory, or computes the graph wrongly.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        device: Device = "cpu",
        *,
        graph: bytes | None = None,
        prove: bool = True,
    ) -> None:
        self.layout, self._bundle = bundle.manifest.layout, bundle
        self.hidden_size = bundle.manifest.decoder.hidden_size
        self._fp32 = Fp32Fallback(bundle, lambda exact: VisionEncoder(exact, threads))
        self._session = Session(bundle.file(VISION), threads, graph, memory_on(device, "--vision-device cuda"))
        resolution = self.layout.resolution
        expected = [None if resolution.is_native else resolution.max_tokens, self.hidden_size]
        shape = self._session.outputs.get("image_features", [])[1:]
        found = [each if isinstance(each, int) else None for each in shape]
        if found != expected:
            raise BundleError(f"{bundle.path / VISION} has features of shape {found}, the contract says {expected}")
        if prove:
            refuse_wrong(self.figures(), "the vision graph", self.machine, bundle.path)

    @property
    def machine(self) -> str:
        """Processor or card, and version of ONNX Runtime."""
        return machine_of(self._session.memory)

    def figures(self) -> list[Figure]:
        """Figures of the graph on the bundle's known answers; empty if it has none."""
        return known_figures(self._bundle, self._figures)

    def tokens(self, image: Pixels) -> int:
        """Number of image tokens (T_img) of an image (H, W, 3).

        Raises:
            ValueError: the contract has no images of this size.
        """
        resolution, (height, width, _) = self.layout.resolution, image.shape
        rows, columns = resolution.grid(height, width)
        is_whole = (height, width) == (rows * resolution.unit, columns * resolution.unit)
        is_square = resolution.is_native or height == width == resolution.image_size
        if not (is_whole and is_square and 0 < rows * columns <= resolution.max_tokens):
            raise ValueError(f"an image of {width} x {height} pixels is not within the contract: {resolution}")
        return rows * columns

    def encode(self, image: Pixels) -> Features:
        """Features of an image (H, W, 3).

        One image a run: on a CPU, a batch takes more memory and more time for each image; a GPU is busy with one.

        Raises:
            NumericError: the features are not finite, or all the same.
            ValueError: the contract has no images of this size.
        """
        self.tokens(image)
        try:
            return self._encode(image)
        except NumericError:
            fallback = self._fp32.get()
            if fallback is None:
                raise
        return fallback.encode(image)

    def run(self, images: NDArray[np.uint8]) -> Features:
        """Features of images (B, H, W, 3) in one run, float32 (B, T_img, D), unchecked."""
        features: Features = self._session.run(["image_features"], {"pixels": images})[0]
        return features

    def _figures(self, known: KnownAnswers, tolerance: Tolerance) -> list[Figure]:
        return known.of_vision(self.run(known.pixels[None])[0], tolerance)

    def _encode(self, image: Pixels) -> Features:
        features: Features = self.run(image[None])[0]
        if not np.isfinite(features).all():  # an activation overflowed
            raise NumericError("the image features are not finite", stage="vision")
        if features.min() == features.max():  # a norm scaled everything to zero
            raise NumericError("the image features are all the same", stage="vision")
        return features
