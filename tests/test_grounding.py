"""Boxes that the model writes of what it saw become boxes in the user's files; what is unreadable is nothing at all."""

import io
import json
import random

import numpy as np
import pyarrow as pa
import pytest
from image_files import image_file
from PIL import Image, ImageOps

from qvl_batch.bundle.layout import Resolution
from qvl_batch.grounding import Box, boxes
from qvl_batch.images.pixels import seen_or_failure
from qvl_batch.images.view import ImageSize, View
from qvl_batch.schema import BOXES_FIELD

VIEWS = {
    **{fit: View.square(168, fit) for fit in ("letterbox", "stretch", "crop")},
    "native": View.of(Resolution(28, None, 56 * 56, 28 * 28 * 1280)),
    "native, smaller": View.of(Resolution(28, None, 56 * 56, 28 * 28 * 30)),
}
#: An image seen as it is.
SAME = ImageSize(100, 80, 100, 80)


def _read(answer, images=(SAME,), fit=None, **options):
    """Boxes of an answer as tuples."""
    found = boxes(answer, images, fit, **options)
    return None if found is None else [(b.image, b.label, b.x0, b.y0, b.x1, b.y1) for b in found]


def _written(place, label="star"):
    """A box as the model writes it."""
    numbers = ", ".join(str(round(number)) for number in place)
    return f'```json\n[\n\t{{"bbox_2d": [{numbers}], "label": "{label}"}}\n]\n```'


def _red(pixels):
    """The box of what is red: left, top, right, bottom."""
    pixels = np.asarray(pixels, int)
    is_red = (pixels[:, :, 0] > 128) & (pixels[:, :, 1] < 128)
    rows, columns = np.flatnonzero(is_red.any(axis=1)), np.flatnonzero(is_red.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 480), (333, 517), (401, 401), (90, 70), (1201, 303)])
