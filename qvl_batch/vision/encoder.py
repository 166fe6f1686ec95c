"""An image to features: the vision graph of a bundle.

What enters: uint8 pixels (H, W, 3), as `images.fit_image` makes them. What leaves: float32
features (T_img, D), never such as mean nothing: an image that gets such is encoded again in fp32
where the bundle holds the checkpoint in fp32 too. Nor of a machine that computes the graph wrongly.

This module knows nothing of prompts or of where images come from.
"""

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.fp32 import InFp32
from qvl_batch.bundle.known_answers import Figure, KnownAnswers, refuse_wrong
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import VISION
from qvl_batch.config import Device
from qvl_batch.errors import BundleError, NumericError
from qvl_batch.runtime.devices import machine_of, memory_on
from qvl_batch.runtime.session import Session

Features = NDArray[np.float32]


class VisionEncoder:
    """The vision graph of a bundle; threads may share it.

    Args:
        bundle: where the graph is.
        threads: threads that one operator may use.
        device: where it runs.
        graph: contents to load in place of the bundle's graph.
        prove: hold the graph to the bundle's known answers, which costs the time of an image.

    Raises:
        BundleError: the graph cannot be loaded, or breaks the contract.
        DeviceError: the device cannot be used, has no room, or computes the graph wrongly.
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
        self._fp32 = InFp32(bundle, lambda exact: VisionEncoder(exact, threads))
        self._session = Session(bundle.file(VISION), threads, graph, memory_on(device, "--vision-device cuda"))
        expected = list(bundle.manifest.feature_shape)
        found = self._session.outputs.get("image_features", [])[1:]
        if found != expected:
            raise BundleError(f"{bundle.path / VISION} gives features of shape {found}, the contract says {expected}")
        if prove:
            refuse_wrong(self.figures(), "the vision graph", self.machine, bundle.path)

    @property
    def machine(self) -> str:
        """What computes it."""
        return machine_of(self._session.memory)

    def figures(self) -> list[Figure]:
        """What the graph makes of the bundle's known answers; nothing where it has none."""
        known, tolerance = KnownAnswers.of(self._bundle), self._bundle.manifest.tolerance
        if known is None or tolerance is None:
            return []
        return known.of_vision(self.run(known.pixels[None])[0], tolerance)

    def encode(self, image: NDArray[np.uint8]) -> Features:
        """Features of an image. One a run: on a CPU, more in one take more memory and longer each, and
        one is work enough for a GPU.

        Raises:
            NumericError: the features mean nothing.
        """
        try:
            return self._encode(image)
        except NumericError:
            again = self._fp32.get()
            if again is None:
                raise
        return again.encode(image)

    def run(self, images: NDArray[np.uint8]) -> Features:
        """Whatever the graph makes of images (B, H, W, 3) in one run, float32 (B, T_img, D)."""
        features: Features = self._session.run(["image_features"], {"pixels": images})[0]
        return features

    def _encode(self, image: NDArray[np.uint8]) -> Features:
        features: Features = self.run(image[None])[0]
        if not np.isfinite(features).all():  # something overflowed
            raise NumericError("the image features are not finite", stage="vision")
        if features.min() == features.max():  # a norm lost everything
            raise NumericError("the image features are all the same", stage="vision")
        return features
