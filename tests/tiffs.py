"""TIFFs of samples that are known, whatever libtiff and Pillow think of such files."""

import itertools
import struct
import zlib

import numpy as np

DEFLATE = 8
#: Offsets and sizes of strips and tiles, which are longs.
PLACES = (273, 279, 324, 325)


def tiff(
    samples,
    *,
    photometric=2,
    bits=None,
    kind=1,
    order="<",
    planar=False,
    compression=1,
    predictor=1,
    extra=(),
    tile=None,
    rows=None,
    ahead=0,
    **more,
):
    """A TIFF of samples (H, W, S), stored with so many bits: unsigned (kind 1), signed (2) or floats (3)."""
    height, width, count = samples.shape
    bits = bits or samples.dtype.itemsize * 8
    planes = [samples[..., place : place + 1] for place in range(count)] if planar else [samples]
    blocks = [_packed(block, bits, order, predictor) for plane in planes for block in _blocks(plane, tile, rows)]
    blocks = [zlib.compress(block) if compression == DEFLATE else block for block in blocks]
    places, sizes = tuple(itertools.accumulate([8 + ahead, *map(len, blocks)]))[:-1], tuple(map(len, blocks))
    tags = {256: width, 257: height, 258: (bits,) * count, 259: compression, 262: photometric, 277: count}
    tags |= {284: 2 if planar else 1, 317: predictor, 339: (kind,) * count}
    tags |= {322: tile, 323: tile, 324: places, 325: sizes} if tile else {273: places, 278: rows or height, 279: sizes}
    tags |= {338: extra} if extra else {}
    tags |= {int(name[1:]): value for name, value in more.items()}
    return _file(tags, b"".join(blocks), order, ahead)


def _blocks(plane, tile, rows):
    height, width, _ = plane.shape
    if not tile:
        yield from (plane[y : y + (rows or height)] for y in range(0, height, rows or height))
        return
    for y, x in itertools.product(range(0, height, tile), range(0, width, tile)):
        part = plane[y : y + tile, x : x + tile]
        yield np.pad(part, ((0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)))


def _packed(block, bits, order, predictor):
    if bits not in {8, 16, 32, 64}:
        places = np.arange(bits - 1, -1, -1)
        return np.packbits((block.reshape(len(block), -1, 1) >> places & 1).reshape(len(block), -1), axis=1).tobytes()
    if predictor == 3:
        size, count = block.dtype.itemsize, block.shape[2]
        parts = block.astype(block.dtype.newbyteorder(">")).reshape(len(block), -1).view(np.uint8)
        parts = parts.reshape(len(block), -1, size).transpose(0, 2, 1).reshape(len(block), -1)
        parts[:, count:] -= parts[:, :-count].copy()
        return parts.tobytes()
    if predictor == 2:
        block = np.concatenate([block[:, :1], block[:, 1:] - block[:, :-1]], axis=1)
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


def _file(tags, body, order, ahead=0):
    """The tags stand behind the body, or `ahead` of it by so many bytes that they fit."""
    body += bytes(len(body) % 2)
    at = 8 if ahead else 8 + len(body)
    entries, values, start = b"", b"", at + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        if isinstance(value, bytes):
            code, size, packed = 7, len(value), value
        else:
            numbers = value if isinstance(value, tuple) else (value,)
            code, size = (4 if tag in PLACES else 3), len(numbers)
            packed = struct.pack(f"{order}{size}{'I' if code == 4 else 'H'}", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack(f"{order}I", start + len(values)), values + packed + bytes(len(packed) % 2)
        entries += struct.pack(f"{order}HHI", tag, code, size) + packed.ljust(4, b"\0")
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return head + (directory.ljust(ahead, b"\0") + body if ahead else body + directory)
