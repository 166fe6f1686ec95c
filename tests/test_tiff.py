"""A TIFF shows the colours that its samples stand for, however they are stored, or is refused: never others."""

import itertools
import logging

import numpy as np
import pytest
from image_files import image_file, png
from PIL import Image
from tiffs import DEFLATE, tiff

from qvl_batch.config import ImageRules
from qvl_batch.errors import ImageError
from qvl_batch.images import bit_depth
from qvl_batch.images.pixels import decode_image

HEIGHT, WIDTH = 20, 33
#: Photometric interpretation, samples, and what those beyond colours are: 1 and 2 alpha, 0 nothing.
COLOURS = {
    "grey": (1, 1, ()),
    "white is zero": (0, 1, ()),
    "grey, alpha": (1, 2, (2,)),
    "white is zero, alpha": (0, 2, (2,)),
    "grey, another": (1, 2, (0,)),
    "rgb": (2, 3, ()),
    "rgb, alpha": (2, 4, (2,)),
    "rgb times alpha": (2, 4, (1,)),
    "rgb, another": (2, 4, (0,)),
    "cmyk": (5, 4, ()),
}
#: How samples are stored: bits, kind, the largest in the files made here, and which one is the lightest shade.
STORED = {
    np.dtype("u1"): [(1, 1, 1, 1), (2, 1, 3, 3), (4, 1, 15, 15), (8, 1, 255, 255)],
    np.dtype("i1"): [(8, 2, 127, 255)],
    np.dtype("u2"): [(12, 1, 4095, 4095), (16, 1, 65535, 65535)],
    np.dtype("i2"): [(16, 2, 32767, 65535)],
    np.dtype("u4"): [(32, 1, 65535, 65535)],
    np.dtype("i4"): [(32, 2, 65535, 65535)],
    np.dtype("f2"): [(16, 3, 1, 1)],
    np.dtype("f4"): [(32, 3, 1, 1), (32, 3, 255, 255)],
    np.dtype("f8"): [(64, 3, 1, 1)],
}
KINDS = [(dtype, *kind) for dtype, kinds in STORED.items() for kind in kinds]


def _samples(dtype, count, most, extra):
    rng = np.random.default_rng(0)
    shades = rng.random((HEIGHT, WIDTH, count)) * most
    if extra == (1,):
        shades[..., :3] *= shades[..., 3:] / most
    return shades.astype(dtype) if dtype.kind == "f" else shades.round().astype(dtype)


def _colours(samples, photometric, extra, lightest):
    shades = samples.astype(np.float64) / lightest * 255
    if photometric == 5:
        return (255 - shades[..., :3]) * (255 - shades[..., 3:]) / 255
    if photometric == 0:
        shades[..., 0] = 255 - shades[..., 0]
    colours = shades[..., :3] if photometric == 2 else shades[..., :1].repeat(3, axis=-1)
    alpha = shades[..., -1:] / 255
    if extra in {(1,), (2,)}:
        return (colours if extra == (1,) else colours * alpha) + 255 * (1 - alpha)
    return colours


def _ways(bits, kind, count):
    """Everything else that may differ between files of the same samples."""
    for order, planar, tile in itertools.product("<>", (False, True) if count > 1 else (False,), (None, 16)):
        predictors = [2] if kind != 3 and bits in {8, 16, 32} else [3] if kind == 3 else []
        for compression, predictor in ((1, 1), (DEFLATE, 1), *((DEFLATE, each) for each in predictors)):
            rows = None if tile else 7
            yield {
                "order": order,
                "planar": planar,
                "tile": tile,
                "rows": rows,
                "compression": compression,
                "predictor": predictor,
            }


@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize("stored", KINDS, ids=lambda stored: f"{stored[0].name}-{stored[1]}-{stored[3]}")
def test_samples_of_any_width_order_and_place_give_their_colours(stored, colours):
    (dtype, bits, kind, most, lightest), (photometric, count, extra) = stored, COLOURS[colours]
    samples = _samples(dtype, count, most, extra)
    expected = _colours(samples, photometric, extra, lightest)
    for way in _ways(bits, kind, count):
        data = tiff(samples, photometric=photometric, bits=bits, kind=kind, extra=extra, **way)
        # Premultiplied colours of 8 bits are divided by alpha and multiplied by it again.
        assert np.abs(np.asarray(decode_image(data)) - expected).max() <= 3, way


@pytest.mark.parametrize(("dtype", "kind"), [("i1", 2), ("i2", 2), ("i4", 2), ("f2", 3), ("f4", 3), ("f8", 3)])
@pytest.mark.parametrize("photometric", [0, 1])
def test_samples_below_zero_are_no_shades(dtype, kind, photometric):
    samples = np.array([[[-1], [0], [1]]], dtype)
    with pytest.raises(ImageError, match="the image has samples from -1 to 1"):
        decode_image(tiff(samples, kind=kind, photometric=photometric))


