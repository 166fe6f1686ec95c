"""From the bytes of an image file to the square of pixels that the vision graph takes.

What enters: encoded bytes of one of `FORMATS`, which nobody may have checked, or images as Pillow has them.
What leaves: uint8 RGB (H, W, 3) with H = W = the bundle's image size, or an `ImageError`. Memory and time
of any file are bounded by Pillow's limit on pixels. Rescaling and normalisation are inside the graph.

This module knows nothing of where the bytes come from, nor of tokens.
"""

import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from qvl_batch.config import Fit
from qvl_batch.errors import ImageError, stable_message
from qvl_batch.schema import Failure

#: All that is tried. Pillow knows 43, among them some that start other programs (EPS: Ghostscript), that take
#: any bytes for theirs (TGA), and many that nobody looks after.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
#: Pillow's resampling takes 32 bytes for each pixel of a side.
LONGEST_SIDE = 1_000_000
#: Scans of a JPEG of the most pixels, of a smaller one accordingly more; writers make about 10. A scan of 15 bytes
#: costs a pass over all pixels: a file of 220 kB took half a minute, and one of 10 MB takes a quarter of an hour.
MOST_SCANS = 50
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
#: Tags of a TIFF: width and length of its tiles.
_TILE = (322, 323)
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
#: Ground of a letterbox: the mean colour of CLIP's training images, so that the bars are close
#: to zero once the graph has normalised them.
LETTERBOX_RGB = (122, 116, 104)
#: Transparent pixels show this ground, as on a page.
ALPHA_GROUND = (255, 255, 255)


def image_key(data: bytes, fit: Fit) -> bytes:
    """16 bytes that stand for an image, by its file's contents or its pixels, and how it is fitted."""
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
        ImageError: the bytes are empty, no image, damaged, or would take too much memory or time.
    """
    if not data:
        raise ImageError("the image has no bytes")
    with _failures_named():
        return _upright_rgb(_opened(data))


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as `decode_image` gives the file that it is of: RGB, upright and opaque.

    Raises:
        ImageError: it is damaged, or too large.
    """
    with _failures_named():
        _check_size(image)
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
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsing met
        raise ImageError(f"{type(error).__name__}: {stable_message(error)}") from error


def _opened(data: bytes) -> Image.Image:
    """An image file whose pixels have not been decoded yet, and may be."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"the bytes are no image of {', '.join(FORMATS)} (first 8: {data[:8]!r})") from error
    _check_size(image)
    _check_work(image, data)
    return image


def _check_size(image: Image.Image) -> None:
    if min(image.size) < 1 or max(image.size) > LONGEST_SIDE:
        width, height = image.size
        raise ImageError(f"the image has {width:,} x {height:,} pixels; a side may have 1 to {LONGEST_SIDE:,}")
    most, pixels = Image.MAX_IMAGE_PIXELS, math.prod(image.size)
    if most and pixels > most:  # of a file, Pillow has looked at that
        raise ImageError(f"the image has {pixels:,} pixels; it may have {most:,}")


def _check_work(image: Image.Image, data: bytes) -> None:
    """Refuse what costs far more than its pixels: Pillow's limit looks at the size of the picture alone."""
    most = Image.MAX_IMAGE_PIXELS or math.inf
    pixels = math.prod(image.size)
    if image.format in {"JPEG", "MPO"}:
        scans = _jpeg_scans(data)
        if scans * pixels > MOST_SCANS * most:
            raise ImageError(f"the JPEG has {scans:,} scans of {pixels:,} pixels, which would take minutes")
    if image.format == "TIFF":
        tile = [getattr(image, "tag_v2", {}).get(tag) or side for tag, side in zip(_TILE, image.size, strict=True)]
        decoded = math.prod(math.ceil(side / of_tile) * of_tile for side, of_tile in zip(image.size, tile, strict=True))
        if decoded > 2 * most:
            raise ImageError(f"the TIFF has tiles of {tile[0]:,} x {tile[1]:,} for {pixels:,} pixels")


def _jpeg_scans(data: bytes) -> int:
    """Count the scans of a JPEG's first picture; there may be others, and any bytes, behind it."""
    at, scans = 2, 0
    while (marker := _JPEG_MARKER.search(data, at)) and marker[0] != _END:
        scans += marker[0] == _SCAN
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    return scans


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = _turn(image)
    image = _to_rgb(image)  # lets go of the original, which may be as large
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright."""
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
        return _TURNS.get(orientation)
    except Exception:  # the picture is whole, whatever the notes beside it are
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image).convert("RGB")
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
    low, high = float(samples.min()), float(samples.max())
    most = 255 if image.mode == "F" else 65535
    if not 0 <= low <= high <= most:  # nor where one is NaN
        raise ImageError(f"the image has samples from {low:g} to {high:g}; shades go from 0 to {most}")
    if image.mode == "F":
        shades = np.multiply(samples, 255 if high <= 1 else 1, dtype=np.float32)
        return Image.fromarray(shades.round(out=shades).astype(np.uint8))
    shades = (samples >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a shade of all 16 bits, as PNG has it
        shades[samples == transparent] = ALPHA_GROUND[0]
    return Image.fromarray(shades)
