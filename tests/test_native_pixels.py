"""Images of their own size are seen as transformers sees them, to the bit; and stages carry any number of images."""

import io

import numpy as np
import pillow_heif
import pyarrow as pa
import pytest
from image_files import image_file
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

from qvl_batch.bundle.layout import Resolution
from qvl_batch.columns import (
    ASKED,
    COLUMNS,
    FAILURE,
    FILE,
    IMAGE_KEYS,
    IMAGES,
    MESSAGES,
    PIXELS,
    ROW,
    SECONDS,
    SIZES,
    THUMBNAIL,
    array,
    failure_columns,
    failures_of,
    with_columns,
)
from qvl_batch.conversation import Message, single_turn, to_json
from qvl_batch.errors import ConfigError, ImageError
from qvl_batch.images.pixels import decode_image, fit_image, image_key, see, seen_or_failure, upright_rgb
from qvl_batch.images.view import ImageSize, View, sizes_of, smart_resize
from qvl_batch.pipeline import prepare as module
from qvl_batch.pipeline.prepare import prepare
from qvl_batch.report.sample import SIDE
from qvl_batch.schema import Failure

pillow_heif.register_heif_opener()  # to save such files

UNIT = 28
#: Smallest and largest pixels: the checkpoint's own, much smaller ones, and ones that make all images larger.
LIMITS = [(56 * 56, 28 * 28 * 1280), (UNIT**2, UNIT**2 * 64), (UNIT**2 * 300, UNIT**2 * 600)]


def _native(smallest=LIMITS[0][0], largest=LIMITS[0][1]):
    return View.of(Resolution(UNIT, None, smallest, largest))


def _noise(width, height, mode="RGB"):
    samples = np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.fromarray(samples[:, :, 0] if mode == "L" else samples, mode)


def _sizes():
    """Widths and heights: all small ones, around multiples of the unit, extreme proportions, large ones."""
    rng = np.random.default_rng(0)
    tiny = [(width, height) for width in (1, 2, 3, 5, 13, 14, 15) for height in (1, 2, 14, 27, 28, 29, 42, 200)]
    edges = [(28 * n + d, 28 * m + e) for n, m in ((1, 2), (2, 9), (36, 1)) for d in (-1, 0, 14) for e in (-14, 0, 1)]
    long = [(1, 200), (200, 1), (5, 1000), (2000, 10), (3000, 15), (4, 799), (20, 4000)]
    usual = [(640, 480), (672, 672), (1920, 1080), (1280, 720), (1003, 1001), (1024, 980), (2048, 1536)]
    drawn = np.exp(rng.uniform(0, np.log(1500), (300, 2))).astype(int).clip(1).tolist()
    return [
        (width, height)
        for width, height in [*tiny, *edges, *long, *usual, *map(tuple, drawn)]
        if max(width, height) / min(width, height) <= 200
    ]


@pytest.mark.parametrize(("smallest", "largest"), LIMITS)
def test_sizes_are_those_of_transformers_for_every_size(smallest, largest):
    rng = np.random.default_rng(1)
    drawn = np.exp(rng.uniform(0, np.log(20_000), (20_000, 2))).astype(int).clip(1).tolist()
    compared = 0
    for width, height in [*_sizes(), *drawn, *((w, h) for w in range(1, 90) for h in range(1, 90))]:
        try:
            expected = theirs(height, width, UNIT, smallest, largest)
        except ValueError:
            with pytest.raises(ImageError, match="at most 200 times"):
                smart_resize(height, width, UNIT, smallest, largest)
        else:
            compared += 1
            assert smart_resize(height, width, UNIT, smallest, largest) == expected, (width, height)
    assert compared > 20_000


