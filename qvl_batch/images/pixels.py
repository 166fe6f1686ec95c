"""From the bytes of an image file to the pixels that are the vision graph's input.

What enters: encoded bytes, unchecked, or Pillow images.
What leaves: uint8 RGB (H, W, 3), of the size that a `View` gives, or an `ImageError`. Memory and time
of any file are bounded by a limit on pixels. Rescaling and normalisation are inside the graph.

This module knows nothing of where the bytes come from, nor of tokens.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from qvl_batch.bundle.layout import Pixels
from qvl_batch.config import Fit, ImageRules
from qvl_batch.errors import ImageError, stable_message
from qvl_batch.images.arrays import picture_of
from qvl_batch.images.bit_depth import to_8_bits
from qvl_batch.images.colour import to_srgb
from qvl_batch.images.damage import MISSING, decoded
from qvl_batch.images.limits import check_size
from qvl_batch.images.view import ImageSize, View, cropped, letterboxed
from qvl_batch.schema import Failure

DEFAULT_RULES = ImageRules()
#: Version of this module's pixels, part of every image's key: raise it when a file's pixels change, so that features of
#: the old pixels are no longer found in a cache.
_PIXELS_VERSION = b"2\0"

#: The transpose that undoes each EXIF orientation.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Fills the bars of a letterbox and the missing pixels of a damaged file. It is the mean colour of CLIP's training
#: images, so it is close to zero once the graph has normalised it.
LETTERBOX_RGB = (122, 116, 104)
#: Background of transparent pixels: white, as on a page.
ALPHA_BACKGROUND = (255, 255, 255)
#: Key in the `info` of a picture that was turned upright: its value is the EXIF orientation, 2 to 8, that it had.
_ORIENTATION = "orientation before it was turned upright"


@dataclass(frozen=True, slots=True)
class Seen:
    """An image as the model sees it: pixels, uint8 (H, W, 3), and sizes before and after."""

    pixels: Pixels
    size: ImageSize


def image_key(data: bytes, view: View) -> bytes:
    """16 bytes that identify an image in caches: a hash of its file's contents or its pixels, and of the view."""
    return hashlib.sha256(_PIXELS_VERSION + view.name.encode() + b"\0" + data).digest()[:16]


def seen_or_failure(data: bytes, view: View, rules: ImageRules = DEFAULT_RULES) -> Seen | Failure:
    """Decode an image file and see it; or the failure of its row."""
    try:
        return see(decode_image(data, rules), view)
    except ImageError as error:
        return Failure.of(error)


def see(image: Image.Image, view: View) -> Seen:
    """What the vision graph gets of an image.

    An image that keeps its proportions is resampled bicubically to a size close to its own: its pixels are those of
    transformers' `Qwen2VLImageProcessorPil`, to the bit. Other images are fitted to a square, by `fit_image`.

    Args:
        image: RGB, from `decode_image` or `upright_rgb`.
        view: how it is seen.

    Raises:
        ImageError: an image that keeps its proportions is too long for its width, or the other way round.
    """
    width, height = view.size_of(*image.size)
    if view.fit is None:
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)
    else:
        pixels = fit_image(image, width, view.fit)
    return Seen(pixels, ImageSize(*image.size, width, height, image.info.get(_ORIENTATION, 1)))


def decode_image(data: bytes, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """Decode an image file to RGB, in sRGB, upright and opaque; of an animation, the first frame.

    Raises:
        ImageError: the bytes are empty, not an image, damaged, or would take too much memory or time.
    """
    if not data:
        raise ImageError("the image has no bytes")
    with _as_image_errors():
        return _upright_rgb(decoded(data, rules))


def upright_rgb(image: Image.Image, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """Convert a Pillow image as `decode_image` converts a file: RGB, in sRGB, upright and opaque.

    Raises:
        ImageError: the image is damaged or too large.
    """
    with _as_image_errors():
        check_size(image.size, rules.max_pixels)
        image.load()
        return _upright_rgb(image)


def array_rgb(array: NDArray[Any], rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """Convert an array of pixels to RGB, as `images.arrays` reads it, and opaque.

    Raises:
        ImageError: it is no image, or too large.
    """
    with _as_image_errors():
        return _upright_rgb(picture_of(array, rules.max_pixels))


def fit_image(image: Image.Image, size: int, fit: Fit = "letterbox") -> NDArray[np.uint8]:
    """Fit an RGB image into a square.

    `letterbox` shows the whole image, keeps its aspect ratio and fills the rest with
    `LETTERBOX_RGB` (LLaVA's `expand2square`); `stretch` shows the whole image and changes its aspect ratio;
    `crop` keeps the aspect ratio and cuts the longer side, centred. All resample bicubically, as the
    checkpoint's own image processor does.

    Returns:
        uint8 (size, size, 3).
    """
    if fit == "stretch":
        fitted = image.resize((size, size), Image.Resampling.BICUBIC)
    elif fit == "crop":
        left, top, side = cropped(*image.size)
        box = (left, top, left + side, top + side)
        fitted = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    else:
        fitted = _letterbox(image, size)
    return np.asarray(fitted, dtype=np.uint8)


def _letterbox(image: Image.Image, size: int) -> Image.Image:
    left, top, width, height = letterboxed(*image.size, size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    if resized.size == (size, size):
        return resized
    canvas = Image.new("RGB", (size, size), LETTERBOX_RGB)
    canvas.paste(resized, (left, top))
    return canvas


@contextmanager
def _as_image_errors() -> Iterator[None]:
    """Turn any other exception into an `ImageError`, and silence warnings."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of oddities in a file that it reads all the same; damage raises.
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise errors of any type
        raise ImageError(f"{type(error).__name__}: {stable_message(error)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    orientation, missing = _orientation(image), image.info.get(MISSING)
    image = _to_rgb(image)  # releases the original, which can be as large
    if missing is not None:
        image.paste(LETTERBOX_RGB, mask=Image.fromarray(missing))
    if orientation in _TRANSPOSES:
        image = image.transpose(_TRANSPOSES[orientation])
        image.info = {_ORIENTATION: orientation}  # without the metadata, by which it would be turned again
    elif _ORIENTATION in image.info:  # it came from `decode_image`; the caller knows it as it is
        image = image.copy()
        del image.info[_ORIENTATION]
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8, 1 if it is upright."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        return int(orientation) if orientation in _TRANSPOSES else 1
    except Exception:  # broken metadata does not damage the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    image = to_srgb(image, profile)
    if image.has_transparency_data:
        overlay = image if image.mode in {"LA", "RGBA"} else image.convert("LA" if image.mode == "La" else "RGBA")
        canvas = Image.new("RGB", overlay.size, ALPHA_BACKGROUND)
        canvas.paste(overlay, mask=overlay)
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of 16-bit integers or of floats to 8 bits; Pillow's own conversion clips instead.

    Raises:
        ImageError: samples are outside the range that `to_8_bits` scales.
    """
    samples = np.asarray(image)
    (grey,) = to_8_bits([samples])
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a PNG's transparent grey level has all 16 bits
        grey[samples == transparent] = ALPHA_BACKGROUND[0]
    return Image.fromarray(grey)
