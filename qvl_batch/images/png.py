"""Reduces a PNG to the chunks that its pixels depend on.

What enters: bytes that begin like a PNG. What leaves: a complete PNG of those chunks, with its pixel data in one chunk
and an end mark; or an `ImageError`. Text chunks are dropped, and so are ancillary chunks whose checksum is wrong. If
the checksum of a pixel chunk is wrong, zlib's own checksum decides whether the pixels are intact.
"""

import struct
import zlib
from collections.abc import Iterator

from qvl_batch.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER, _PALETTE, _PIXELS, _END = b"IHDR", b"PLTE", b"IDAT", b"IEND"
#: Ancillary chunks that colours or orientation depend on.
_ANCILLARY = {b"tRNS", b"iCCP", b"eXIf"}
#: Text chunks that can hold the orientation: XMP, and EXIF as ImageMagick writes it.
_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")
#: Bytes that zlib inflates at a time.
_PIECE = 1 << 20


def cleaned(data: bytes, *, damaged_pixels: bool, ancillary: bool = True) -> bytes:
    """The PNG with only the chunks that its pixels depend on.

    Args:
        data: a PNG.
        damaged_pixels: accept pixels that fail their checksums.
        ancillary: keep ancillary chunks; transparency (tRNS) is always kept.

    Raises:
        ImageError: header, palette or pixels fail their checksums.
    """
    kept, pixels, pixels_are_valid = [], [], True
    for kind, contents, is_valid in _chunks(data):
        if kind == _PIXELS:
            pixels.append(contents)
            pixels_are_valid &= is_valid
        elif kind in {_HEADER, _PALETTE}:
            if not is_valid:
                raise ImageError(f"the PNG is damaged: its {kind.decode()} does not match its checksum")
            kept.append((kind, contents))
        elif is_valid and (kind == b"tRNS" or (ancillary and (kind in _ANCILLARY or contents.startswith(_TEXTS)))):
            kept.append((kind, contents))
    joined = b"".join(pixels)
    if not pixels_are_valid and not damaged_pixels and not _inflates(joined):
        raise ImageError(
            "the PNG is damaged: its pixels do not match their checksum; --allow-truncated shows what there is"
        )
    return SIGNATURE + b"".join(_chunk(*each) for each in (*kept, (_PIXELS, joined), (_END, b"")))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Type and contents of each chunk, and whether they match its checksum.

    A chunk that is cut off has no checksum: it is invalid, except if it holds pixels, which a decoder then finds cut.
    """
    at, view = len(SIGNATURE), memoryview(data)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        stop = at + 8 + length
        if kind == _END or not kind.isalpha():
            return
        checksum = data[stop : stop + 4]
        is_cut = len(checksum) < 4  # noqa: PLR2004
        is_valid = kind == _PIXELS if is_cut else zlib.crc32(view[at + 4 : stop]) == int.from_bytes(checksum)
        yield kind, data[at + 8 : stop], is_valid
        at = stop + 4


def _chunk(kind: bytes, contents: bytes) -> bytes:
    return (
        struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(contents, zlib.crc32(kind)))
    )


def _inflates(compressed: bytes) -> bool:
    """Whether the data inflates to its end and matches zlib's checksum. Memory is bounded by `_PIECE`."""
    stream = zlib.decompressobj()
    try:
        while compressed and not stream.eof:
            stream.decompress(compressed, _PIECE)
            compressed = stream.unconsumed_tail
    except zlib.error:
        return False
    return stream.eof
