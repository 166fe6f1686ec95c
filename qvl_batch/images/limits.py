"""What an image file may cost: pixels, and work that is far more than its pixels.

Pillow's own limit warns at one size, refuses at twice that, and is one for all that runs in a process; this one is
exact and each caller's. Memory and time of any file follow from it.
"""

import math
import re
from collections.abc import Iterator

from PIL import Image

from qvl_batch.errors import ImageError

#: Pillow's resampling takes 32 bytes for each pixel of a side.
LONGEST_SIDE = 1_000_000
#: Scans of a JPEG of the most pixels, of a smaller one accordingly more; writers make about 10. A scan of 15 bytes
#: costs a pass over all pixels: a file of 220 kB took half a minute, and one of 10 MB takes a quarter of an hour.
MOST_SCANS = 50
START_OF_SCAN = 0xDA
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_END_OF_IMAGE = 0xD9
#: Tags of a TIFF: width and length of its tiles.
_TILE = (322, 323)


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a picture that is too large, or none.

    Raises:
        ImageError: it is; how large it may be.
    """
    width, height = size
    if min(size) < 1 or max(size) > LONGEST_SIDE:
        raise ImageError(f"the image has {width:,} x {height:,} pixels; a side may have 1 to {LONGEST_SIDE:,}")
    check_pixels(math.prod(size), max_pixels)


def check_pixels(pixels: int, max_pixels: int) -> None:
    """Refuse a picture of too many pixels.

    Raises:
        ImageError: it is; how many it may have.
    """
    if pixels > max_pixels:
        raise ImageError(f"the image has {pixels:,} pixels; it may have {max_pixels:,} (--max-image-pixels)")


def check_work(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse what costs far more than its pixels.

    Raises:
        ImageError: a JPEG has too many scans, a TIFF too large tiles.
    """
    pixels = math.prod(image.size)
    if image.format in {"JPEG", "MPO"}:
        scans = sum(marker == START_OF_SCAN for marker, _ in jpeg_segments(data))
        if scans * pixels > MOST_SCANS * max_pixels:
            raise ImageError(f"the JPEG has {scans:,} scans of {pixels:,} pixels, which would take minutes")
    if image.format == "TIFF":
        tile = [getattr(image, "tag_v2", {}).get(tag) or side for tag, side in zip(_TILE, image.size, strict=True)]
        decoded = math.prod(math.ceil(side / of_tile) * of_tile for side, of_tile in zip(image.size, tile, strict=True))
        if decoded > 2 * max_pixels:
            raise ImageError(f"the TIFF has tiles of {tile[0]:,} x {tile[1]:,} for {pixels:,} pixels")


def jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and contents of each segment of a JPEG's first picture; there may be others, and any bytes, behind it."""
    at = 2
    while (marker := _JPEG_MARKER.search(data, at)) and marker[1][0] != _END_OF_IMAGE:
        start, length = marker.end(), int.from_bytes(data[marker.end() : marker.end() + 2])
        yield marker[1][0], data[start + 2 : start + length]
        at = start + length
