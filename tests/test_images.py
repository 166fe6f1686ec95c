"""Any image file becomes the pixels that a viewer would show, or an error that says why not."""

import io
import sys

import numpy as np
import pillow_heif
import pytest
from conftest import TINY
from image_files import image_file
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qvl_batch.config import ImageRules
from qvl_batch.errors import ImageError
from qvl_batch.images.pixels import LETTERBOX_RGB, decode_image, fit_image, upright_rgb

pillow_heif.register_heif_opener()  # to save such files


def _gradient(width=40, height=30):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 6, y * 8, x + y], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_their_pixels(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    decoded = decode_image(image_file(_gradient(), file_format, **options))
    assert np.array_equal(decoded, _gradient())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(_gradient(), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data)
    assert np.array_equal(decoded, expected.convert("RGB"))
    assert np.array_equal(upright_rgb(Image.open(io.BytesIO(data))), decoded)
    assert (decoded.size != (40, 30)) == (orientation >= 5)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_white(mode):
    image = Image.new(mode, (4, 4), 0)
    image.putpixel((0, 0), (255, 0, 0, 255) if mode == "RGBA" else (90, 255))
    image.putpixel((1, 0), (0, 0, 0, 128) if mode == "RGBA" else (0, 128))
    decoded = decode_image(image_file(image))
    assert decoded.getpixel((0, 0)) == ((255, 0, 0) if mode == "RGBA" else (90, 90, 90))
    assert decoded.getpixel((1, 0)) == (127, 127, 127)
    assert decoded.getpixel((3, 3)) == (255, 255, 255)


def test_a_transparent_palette_colour_shows_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    decoded = decode_image(image_file(image, "GIF", transparency=0))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 200)]


def test_sixteen_bits_are_scaled_not_clipped():
    samples = np.array([[0, 256 * 100, 65535]], np.uint16)
    decoded = decode_image(image_file(Image.fromarray(samples)))
    assert [decoded.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


def test_a_transparent_shade_of_sixteen_bits_shows_white():
    samples = np.array([[1000, 256 * 90, 1001]], np.uint16)
    decoded = decode_image(image_file(Image.fromarray(samples), transparency=1000))
    assert [decoded.getpixel((x, 0))[0] for x in range(3)] == [255, 90, 3]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    file_format = "JPEG" if mode in {"CMYK", "YCbCr"} else "PNG"
    decoded = decode_image(image_file(_gradient().convert(mode), file_format))
    assert (decoded.mode, decoded.size) == ("RGB", (40, 30))


@pytest.mark.parametrize(
    "mode", ["1", "CMYK", "F", "HSV", "I", "I;16", "I;16B", "I;16L", "LAB", "La", "PA", "RGBX", "RGBa"]
)
def test_a_pillow_image_may_have_any_mode(mode):
    image = Image.fromarray(np.full((6, 4, 3), 255, np.uint8))
    if mode in {"La", "RGBa"}:
        image = image.convert(mode.upper())
    image = image.convert("I").point(lambda sample: sample * 257) if mode.startswith("I") else image
    shown = np.asarray(upright_rgb(image.convert(mode)))
    assert shown.shape == (6, 4, 3)
    assert shown.min() >= 250  # LAB rounds


def test_a_pillow_image_is_refused_as_its_file_would_be():
    with pytest.raises(ImageError, match="truncated"):
        upright_rgb(Image.open(io.BytesIO(image_file(_gradient(400, 300), "JPEG")[:2000])))
    with pytest.raises(ImageError, match=r"has 1,200 pixels; the limit is 1,000 \(--max-image-pixels\)"):
        upright_rgb(_gradient(), ImageRules(max_pixels=1000))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    decoded = decode_image(image_file(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of AVIF, BMP"),
        (
            image_file(_gradient(400, 300))[:200],
            "the PNG is damaged and lacks 103,200 of 120,000 pixels: .*truncated.*; --allow-truncated",
        ),
        (image_file(_gradient(400, 300), "JPEG")[:2000], "truncated"),
    ],
)
def test_what_is_no_image_says_so(data, message):
    with pytest.raises(ImageError, match=message):
        decode_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "JPEG2000", "HEIF"])
