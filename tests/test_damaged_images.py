"""Of a damaged image file, what is whole is shown, and what lacks pixels is an error that says how many.

With `allow_truncated` it is shown too, and what is missing has the colour of a letterbox's bars.
"""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import image_file, png_of
from PIL import Image, ImageFile
from tiffs import tiff

from qvl_batch.config import ImageRules
from qvl_batch.errors import ImageError
from qvl_batch.images.pixels import LETTERBOX_RGB, decode_image

SHOWN = ImageRules(allow_truncated=True)
_SHADES = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
PICTURE = Image.fromarray(_SHADES).resize((200, 160), Image.Resampling.BICUBIC)


def _picture_file(kind, image=PICTURE, **options):
    return image_file(image, kind, **options)


FILES = {
    "jpeg": _picture_file("JPEG", quality=90),
    "jpeg 4:4:4": _picture_file("JPEG", quality=95, subsampling=0),
    "jpeg with restarts": _picture_file("JPEG", restart_marker_blocks=3),
    "progressive jpeg": _picture_file("JPEG", progressive=True),
    "grey jpeg": _picture_file("JPEG", PICTURE.convert("L")),
    "cmyk jpeg": _picture_file("JPEG", PICTURE.convert("CMYK")),
    "png": _picture_file("PNG"),
    "png palette": _picture_file("PNG", PICTURE.quantize(64)),
    "png alpha": _picture_file("PNG", PICTURE.convert("RGBA")),
    "gif": _picture_file("GIF", PICTURE.quantize(64)),
    "bmp": _picture_file("BMP"),
    "ppm": _picture_file("PPM"),
    "tiff": tiff(np.asarray(PICTURE), rows=16, ahead=500),
    "deflated tiff": tiff(np.asarray(PICTURE), rows=16, ahead=500, compression=8),
    "two-coloured tiff": tiff(np.asarray(PICTURE.convert("1"), np.uint8)[..., None], photometric=1, bits=1, ahead=300),
}
#: Bytes at a file's end that hold no pixels: marks, checksums and tags.
BEHIND = {"png": 12 + 4 + 4, "gif": 2, "jpeg": 2}


def _behind(name):
    return max((count for kind, count in BEHIND.items() if kind in name), default=0)


def _pixels(image):
    return np.asarray(image, np.int16)


@pytest.mark.parametrize("name", [name for name in FILES if _behind(name)])
def test_a_file_that_lacks_its_end_mark_alone_is_whole(name):
    whole = decode_image(FILES[name])
    for lacking in range(1, _behind(name) + 1):
        assert np.array_equal(decode_image(FILES[name][:-lacking]), whole), lacking


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_file_shows_what_it_has_if_that_is_allowed(name, share):
    cut, whole = FILES[name][: int(len(FILES[name]) * share)], _pixels(decode_image(FILES[name]))
    with pytest.raises(
        ImageError, match=r"is damaged and lacks (detail|[\d,]+ of 32,000 pixels): .*; --allow-truncated"
    ):
        decode_image(cut)
    shown = _pixels(decode_image(cut, SHOWN))
    missing = (shown == LETTERBOX_RGB).all(axis=-1)
    if name == "progressive jpeg":
        assert not missing.any()
        assert np.abs(shown - whole).mean() < 8
        return
    assert 0.3 * (1 - share) < missing.mean() < 1 - share + 0.2
    assert np.abs(shown - whole)[~missing].max() <= (3 if "jpeg" in name else 0)


@pytest.mark.parametrize("name", FILES)
def test_what_is_whole_is_the_same_whatever_is_allowed(name):
    for behind in (b"", b"\0" * 100, b"any"):
        data = FILES[name] + behind
        assert np.array_equal(decode_image(data), decode_image(data, SHOWN))


@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg 4:4:4", "jpeg with restarts", "grey jpeg", "cmyk jpeg", "progressive jpeg"]
)
def test_no_jpeg_that_lacks_a_bit_of_its_pixels_is_taken_for_whole(name):
    data = FILES[name]
    whole = decode_image(data)
    taken = []
    for lacking in range(3, 60):
        try:
            taken.append(decode_image(data[:-lacking]))
        except ImageError:
            continue
    # The last byte may hold nothing but bits that fill it up.
    assert len(taken) <= 1
    assert all(np.array_equal(image, whole) for image in taken)


def test_a_progressive_jpeg_without_its_first_scan_or_last_ones_is_not_whole():
    data = FILES["progressive jpeg"]
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    with pytest.raises(ImageError, match="the JPEG is damaged: OSError"):
        decode_image(data[: scans[1] - 20], SHOWN)
    for start in scans[1:]:  # a scan is whole, others do not follow
        place = data.rindex(b"\xff\xc4", 0, start) if b"\xff\xc4" in data[:start] else start
        with pytest.raises(ImageError, match="the JPEG is damaged"):
            decode_image(data[:place])


