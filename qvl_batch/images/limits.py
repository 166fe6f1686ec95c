"""Limits on what an image file can cost: its pixels, and decoding work out of proportion to them.

What enters: sizes, opened images, bytes. What leaves: nothing, or an `ImageError`. Pillow's own limit warns at one
size, refuses at twice that, and is shared by the whole process; this one is exact, and every caller has its own. It
bounds memory and time of any file.
"""

import math
import re
from collections.abc import Iterator

from PIL import Image

from qvl_batch.errors import ImageError

#: Pixels of a side at most: Pillow's resampling allocates 32 bytes for each.
LONGEST_SIDE = 1_000_000
#: Most scans of a JPEG with `max_pixels` pixels; one with fewer pixels can have proportionally more. Encoders write
#: about 10. A scan of 15 bytes costs a pass over all pixels: a file of 220 kB took half a minute, and one of 10 MB
#: takes a quarter of an hour.
MOST_SCANS = 50
START_OF_SCAN = 0xDA
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_END_OF_IMAGE = 0xD9
#: TIFF tags: tile width and tile length.
_TILE = (322, 323)


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a picture that is too large or has no pixels.

    Args:
        size: width and height.
        max_pixels: most pixels.

    Raises:
        ImageError: a side or the number of pixels is out of bounds; the message names the limit.
    """
    width, height = size
    if min(size) < 1 or max(size) > LONGEST_SIDE:
        raise ImageError(f"the image has {width:,} x {height:,} pixels; a side can have 1 to {LONGEST_SIDE:,}")
    check_pixels(math.prod(size), max_pixels)


def check_pixels(pixels: int, max_pixels: int) -> None:
    """Refuse a picture of too many pixels.

    Raises:
        ImageError: it has more than `max_pixels`.
    """
    if pixels > max_pixels:
        raise ImageError(f"the image has {pixels:,} pixels; the limit is {max_pixels:,} (--max-image-pixels)")


def check_work(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse a file whose decoding costs far more than its pixels.

    Raises:
        ImageError: a JPEG has too many scans, or a TIFF's tiles are too large.
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
    """Marker and contents of each segment of a JPEG's first picture. Other pictures or any bytes can follow it."""
    at = 2
    while (marker := _JPEG_MARKER.search(data, at)) and marker[1][0] != _END_OF_IMAGE:
        start, length = marker.end(), int.from_bytes(data[marker.end() : marker.end() + 2])
        yield marker[1][0], data[start + 2 : start + length]
        at = start + length
