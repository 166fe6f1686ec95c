"""What is whole of an image file that its decoder did not get to the end of.

What enters: a file's bytes. What leaves: its picture, and which of its pixels are missing. No decoder says how far it
came, so such a file is decoded twice, onto grounds of two colours and, a JPEG, with two different endings: what
differs is missing. Pillow's own switch for such files is one for a whole process, and is left alone.
"""

from contextlib import suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.config import ImageRules
from qvl_batch.errors import ImageError, stable_message
from qvl_batch.images.bit_depth import look_at_range
from qvl_batch.images.formats import has_deep_samples, of_pillows_limit, opened
from qvl_batch.images.limits import START_OF_SCAN, check_size, jpeg_segments

#: Their decoders write row by row into the picture, and say where data ends too soon.
_ROW_BY_ROW = {"BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF"}
_JPEG = {"JPEG", "MPO"}
#: A JPEG's last bits are taken once others follow; what is made of these looks different.
_ENDINGS = (b"\0" * 16, b"\xaa" * 16)
_END_OF_JPEG = b"\xff\xd9"
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_FRAMES = {0xC0, 0xC1, 0xC3, 0xC5, 0xC7, 0xC9, 0xCB, 0xCD, 0xCF} | _PROGRESSIVE
#: Bytes that say what is in a scan of one component.
_SHORTEST_SCAN = 6
#: Rows that are compared at a time.
_ROWS = 256

#: In the `info` of a picture, where it lacks pixels: which, bool (H, W).
MISSING = "missing pixels"


def decoded(data: bytes, rules: ImageRules) -> Image.Image:
    """The picture of an image file; it may lack pixels if the rules allow it.

    Raises:
        ImageError: it cannot be opened, or what must be there is not.
    """
    image = opened(data, rules)
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise of_pillows_limit(image.format, error, rules.max_pixels) from error
    except Exception as error:  # Pillow's plugins raise whatever their decoding met
        kind, what = image.format or "image", f"{type(error).__name__}: {stable_message(error)}"
        del image
        rest = _rest(data, kind, what, rules) if kind in _ROW_BY_ROW else None
        if rest is None:
            raise ImageError(f"the {kind} is damaged: {what}") from error
        return rest
    check_size(image.size, rules.max_pixels)  # a picture in an icon may be larger than the icon says
    if has_deep_samples(image, data):
        look_at_range(image)
    return image


def _rest(data: bytes, kind: str, what: str, rules: ImageRules) -> Image.Image | None:
    """What there is of a picture, None if nothing is, `what` being what its decoder said.

    Raises:
        ImageError: it lacks pixels, and may not.
    """
    scans = _Scans(data) if kind in _JPEG else None
    end = _END_OF_JPEG if scans and scans.are_collected else b""
    data = data.removesuffix(b"\xff") if scans else data
    endings = [ending + end for ending in _ENDINGS] if scans else [b"", b""]
    first, second = (_on_ground(opened(data + ending, rules), 255 * place) for place, ending in enumerate(endings))
    if first is None or second is None or first.size != second.size:
        return None
    missing = _difference(first, second)
    # Of a PNG whose pixels were all read, the decoder says that they are not what was written.
    if not missing.any() and kind != "PNG" and (scans is None or scans.are_all):
        return first
    is_coarse = bool(end)  # one scan after the other makes all of it finer, once there is a first
    if missing.all() or (scans and is_coarse and scans.count == 1):
        return None
    if not rules.allow_truncated:
        lack = "detail" if is_coarse else f"{int(missing.sum()):,} of {missing.size:,} pixels"
        raise ImageError(f"the {kind} is damaged and lacks {lack}: {what}; --allow-truncated shows the rest")
    if is_coarse:
        image = opened(data + end, rules)
        image.load()
        return image
    first.info[MISSING] = missing
    return first


def _on_ground(image: Image.Image, ground: int) -> Image.Image | None:
    """An image as far as it can be decoded, onto a ground; None if it has no pixels at all."""
    prepare = image.load_prepare  # type: ignore[attr-defined]

    def paint() -> None:
        prepare()
        ink = (ground,) * image.im.bands if image.im.bands > 1 else ground
        for tile in image.tile:  # type: ignore[attr-defined]
            image.im.paste(ink, tile.extents)

    image.load_prepare = paint  # type: ignore[attr-defined]
    with suppress(Exception):  # the same as before
        image.load()
    try:
        image.tile = []  # type: ignore[attr-defined]  # there is nothing more to load
        image._size = image.im.size  # noqa: SLF001  (of a TIFF that is not upright yet)
        image.load()
    except Exception:  # there are no pixels, or no palette that they are of
        return None
    return image


def _difference(first: Image.Image, second: Image.Image) -> NDArray[np.bool_]:
    """Which pixels differ, a few rows at a time."""
    width, height = first.size
    found = np.zeros((height, width), np.bool_)
    for start in range(0, height, _ROWS):
        box = (0, start, width, min(start + _ROWS, height))
        differs = np.asarray(first.crop(box)) != np.asarray(second.crop(box))
        found[start : box[3]] = differs.any(axis=-1) if differs.ndim > 2 else differs  # noqa: PLR2004
    return found


class _Scans:
    """What a JPEG's scans bring: the decoder of several collects them all before it shows anything."""

    def __init__(self, data: bytes) -> None:
        self.count = 0
        self._components: frozenset[int] = frozenset()
        self._exact: set[tuple[int, int]] = set()
        self.are_collected = False
        for marker, contents in jpeg_segments(data):
            if marker in _FRAMES and not self._components:
                self._components = frozenset(contents[6::3])  # behind precision, sides, and how many there are
                self.are_collected = marker in _PROGRESSIVE
            elif marker == START_OF_SCAN and len(contents) >= _SHORTEST_SCAN:
                self._add(contents)

    def _add(self, contents: bytes) -> None:
        number = contents[0]
        components = contents[1 : 1 + 2 * number : 2]
        first, last, bits = contents[-3:]
        self.count += 1
        self.are_collected |= number < len(self._components)
        if bits & 15 == 0:  # down to the last bit
            self._exact |= {(component, place) for component in components for place in range(first, last + 1)}

    @property
    def are_all(self) -> bool:
        """Every coefficient of every component is there to its last bit."""
        return self._exact >= {(component, place) for component in self._components for place in range(64)}
