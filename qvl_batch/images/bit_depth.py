"""Samples of any width to the 8 bits of a shade.

What enters: arrays of the samples of one image, any integers or floats. What leaves: uint8 arrays of the same
shapes. It does not know what a sample is of: grey, a colour, or what shows through.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.errors import ImageError

#: Largest shade of so many bits.
MOST = {bits: (1 << bits) - 1 for bits in (1, 2, 4, 8, 12, 16)}
_BYTE = 8
#: Rows that are converted at a time.
_ROWS = 256


def shades(parts: Sequence[NDArray[Any]], bits: int = 16) -> list[NDArray[np.uint8]]:
    """Shades of integers of so many bits, whatever they are stored in, or of floats up to 1 or 255.

    Args:
        parts: samples (H, ...), such as the planes of an image.
        bits: one of `MOST`; floats have none.

    Raises:
        ImageError: samples beyond that are measurements, and which shades they are nobody knows.
    """
    low, high = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    floats = parts[0].dtype.kind == "f"
    most = 255 if floats else MOST[bits]
    if not 0 <= low <= high <= most or any(np.isnan(part.max()) for part in parts):
        raise ImageError(f"the image has samples from {low:g} to {high:g}; shades go from 0 to {most}")
    if most == MOST[16] and 0 < high <= MOST[12]:
        _say_that_range_is_unused()
    if floats:
        return [
            _by_rows(part, lambda rows: np.rint(rows.astype(np.float32) * (255 if high <= 1 else 1))) for part in parts
        ]
    if bits < _BYTE:
        return [_by_rows(part, lambda rows: rows * (MOST[_BYTE] // most)) for part in parts]
    return [_by_rows(part, lambda rows: rows >> bits - _BYTE) for part in parts]


def _by_rows(samples: NDArray[Any], convert: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.uint8]:
    """Convert a few rows at a time: what lies between is as wide as the samples, or wider."""
    found = np.empty(samples.shape, np.uint8)
    for start in range(0, len(samples), _ROWS):
        found[start : start + _ROWS] = convert(samples[start : start + _ROWS])
    return found


def look_at_range(image: Image.Image) -> None:
    """Say in the log if colours of 16 bits, of which Pillow has made 8, have used the lowest 12 alone."""
    if image.mode in {"RGB", "RGBA"}:
        extrema: Any = image.getextrema()
        if 0 < max(high for _, high in extrema[:3]) <= MOST[12] >> _BYTE:
            _say_that_range_is_unused()


@functools.cache  # one such image says it for all others of a process
def _say_that_range_is_unused() -> None:
    logging.getLogger(__name__).warning(
        "an image's samples of 16 bits are all below 4,096, so that it is nearly black: if they are of 12 bits, scale "
        "them to 16 first. Other such images are not named."
    )