@pytest.mark.parametrize(
    ("smallest", "largest"),
    [LIMITS[1], *(pytest.param(*each, marks=pytest.mark.long) for each in (LIMITS[0], LIMITS[2]))],
)
def test_pixels_are_those_of_transformers_to_the_bit(smallest, largest):
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": smallest, "longest_edge": largest})
    view, compared = _native(smallest, largest), 0
    for number, (width, height) in enumerate(_sizes()):
        image = decode_image(image_file(_noise(width, height, ("RGB", "L", "RGBA")[number % 3])))
        resized_height, resized_width = theirs(height, width, UNIT, smallest, largest)
        if resized_height * resized_width > largest:
            with pytest.raises(ImageError, match="the limit is"):
                see(image, view)
            continue
        seen = see(image, view)
        assert (seen.pixels.dtype, seen.pixels.shape) == (np.uint8, (resized_height, resized_width, 3))
        assert seen.size == ImageSize(width, height, resized_width, resized_height)
        # Without rescaling, the processor's patches are its pixels, each in two frames.
        found = processor([image], do_rescale=False, do_normalize=False, return_tensors="np")
        assert found["image_grid_thw"].tolist() == [[1, resized_height // 14, resized_width // 14]]
        rows, columns = resized_height // UNIT, resized_width // UNIT
        patches = found["pixel_values"].reshape(rows, columns, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
        pixels = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(resized_height, resized_width, 3)
        assert np.array_equal(pixels, seen.pixels), (width, height)
        compared += 1
    assert compared > 300


def test_what_the_processor_computes_of_an_image_is_what_it_computes_of_the_seen_one():
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": LIMITS[0][0], "longest_edge": LIMITS[0][1]})
    image = _noise(4000, 3000)
    seen = see(image, _native())
    whole = processor([image], return_tensors="np")
    again = processor([Image.fromarray(seen.pixels)], do_resize=False, return_tensors="np")
    assert np.array_equal(whole["pixel_values"], again["pixel_values"])


def test_extreme_proportions_are_refused_with_width_and_height():
    view = _native()
    assert see(Image.new("RGB", (1000, 5)), view).size.width == 1000
    with pytest.raises(ImageError, match="1,001 x 5 pixels; one side can be at most 200 times the other"):
        see(Image.new("RGB", (1001, 5)), view)
    failure = seen_or_failure(image_file(Image.new("L", (1, 300))), view)
    assert isinstance(failure, Failure)
    assert (failure.stage, failure.message[:28]) == ("image", "the image has 1 x 300 pixels")


def test_an_image_that_cannot_be_seen_within_the_limit_is_refused():
    view = _native(UNIT**2, UNIT**2 * 10)
    with pytest.raises(ImageError, match=r"2,000 x 10 pixels and would be seen as 420 x 28; the limit is 7,840 "):
        see(Image.new("RGB", (2000, 10)), view)
    assert see(Image.new("RGB", (200, 100)), view).pixels.size <= 3 * UNIT**2 * 10


@pytest.mark.parametrize("fit", ["letterbox", "stretch", "crop"])
def test_a_fixed_view_shows_the_square_of_its_fit(fit):
    image, view = _noise(90, 50), View.square(56, fit)
    seen = see(image, view)
    assert np.array_equal(seen.pixels, fit_image(image, 56, fit))
    assert seen.size == ImageSize(90, 50, 56, 56)
    of_bundle = View.of(Resolution(UNIT, 56, 56**2, 56**2), fit)
    assert np.array_equal(see(image, of_bundle).pixels, seen.pixels)


def test_keys_differ_where_pixels_can():
    views = [View.square(56, fit) for fit in ("letterbox", "stretch", "crop")]
    views += [_native(), _native(largest=UNIT**2 * 100), _native(smallest=UNIT**2)]
    assert len({image_key(b"a", view) for view in views} | {image_key(b"b", views[0])}) == 7
    assert image_key(b"a", _native()) == image_key(b"a", View.of(Resolution(UNIT, None, *LIMITS[0])))
    # Features in caches are of these keys; they change with the pixels alone.
    assert image_key(b"a", views[0]).hex() == "224594bb3012dafb244b43710467916e"


def test_a_lower_limit_is_the_jobs():
    resolution = Resolution(UNIT, None, *LIMITS[0])
    lower = View.of(resolution, max_pixels=UNIT**2 * 16)
    assert see(_noise(400, 400), lower).size == ImageSize(400, 400, 112, 112)
    assert View.of(resolution) == View.of(resolution, max_pixels=LIMITS[0][1]) == _native()


@pytest.mark.parametrize(
    ("resolution", "fit", "max_pixels", "message"),
    [
        (Resolution(UNIT, None, *LIMITS[0]), "crop", None, "--fit crop: this bundle shows images at their own size"),
        (Resolution(UNIT, None, *LIMITS[0]), None, 10**9, "--max-pixels 1000000000: this bundle takes 3136 to 1003520"),
        (Resolution(UNIT, None, *LIMITS[0]), None, 3000, "--max-pixels 3000: this bundle takes 3136 to 1003520"),
        (Resolution(UNIT, 56, 56**2, 56**2), "crop", 3000, "--max-pixels 3000: .* a square of 56 pixels a side"),
    ],
)
def test_options_that_are_not_for_the_bundle_are_refused(resolution, fit, max_pixels, message):
    with pytest.raises(ConfigError, match=message):
        View.of(resolution, fit, max_pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("view", [View.square(56), _native()])
def test_the_turn_of_a_file_is_known_and_made_once(view, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(_noise(84, 56), exif=exif)
    seen = seen_or_failure(data, view)
    upright = (56, 84) if orientation >= 5 else (84, 56)
    assert (seen.size.width, seen.size.height, seen.size.orientation) == (*upright, orientation)
    assert see(upright_rgb(Image.open(io.BytesIO(data))), view).size == seen.size
    # A picture that is upright already is not turned again, and has no turn to undo.
    decoded = decode_image(data)
    again = see(upright_rgb(decoded), view)
    assert np.array_equal(again.pixels, seen.pixels)
    assert again.size.orientation == 1
    assert see(decoded, view).size == seen.size


@pytest.mark.parametrize("kind", ["TIFF", "HEIF"])
def test_what_pillow_turns_itself_has_no_turn_to_undo(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif.tobytes(), "quality": 95} if kind == "HEIF" else {"exif": exif}
    data = image_file(Image.new("RGB", (84, 56), "red"), kind, **options)
    assert seen_or_failure(data, View.square(56)).size == ImageSize(56, 84, 56, 56, 1)


def test_a_callers_picture_is_left_as_it_is():
    image = _noise(84, 56)
    image.info["x"] = 1
    upright_rgb(image)
    assert image.info == {"x": 1}


def test_sizes_travel_as_numbers():
    sizes = [ImageSize(1, 2, 3, 4, 5), ImageSize(6, 7, 8, 9)]
    numbers = [each for size in sizes for each in size.numbers]
    assert numbers == [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]
    assert sizes_of(numbers) == sizes
    assert sizes_of([]) == []


def _table(rows, failures=None):
    """Rows as they are read: lists of files, each asked about; None for a row that failed."""
    messages = [None if files is None else to_json(single_turn("Which?", len(files))) for files in rows]
    columns = {
        FILE: array(FILE, [0] * len(rows)),
        ROW: array(ROW, range(len(rows))),
        MESSAGES: array(MESSAGES, messages),
        IMAGES: array(IMAGES, rows),
    }
    return with_columns(pa.table(columns), failure_columns(failures or [None] * len(rows)))


RED, BLUE, GREY = (image_file(Image.new("RGB", size, color)) for size, color in
                   (((90, 50), "red"), ((30, 300), "blue"), ((56, 56), "gray")))  # fmt: skip


@pytest.mark.parametrize("view", [View.square(56), _native()])
def test_rows_of_any_number_of_images_are_prepared(view):
    lost = Failure("read", "RecordError", "no row")
    rows = [[RED, BLUE], [], None, [GREY], [BLUE, RED, GREY]]
    table = prepare(_table(rows, [None, None, lost, None, None]), view)
    assert failures_of(table) == [None, None, lost, None, None]
    for files, pixels, sizes, keys in zip(
        rows, *(table[name].to_pylist() for name in (PIXELS, SIZES, IMAGE_KEYS)), strict=True
    ):
        if files is None:
            assert pixels is sizes is keys is None
            continue
        expected = [see(decode_image(file), view) for file in files]
        assert sizes_of(sizes) == [seen.size for seen in expected]
        assert pixels == [seen.pixels.tobytes() for seen in expected]
        assert [len(each) for each in pixels] == [3 * s.seen_width * s.seen_height for s in sizes_of(sizes)]
        assert keys == [image_key(file, view) for file in files]
    written = [name for name, column in COLUMNS.items() if "prepare" in column.written_by]
    assert {name: table.schema.field(name).type for name in written} == {n: COLUMNS[n].type for n in written}
    assert IMAGES not in table.column_names
    assert table[SECONDS["image"]].to_pylist()[1:] == [0.0] * 4


def test_a_failure_names_its_image_where_there_are_several():
    table = prepare(_table([[RED, b"none", b""], [b""], [RED], [RED, RED, b""]]), View.square(56))
    messages = [failure and failure.message for failure in failures_of(table)]
    assert messages[0].startswith("image 2 of 3: the bytes are no image")
    assert messages[1:] == ["the image has no bytes", None, "image 3 of 3: the image has no bytes"]
    for name in (PIXELS, SIZES, IMAGE_KEYS):
        assert [value is None for value in table[name].to_pylist()] == [True, True, False, True]
    assert table[FAILURE[0]].to_pylist() == ["image", "image", None, "image"]


def test_an_image_that_occurs_several_times_is_decoded_once(monkeypatch):
    calls = []

    def counted(data, *options):
        calls.append(data)
        return seen_or_failure(data, *options)

    monkeypatch.setattr(module, "seen_or_failure", counted)
    table = prepare(_table([[RED, BLUE], [BLUE, RED], [b"none"], [RED, b"none"]]), View.square(56))
    assert calls == [RED, BLUE, b"none"]
    assert [failure and failure.message[:6] for failure in failures_of(table)] == [None, None, "the by", "image "]


def test_the_sample_shows_images_side_by_side_and_the_last_question():
    table = _table([[RED, BLUE], [RED], [], [GREY] * 9, [RED], [b""]])
    chat = (Message("user", (0, "One.")), Message("assistant", "Yes."), Message("user", ("Two", ", three?")))
    messages = [to_json(chat), *table[MESSAGES].to_pylist()[1:]]
    table = table.set_column(table.column_names.index(MESSAGES), MESSAGES, array(MESSAGES, messages))
    prepared = prepare(table, _native(), frozenset((0, row) for row in (0, 2, 3, 4, 5)))
    assert prepared[ASKED].to_pylist() == ["Two, three?", None, "Which?", "Which?", "Which?", "Which?"]
    shown = [value and Image.open(io.BytesIO(value)) for value in prepared[THUMBNAIL].to_pylist()]
    assert [image is None for image in shown] == [False, True, True, False, False, True]
    pair = np.asarray(shown[0].convert("RGB"), int)
    assert pair.shape[0] == SIDE
    assert np.abs(pair[10, 10] - (255, 0, 0)).max() < 20
    assert np.abs(pair[-10, -4] - (0, 0, 255)).max() < 20
    assert np.abs(pair[-10, 10] - (255, 255, 255)).max() < 20
    assert shown[3].width <= 5 * SIDE
    assert shown[3].width > shown[3].height * 9
    assert max(shown[4].size) == 84
