"""Colours are those that the embedded profile means, in sRGB; without one, or with a broken one, as they are."""

import io
import struct

import numpy as np
import pytest
from image_files import image_file, png_chunk
from PIL import Image, ImageCms
from profiles import ADOBE, PROPHOTO, cmyk_profile, grey_profile, rgb_profile
from tiffs import tiff

from qvl_batch.images.colour import LARGEST_PROFILE
from qvl_batch.images.pixels import decode_image, upright_rgb

#: X, Y, Z for D50 of linear sRGB.
TO_SRGB = np.linalg.inv(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)  # fmt: skip
COLOURS = np.array(
    [[[0, 0, 0], [255, 255, 255], [128, 128, 128], [70, 60, 200], [200, 60, 50], [40, 90, 60]]], np.uint8
)


def _profiled(image, kind, profile, **options):
    return image_file(image, kind, icc_profile=profile, **options)


def _curved(linear):
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def _srgb(colours, columns, gamma):
    """From the definitions: a curve, the columns, sRGB's columns, its curve."""
    return _curved((colours / 255) ** gamma @ np.array(columns) @ TO_SRGB.T)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize(("columns", "gamma"), [(ADOBE, 2.19921875), (PROPHOTO, 1.80078125)])
def test_colours_of_a_wider_space_are_converted(kind, columns, gamma):
    colours = COLOURS.repeat(16, axis=0).repeat(16, axis=1)
    options = {
        "JPEG": {"quality": 100, "subsampling": 0},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    }
    data = _profiled(Image.fromarray(colours), kind, rgb_profile(columns, gamma), **options.get(kind, {}))
    shown = np.asarray(decode_image(data), float)[8, 8::16]
    expected = _srgb(COLOURS[0], columns, gamma)
    assert np.abs(expected - COLOURS[0]).max() > 10
    assert np.abs(shown - expected).max() <= (2 if kind in {"PNG", "TIFF", "WEBP"} else 6)
    assert np.array_equal(upright_rgb(Image.open(io.BytesIO(data))), decode_image(data))


def test_a_blue_of_prophoto_is_blue():
    data = _profiled(Image.new("RGB", (1, 1), (86, 68, 233)), "PNG", rgb_profile(PROPHOTO, 1.8))
    red, _, blue = decode_image(data).getpixel((0, 0))
    assert red < 20
    assert blue > 200


@pytest.mark.parametrize("profile", [SRGB, None, b"no profile", SRGB[:200], bytes(1000)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_without_another_space_every_sample_stays_as_it_is(kind, profile):
    samples = np.random.default_rng(0).integers(0, 256, (60, 70, 3), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_image(_profiled(Image.fromarray(samples), kind, profile, **options)), samples)


@pytest.mark.parametrize(
    ("mode", "profile"),
    [("RGB", grey_profile(1.0)), ("L", rgb_profile(ADOBE, 2.2)), ("RGB", cmyk_profile((255, 128, 128), (0, 128, 128)))],
)
def test_a_profile_of_other_colours_than_the_images_is_passed_over(mode, profile):
    image = Image.linear_gradient("L").resize((40, 32)).convert(mode)
    assert np.array_equal(decode_image(_profiled(image, "TIFF", profile)), image.convert("RGB"))


def test_shades_are_converted_by_their_curve():
    image = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    shown = np.asarray(decode_image(_profiled(image, "PNG", grey_profile(1.0))), float)[0]
    assert np.abs(shown - _curved(np.arange(256) / 255)[:, None]).max() <= 2


@pytest.mark.parametrize("photometric", [0, 1])
def test_shades_of_sixteen_bits_are_converted_too(photometric):
    samples = np.arange(256, dtype=np.uint16)[None, :, None] * 257
    profile = grey_profile(1.0)
    shown = np.asarray(decode_image(tiff(samples, photometric=photometric, t34675=profile)), float)[0]
    shades = np.arange(256) if photometric else np.arange(255, -1, -1)
    assert np.abs(shown - _curved(shades / 255)[:, None]).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_shows_through_shows_as_much_of_the_ground_as_before(mode):
    profile = grey_profile(1.0) if mode == "LA" else rgb_profile(ADOBE, 2.19921875)
    colour = (128,) * 3 if mode == "LA" else (40, 160, 60)
    expected = _curved(np.array([128] * 3) / 255) if mode == "LA" else _srgb(np.array(colour), ADOBE, 2.19921875)
    if mode == "P":
        image = Image.new("P", (2, 1), 1)
        image.putpalette([0, 0, 0, *colour])
        image.putpixel((0, 0), 0)
        data = _profiled(image, "PNG", profile, transparency=0)
        wanted = [[255] * 3, expected]
    else:
        image = Image.new("RGBA", (2, 1), (*colour, 255))
        image.putpixel((0, 0), (*colour, 51))
        data = _profiled(image.convert(mode), "PNG", profile)
        wanted = [expected * 0.2 + 255 * 0.8, expected]
    assert np.abs(np.asarray(decode_image(data), float)[0] - wanted).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_are_shown_as_their_profile_says_and_without_one_as_before(kind):
    image = Image.new("CMYK", (32, 16), (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (16, 0, 32, 16))
    options = {"quality": 100} if kind == "JPEG" else {}
    # Paper of L* 100; ink of L* 50.2 and no colour, which is a shade of 119.
    shown = decode_image(_profiled(image, kind, cmyk_profile((255, 128, 128), (128, 128, 128)), **options))
    paper, ink = (shown.getpixel((x, 8)) for x in (4, 28))
    assert np.abs(np.array([paper, ink]) - [[255] * 3, [119] * 3]).max() <= 3
    plain = decode_image(_profiled(image, kind, None, **options))
    assert np.abs(np.array(plain.getpixel((28, 8))) - (0, 255, 255)).max() <= 3


def test_a_huge_profile_costs_nothing_but_itself():
    image = Image.new("RGB", (4, 4), (10, 200, 30))
    profile = rgb_profile(ADOBE, 2.2)
    huge = profile + np.random.default_rng(0).bytes(LARGEST_PROFILE)
    assert decode_image(_profiled(image, "TIFF", profile)).getpixel((0, 0)) != (10, 200, 30)
    for kind in ("TIFF", "PNG"):
        assert decode_image(_profiled(image, kind, huge)).getpixel((0, 0)) == (10, 200, 30)


def test_an_image_that_the_caller_has_keeps_its_colours():
    image = Image.open(io.BytesIO(_profiled(Image.fromarray(COLOURS), "PNG", rgb_profile(ADOBE, 2.2))))
    image.load()
    upright_rgb(image)
    assert np.array_equal(image, COLOURS)


def test_chunks_that_only_describe_colours_change_none():
    plain = _profiled(Image.fromarray(COLOURS), "PNG", None)
    end_of_header = plain.index(b"IDAT") - 4
    notes = png_chunk(b"gAMA", struct.pack(">I", 100_000)) + png_chunk(b"cICP", bytes((12, 13, 0, 1)))
    notes += png_chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
    assert np.array_equal(decode_image(plain[:end_of_header] + notes + plain[end_of_header:]), COLOURS)