@pytest.mark.parametrize("name", VIEWS)
def test_a_box_in_what_the_model_saw_is_a_box_in_the_file(name, size, orientation):
    width, height = size
    # Within the square that a crop keeps, and at one place only in each of the eight orientations.
    side = min(size)
    left, top = (width - side) // 2 + side // 5, (height - side) // 2 + side // 9
    place = (left, top, left + side // 3, top + side // 2)
    picture = Image.new("RGB", size, "white")
    picture.paste("red", place)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_file(picture, exif=exif)
    view = VIEWS[name]
    seen = seen_or_failure(data, view)

    answer = _written(_red(seen.pixels))
    (found,) = _read(answer, [seen.size], view.fit)
    longest = max(seen.size.width / seen.size.seen_width, seen.size.height / seen.size.seen_height)
    if name == "letterbox":
        longest = max(size) / 168
    if name == "crop":
        longest = side / 168
    pixel = max(1.0, longest)
    assert found[:2] == (0, "star")
    assert np.abs(np.subtract(found[2:], place)).max() <= pixel
    # As a caller would cut it out of the array, and out of the picture that a viewer shows.
    assert np.abs(np.subtract(_red(np.asarray(Image.open(io.BytesIO(data)))), found[2:])).max() <= pixel
    (shown,) = _read(answer, [seen.size], view.fit, upright=True)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == (seen.size.width, seen.size.height)
    assert np.abs(np.subtract(_red(upright), shown[2:])).max() <= pixel


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_corners_of_the_picture_are_the_corners_of_the_file(orientation):
    width, height = (80, 100) if orientation >= 5 else (100, 80)
    size = ImageSize(width, height, 56, 84, orientation)
    (found,) = _read(_written((0, 0, 56, 84)), [size])
    assert found[2:] == (0, 0, 100, 80)


def test_what_is_in_a_bar_is_clipped_to_the_edge():
    wide = ImageSize(200, 100, 56, 56)  # shown in rows 14 to 42
    assert _read(_written((0, 0, 56, 56)), [wide], "letterbox") == [(0, "star", 0, 0, 200, 100)]
    assert _read(_written((28, 0, 42, 10)), [wide], "letterbox") == [(0, "star", 100, 0, 150, 0)]
    assert _read(_written((28, 28, 99, 99)), [wide], "letterbox") == [(0, "star", 100, 50, 200, 100)]
    assert _read(_written((-9, 14, 28, 28)), [wide], "letterbox") == [(0, "star", 0, 0, 100, 50)]
    tall = ImageSize(100, 200, 56, 56)
    assert _read(_written((14, 0, 28, 28)), [tall], "letterbox") == [(0, "star", 0, 0, 50, 100)]
    assert _read(_written((0, 0, 56, 28)), [tall], "crop") == [(0, "star", 0, 50, 100, 100)]
    assert _read(_written((0, 0, 28, 28)), [tall], "stretch") == [(0, "star", 0, 0, 50, 100)]


CAT, DOG = '{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', '{"bbox_2d": [5, 6, 7, 8], "label": "dog"}'
ONE, TWO = [(0, "cat", 1, 2, 3, 4)], [(0, "cat", 1, 2, 3, 4), (0, "dog", 5, 6, 7, 8)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"```json\n[\n\t{CAT},\n\t{DOG}\n]\n```", TWO),
        (f"[{CAT}, {DOG}]", TWO),
        (f"[{CAT}, {DOG}, ]", TWO),
        (CAT, ONE),
        (f"```json\n{CAT}\n```", ONE),
        (f"```\n[{CAT}]\n```", ONE),
        (f"```json\n[{CAT}]", ONE),  # the list is whole, only its fence is not
        (f"Here they are [see below]:\n```json\n[{CAT}]\n```\nThat is all, {{I think}}.", ONE),
        (f'The 6" cat is at [{CAT}], as asked.', ONE),
        (f"{CAT}\n{DOG}", TWO),
        (f"{CAT}, {DOG}", TWO),
        (f"One:\n```json\n[{CAT}]\n```\nOther:\n```json\n[{DOG}]\n```", TWO),
        (f'{{"scene": "garden", "size": [9, 9], "objects": [{CAT}, {DOG}]}}', TWO),
        ('[{"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "cat"}]', [*ONE, (0, "cat", 5, 6, 7, 8)]),
        ('[{"bbox_2d": [1.0, "2", " 3.0 ", 4,], "label": "cat",},]', ONE),
        ('[{"bbox_2d": [3, 4, 1, 2], "label": "cat"}]', ONE),
        ('[{"point_2d": [10, 20.5], "label": "tip"}]', [(0, "tip", 10, 20.5, 10, 20.5)]),
        ('[{"point_2d": ["10", 20], "bbox_2d": [1, 2, 3, 4], "label": "cat"}]', ONE),
        ('[{"bbox_2d": null, "point_2d": [1, 2], "label": "a"}]', [(0, "a", 1, 2, 1, 2)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "sub_label": "cat"}]', ONE),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "", "text_content": "cat"}]', ONE),
        ('[{"bbox_2d": [1, 2, 3, 4], "text_content": "a,]\\n\\"b\\" ,}"}]', [(0, 'a,]\n"b" ,}', 1, 2, 3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "two\nlines"}]', [(0, "two\nlines", 1, 2, 3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": 7}]', [(0, "7", 1, 2, 3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', [(0, None, 1, 2, 3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": ["cat"]}]', [(0, None, 1, 2, 3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "\\ud83d"}]', [(0, "?", 1, 2, 3, 4)]),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "cat", "image": "cat.jpg"}]', ONE),  # there is no other
        (f'[{CAT}, {{"label": "dog", "note": "not there"}}]', ONE),
        ("[]", []),
        ("```json\n[]\n```", []),
        ('{"objects": []}', []),
        ('[{"bbox_2d": [], "label": "dog"}]', []),
        ("```json\n[\n]\n```\nThere are none.", []),
    ],
)
def test_what_the_model_writes_is_read(answer, expected):
    assert _read(answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "",
        "There is no dog.",
        "The dog is at [5, 6, 7, 8].",
        "[[5, 6, 7, 8]]",
        '[{"label": "dog"}]',
        f"[{CAT}, ",
        f"[{CAT}, {DOG}",
        f"```json\n[\n\t{CAT},\n\t{{",
        f"```json\n[\n\t{CAT},\n\t{DOG[:-9]}",
        "```json\n[\n",
        f"{CAT},\n",
        f"{CAT},\n{{",
        f"{CAT}\n{DOG[:-1]}",
        f"```json\n[{CAT}]\n```\n```json\n[{DOG}\n```",
        "[{'bbox_2d': [1, 2, 3, 4]}]",
        '[{"bbox_2d": [1, 2, 3]}]',
        '[{"bbox_2d": [1, 2, 3, 4, 5]}]',
        '[{"bbox_2d": [1, 2, 3, "x"]}]',
        '[{"bbox_2d": [1, 2, 3, true]}]',
        '[{"bbox_2d": [1, 2, 3, null]}]',
        '[{"bbox_2d": [1, 2, 3, NaN]}]',
        '[{"bbox_2d": [1, 2, 3, 1e999]}]',
        '[{"bbox_2d": [1, 2, 3, 1' + "0" * 400 + "]}]",
        '[{"bbox_2d": [1, 2, 3, 1' + "0" * 5000 + "]}]",
        '[{"bbox_2d": [[1, 2, 3, 4], []]}]',
        '[{"bbox_2d": {"x": 1}}]',
        '[{"bbox_2d": "1, 2, 3, 4"}]',
        '[{"point_2d": [1]}]',
        '[{"point_2d": [1, 2, 3, 4]}]',
        f'[{CAT}, {{"bbox_2d": [1, 2]}}]',
        '[{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [5, 6, 7, 8]}]',
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
    ],
)
def test_what_cannot_be_read_is_no_boxes_at_all(answer):
    assert _read(answer) is None


