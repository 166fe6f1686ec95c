"""A PNG with what its pixels depend on and nothing else.

What enters: bytes that begin like a PNG. What leaves: a PNG of the chunks that pixels are made of, in one piece, whole
to its end mark. Chunks of text, and others whose checksum is wrong, lose nothing but themselves; a checksum that is
wrong over pixels is looked into, as zlib's own says whether they are whole.
"""

import struct
import zlib
from collections.abc import Iterator

from qvl_batch.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER, _PALETTE, _PIXELS, _END = b"IHDR", b"PLTE", b"IDAT", b"IEND"
#: What colours depend on, and which side is up.
_NOTES = {b"tRNS", b"iCCP", b"eXIf"}
#: Texts that may say which side is up: XMP, and EXIF as ImageMagick writes it.
_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")
_PIECE = 1 << 20


def cleaned(data: bytes, *, damaged_pixels: bool, notes: bool = True) -> bytes:
    """The PNG with chunks that are needed.

    Args:
        data: a PNG.
        damaged_pixels: take pixels that are not what was written.
        notes: with what stands beside the pixels, of which transparency is always taken.

    Raises:
        ImageError: header, palette or pixels are not what was written.
    """
    kept, pixels, pixels_are_right = [], [], True
    for kind, contents, is_right in _chunks(data):
        if kind == _PIXELS:
            pixels.append(contents)
            pixels_are_right &= is_right
        elif kind in {_HEADER, _PALETTE}:
            if not is_right:
                raise ImageError(f"the PNG is damaged: its {kind.decode()} does not match its checksum")
            kept.append((kind, contents))
        elif is_right and (kind == b"tRNS" or (notes and (kind in _NOTES or contents.startswith(_TEXTS)))):
            kept.append((kind, contents))
    joined = b"".join(pixels)
    if not pixels_are_right and not damaged_pixels and not _inflates(joined):
        raise ImageError(
            "the PNG is damaged: its pixels do not match their checksum; --allow-truncated shows what there is"
        )
    return SIGNATURE + b"".join(_chunk(*each) for each in (*kept, (_PIXELS, joined), (_END, b"")))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Kind and contents of each chunk, and whether they match its checksum, which a cut one does not lack alone."""
    at, view = len(SIGNATURE), memoryview(data)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        stop = at + 8 + length
        if kind == _END or not kind.isalpha():
            return
        checksum = data[stop : stop + 4]
        is_cut = len(checksum) < 4  # noqa: PLR2004
        is_right = kind == _PIXELS if is_cut else zlib.crc32(view[at + 4 : stop]) == int.from_bytes(checksum)
        yield kind, data[at + 8 : stop], is_right
        at = stop + 4


def _chunk(kind: bytes, contents: bytes) -> bytes:
    return (
        struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(contents, zlib.crc32(kind)))
    )


def _inflates(compressed: bytes) -> bool:
    """Whether zlib's checksum over what was compressed is right; in little memory, whatever that is."""
    stream = zlib.decompressobj()
    try:
        while compressed and not stream.eof:
            stream.decompress(compressed, _PIECE)
            compressed = stream.unconsumed_tail
    except zlib.error:
        return False
    return stream.eof
