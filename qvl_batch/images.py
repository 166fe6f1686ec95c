"""From the bytes of an image file to the square of pixels that the vision graph takes.

What enters: encoded bytes of any format Pillow reads. What leaves: uint8 RGB (H, W, 3) with
H = W = the bundle's image size. Rescaling and normalisation are inside the graph.

This module knows nothing of where the bytes come from, nor of tokens.
"""

import hashlib
import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from qvl_batch.config import Fit
from qvl_batch.errors import ImageError, stable_message
from qvl_batch.schema import Failure

#: Ground of a letterbox: the mean colour of CLIP's training images, so that the bars are close
#: to zero once the graph has normalised them.
LETTERBOX_RGB = (122, 116, 104)
#: Transparent pixels show this ground, as on a page.
ALPHA_GROUND = (255, 255, 255, 255)


def image_key(data: bytes, fit: Fit) -> bytes:
    """16 bytes that stand for an image file's contents and how it is fitted."""
    return hashlib.sha256(fit.encode() + b"\0" + data).digest()[:16]


def pixels_or_failure(data: bytes, size: int, fit: Fit) -> NDArray[np.uint8] | Failure:
    """Decode and fit an image file; what is wrong with it where that cannot be done."""
    try:
        return fit_image(decode_image(data), size, fit)
    except ImageError as error:
        return Failure.of(error)


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to RGB, upright and opaque; of an animation, the first frame.

    Raises:
        ImageError: the bytes are empty, no image, damaged, or larger than Pillow's limit.
    """
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ImageError(f"the bytes are no image this Pillow reads (first 8: {data[:8]!r})") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsing met
        raise ImageError(f"{type(error).__name__}: {stable_message(error)}") from error


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow's own conversion clips 16-bit samples to 255 instead of scaling them.
        samples = np.asarray(image, dtype=np.int64)
        return Image.fromarray(np.clip(samples >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, ALPHA_GROUND), rgba).convert("RGB")
    return image.convert("RGB")
