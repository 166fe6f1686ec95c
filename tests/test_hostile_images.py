"""No image file, whoever made it, ends a worker, holds it up or fills its memory: it is shown right, or refused."""

import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from fuzz import forget_peak, peak_memory
from image_files import image_file, png
from PIL import Image

from qvl_batch.config import ImageRules
from qvl_batch.errors import ImageError
from qvl_batch.images.formats import FORMATS
from qvl_batch.images.limits import LONGEST_SIDE
from qvl_batch.images.pixels import decode_image, seen_or_failure
from qvl_batch.images.view import View
from qvl_batch.schema import Failure


def _grey_png(*chunks):
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(GREY))
    return png(*GREY.size, 8, 0, rows, *chunks)


def _ifd(tags, data=b""):
    """A TIFF of one directory, of 16-bit or, where they do not fit, 32-bit numbers; OFFSET is where `data` begins."""
    entries = b""
    extra = b""
    start = 8 + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        values = value if isinstance(value, tuple) else (value,)
        values = tuple(start if each is OFFSET else each for each in values)
        kind, code = (3, "H") if max(values) < 1 << 16 and tag not in {273, 324} else (4, "I")
        packed = struct.pack(f"<{len(values)}{code}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack("<I", start + len(data) + len(extra)), extra + packed
        entries += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data + extra


OFFSET = object()


def _tiff(width, height, bits, photometric, data, **more):
    samples = len(bits) if isinstance(bits, tuple) else 1
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: OFFSET, 277: samples, 278: height}
    return _ifd(tags | {279: len(data)} | {int(tag[1:]): value for tag, value in more.items()}, data)


def _tiff_of_tiles(side):
    data = zlib.compress(bytes(10_000))
    return _tiff(16, 16, 8, 1, data, t259=8, t322=side, t323=side, t324=OFFSET, t325=len(data))


def _patched(data, mark, skip, code, *values):
    """A file with other numbers so many bytes behind a mark."""
    patched = bytearray(data)
    struct.pack_into(code, patched, data.index(mark) + skip, *values)
    return bytes(patched)


def _jpeg_of_empty_scans(scans, side):
    """A progressive JPEG whose scans have no data."""
    data = image_file(Image.new("L", (8, 8)), "JPEG", progressive=True)
    data = _patched(data, b"\xff\xc2", 5, ">HH", side, side)
    return data[:-2] + b"\xff\xda\0\x08\1\1\0\1\x3f\0" * scans + b"\xff\xd9"


def _ico(image):
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(image), 22) + image


