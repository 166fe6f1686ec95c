"""Image files of the accepted formats, opened: what is in them is known, pixels are decoded when they are loaded.

What enters: encoded bytes that nobody may have checked. What leaves: an image as Pillow has it, whose size and work
are within limits, or an `ImageError` that tells bytes of no such format from a file of one that is damaged.
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
from qvl_batch.images.limits import check_pixels, check_size, check_work
from qvl_batch.images.png import cleaned
from qvl_batch.images.tiff import deep_picture

HEIF = "HEIF"
#: All that is tried. Pillow knows 43, among them some that start other programs (EPS: Ghostscript), that take
#: any bytes for theirs (TGA), and many that nobody looks after.
FORMATS = ("AVIF", "BMP", "GIF", HEIF, "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
#: Kinds of HEIF whose pictures are HEVC, as phones save them (.heic), or may be.
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
#: Where a PNG has the bits of its samples: behind signature, chunk's head, and sides.
_PNG_DEPTH, _DEEP = 24, 16


def opened(data: bytes, rules: ImageRules) -> Image.Image:
    """An image file whose pixels have not been decoded yet, and may be; a TIFF that Pillow cannot read is, already.

    Raises:
        ImageError: it is none of `FORMATS`, damaged, or would take too much memory or time.
    """
    kinds = [kind for kind in FORMATS if _begins_like(kind, data[:16])]
    if not kinds:
        raise ImageError(f"the bytes are no image of {', '.join(FORMATS)} (first 8: {data[:8]!r})")
    for number, kind in enumerate(kinds, 1):
        try:
            image = _opened_as(kind, data, rules)
        except Image.DecompressionBombError as error:
            raise of_pillows_limit(kind, error, rules.max_pixels) from error
        except ImageError:
            raise
        except Exception as error:  # Pillow's plugins raise whatever their parsing met
            if number == len(kinds):
                what = f"{type(error).__name__}: {stable_message(error)}"
                raise ImageError(f"the bytes begin like {kinds[0]} and are damaged: {what}") from error
        else:
            check_size(image.size, rules.max_pixels)
            check_work(image, data, rules.max_pixels)
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # else it asks for Pillow's limit again
                image.im = Image.new(image.mode, image._tile_size).im  # noqa: SLF001
            return image
    raise AssertionError


def has_deep_samples(image: Image.Image, data: bytes) -> bool:
    """Whether samples of 16 bits are in the file, whatever is in the picture of it."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _DEEP in image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, ())
    return image.format == "PNG" and data[_PNG_DEPTH] == _DEEP


def _begins_like(kind: str, first: bytes) -> bool:
    if kind == HEIF:
        return first[4:8] == b"ftyp" and first[8:12] in _HEIF_BRANDS
    accept = Image.OPEN[kind][1]
    return accept is not None and accept(first) is True


def _opened_as(kind: str, data: bytes, rules: ImageRules) -> Image.Image:
    """By the format's own reader: `Image.open` tells nobody why it did not take a file, and has a limit of its own."""
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
    except Exception:  # of what stands beside the pixels, which then have to do without
        return reader(io.BytesIO(cleaned(data, damaged_pixels=rules.allow_truncated, notes=False)), "")


def _heif_reader() -> Callable[[io.BytesIO], Image.Image]:
    try:
        from pillow_heif import HeifImageFile  # noqa: PLC0415  (an extra, and most images are none)
    except ImportError as error:
        raise ImageError("the image is a HEIC or HEIF: `pip install '.[heif]'` where images are decoded") from error
    reader: Any = HeifImageFile
    return reader  # type: ignore[no-any-return]


def of_pillows_limit(kind: str | None, error: Image.DecompressionBombError, max_pixels: int) -> ImageError:
    """Some of Pillow's readers have its own limit, twice `Image.MAX_IMAGE_PIXELS`, for every caller in a process."""
    found = re.findall(r"\d+", str(error))
    try:
        check_pixels(int(found[0]), max_pixels)
    except ImageError as ours:
        return ours
    return ImageError(f"the {kind} has {int(found[0]):,} pixels; Pillow reads those of {int(found[1]):,} at most")
