"""Decodes image files, damaged ones too: of those, the pixels that are intact, and a mask of the missing ones.

What enters: a file's bytes. What leaves: its picture, with the mask of missing pixels in its `info`; or an
`ImageError`. Decoders do not report how far they came, so a damaged file is decoded twice, onto backgrounds of two
colours and, if it is a JPEG, with two different endings: pixels that differ are missing. Pillow's own switch for
truncated files (`ImageFile.LOAD_TRUNCATED_IMAGES`) applies to the whole process, and is left alone.
"""

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.config import ImageRules
from qvl_batch.errors import ImageError, stable_message
from qvl_batch.images.bit_depth import warn_if_12_bits
from qvl_batch.images.formats import has_16_bit_samples, opened, pillow_limit_error
from qvl_batch.images.limits import START_OF_SCAN, check_size, jpeg_segments

#: Formats whose decoders write into the picture row by row, and raise where the data ends early.
_ROW_BY_ROW = {"BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF"}
_JPEG = {"JPEG", "MPO"}
#: Appended to a damaged JPEG: its last bits are decoded only if more follow, and these two decode to different pixels.
_ENDINGS = (b"\0" * 16, b"\xaa" * 16)
_END_OF_JPEG = b"\xff\xd9"
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_FRAMES = {0xC0, 0xC1, 0xC3, 0xC5, 0xC7, 0xC9, 0xCB, 0xCD, 0xCF} | _PROGRESSIVE
#: Bytes of the shortest scan header, that of one component.
_SHORTEST_SCAN = 6
#: Rows compared at a time.
_ROWS = 256

#: Key in the `info` of a picture that lacks pixels: its value, bool (H, W), is True where one is missing.
MISSING = "missing pixels"


def decoded(data: bytes, rules: ImageRules) -> Image.Image:
    """Decode an image file. The picture can lack pixels (`MISSING`) if the rules allow it.

    Raises:
        ImageError: the file cannot be opened, or is damaged beyond what the rules allow.
    """
    image = opened(data, rules)
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise pillow_limit_error(image.format, error, rules.max_pixels) from error
    except Exception as error:  # Pillow's plugins raise errors of any type
        kind, reason = image.format or "image", f"{type(error).__name__}: {stable_message(error)}"
        del image
        recovered = _recovered(data, kind, reason, rules) if kind in _ROW_BY_ROW else None
        if recovered is None:
            raise ImageError(f"the {kind} is damaged: {reason}") from error
        return recovered
    check_size(image.size, rules.max_pixels)  # a picture in an icon can be larger than the icon's header says
    if has_16_bit_samples(image, data):
        warn_if_12_bits(image)
    return image


def _recovered(data: bytes, kind: str, reason: str, rules: ImageRules) -> Image.Image | None:
    """The intact part of a damaged picture.

    Args:
        data: the file.
        kind: its format, one of `_ROW_BY_ROW`.
        reason: the decoder's error, for the message.
        rules: whether pixels can be missing.

    Returns:
        The picture, with `MISSING` in its `info` unless it is complete or merely coarse; None if nothing is recovered.

    Raises:
        ImageError: pixels or detail are missing, and the rules do not allow it.
    """
    scans = _Scans(data) if kind in _JPEG else None
    end = _END_OF_JPEG if scans and scans.are_multiple else b""
    data = data.removesuffix(b"\xff") if scans else data
    endings = [ending + end for ending in _ENDINGS] if scans else [b"", b""]
    first, second = (
        _on_background(opened(data + ending, rules), 255 * number) for number, ending in enumerate(endings)
    )
    if first is None or second is None or first.size != second.size:
        return None
    missing = _difference(first, second)
    # A PNG that lacks no pixel is damaged all the same: its decoder raised since the pixels fail their checksum.
    if not missing.any() and kind != "PNG" and (scans is None or scans.are_complete):
        return first
    is_coarse = bool(end)  # of several scans, the first covers the picture and later ones refine all of it
    if missing.all() or (scans and is_coarse and scans.count == 1):
        return None
    if not rules.allow_truncated:
        lack = "detail" if is_coarse else f"{int(missing.sum()):,} of {missing.size:,} pixels"
        raise ImageError(f"the {kind} is damaged and lacks {lack}: {reason}; --allow-truncated shows the rest")
    if is_coarse:
        image = opened(data + end, rules)
        image.load()
        return image
    first.info[MISSING] = missing
    return first


def _on_background(image: Image.Image, level: int) -> Image.Image | None:
    """Decode an image as far as possible onto a background of a level; None if that gives no picture at all."""
    prepare = image.load_prepare  # type: ignore[attr-defined]

    def paint() -> None:
        prepare()
        ink = (level,) * image.im.bands if image.im.bands > 1 else level
        for tile in image.tile:  # type: ignore[attr-defined]
            image.im.paste(ink, tile.extents)

    image.load_prepare = paint  # type: ignore[attr-defined]
    with suppress(Exception):  # the error that brought the caller here
        image.load()
    try:
        image.tile = []  # type: ignore[attr-defined]  # so that `load` decodes nothing more
        image._size = image.im.size  # noqa: SLF001  (a TIFF's size is already upright here, its pixels are not)
        image.load()
    except Exception:  # there are no pixels, or their palette is missing
        return None
    return image


def _difference(first: Image.Image, second: Image.Image) -> NDArray[np.bool_]:
    """Which pixels differ, a few rows at a time."""
    width, height = first.size
    mask = np.zeros((height, width), np.bool_)
    for start in range(0, height, _ROWS):
        box = (0, start, width, min(start + _ROWS, height))
        differs = np.asarray(first.crop(box)) != np.asarray(second.crop(box))
        mask[start : box[3]] = differs.any(axis=-1) if differs.ndim > 2 else differs  # noqa: PLR2004
    return mask


class _Scans:
    """The scans of a JPEG: how many, and whether together they hold the whole picture.

    `are_multiple` is libjpeg's `jpeg_has_multiple_scans`: the file is progressive, or its scans do not interleave all
    components. Its decoder then reads all scans before it returns a row.
    """

    def __init__(self, data: bytes) -> None:
        self.count = 0
        self._components: frozenset[int] = frozenset()
        #: Component and index of the coefficients that are complete.
        self._complete: set[tuple[int, int]] = set()
        self.are_multiple = False
        for marker, contents in jpeg_segments(data):
            if marker in _FRAMES and not self._components:
                self._components = frozenset(contents[6::3])  # after precision, height, width, number of components
                self.are_multiple = marker in _PROGRESSIVE
            elif marker == START_OF_SCAN and len(contents) >= _SHORTEST_SCAN:
                self._add(contents)

    def _add(self, contents: bytes) -> None:
        count = contents[0]
        components = contents[1 : 1 + 2 * count : 2]
        first, last, bits = contents[-3:]
        self.count += 1
        self.are_multiple |= count < len(self._components)
        if bits & 15 == 0:  # successive approximation has reached the last bit
            self._complete |= {(component, index) for component in components for index in range(first, last + 1)}

    @property
    def are_complete(self) -> bool:
        """Whether every coefficient of every component is there to its last bit."""
        return self._complete >= {(component, index) for component in self._components for index in range(64)}
