"""Image files in memory: as Pillow saves them, and PNGs chunk by chunk."""

import io
import struct
import zlib


def image_file(image, kind="PNG", **options):
    """An image saved by Pillow, as bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, depth, color, rows, *chunks):
    """A PNG of uncompressed rows, with more chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return png_of((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def png_of(*chunks):
    """A PNG of chunks, each as `png_chunk` takes them."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind, contents, wrong=0):
    """A chunk of a PNG; `wrong` is added to its checksum."""
    checksum = (zlib.crc32(kind + contents) + wrong) % 2**32
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", checksum)