def test_a_cut_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (_picture_file("JPEG", exif=exif), tiff(np.asarray(PICTURE), rows=16, ahead=500, t274=6)):
        shown = _pixels(decode_image(data[: len(data) // 2], SHOWN))
        missing = (shown == LETTERBOX_RGB).all(axis=-1)
        assert shown.shape == (200, 160, 3)
        assert missing[:, 0].all()  # its lower rows, which are the left columns
        assert not missing[:, -1].any()


def _chunks(data):
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length], at
        at += length + 12


@pytest.mark.parametrize(
    "kind", [b"tEXt", b"iTXt", b"zTXt", b"tIME", b"pHYs", b"gAMA", b"iCCP", b"eXIf", b"tRNS", b"abCd"]
)
@pytest.mark.parametrize("place", [1, -1])
def test_a_png_with_a_wrong_checksum_beside_its_pixels_is_whole(kind, place):
    chunks = [(name, contents, 0) for name, contents, _ in _chunks(FILES["png"])]
    chunks.insert(place, (kind, b"any\0contents", 1))
    assert np.array_equal(decode_image(png_of(*chunks)), PICTURE)


@pytest.mark.parametrize("name", ["png", "png palette"])
def test_a_png_with_a_wrong_checksum_over_its_pixels_is_whole_if_zlibs_is_right(name):
    chunks = [(kind, contents, kind == b"IDAT") for kind, contents, _ in _chunks(FILES[name])]
    assert np.array_equal(decode_image(png_of(*chunks)), decode_image(FILES[name]))


def test_a_png_with_other_pixels_than_were_written_is_not_whole():
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(PICTURE))
    stored = bytearray(zlib.compress(rows, 0))
    stored[50_000] ^= 255
    header = (b"IHDR", struct.pack(">IIBBBBB", *PICTURE.size, 8, 2, 0, 0, 0), 0)
    for wrong in (0, 1):
        data = png_of(header, (b"IDAT", bytes(stored), wrong), (b"IEND", b"", 0))
        with pytest.raises(ImageError, match=r"the PNG is damaged.*--allow-truncated shows"):
            decode_image(data)
        differs = (_pixels(decode_image(data, SHOWN)) != _pixels(PICTURE)).any(axis=-1)
        assert differs[:-1].sum() == 1  # the last row is not handed over
    broken = zlib.compress(rows)
    broken = broken[:30_000] + bytes(100) + broken[30_100:]
    data = png_of(header, (b"IDAT", broken, 1), (b"IEND", b"", 0))
    with pytest.raises(ImageError, match="its pixels do not match their checksum"):
        decode_image(data)
    shown = _pixels(decode_image(data, SHOWN))
    same = (shown == _pixels(PICTURE)).all(axis=-1)
    assert same[:20].all()
    assert (shown[-1] == LETTERBOX_RGB).all()


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE"])
def test_a_png_whose_header_or_palette_is_damaged_is_refused(kind):
    chunks = [(name, contents, name == kind) for name, contents, _ in _chunks(FILES["png palette"])]
    for rules in (ImageRules(), SHOWN):
        with pytest.raises(ImageError, match=f"the PNG is damaged: its {kind.decode()} does not match its checksum"):
            decode_image(png_of(*chunks), rules)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF", "JPEG2000", "ICO"])
def test_formats_that_are_decoded_at_once_show_nothing_where_they_are_cut(kind):
    data = _picture_file(kind)
    for rules in (ImageRules(), SHOWN):
        with pytest.raises(ImageError, match=f"the {kind} is damaged|begin like {kind} and are damaged"):
            decode_image(data[: len(data) // 2], rules)


def test_a_damaged_file_says_what_it_is_and_other_bytes_that_they_are_none():
    with pytest.raises(ImageError, match="begin like PNG and are damaged"):
        decode_image(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ImageError, match=r"no image of AVIF, .*\(first 8: b'any byte'\)"):
        decode_image(b"any bytes")


def test_threads_do_not_share_what_is_allowed():
    cut = {name: data[: len(data) // 2] for name, data in FILES.items()}

    def ask(number):
        name = list(cut)[number % len(cut)]
        if number % 2:
            return name, _pixels(decode_image(cut[name], SHOWN))
        with pytest.raises(ImageError):
            decode_image(cut[name])
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        return name, None

    alone = {name: _pixels(decode_image(data, SHOWN)) for name, data in cut.items()}
    with ThreadPoolExecutor(4) as pool:
        for name, pixels in pool.map(ask, range(8 * len(cut) + 1)):
            assert pixels is None or np.array_equal(pixels, alone[name])
