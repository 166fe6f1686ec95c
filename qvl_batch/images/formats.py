"""Opens image files of the accepted formats: parses headers; Pillow decodes the pixels when the image is loaded.

What enters: encoded bytes, unchecked. What leaves: a Pillow image whose size and decoding work are within limits, or an
`ImageError`, which tells bytes of no accepted format from a damaged file.
"""

import io
import re
from collections.abc import Callable
from typing import Any

from PIL import (
    AvifImagePlugin,  # noqa: F401  (each makes its format known to Pillow)
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    IcoImagePlugin,  # noqa: F401
    Image,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    WebPImagePlugin,  # noqa: F401
)

from qvl_batch.config import ImageRules
from qvl_batch.errors import ImageError, stable_message
from qvl_batch.images.arrays import is_npy, of_npy, picture_of
from qvl_batch.images.limits import check_pixels, check_size, check_work
from qvl_batch.images.png import cleaned
from qvl_batch.images.tiff import deep_picture

HEIF = "HEIF"
#: Formats that are tried. Pillow knows 43, among them some that start other programs (EPS: Ghostscript), some that
#: accept any bytes (TGA), and many that are unmaintained.
FORMATS = ("AVIF", "BMP", "GIF", HEIF, "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
#: Brands of HEIF files whose pictures are HEVC, as phones save them (.heic), or can be.
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
#: Offset of a PNG's bit depth: after signature, chunk header, width and height.
_PNG_DEPTH = 24
_16_BITS = 16


def opened(data: bytes, rules: ImageRules) -> Image.Image:
    """Open an image file; its pixels are not decoded yet, except those of a TIFF that Pillow cannot read.

    Raises:
        ImageError: the file is none of `FORMATS` and no array, damaged, or would take too much memory or time.
    """
    if is_npy(data):
        return picture_of(of_npy(data), rules.max_pixels)
    kinds = [kind for kind in FORMATS if _begins_like(kind, data[:16])]
    if not kinds:
        raise ImageError(f"the bytes are no image of {', '.join(FORMATS)} or NPY (first 8: {data[:8]!r})")
    for number, kind in enumerate(kinds, 1):
        try:
            image = _opened_as(kind, data, rules)
        except Image.DecompressionBombError as error:
            raise pillow_limit_error(kind, error, rules.max_pixels) from error
        except ImageError:
            raise
        except Exception as error:  # Pillow's plugins raise errors of any type
            if number == len(kinds):
                reason = f"{type(error).__name__}: {stable_message(error)}"
                raise ImageError(f"the bytes begin like {kinds[0]} and are damaged: {reason}") from error
        else:
            check_size(image.size, rules.max_pixels)
            check_work(image, data, rules.max_pixels)
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # else `load` checks Pillow's own limit again
                image.im = Image.new(image.mode, image._tile_size).im  # noqa: SLF001
            return image
    raise AssertionError


def has_16_bit_samples(image: Image.Image, data: bytes) -> bool:
    """Whether the file has 16-bit samples, whatever Pillow has reduced them to."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _16_BITS in image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, ())
    return image.format == "PNG" and data[_PNG_DEPTH] == _16_BITS


def _begins_like(kind: str, first: bytes) -> bool:
    if kind == HEIF:
        return first[4:8] == b"ftyp" and first[8:12] in _HEIF_BRANDS
    accept = Image.OPEN[kind][1]
    return accept is not None and accept(first) is True


def _opened_as(kind: str, data: bytes, rules: ImageRules) -> Image.Image:
    """Call the format's own reader: `Image.open` does not say why it rejects a file, and has its own pixel limit."""
    if kind == HEIF:
        return _heif_reader()(io.BytesIO(data))
    if kind == "TIFF" and (deep := deep_picture(data, rules.max_pixels)):
        return deep
    reader = Image.OPEN[kind][0]
    if kind != "PNG":
        return reader(io.BytesIO(data), "")
    try:
        return reader(io.BytesIO(cleaned(data, damaged_pixels=rules.allow_truncated)), "")
    except ImageError:
        raise
    except Exception:  # an ancillary chunk is broken; the pixels are shown without
        return reader(io.BytesIO(cleaned(data, damaged_pixels=rules.allow_truncated, ancillary=False)), "")


def _heif_reader() -> Callable[[io.BytesIO], Image.Image]:
    try:
        from pillow_heif import HeifImageFile  # noqa: PLC0415  (an optional dependency that most jobs do not need)
    except ImportError as error:
        raise ImageError("the image is a HEIC or HEIF: `pip install '.[heif]'` where images are decoded") from error
    reader: Any = HeifImageFile
    return reader  # type: ignore[no-any-return]


def pillow_limit_error(kind: str | None, error: Image.DecompressionBombError, max_pixels: int) -> ImageError:
    """The error for an image that exceeds Pillow's own limit.

    Some of Pillow's readers check it: twice `Image.MAX_IMAGE_PIXELS`, for every caller in the process.
    """
    pixels, limit = (int(number) for number in re.findall(r"\d+", str(error))[:2])
    try:
        check_pixels(pixels, max_pixels)
    except ImageError as ours:
        return ours
    return ImageError(f"the {kind} has {pixels:,} pixels; Pillow reads at most {limit:,}")
