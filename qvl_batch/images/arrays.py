"""Arrays of pixels, and the `.npy` files that hold one, to pictures.

What enters: arrays of any shape and dtype, or bytes of NumPy's own format. What leaves: a Pillow image of 8 bits (L,
LA, RGB or RGBA), or an `ImageError`.

An array is (H, W), (H, W, C) or, if its first axis alone can be the channels, (C, H, W); C is 1 to 4: grey, grey and
alpha, RGB, RGBA. Its samples are booleans; uint8; uint16, of all 16 bits; floats from 0 to 1 or from 0 to 255; or other
integers, of 8 bits if none is above 255, else of 16.
"""

import io
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.errors import ImageError
from qvl_batch.images.bit_depth import to_8_bits
from qvl_batch.images.limits import check_size

#: Numbers of channels that can be the last axis, and the first.
_LAST, _FIRST = (1, 2, 3, 4), (1, 3, 4)
_BYTE = 255


def is_npy(data: bytes) -> bool:
    """Whether bytes begin like a `.npy` file."""
    return data.startswith(npy.MAGIC_PREFIX)


def of_npy(data: bytes) -> NDArray[Any]:
    """The array of a `.npy` file, as a view of its bytes.

    Raises:
        ImageError: it is damaged, or an array of objects.
    """
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(file)
        if dtype.hasobject:
            raise ImageError("the NPY holds objects, not numbers")
        array = np.frombuffer(data, dtype, offset=file.tell())
        return array.reshape(shape, order="F" if is_fortran else "C")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ImageError(f"the NPY is damaged: {error}") from error


def picture_of(array: NDArray[Any], max_pixels: int) -> Image.Image:
    """The picture of an array.

    Raises:
        ImageError: it has no shape or samples of a picture, could be read in two ways, or has too many pixels.
    """
    what = f"a {array.dtype} array of shape {array.shape}"
    pixels = _channels_last(array, what)
    check_size((pixels.shape[1], pixels.shape[0]), max_pixels)
    shades = _eight_bits(pixels, what)
    return Image.fromarray(shades[..., 0] if shades.shape[2:] == (1,) else shades)


def _channels_last(array: NDArray[Any], what: str) -> NDArray[Any]:
    """(H, W) or (H, W, C) of an array in any of the forms."""
    if array.ndim == 2:  # noqa: PLR2004
        return array
    first, last = (array.shape[0] in _FIRST, array.shape[2] in _LAST) if array.ndim == 3 else (False, False)  # noqa: PLR2004
    if first and last:
        raise ImageError(
            f"{what} can be read as (height, width, channels) and as (channels, height, width): give a Pillow image"
        )
    if not (first or last):
        raise ImageError(
            f"{what} is not an image: give (height, width), (height, width, channels) or (channels, height, width)"
        )
    return array if last else np.moveaxis(array, 0, 2)


def _eight_bits(pixels: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """Samples of any dtype as uint8."""
    kind = pixels.dtype.kind
    if kind == "b":
        return pixels * np.uint8(_BYTE)
    if kind not in "uif":
        raise ImageError(f"{what} is not an image: its samples must be numbers")
    is_wide = kind != "f" and pixels.dtype != np.dtype(np.uint16).newbyteorder(pixels.dtype.byteorder)
    if is_wide and 0 <= pixels.min() <= pixels.max() <= _BYTE:
        return pixels.astype(np.uint8)
    (shades,) = to_8_bits([pixels])
    return shades
