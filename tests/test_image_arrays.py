"""Arrays of pixels are shown as what they are, or refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from qvl_batch.errors import ImageError
from qvl_batch.images.arrays import picture_of
from qvl_batch.images.pixels import DEFAULT_RULES, array_rgb, decode_image

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY, ALPHA = RGB[..., 0], RANDOM.integers(0, 256, (6, 9, 1), dtype=np.uint8)


def _npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


SAME = {
    "uint8": RGB,
    "of Fortran's order": np.asfortranarray(RGB),
    "a slice": np.repeat(RGB, 2, axis=1)[:, ::2],
    "channels first": RGB.transpose(2, 0, 1),
    "from 0 to 1": RGB / 255,
    "float16 from 0 to 1": (RGB / 255).astype(np.float16),
    "from 0 to 255": RGB.astype(np.float32),
    "16 bits": RGB.astype(np.uint16) * 257,
    "16 bits of the other order": (RGB.astype(np.uint16) * 257).astype(">u2"),
    "bytes in wider integers": RGB.astype(np.int64),
    "16 bits in wider integers": RGB.astype(np.int32) * 257,
}


@pytest.mark.parametrize("name", SAME)
def test_arrays_of_the_same_picture_are_shown_the_same(name):
    array = SAME[name]
    assert np.array_equal(array_rgb(array), RGB)
    assert np.array_equal(decode_image(_npy(array)), RGB)


@pytest.mark.parametrize("array", [GREY, GREY[..., None], GREY[None], GREY / 255])
def test_grey_arrays_are_grey(array):
    assert np.array_equal(array_rgb(array), np.repeat(GREY[..., None], 3, axis=2))


def test_booleans_are_black_and_white():
    mask = GREY > 99
    assert np.array_equal(np.asarray(array_rgb(mask))[..., 1], mask * 255)
    assert np.array_equal(np.asarray(array_rgb(np.stack([mask] * 3)))[..., 2], mask * 255)


@pytest.mark.parametrize(("first", "mode"), [(RGB, "RGBA"), (GREY[..., None], "LA")])
def test_alpha_is_composited_on_white_as_that_of_files_is(first, mode):
    array = np.concatenate([first, ALPHA], axis=2)
    assert picture_of(array, 100).mode == mode
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    assert np.array_equal(array_rgb(array), decode_image(file.getvalue()))
    if mode == "RGBA":
        assert np.array_equal(array_rgb(array.transpose(2, 0, 1)), decode_image(file.getvalue()))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 9, 3)), r"shape \(3, 9, 3\) can be read as .* give a Pillow image"),
        (np.zeros((1, 9, 4)), r"shape \(1, 9, 4\) can be read as "),
        (np.zeros((9, 9, 5)), r"shape \(9, 9, 5\) is not an image: give \(height, width\)"),
        (np.zeros((1, 9, 9, 3)), r"shape \(1, 9, 9, 3\) is not an image"),
        (np.zeros(9), "is not an image"),
        (np.zeros(()), "is not an image"),
        (np.zeros((0, 9, 3)), "has 9 x 0 pixels; a side can have 1 to"),
        (np.zeros((9, 9), "M8[s]"), "its samples must be numbers"),
        (np.full((9, 9), "a"), "its samples must be numbers"),
        (np.full((9, 9), None), "its samples must be numbers"),
        (np.zeros((9, 9), [("r", "u1")]), "its samples must be numbers"),
        (np.full((9, 9), np.nan), "samples from nan to nan; they must be from 0 to 255"),
        (np.full((9, 9), np.inf), "samples from inf to inf; they must be from 0 to 255"),
        (np.linspace(-2.1, 2.6, 99).reshape(9, 11), "samples from -2.1 to 2.6; they must be from 0 to 255"),
        (np.full((9, 9), 256.0), "samples from 256 to 256; they must be from 0 to 255"),
        (np.full((9, 9), 65536), "samples from 65536 to 65536; they must be from 0 to 65535"),
        (np.full((9, 9), -1, np.int8), "samples from -1 to -1; they must be from 0 to 65535"),
        (np.broadcast_to(np.uint8(0), (100_000, 100_000)), "the image has 10,000,000,000 pixels; the limit is"),
    ],
    ids=lambda value: str(getattr(value, "shape", "")),
)
def test_what_is_no_picture_or_could_be_two_is_refused_by_name(array, message):
    with pytest.raises(ImageError, match=message):
        array_rgb(array)


def test_damaged_files_of_arrays_are_refused():
    whole = _npy(RGB)
    objects = _npy(np.array([[object()]]), allow_pickle=True)
    for data in (
        whole[:-1], whole + b"x", whole[:7], whole[:20], whole.replace(b"|u1", b"|z1"), whole.replace(b"(6,", b"(-6,"),
        whole.replace(b"6, 9, 3", b"6, 9,,3"), whole[:6] + b"\x03\x00" + whole[8:], objects,
        whole.replace(b"(6, 9, 3)", b"(9**9)**9"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=r"^the NPY (is damaged: |holds objects)"):
            decode_image(data)


def test_a_file_of_an_array_has_its_limit_of_pixels():
    data = _npy(np.zeros((1000, 1001), np.uint8))
    with pytest.raises(ImageError, match="has 1,001,000 pixels; the limit is 1,000,000"):
        decode_image(data, DEFAULT_RULES.__class__(1_000_000))
