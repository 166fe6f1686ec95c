"""From the bytes of an image file to the square of pixels that is the vision graph's input.

What enters: encoded bytes, unchecked, or Pillow images.
What leaves: uint8 RGB (H, W, 3) with H = W = the bundle's image size, or an `ImageError`. Memory and time
of any file are bounded by a limit on pixels. Rescaling and normalisation are inside the graph.

This module knows nothing of where the bytes come from, nor of tokens.
"""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from qvl_batch.config import Fit, ImageRules
from qvl_batch.errors import ImageError, stable_message
from qvl_batch.images.bit_depth import to_8_bits
from qvl_batch.images.colour import to_srgb
from qvl_batch.images.damage import MISSING, decoded
from qvl_batch.images.limits import check_size
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


def image_key(data: bytes, fit: Fit) -> bytes:
    """16 bytes that identify an image in caches: a hash of its file's contents or its pixels, and of the fit."""
    return hashlib.sha256(_PIXELS_VERSION + fit.encode() + b"\0" + data).digest()[:16]


def pixels_or_failure(
    data: bytes, size: int, fit: Fit, rules: ImageRules = DEFAULT_RULES
) -> NDArray[np.uint8] | Failure:
    """Decode an image file and fit it, as uint8 (size, size, 3); or the failure of its row."""
    try:
        return fit_image(decode_image(data, rules), size, fit)
    except ImageError as error:
        return Failure.of(error)


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


def fit_image(image: Image.Image, size: int, fit: Fit = "letterbox") -> NDArray[np.uint8]:
    """Fit an RGB image into a square.

    `letterbox` shows the whole image, keeps its aspect ratio and fills the rest with
    `LETTERBOX_RGB` (LLaVA's `expand2square`); `stretch` shows the whole image and changes its aspect ratio;
    `crop` keeps the aspect ratio and cuts the longer side, centred. All resample bicubically, as the
    checkpoint's own image processor does.

    Returns:
        uint8 (size, size, 3).
    """
    width, height = image.size
    if fit == "stretch":
        fitted = image.resize((size, size), Image.Resampling.BICUBIC)
    elif fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        fitted = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    else:
        fitted = _letterbox(image, size)
    return np.asarray(fitted, dtype=np.uint8)


def _letterbox(image: Image.Image, size: int) -> Image.Image:
    longer = max(image.size)
    width, height = (max(1, round(side * size / longer)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    if resized.size == (size, size):
        return resized
    canvas = Image.new("RGB", (size, size), LETTERBOX_RGB)
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
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
    transpose, missing = _transpose(image), image.info.get(MISSING)
    image = _to_rgb(image)  # releases the original, which can be as large
    if missing is not None:
        image.paste(LETTERBOX_RGB, mask=Image.fromarray(missing))
    return image if transpose is None else image.transpose(transpose)


def _transpose(image: Image.Image) -> Image.Transpose | None:
    """The transpose that makes the image upright, None if it is upright."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        return _TRANSPOSES.get(orientation)
    except Exception:  # broken metadata does not damage the pixels
        return None


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
