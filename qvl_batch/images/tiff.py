"""Decodes TIFFs whose samples Pillow misreads or does not know: deep, planar, signed, floats, white as zero.

What enters: a TIFF's bytes. What leaves: a picture of 8 bits a sample; None for a TIFF that is left to Pillow, since
Pillow reads it correctly or it cannot be read here either; or an `ImageError`.

libtiff decompresses strips and tiles: the file is given tags that describe its rows as 8-bit grey. Sample format, byte
order and predictor are applied here. This works for lossless compressions only. Tags and their values are those of
TIFF 6.0; predictor 3 is that of Adobe's TIFF Technical Note 3.
"""

import io
import math
import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from qvl_batch.errors import ImageError
from qvl_batch.images.bit_depth import MAX_SAMPLE, to_8_bits
from qvl_batch.images.limits import check_size

#: Lossless compressions: none, LZW, deflate (two numbers), PackBits, LZMA, zstd.
_LOSSLESS = {1, 5, 8, 32946, 32773, 34925, 50000}
#: Most bytes of a picture's samples for each pixel that it can have (`max_pixels`).
_BYTES = 8
#: Most samples of a pixel.
_MOST_SAMPLES = 8
#: Version number of a BigTIFF, whose header is longer; in its third or fourth byte, depending on byte order.
_BIG_TIFF = 43
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 317, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT, PROFILE = 338, 339, 34675
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK = 0, 1, 2, 5
_COLOURS: Final = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, CMYK: 4}
_BYTE = 8
#: Bits of the deepest colours that Pillow reads.
_PILLOW_BITS = 16
#: Pillow modes, grey and RGB, of the two kinds of alpha that `EXTRA_SAMPLES` names: premultiplied and not.
_ALPHA: Final = {1: ("La", "RGBa"), 2: ("LA", "RGBA")}


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """How a TIFF stores its samples.

    Args:
        width, height: pixels.
        samples: of a pixel, extra samples included.
        bits: of a sample.
        format: NumPy's kind of a sample: `u`, `i` or `f`; empty if unknown.
        photometric: what the colours are, one of `_COLOURS`.
        is_planar: whether each sample has a plane of its own.
        predictor: 1 none, 2 horizontal differences, 3 floating point.
        extra: the tag `EXTRA_SAMPLES`.
        order: byte order, `<` or `>`.
        tile: width and height of a tile, None if the file has strips.
    """

    width: int
    height: int
    samples: int
    bits: int
    format: str
    photometric: int
    is_planar: bool
    predictor: int
    extra: tuple[int, ...]
    order: str
    tile: tuple[int, int] | None

    @classmethod
    def of(cls, tags: ImageFileDirectory_v2) -> "SampleLayout | None":
        """The layout that the tags describe; None if its samples differ in type, or it is not supported here."""
        width, height, photometric = tags[WIDTH], tags[HEIGHT], tags.get(PHOTOMETRIC, 0)
        if tags.get(COMPRESSION, 1) not in _LOSSLESS or photometric not in _COLOURS:
            return None
        bits, formats = set(tags.get(BITS, (1,))), set(tags.get(SAMPLE_FORMAT, (1,)))
        samples, extra = tags.get(SAMPLES, 1), tuple(tags.get(EXTRA_SAMPLES, ()))
        tile = (tags[TILE_WIDTH], tags[TILE_HEIGHT]) if TILES in tags else None
        numbers = (width, height, samples, *(tile or ()))
        if len(bits) > 1 or len(formats) > 1 or not all(isinstance(each, int) and each > 0 for each in numbers):
            return None
        if not _COLOURS[photometric] <= samples <= _MOST_SAMPLES:
            return None
        return cls(
            width=width,
            height=height,
            samples=samples,
            bits=bits.pop(),
            format={1: "u", 2: "i", 3: "f"}.get(formats.pop(), ""),
            photometric=photometric,
            is_planar=tags.get(PLANAR, 1) == 2 and samples > 1,  # noqa: PLR2004
            predictor=tags.get(PREDICTOR, 1),
            extra=extra,
            order="<" if tags.prefix == b"II" else ">",
            tile=tile,
        )

    @property
    def is_ours(self) -> bool:
        """Whether Pillow misreads these samples or cannot read them, and this module can."""
        kinds = {"u": (1, 2, 4, 8, 12, 16, 32), "i": (8, 16, 32), "f": (16, 32, 64)}
        predictors = {1, *([2] if self.bits % _BYTE == 0 else []), *([3] if self.format == "f" else [])}
        if self.bits not in kinds.get(self.format, ()) or self.predictor not in predictors:
            return False
        if self.format != "u" or self.is_planar:
            return True
        if self.bits == _PILLOW_BITS:
            return self.photometric in {WHITE_IS_ZERO, BLACK_IS_ZERO} or self.alpha == 1
        if self.bits == _BYTE:
            return self.photometric == WHITE_IS_ZERO and self.samples > 1
        return self.bits > _BYTE or self.samples > 1

    @property
    def alpha(self) -> int:
        """0 without alpha, 1 with alpha and premultiplied colours, 2 with alpha and colours that are not."""
        if not self.extra:  # the fourth sample of RGB counts as alpha, though no tag says so
            return 2 if self.photometric == RGB and self.samples > _COLOURS[RGB] else 0
        return self.extra[0] if self.extra[0] in _ALPHA and self.photometric != CMYK else 0

    @property
    def padded(self) -> tuple[int, int]:
        """Width and height rounded up to whole tiles."""
        if not self.tile:
            return self.width, self.height
        return -(-self.width // self.tile[0]) * self.tile[0], -(-self.height // self.tile[1]) * self.tile[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a stored sample; if several samples share a byte, of the unpacked one."""
        return np.dtype(f"{self.order}{self.format}{1 if self.bits <= _BYTE else max(self.bits, 16) // 8}")


def deep_picture(data: bytes, max_pixels: int) -> Image.Image | None:
    """Decode a TIFF that Pillow does not read correctly.

    Args:
        data: the file.
        max_pixels: most pixels.

    Returns:
        The picture, 8 bits a sample, with orientation and ICC profile; None for any other TIFF.

    Raises:
        ImageError: the TIFF is too large, or its samples are outside the range that `to_8_bits` scales.
        Exception: strips or tiles are damaged; of any type, from Pillow or NumPy.
    """
    try:
        tags = _tags(data)
        layout = SampleLayout.of(tags)
    except Exception:  # tags are missing or of odd types; Pillow's own error will say which
        return None
    if layout is None or not layout.is_ours:
        return None
    check_size((layout.width, layout.height), max_pixels)
    if math.prod(layout.padded) * layout.samples * layout.dtype.itemsize > _BYTES * max_pixels:
        raise ImageError(
            f"the TIFF has {layout.width:,} x {layout.height:,} pixels of {layout.samples} samples of {layout.bits} "
            f"bits; at most {max_pixels:,} pixels of {_BYTES} bytes are read (--max-image-pixels)"
        )
    parts = [_part(data, tags, layout, plane) for plane in range(layout.samples if layout.is_planar else 1)]
    picture = _picture(to_8_bits(parts, min(layout.bits, 16)), layout)
    picture.getexif()[ORIENTATION] = tags.get(ORIENTATION, 1)
    if PROFILE in tags:
        picture.info["icc_profile"] = tags[PROFILE]
    return picture


def _tags(data: bytes) -> ImageFileDirectory_v2:
    """Tags of the first picture."""
    tags = ImageFileDirectory_v2(data[: 16 if _BIG_TIFF in data[2:4] else 8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _part(data: bytes, tags: ImageFileDirectory_v2, layout: SampleLayout, plane: int) -> NDArray[Any]:
    """Samples (H, W, S) of one plane, or of the whole file if its samples are interleaved."""
    interleaved = 1 if layout.is_planar else layout.samples
    offset_tag, size_tag = (TILES, TILE_BYTES) if layout.tile else (STRIPS, STRIP_BYTES)
    offsets, sizes = tags[offset_tag], tags.get(size_tag, ())  # uncompressed files can lack sizes
    per_plane = len(offsets) // (layout.samples if layout.is_planar else 1)
    kept = slice(plane * per_plane, (plane + 1) * per_plane)
    row_bytes = -(-layout.padded[0] * interleaved * layout.bits // 8)
    bytewise = {
        WIDTH: row_bytes, HEIGHT: layout.height, BITS: 8, COMPRESSION: tags.get(COMPRESSION, 1), SAMPLES: 1,
        PHOTOMETRIC: BLACK_IS_ZERO, FILL_ORDER: tags.get(FILL_ORDER, 1), offset_tag: offsets[kept],
    }  # fmt: skip
    if sizes:
        bytewise |= {size_tag: sizes[kept]}
    if layout.tile:
        bytewise |= {TILE_WIDTH: layout.tile[0] * interleaved * layout.bits // 8, TILE_HEIGHT: layout.tile[1]}
    else:
        bytewise |= {ROWS_PER_STRIP: min(tags.get(ROWS_PER_STRIP, layout.height), layout.height)}
    rows = _decompressed(_with_tags(data, layout.order, bytewise), row_bytes, layout.height)
    return _samples(rows, layout, interleaved)


def _with_tags(data: bytes, order: str, tags: dict[int, Any]) -> bytes:
    """Put a new header with `tags` before the file, whose own bytes follow unchanged; offsets in `tags` are shifted.

    The end of the file stays the end of the data, so that a file that was cut is still cut.
    """
    values_at = 8 + 2 + 12 * len(tags) + 4
    shift = values_at + 4 * sum(len(value) for value in tags.values() if isinstance(value, tuple) and len(value) > 1)
    entries, values = b"", b""
    for tag, value in sorted(tags.items()):
        numbers = value if isinstance(value, tuple) else (value,)
        if tag in {STRIPS, TILES}:
            numbers = tuple(number + shift for number in numbers)
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, values = struct.pack(f"{order}I", values_at + len(values)), values + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    return b"".join((head, entries, bytes(4), values, data))


def _decompressed(data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Rows of bytes (H, W), which libtiff reads as an 8-bit grey image."""
    with TiffImageFile(io.BytesIO(data)) as file:
        file.im = Image.new("L", (width, height)).im  # else Pillow counts the bytes as pixels and checks its own limit
        file.load()
        return np.asarray(file)


def _samples(rows: NDArray[np.uint8], layout: SampleLayout, interleaved: int) -> NDArray[Any]:
    """Samples (H, W, S) of rows of bytes, without those of tiles that are beyond the picture's right edge."""
    if layout.bits % _BYTE:
        unpacked = _twelve_bits(rows) if layout.bits > _BYTE else _few_bits(rows, layout.bits)
        samples = unpacked[:, : layout.padded[0] * interleaved]
    elif layout.predictor == 1:
        samples = rows.view(layout.dtype)
    else:
        across = layout.padded[0] // layout.tile[0] if layout.tile else 1
        samples = _unpredicted(rows.reshape(layout.height * across, -1), layout, interleaved)
    return samples.reshape(layout.height, -1, interleaved)[:, : layout.width]


def _few_bits(rows: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unpack bytes of several samples, the first in the highest bits."""
    shifts = np.arange(_BYTE - bits, -1, -bits, dtype=np.uint8)
    samples: NDArray[np.uint8] = rows[..., None] >> shifts & np.uint8(MAX_SAMPLE[bits])
    return samples.reshape(len(rows), -1)


def _twelve_bits(rows: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Unpack two samples from every three bytes."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 3))).reshape(len(rows), -1, 3).astype(np.uint16)
    first, middle, last = (padded[:, :, index] for index in range(3))
    return np.stack([first << 4 | middle >> 4, (middle & 15) << 8 | last], axis=-1).reshape(len(rows), -1)


def _unpredicted(rows: NDArray[np.uint8], layout: SampleLayout, interleaved: int) -> NDArray[Any]:
    """Undo the predictor: rows of strips or tiles, stored as differences from the pixel before, to samples (N, W, S).

    Predictor 2 stores differences of integers of the samples' width. Predictor 3 stores differences of bytes, after it
    has moved the highest bytes of all samples of a row to the front, then the second highest, and so on.
    """
    size = layout.dtype.itemsize
    if layout.predictor == 2:  # noqa: PLR2004
        stored, own = np.dtype(f"{layout.order}u{size}"), np.dtype(f"u{size}")
        sums = np.add.accumulate(rows.view(stored).reshape(len(rows), -1, interleaved), axis=1, dtype=own)
        return sums.view(layout.dtype.newbyteorder("="))
    planes = np.add.accumulate(rows.reshape(len(rows), -1, interleaved), axis=1, dtype=np.uint8)
    samples = np.ascontiguousarray(planes.reshape(len(rows), size, -1).transpose(0, 2, 1))
    return samples.view(f">f{size}").reshape(len(rows), -1, interleaved)


def _picture(parts: list[NDArray[np.uint8]], layout: SampleLayout) -> Image.Image:
    """The planes, or interleaved samples, as a Pillow image; extra samples other than alpha are dropped."""
    bands = [part[..., index] for part in parts for index in range(part.shape[-1])]
    if layout.photometric == WHITE_IS_ZERO:
        bands[0] = ~bands[0]
    colours = bands[: _COLOURS[layout.photometric]]
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[len(colours)]
    if layout.alpha:
        mode = _ALPHA[layout.alpha][mode == "RGB"]
        colours = bands[: len(colours) + 1]
    return Image.frombytes(mode, (layout.width, layout.height), np.stack(colours, axis=-1).tobytes())