@pytest.mark.parametrize("planar", [False, True])
def test_samples_that_are_no_numbers_are_no_shades(planar):
    samples = np.full((2, 2, 3), 0.5, np.float32)
    samples[1, 1, 2] = np.nan
    with pytest.raises(ImageError, match="the image has samples from"):
        decode_image(tiff(samples, kind=3, planar=planar))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_pillow_cannot_read_is_turned_upright_too(orientation):
    shown = np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40
    eight, sixteen = (
        decode_image(tiff(samples, photometric=0, t274=orientation))
        for samples in (shown, shown.astype(np.uint16) * 257)
    )
    assert eight.size == sixteen.size == ((2, 3) if orientation >= 5 else (3, 2))
    assert np.array_equal(eight, sixteen)


def test_bits_may_be_filled_from_the_other_end():
    samples = np.arange(0, 65536, 65535 // 8, dtype=np.uint16).reshape(1, -1, 1)
    plain = tiff(samples, photometric=1)
    reversed_bits = bytes(int(f"{byte:08b}"[::-1], 2) for byte in plain[8 : 8 + samples.nbytes])
    data = plain[:8] + reversed_bits + tiff(samples, photometric=1, t266=2)[8 + samples.nbytes :]
    assert np.array_equal(decode_image(data), decode_image(plain))


def test_a_big_tiff_is_read_as_a_small_one():
    samples = np.array([[[0], [25_600], [65_535]]], np.uint16)
    data = image_file(Image.fromarray(samples[..., 0]), "TIFF", big_tiff=True)
    assert data[2] == 43
    assert [pixel[0] for pixel in np.asarray(decode_image(data))[0]] == [0, 100, 255]


def test_deep_samples_are_held_to_the_limits_too():
    samples = np.zeros((100, 100, 4), np.float64)
    data = tiff(samples, kind=3, compression=DEFLATE)
    with pytest.raises(ImageError, match=r"has 10,000 pixels; the limit is 9,999 \(--max-image-pixels\)"):
        decode_image(data, ImageRules(max_pixels=9_999))
    with pytest.raises(ImageError, match="100 x 100 pixels of 4 samples of 64 bits; at most 10,000 pixels of 8 bytes"):
        decode_image(data, ImageRules(max_pixels=10_000))
    assert decode_image(data, ImageRules(max_pixels=40_000)).size == (100, 100)
    tile = tiff(np.zeros((16, 16, 1), np.uint16), photometric=1, tile=16)
    with pytest.raises(ImageError, match="16 x 16 pixels of 1 samples"):
        decode_image(_other_tile(tile, 60_000))


def _other_tile(data, side):
    for tag in (322, 323):
        data = data.replace(
            tag.to_bytes(2, "little") + b"\3\0\1\0\0\0\x10\0",
            tag.to_bytes(2, "little") + b"\3\0\1\0\0\0" + side.to_bytes(2, "little"),
        )
    return data


@pytest.mark.parametrize("cut", [1, 50, 600])
@pytest.mark.parametrize("compression", [1, DEFLATE])
@pytest.mark.parametrize("planar", [False, True])
def test_deep_samples_of_a_file_that_is_cut_are_refused(cut, compression, planar):
    samples = np.random.default_rng(0).integers(0, 65536, (20, 33, 2), np.uint16)
    data = tiff(samples, photometric=0, compression=compression, planar=planar, rows=6, ahead=500)
    assert decode_image(data).size == (33, 20)
    with pytest.raises(ImageError, match="begin like TIFF and are damaged"):
        decode_image(data[:-cut])


@pytest.fixture
def _not_said_yet():
    # It is logged once per process, maybe in an earlier test.
    bit_depth.warn_of_12_bits.cache_clear()
    yield
    bit_depth.warn_of_12_bits.cache_clear()


@pytest.mark.usefixtures("_not_said_yet")
def test_twelve_bits_in_samples_of_sixteen_are_named_in_the_log_once(caplog):
    dark = np.array([[[0], [2_000], [4_095]]], np.uint16)
    with caplog.at_level(logging.WARNING):
        decode_image(tiff(dark * 16, photometric=1))
        decode_image(tiff(dark, photometric=1, bits=12))
        assert not caplog.records
        for photometric in (1, 0, 1):
            decode_image(tiff(dark, photometric=photometric))
    (record,) = caplog.records
    assert "16-bit samples are all below 4,096" in record.getMessage()


@pytest.mark.usefixtures("_not_said_yet")
@pytest.mark.parametrize("kind", ["tiff", "planar tiff", "png", "png alpha"])
def test_colours_of_twelve_bits_in_samples_of_sixteen_are_named_too(kind, caplog):
    for scale in (16, 1):
        colours = np.array([[[0, 0, 0], [0, 4_095, 0]]], np.uint16) * scale
        if "tiff" in kind:
            data = tiff(colours, planar=kind == "planar tiff")
        else:
            alpha = np.full((1, 2, 1), 65535, np.uint16)
            samples = np.concatenate([colours, alpha], axis=2) if kind == "png alpha" else colours
            data = png(2, 1, 16, 6 if kind == "png alpha" else 2, b"\0" + samples.astype(">u2").tobytes())
        assert decode_image(data).getpixel((1, 0)) == (0, 255 if scale == 16 else 15, 0)
        assert len(caplog.records) == (scale == 1)
