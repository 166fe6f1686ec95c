"""From the bytes of an image file to the square of pixels that the vision graph takes.

What enters: encoded bytes, which nobody may have checked, or images as Pillow has them.
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
from qvl_batch.images.bit_depth import shades
from qvl_batch.images.colour import to_srgb
from qvl_batch.images.damage import MISSING, decoded
from qvl_batch.images.limits import check_size
from qvl_batch.schema import Failure

DEFAULT_RULES = ImageRules()
#: Part of every image's key: another number where pixels of a file change, so that no features are kept of the old.
_MADE_AS = b"2\0"

#: What undoes each orientation of EXIF.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Ground of a letterbox, and of pixels that a damaged file lacks: the mean colour of CLIP's training images, so that
#: they are close to zero once the graph has normalised them.
LETTERBOX_RGB = (122, 116, 104)
#: Transparent pixels show this ground, as on a page.
ALPHA_GROUND = (255, 255, 255)


def image_key(data: bytes, fit: Fit) -> bytes:
    """16 bytes that stand for an image, by its file's contents or its pixels, and how it is fitted."""
    return hashlib.sha256(_MADE_AS + fit.encode() + b"\0" + data).digest()[:16]


def pixels_or_failure(
    data: bytes, size: int, fit: Fit, rules: ImageRules = DEFAULT_RULES
) -> NDArray[np.uint8] | Failure:
    """Decode and fit an image file; what is wrong with it where that cannot be done."""
    try:
        return fit_image(decode_image(data, rules), size, fit)
    except ImageError as error:
        return Failure.of(error)


def decode_image(data: bytes, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """Decode an image file to RGB, in sRGB, upright and opaque; of an animation, the first frame.

    Raises:
        ImageError: the bytes are empty, no image, damaged, or would take too much memory or time.
    """
    if not data:
        raise ImageError("the image has no bytes")
    with _failures_named():
        return _upright_rgb(decoded(data, rules))


def upright_rgb(image: Image.Image, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    """An image as `decode_image` gives the file that it is of: RGB, in sRGB, upright and opaque.

    Raises:
        ImageError: it is damaged, or too large.
    """
    with _failures_named():
        check_size(image.size, rules.max_pixels)
        image.load()
        return _upright_rgb(image)


def fit_image(image: Image.Image, size: int, fit: Fit = "letterbox") -> NDArray[np.uint8]:
    """Fit an RGB image into a square.

    `letterbox` keeps all of the image and its proportions and fills the rest with
    `LETTERBOX_RGB` (LLaVA's `expand2square`); `stretch` keeps all and gives up proportions;
    `crop` keeps proportions and cuts the longer side, centred. All resample bicubically, as the
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
def _failures_named() -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # What is odd in a file is not the job's concern; what is wrong raises.
            warnings.simplefilter("ignore")
            yield
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsing met
        raise ImageError(f"{type(error).__name__}: {stable_message(error)}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    turn, missing = _turn(image), image.info.get(MISSING)
    image = _to_rgb(image)  # lets go of the original, which may be as large
    if missing is not None:
        image.paste(LETTERBOX_RGB, mask=Image.fromarray(missing))
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        return _TURNS.get(orientation)
    except Exception:  # the picture is whole, whatever the notes beside it are
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    image = to_srgb(image, profile)
    if image.has_transparency_data:
        seen = image if image.mode in {"LA", "RGBA"} else image.convert("LA" if image.mode == "La" else "RGBA")
        ground = Image.new("RGB", seen.size, ALPHA_GROUND)
        ground.paste(seen, mask=seen)
        return ground
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Shades of 16 bits, or of floats up to 1 or 255; Pillow's own conversion clips them.

    Raises:
        ImageError: samples beyond that are measurements, and which shades they are nobody knows.
    """
    samples = np.asarray(image)
    (found,) = shades([samples])
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a shade of all 16 bits, as PNG has it
        found[samples == transparent] = ALPHA_GROUND[0]
    return Image.fromarray(found)