def test_the_limit_on_pixels_is_exact_and_says_how_it_is_raised(kind, monkeypatch):
    data, rules = image_file(_gradient(), kind), ImageRules(max_pixels=1199)
    with pytest.raises(ImageError, match=r"has 1,200 pixels; the limit is 1,199 \(--max-image-pixels\)"):
        decode_image(data, rules)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of another user of Pillow: it warns here, or refuses
    assert decode_image(data, ImageRules(max_pixels=1200)).size[0] > 30


def test_an_honest_scan_is_read_where_the_limit_is_raised(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000", "HEIF"):
        data = image_file(_gradient(), kind)
        with pytest.raises(ImageError, match="limit is 1,000"):
            decode_image(data, ImageRules(max_pixels=1000))
        assert decode_image(data, ImageRules(max_pixels=1200)).size == (40, 30), kind
    with pytest.raises(ImageError, match="the WEBP has 1,200 pixels; Pillow reads at most 1,000"):
        decode_image(image_file(_gradient(), "WEBP"), ImageRules(max_pixels=1200))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_photo_of_a_phone_is_shown(mode):
    image = _gradient(320, 240).resize((640, 480), Image.Resampling.BICUBIC).convert(mode)
    data = image_file(image, "HEIF", quality=95)
    assert data[4:10] == b"ftyphe"
    shown, expected = np.asarray(decode_image(data), np.int16), np.asarray(image.convert("RGB"), np.int16)
    assert np.abs(shown - expected).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_of_a_phone_is_turned_upright_once(orientation):
    image = Image.new("RGB", (64, 32), "white")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(image, "HEIF", exif=exif.tobytes(), quality=95)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image), np.int16)
    for shown in (decode_image(data), upright_rgb(Image.open(io.BytesIO(data)))):
        assert shown.size == ((32, 64) if orientation >= 5 else (64, 32))
        assert np.abs(np.asarray(shown, np.int16) - expected).mean() < 8


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_without_its_library_a_photo_of_a_phone_says_what_to_install(brand, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = image_file(_gradient(), "HEIF")
    with pytest.raises(ImageError, match=r"HEIC or HEIF: `pip install '\.\[heif\]'`"):
        decode_image(data[:8] + brand + data[12:])


def test_a_letterbox_keeps_everything_in_proportion():
    fitted = fit_image(Image.new("RGB", (200, 100), "red"), 56, "letterbox")
    assert fitted.shape == (56, 56, 3)
    assert (fitted[:14] == LETTERBOX_RGB).all()
    assert (fitted[42:] == LETTERBOX_RGB).all()
    assert (fitted[14:42] == (255, 0, 0)).all()


def test_a_stretch_keeps_everything_and_fills():
    fitted = fit_image(Image.new("RGB", (200, 100), "red"), 56, "stretch")
    assert (fitted == (255, 0, 0)).all()


def test_a_crop_cuts_the_longer_side_evenly():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    fitted = fit_image(image, 56, "crop")
    assert (fitted[:, 2:-2] == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3000, 7)])
@pytest.mark.parametrize("fit", ["letterbox", "stretch", "crop"])
def test_any_size_fits(size, fit):
    assert fit_image(Image.new("RGB", size), 56, fit).shape == (56, 56, 3)


def test_transformers_processor_leaves_a_fitted_image_as_it_is(tiny_bundle):
    size = tiny_bundle.manifest.layout.resolution.image_size
    fitted = fit_image(_gradient(500, 300), size)
    processor = Qwen2VLImageProcessorPil.from_pretrained(TINY)
    patches = processor([Image.fromarray(fitted)], return_tensors="np")
    assert patches["image_grid_thw"].tolist() == [[1, 48, 48]]
    assert np.isclose(patches["pixel_values"].min(), (fitted / 255 - [0.481, 0.458, 0.408]).min() / 0.27, atol=0.05)