@pytest.mark.parametrize("key", ["image", "image_index", "image_id", "image_number"])
@pytest.mark.parametrize("name", ["2", '"2"', '"image 2"', '"Image_2"', '"Picture 2"', '" image #2 "'])
def test_of_several_images_an_entry_names_its_own(key, name):
    images = [SAME, ImageSize(1000, 800, 100, 80, 3)]
    answer = f'[{{"bbox_2d": [1, 2, 3, 4], "{key}": {name}, "label": "cat"}}]'
    assert _read(answer, images) == [(1, "cat", 970, 760, 990, 780)]
    assert _read(answer, images, upright=True) == [(1, "cat", 10, 20, 30, 40)]


@pytest.mark.parametrize(
    "name", ["0", "3", "-1", "1.0", "true", '"second"', '"2 or 1"', "[2]", "null", '"' + "9" * 99 + '"']
)
def test_an_entry_that_names_none_of_several_images_has_no_place(name):
    nowhere = (None, "cat", None, None, None, None)
    answer = f'[{{"bbox_2d": [1, 2, 3, 4], "image": {name}, "label": "cat"}}, {DOG[:-1]}, "image": 1}}]'
    assert _read(answer, [SAME, SAME]) == [nowhere, (0, "dog", 5, 6, 7, 8)]
    assert _read(f"[{CAT}]", [SAME, SAME]) == [nowhere]
    assert _read(f"[{CAT}]", []) == [nowhere]


def test_boxes_fit_their_column():
    lone = '[{"bbox_2d": [1, 2, 3, 4], "label": "\\ud83d"}]'
    rows = [boxes(answer, images, None) for answer in (f"[{CAT}]", "[]", "no", lone) for images in ([SAME], [SAME] * 2)]
    values = [
        None if row is None else [{name: getattr(box, name) for name in Box.__slots__} for box in row] for row in rows
    ]
    column = pa.array(values, BOXES_FIELD.type)
    assert column.to_pylist() == values
    assert column.null_count == 2
    assert [field.name for field in BOXES_FIELD.type.value_type] == list(Box.__slots__)


def test_no_answer_ever_raises():
    rng = random.Random(0)  # noqa: S311  (nothing secret)
    whole = [f"```json\n[\n\t{CAT},\n\t{DOG}\n]\n```", '{"objects": [{"point_2d": [1, "2"], "image": "image 2"}]}']
    pieces = [*'[]{}",:`\\ \n-.e', "```json", "null", "NaN", "1e999", "bbox_2d", '"bbox_2d": ', '"label":', "\\u", "7"]
    images = [ImageSize(100, 80, 56, 56, 6), ImageSize(3, 1, 56, 28)]
    read = 0
    for _ in range(20_000):
        text = list(rng.choice(whole) * rng.choice((1, 1, 2)))
        for _ in range(rng.randrange(5)):
            at = rng.randrange(len(text) + 1)
            text[at : at + rng.choice((0, 1, 1, 4))] = rng.choice(pieces)
        if rng.random() < 0.2:
            del text[rng.randrange(len(text) + 1) :]
        fit = rng.choice(("letterbox", "crop", "stretch", None))
        found = boxes("".join(text), images[: rng.randrange(3)], fit)
        read += found is not None
        for box in found or ():
            if box.image is not None:
                size = images[box.image]
                width, height = (size.height, size.width) if size.orientation >= 5 else (size.width, size.height)
                assert 0 <= box.x0 <= box.x1 <= width
                assert 0 <= box.y0 <= box.y1 <= height
    assert 2_000 < read < 18_000
    for _ in range(5_000):
        boxes("".join(rng.choice(pieces) for _ in range(rng.randrange(60))), images, "letterbox")


def test_every_beginning_of_a_list_is_unreadable():
    answer = json.dumps(
        [{"bbox_2d": [1, 2, 3, 4], "label": "cat"}, {"bbox_2d": [5, 6, 7, 8], "label": "dog"}], indent=1
    )
    for text in (answer, f"```json\n{answer}"):
        assert _read(text) == TWO
        assert {
            None if found is None else len(found) for found in map(_read, (text[:n] for n in range(len(text))))
        } == {None}


@pytest.mark.parametrize("piece", ['"', '\\"', '"\\', ", ", "[{", '{"', "[]", "{} ", "```", ",]", '{"a": [', "[1, "])
def test_a_long_answer_takes_no_long_time(piece):
    # Quadratic work would take minutes.
    boxes('[{"' + piece * (400_000 // len(piece)), [SAME], None)
    boxes(piece * (400_000 // len(piece)), [SAME], None)