def _webp(width, height):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = image_file(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return data.replace(data[24:30], size, 1)


LIMIT = "pixels; the limit is 89,478,485"
GREY = Image.linear_gradient("L").resize((40, 32))
SAVED = {kind: image_file(GREY.convert("1" if kind == "PPM" else "RGB"), kind) for kind in FORMATS}
SMALL_JP2 = image_file(GREY, "JPEG2000", no_jp2=True)
#: 200 MB of zeros.
BOMB = zlib.compress(bytes(200_000_000))
XMP = b"XML:com.adobe.xmp"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"

#: Small files that declare, or unpack to, gigabytes.
BOMBS = {
    "png": (lambda: png(60_000, 60_000, 8, 2, bytes(1000)), LIMIT),
    "bmp": (lambda: _patched(SAVED["BMP"], b"BM", 18, "<ii", 60_000, 60_000), LIMIT),
    "gif screen": (lambda: _patched(SAVED["GIF"], b"GIF8", 6, "<HH", 65_535, 65_535), LIMIT),
    "gif frame": (lambda: _patched(image_file(GREY, "GIF"), b",\0\0\0\0", 5, "<HH", 65_535, 65_535), LIMIT),
    "animated webp": (lambda: _webp(1 << 16, 1 << 15), LIMIT),
    "jpeg": (lambda: _patched(image_file(GREY, "JPEG"), b"\xff\xc0", 5, ">HH", 65_500, 65_500), LIMIT),
    "jpeg 2000": (lambda: _patched(SMALL_JP2, b"\xff\x51", 6, ">6I", 60_000, 60_000, 0, 0, 60_000, 60_000), LIMIT),
    "avif": (lambda: _patched(SAVED["AVIF"], b"ispe", 8, ">II", 30_000, 30_000), "begin like AVIF and are damaged"),
    "ppm": (lambda: b"P6\n60000 60000\n255\n" + bytes(100), LIMIT),
    "ico": (lambda: _ico(png(50_000, 50_000, 1, 0, bytes(100))), LIMIT),
    "tiff": (lambda: _tiff(60_000, 60_000, 8, 1, bytes(100)), LIMIT),
    "tiff of huge tiles": (lambda: _tiff_of_tiles(40_000), "tiles of 40,000 x 40,000"),
    "too long a side": (lambda: png(LONGEST_SIDE + 1, 1, 1, 0, bytes(LONGEST_SIDE)), "1,000,001 x 1 pixels"),
    "jpeg of many scans": (lambda: _jpeg_of_empty_scans(3000, 9400), "3,0.. scans"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_declares_gigabytes_is_refused_before_it_takes_them(name):
    make, message = BOMBS[name]
    data = make()
    assert len(data) < 400_000
    forget_peak()
    before = peak_memory()
    with pytest.raises(ImageError, match=message):
        decode_image(data)
    assert peak_memory() - before < 100_000_000


#: What is odd, and is shown as it would be without that.
ODD = {
    "png of a long text": lambda: _grey_png((b"zTXt", b"k\0\0" + BOMB)),
    "png of a long text that may be read": lambda: _grey_png((b"zTXt", b"Raw profile type exif\0\0" + BOMB)),
    "png of many texts": lambda: _grey_png(*[(b"iTXt", XMP + b"\0\1\0\0\0" + zlib.compress(bytes(10**6)))] * 200),
    "png of a long profile": lambda: _grey_png((b"iCCP", b"k\0\0" + BOMB)),
    "png of a short time": lambda: _grey_png((b"tIME", b"")),
    "tiff of 2,000 pages": lambda: image_file(
        GREY, "TIFF", save_all=True, append_images=[Image.new("1", (1, 1))] * 2000
    ),
    "tiff whose tags share a megabyte": lambda: _shared_block(1_000_000),
    "jpeg whose notes share a block": lambda: _with_exif(_shared_block(60_000)),
    "broken exif": lambda: _with_exif(b"II*\0\xff\xff\xff\xff"),
    "exif that is none": lambda: _with_exif(b"no notes at all"),
    "exif of a wrong type": lambda: _with_exif(_ifd({0x0112: 6}).replace(b"\x12\1\3\0\1", b"\x12\1\2\0\4")),
    "exif of no such orientation": lambda: _with_exif(_ifd({0x0112: 77})),
    "gif of 100,000 comments": lambda: _gif_with(b"\x21\xfe\1a\0" * 100_000),
    "gif of one long comment": lambda: _gif_with(b"\x21\xfe" + (b"\xff" + b"a" * 255) * 10_000 + b"\0"),
    "progressive jpeg": lambda: image_file(GREY, "JPEG", progressive=True, quality=100),
    "jpeg with a film behind it": lambda: image_file(GREY, "JPEG", quality=100) + b"\xff\xda\0\2" * 100_000,
    "jpeg with scans in its notes": lambda: _with_exif(b"\xff\xda" * 20_000),
}  # fmt: skip


def _shared_block(size):
    """A TIFF of 4,000 more tags, all of them the same block: read one by one, 4 GB."""
    data = bytearray(_tiff(40, 32, 8, 1, GREY.tobytes()))
    count = struct.unpack_from("<H", data, 8)[0]
    end = 10 + 12 * count
    block = len(data) + 12 * 4000
    entries = b"".join(struct.pack("<HHII", 40_000 + tag, 1, size, block) for tag in range(4000))
    data[end:end] = entries
    struct.pack_into("<H", data, 8, count + 4000)
    place = next(at for at in range(10, end, 12) if struct.unpack_from("<H", data, at)[0] == 273)
    struct.pack_into("<I", data, place + 8, struct.unpack_from("<I", data, place + 8)[0] + len(entries))
    return bytes(data) + bytes(size)


def _with_exif(exif):
    return image_file(GREY, "JPEG", quality=100, exif=b"Exif\0\0" + exif[:65_000])


def _gif_with(extensions):
    data = image_file(GREY, "GIF")
    place = data.index(b",\0\0\0\0")
    return data[:place] + extensions + data[place:]


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_beside_the_pixels_costs_neither_the_image_nor_memory(name):
    rules = ImageRules(max_pixels=2000)  # 50 scans of it are 78 of this picture
    data = ODD[name]()
    forget_peak()
    before = peak_memory()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        decoded = decode_image(data, rules)
    assert np.abs(np.asarray(decoded, np.int16) - np.asarray(GREY.convert("RGB"))).max() <= 2
    assert not warned
    assert peak_memory() - before < 50_000_000


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_in_half_or_overwritten_is_refused(kind):
    data = SAVED[kind]
    noise = np.random.default_rng(0).bytes(len(data))
    for damaged in (data[: len(data) // 2], data[:20], data[:5] + noise, noise):
        with pytest.raises(ImageError):
            decode_image(damaged)


def test_an_animation_cut_in_its_first_frame_is_refused():
    frames = [GREY.rotate(turn) for turn in (0, 90, 180)]
    for kind in ("GIF", "PNG", "WEBP"):
        data = image_file(frames[0], kind, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError):
            decode_image(data[: len(data) // 6])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html><img src='a.png'></html>", "no image of AVIF, BMP"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "no image of AVIF, BMP"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "no image of AVIF, BMP"),
        (image_file(GREY.convert("RGB"), "TGA"), "no image of AVIF, BMP"),
        (image_file(GREY.convert("RGB"), "ICNS"), "no image of AVIF, BMP"),
        (_patched(SAVED["GIF"], b"GIF8", 6, "<HH", 0, 0)[:13] + b";", "begin like GIF and are damaged"),
        (b"\0", "no image of AVIF, BMP"),
    ],
)
def test_what_is_no_image_is_refused_by_name(data, message):
    with pytest.raises(ImageError, match=message):
        decode_image(data)


def test_no_other_program_is_started(tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    with pytest.raises(ImageError, match="no image of AVIF"):
        decode_image(EPS)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (100_000, 3)])
def test_images_of_any_shape_are_fitted(size):
    seen = seen_or_failure(image_file(Image.new("L", size, 90), "PNG"), View.square(56))
    assert (seen.pixels == 90).all(axis=-1).any()
    assert (seen.size.width, seen.size.height) == size


def _sixteen(*shades):
    return b"".join(struct.pack(">H", shade) for shade in shades)


def _floats(*shades):
    return _tiff(len(shades), 1, 32, 1, struct.pack(f"<{len(shades)}f", *shades), t339=3)


def _integers(*shades):
    return _tiff(len(shades), 1, 32, 1, struct.pack(f"<{len(shades)}i", *shades), t339=2)


SHADES = [[0] * 3, [100] * 3, [255] * 3]
RED, PINK = [[255, 0, 0]], [[255, 127, 127]]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(3, 1, 16, 0, b"\0" + _sixteen(0, 25_600, 65_535)), SHADES),
        (png(1, 1, 16, 2, b"\0" + _sixteen(65_535, 0, 255)), RED),
        (png(1, 1, 16, 6, b"\0" + _sixteen(65_535, 0, 0, 0x8080)), PINK),
        (_tiff(3, 1, 16, 1, struct.pack("<3H", 0, 25_600, 65_535)), SHADES),
        (_tiff(1, 1, (16, 16, 16), 2, struct.pack("<3H", 65_535, 0, 255)), RED),
        (_integers(0, 25_600, 65_535), SHADES),
        (_floats(0, 100 / 255, 1), SHADES),
        (_floats(0, 100, 255), SHADES),
        (image_file(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), RED),
        (image_file(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"), [[255, 255, 255]]),
        (image_file(Image.new("RGB", (1, 1), "red").quantize(4), "PNG"), RED),
        (image_file(Image.new("RGB", (1, 1), "red").quantize(4), "BMP"), RED),
        (image_file(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), "ICO"), PINK),
        (image_file(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), "TIFF"), PINK),
        (png(1, 1, 8, 2, b"\0\xff\0\0", (b"tRNS", _sixteen(255, 0, 0))), [[255, 255, 255]]),
    ],
)
def test_samples_of_every_kind_give_the_colours_they_stand_for(data, expected):
    assert np.abs(np.asarray(decode_image(data), np.int16)[0] - expected).max() <= 1


def test_adobes_inverted_cmyk_is_the_right_way_up():
    data = image_file(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(np.asarray(decode_image(data), np.int16) - RED[0]).max() <= 2


@pytest.mark.parametrize(
    "data", [_floats(0, -1), _floats(0, 256), _floats(0, float("nan")), _integers(0, 65_536), _integers(0, -1)]
)
def test_measurements_are_not_taken_for_shades(data):
    with pytest.raises(ImageError, match="the image has samples from"):
        decode_image(data)


@pytest.mark.parametrize("alpha", [0, 1, 100, 254, 255])
def test_what_shows_through_is_as_bright_as_pillows_own_composite(alpha):
    image = GREY.convert("RGBA")
    image.putalpha(alpha)
    ground = Image.new("RGBA", image.size, "white")
    expected = np.asarray(Image.alpha_composite(ground, image).convert("RGB"), np.int16)
    assert np.abs(np.asarray(decode_image(image_file(image, "PNG"))) - expected).max() <= 1


#: Bytes of memory for each pixel: of the picture as Pillow has it, and of its RGB; no more to turn it.
@pytest.mark.parametrize(
    ("mode", "kind", "most"),
    [("RGB", "PNG", 9), ("RGBA", "PNG", 9), ("LA", "PNG", 9), ("P", "PNG", 10), ("CMYK", "TIFF", 9), ("L", "JPEG", 9),
     ("I;16", "PNG", 9), ("I", "TIFF", 18), ("F", "TIFF", 18), ("RGBA", "WEBP", 17)],
)  # fmt: skip
def test_memory_is_bounded_by_the_pixels(mode, kind, most):
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {"lossless": True} if kind == "WEBP" else {}
    if mode == "P":
        options["transparency"] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    data = image_file(Image.new(mode, (3000, 3000)), kind, exif=exif, **options)
    decode_image(SAVED[kind])
    forget_peak()
    before = peak_memory()
    decode_image(data)
    assert peak_memory() - before < most * 3000 * 3000


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("mode", ["1", "LA", "P", "I;16", "CMYK", "F"])
def test_an_image_of_any_mode_is_turned_upright(mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new(mode, (5, 4))
    kind = "TIFF" if mode in {"CMYK", "F"} else "PNG"
    assert decode_image(image_file(image, kind, exif=exif)).size == ((5, 4) if orientation == 3 else (4, 5))


HANGS = """
import pyarrow as pa
from qvl_batch.pipeline import prepare
from qvl_batch.columns import FAILURE, IMAGES
from qvl_batch.images.view import View
prepare.SECONDS = 0.5
prepare.seen_or_failure = lambda *_: sum(range(10**15))
table = pa.table({IMAGES: [[b"x"]], **dict.fromkeys(FAILURE, pa.nulls(1, pa.string()))})
prepare.prepare(table, View.square(1, "crop"))
"""


def test_an_image_that_holds_its_process_up_ends_it():
    # In C, under the interpreter's lock, as a decoder may; what ends its process becomes an error row.
    command = [sys.executable, "-c", HANGS]
    held_up = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (held_up.returncode, held_up.stderr) == (1, "")


def test_a_picture_in_an_icon_is_held_to_the_limit_whatever_the_icon_says():
    data = _ico(png(100, 100, 8, 0, bytes(101 * 100)))
    assert decode_image(data, ImageRules(max_pixels=10_000)).size == (100, 100)
    with pytest.raises(ImageError, match="has 10,000 pixels; the limit is 9,999"):
        decode_image(data, ImageRules(max_pixels=9_999))


def test_a_photo_of_a_phone_whose_file_says_that_it_is_small_takes_no_memory():
    data = image_file(Image.new("RGB", (6000, 6000), "red"), "HEIF", quality=10)
    data = _patched(data, b"ispe", 8, ">II", 16, 16)
    forget_peak()
    before = peak_memory()
    with pytest.raises(ImageError, match="the HEIF is damaged"):
        decode_image(data)
    assert peak_memory() - before < 10_000_000


def test_an_image_without_pixels_is_refused(monkeypatch):
    monkeypatch.setattr("qvl_batch.images.damage.opened", lambda *_: Image.new("RGB", (0, 5)))
    failure = seen_or_failure(b"any", View.square(56))
    assert isinstance(failure, Failure)
    assert failure.message == "the image has 0 x 5 pixels; a side can have 1 to 1,000,000"
