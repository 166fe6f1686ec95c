"""Samples of any bit depth to 8 bits.

What enters: arrays of the samples of one image, integers or floats of any dtype. What leaves: uint8 arrays of the same
shapes, or an `ImageError`. It does not know what a sample stands for: grey, a colour, or alpha.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.errors import ImageError

#: Largest sample of each bit depth.
MAX_SAMPLE = {bits: (1 << bits) - 1 for bits in (1, 2, 4, 8, 12, 16)}
_BYTE = 8
#: Rows converted at a time.
_ROWS = 256


def to_8_bits(parts: Sequence[NDArray[Any]], bits: int = 16) -> list[NDArray[np.uint8]]:
    """Scale integers of a bit depth, or floats from 0 to 1 or from 0 to 255, to 8 bits.

    Args:
        parts: samples (H, ...), for example one array for each plane of an image. Their dtype can be wider than `bits`.
        bits: depth of integers, a key of `MAX_SAMPLE`; ignored for floats.

    Returns:
        For each part, uint8 of its shape.

    Raises:
        ImageError: samples are outside that range. Such values are measurements, with no defined scale to 8 bits.
    """
    low, high = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    floats = parts[0].dtype.kind == "f"
    most = 255 if floats else MAX_SAMPLE[bits]
    if not 0 <= low <= high <= most or any(np.isnan(part.max()) for part in parts):
        raise ImageError(f"the image has samples from {low:g} to {high:g}; they must be from 0 to {most}")
    if most == MAX_SAMPLE[16] and 0 < high <= MAX_SAMPLE[12]:
        warn_of_12_bits()
    if floats:
        return [
            _by_rows(part, lambda rows: np.rint(rows.astype(np.float32) * (255 if high <= 1 else 1))) for part in parts
        ]
    if bits < _BYTE:
        return [_by_rows(part, lambda rows: rows * (MAX_SAMPLE[_BYTE] // most)) for part in parts]
    return [_by_rows(part, lambda rows: rows >> bits - _BYTE) for part in parts]


def _by_rows(samples: NDArray[Any], convert: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.uint8]:
    """Convert a few rows at a time: intermediate arrays are as wide as the samples, or wider."""
    converted = np.empty(samples.shape, np.uint8)
    for start in range(0, len(samples), _ROWS):
        converted[start : start + _ROWS] = convert(samples[start : start + _ROWS])
    return converted


def warn_if_12_bits(image: Image.Image) -> None:
    """Log a warning if an image's 16-bit colours, which Pillow has reduced to 8 bits, use only the lowest 12 bits."""
    if image.mode in {"RGB", "RGBA"}:
        extrema: Any = image.getextrema()
        if 0 < max(high for _, high in extrema[:3]) <= MAX_SAMPLE[12] >> _BYTE:
            warn_of_12_bits()


@functools.cache  # once per process
def warn_of_12_bits() -> None:
    """Log that an image seems to hold 12 bits in 16."""
    logging.getLogger(__name__).warning(
        "an image's 16-bit samples are all below 4,096, so it is nearly black: if they hold 12 bits, scale them to 16 "
        "bits first. Further images like it are not reported."
    )
