"""Images are found in the cells that people's tables have, and a cell that has none costs its row alone."""

import base64
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import image_file
from PIL import Image
from reading import caption_config, images_of, read_rows

from qvl_batch.columns import FAILURE, IMAGES
from qvl_batch.errors import ImageError, InputError
from qvl_batch.images.pixels import decode_image
from qvl_batch.input.image_cells import image_values, is_image, is_list_of_images, of_text, plain_image
from qvl_batch.input.reader import refuse_paths
from qvl_batch.input.source import open_source

STAGE, KIND, MESSAGE = FAILURE
RGB = np.random.default_rng(0).integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)
PNG, OTHER = (image_file(Image.fromarray(pixels)) for pixels in RGB[:2])
AS_TEXT, OTHER_AS_TEXT = (base64.b64encode(data).decode() for data in (PNG, OTHER))
UINT8 = pa.uint8()
#: What Arrow stores a tensor of any shape as.
VARIABLE = pa.struct([("data", pa.list_(UINT8)), ("shape", pa.list_(pa.int32(), 3))])


def _rows(tmp_path, image, metadata=None, **options):
    count = len(image)
    schema = pa.schema([pa.field("id", pa.int64()), pa.field("image", image.type, metadata=metadata)])
    pq.write_table(pa.table([pa.array(range(count)), image], schema=schema), tmp_path / "a.parquet")
    config = caption_config(tmp_path, prompt="What?", **options)
    return read_rows(open_source(config), "What?", 2, config.allow_images_from)


def _shown(files):
    return [None if file is None else np.asarray(decode_image(file)) for file in files]


@pytest.mark.parametrize(
    "image",
    [
        pa.array([PNG, None, OTHER]).dictionary_encode(),
        pa.array([PNG.ljust(600, b"\0"), None, OTHER.ljust(600, b"\0")], pa.binary(600)),
        pa.array([{"bytes": AS_TEXT}, {"bytes": None}, {"bytes": OTHER_AS_TEXT}]),
        pa.array([{"bytes": f"data:;base64,{AS_TEXT}", "path": "p"}, None, {"bytes": OTHER_AS_TEXT}]),
        pa.array([AS_TEXT, None, base64.urlsafe_b64encode(OTHER).decode().rstrip("=")]),
        pa.array([f"DATA:;Base64,{AS_TEXT}", None, f"\n{base64.encodebytes(OTHER).decode()}"]).dictionary_encode(),
        pa.array([AS_TEXT, None, OTHER_AS_TEXT], pa.large_string()),
        pa.array([AS_TEXT, None, OTHER_AS_TEXT], pa.string_view()),
        pa.array([RGB[0].tolist(), None, RGB[1].tolist()], pa.list_(pa.list_(pa.list_(UINT8)))),
        pa.array([RGB[0].tolist(), None, RGB[1].tolist()]),
        pa.array([RGB[0].tolist(), None, RGB[1].tolist()], pa.large_list(pa.list_(pa.list_(UINT8, 3), 9))),
        pa.array([(RGB[0] / 255).tolist(), None, (RGB[1] / 255).tolist()], pa.list_(pa.list_(pa.list_(pa.float32())))),
        pa.array([RGB[0].transpose(2, 0, 1).tolist(), None, RGB[1].transpose(2, 0, 1).tolist()]),
    ],
    ids=lambda value: str(value.type)[:60],
)  # fmt: skip
def test_images_may_be_in_cells_of_many_kinds(image, tmp_path):
    rows = _rows(tmp_path, image)
    shown = _shown(images_of(rows))
    assert np.array_equal(shown[0], RGB[0])
    assert np.array_equal(shown[2], RGB[1])
    assert rows[MESSAGE].to_pylist() == [None, "the image is null", None]


def _tensors():
    """Columns of the three images, and the metadata of a column that is stored as an extension would be."""
    flat = pa.array([each.ravel().tolist() for each in RGB], pa.list_(UINT8))
    shapes = pa.array([list(each.shape) for each in RGB])
    fixed = pa.FixedShapeTensorArray.from_numpy_ndarray(RGB)
    turned = pa.fixed_shape_tensor(UINT8, (9, 3, 6), permutation=(2, 0, 1))
    stored = np.ascontiguousarray(RGB.transpose(0, 2, 3, 1)).reshape(3, -1)
    yield "fixed", fixed, None
    yield (
        "fixed, permuted",
        pa.ExtensionArray.from_storage(turned, pa.array(stored.tolist(), turned.storage_type)),
        None,
    )
    ray = {"ARROW:extension:name": "ray.data.arrow_tensor", "ARROW:extension:metadata": "[6, 9, 3]"}
    yield "Ray's", flat, ray
    yield "Ray's, large", flat.cast(pa.large_list(UINT8)), {**ray, "ARROW:extension:name": "ray.data.arrow_tensor_v2"}
    variable = pa.StructArray.from_arrays([flat, shapes], ["data", "shape"])
    name = "ray.data.arrow_variable_shaped_tensor"
    yield "Ray's, variable", variable, {"ARROW:extension:name": name, "ARROW:extension:metadata": "3"}
    yield "variable", variable.cast(pa.struct([("shape", pa.list_(pa.int32(), 3)), ("data", pa.list_(UINT8))])), None
    arrows = {"ARROW:extension:name": "arrow.variable_shape_tensor", "ARROW:extension:metadata": ""}
    yield "Arrow's, variable", variable.cast(VARIABLE), arrows
    array3d = pa.array([each.tolist() for each in RGB], pa.list_(pa.list_(pa.list_(UINT8))))
    yield "Hugging Face's", array3d, {"ARROW:extension:name": "datasets.features.features.Array3DExtensionType"}


@pytest.mark.parametrize(("column", "metadata"), [pytest.param(*each[1:], id=each[0]) for each in _tensors()])
def test_images_may_be_tensors_of_any_maker(column, metadata, tmp_path):
    rows = _rows(tmp_path, column, metadata)
    assert rows[MESSAGE].to_pylist() == [None] * 3
    assert np.array_equal(_shown(images_of(rows)), RGB)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_the_tensors_of_arrow_are_what_arrow_says(axes):
    views = RGB.transpose(0, *(axis + 1 for axis in axes))
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(views)
    found = image_values(pa.chunked_array([column.take(pa.array([2, None, 0]))]), pa.field("image", column.type))
    assert found[1] is None
    assert np.array_equal([np.load(io.BytesIO(found[at])) for at in (0, 2)], views[[2, 0]])


def test_a_tensor_whose_axes_are_in_an_order_that_cannot_be_known_is_refused(tmp_path):
    about = '{"permutation":[2,0,1]}'
    metadata = {"ARROW:extension:name": "arrow.variable_shape_tensor", "ARROW:extension:metadata": about}
    with pytest.raises(InputError, match=r"'image' \(--image-column\) is .*permutation=\[2,0,1\].*; it must be bytes"):
        _rows(tmp_path, pa.nulls(1, VARIABLE), metadata)
    assert not is_image(pa.field("image", VARIABLE, metadata=metadata))


def test_tensors_that_ray_wrote_are_read_where_ray_is_known(tmp_path):
    import ray.data  # noqa: F401, PLC0415  (makes its types known to Arrow)
    from ray.data.extensions import ArrowTensorArray  # noqa: PLC0415

    ragged = np.empty(3, object)
    ragged[:] = [RGB[0], RGB[1][:5], RGB[2][:, :7]]
    for images in (RGB, ragged):
        column = ArrowTensorArray.from_numpy(images)
        assert isinstance(column.type, pa.ExtensionType)
        rows = _rows(tmp_path, column)
        assert rows[MESSAGE].to_pylist() == [None] * 3
        for shown, expected in zip(_shown(images_of(rows)), images, strict=True):
            assert np.array_equal(shown, expected)


SPARK = pa.struct(
    [
        ("origin", pa.string()),
        *((name, pa.int32()) for name in ("height", "width", "nChannels", "mode")),
        ("data", pa.binary()),
    ]
)


def _spark(pixels, mode=None, **more):
    height, width, channels = pixels.shape
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    mode = 8 * (channels - 1) if mode is None else mode
    image = {
        "height": height,
        "width": width,
        "nChannels": channels,
        "mode": mode,
        "data": pixels[..., order].tobytes(),
    }
    return {"origin": "file:/a.png", **image, **more}


def test_images_of_spark_are_rgb_again(tmp_path):
    alpha = np.concatenate([RGB[0], RGB[1][..., :1]], axis=2)
    undefined = {"origin": "file:/b", "height": -1, "width": -1, "nChannels": -1, "mode": -1, "data": b""}
    cells = [
        _spark(RGB[0]), _spark(RGB[1][..., :1]), _spark(alpha), None, undefined, _spark(RGB[0], mode=21),
        _spark(RGB[0], data=b"x"), _spark(RGB[0], height=None), _spark(RGB[0], nChannels=2), _spark(RGB[0], data=None),
        _spark(RGB[0], height=-6, width=-9),
    ]  # fmt: skip
    rows = _rows(tmp_path, pa.array(cells, SPARK))
    first, grey, with_alpha = _shown(images_of(rows)[:3])
    assert np.array_equal(first, RGB[0])
    assert np.array_equal(grey, np.repeat(RGB[1][..., :1], 3, axis=2))
    assert np.array_equal(with_alpha, decode_image(image_file(Image.fromarray(alpha))))
    assert rows[KIND].to_pylist() == [None] * 3 + ["ImageError"] * 8
    assert rows[MESSAGE].to_pylist()[3:] == [
        "the image is null",
        "Spark could not read the image file:/b",
        "Spark's image has 3 channels and mode 21: it must be of 1, 3 or 4 bytes",
        "the image has 1 values, which is not what the shape (6, 9, 3) has",
        "the image has 162 values, which is not what the shape (None, 9, 3) has",
        "Spark's image has 2 channels and mode 16: it must be of 1, 3 or 4 bytes",
        "the image is null",
        "the image has 162 values, which is not what the shape (-6, -9, 3) has",
    ]


WRONG_SHAPE = "the image has 75 values, which is not what the shape"


@pytest.mark.parametrize(
    ("cell", "kind", "message"),
    [
        ([[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]], None, "the lists of its pixels have different lengths: 1, 2"),
        ([[[1, 2, 3], [1, 2]]], None, "the lists of its pixels have different lengths: 3, 2"),
        ([[[1, 2, 3], None]], None, "the lists of its pixels have different lengths: 3, None"),
        ([[[1, None, 3]] * 5] * 5, None, "a pixel of the image is null"),
        ({"data": [1] * 75, "shape": [5, 5]}, None, f"{WRONG_SHAPE} (5, 5) has"),
        ({"data": [1] * 75, "shape": [-5, -5, 3]}, None, f"{WRONG_SHAPE} (-5, -5, 3)"),
        ({"data": [1] * 75, "shape": [5, None, 3]}, None, f"{WRONG_SHAPE} (5, None, 3) has"),
        ({"data": [1] * 75, "shape": None}, None, "the image is null"),
        ("iVBORw" + "0" * 80 + "*", pa.string(), "iVBORw000000"),
        (AS_TEXT[: len(AS_TEXT) // 4 * 4 - 3], pa.string(), "an image in base64 of "),
        ({"bytes": "photo.jpg"}, None, "an image in base64 of 9 characters has invalid base64"),
        ({"bytes": ""}, None, None),
        ("data:image/png,x", pa.string(), "a data: address of an image must be in base64"),
    ],
)  # fmt: skip
def test_a_cell_that_has_no_image_fails_its_row_alone(cell, kind, message, tmp_path):
    good = {list: RGB[0].tolist(), dict: {"bytes": AS_TEXT, "path": None}, str: AS_TEXT}[type(cell)]
    if isinstance(cell, dict) and "data" in cell:
        good = {"data": RGB[0].ravel().tolist(), "shape": [6, 9, 3]}
    rows = _rows(tmp_path, pa.array([good, cell, good], kind), allow_images_from=(str(tmp_path),))
    shown = _shown([images_of(rows)[at] for at in (0, 2)])
    assert np.array_equal(shown, [RGB[0]] * 2)
    first, found, last = rows[MESSAGE].to_pylist()
    assert first is last is None
    assert (found is None) if message is None else found.startswith(message)


def test_shapes_of_pixels_without_any_fail_their_rows(tmp_path):
    rows = _rows(tmp_path, pa.array([[], [[]], [[[]]], RGB[0].tolist()], pa.list_(pa.list_(pa.list_(UINT8)))))
    for file in images_of(rows)[:3]:
        with pytest.raises(ImageError, match=r"pixels; a side can have|is not an image"):
            decode_image(file)
    assert np.array_equal(_shown(images_of(rows)[3:]), RGB[:1])


NO_IMAGES = {
    "bytes as numbers": pa.list_(UINT8),
    "a list of bytes as numbers, or grey": pa.list_(pa.list_(UINT8)),
    "texts in lists in lists": pa.list_(pa.list_(pa.list_(pa.string()))),
    "lists of lists of images": pa.list_(pa.list_(pa.binary())),
    "no struct of Spark's": pa.struct([("height", pa.int32()), ("width", pa.int32()), ("data", pa.binary())]),
    "data and a shape of texts": pa.struct([("data", pa.list_(UINT8)), ("shape", pa.string())]),
    "a UUID": pa.uuid(),
    "an integer": pa.int64(),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_other_types_are_refused(name):
    field = pa.field("image", NO_IMAGES[name])
    assert not is_image(field)
    assert not is_list_of_images(field)


def test_a_tensor_whose_shape_is_a_pickle_is_not_opened():
    metadata = {"ARROW:extension:name": "ray.data.arrow_tensor", "ARROW:extension:metadata": b"\x80\x05K\x01."}
    assert not is_image(pa.field("image", pa.list_(UINT8), metadata=metadata))


@pytest.mark.parametrize(
    "image",
    [
        pa.array([[PNG], [OTHER, PNG], []]),
        pa.array([[AS_TEXT], [OTHER_AS_TEXT, AS_TEXT], []]),
        pa.array([[{"bytes": AS_TEXT}], [{"bytes": OTHER_AS_TEXT}, {"bytes": AS_TEXT}], []]),
        pa.array([RGB[:1].tolist(), RGB[[1, 0]].tolist(), []], pa.list_(pa.list_(pa.list_(pa.list_(UINT8))))),
        pa.array([[_spark(RGB[0])], [_spark(RGB[1]), _spark(RGB[0])], []], pa.list_(SPARK)),
        pa.ListArray.from_arrays(
            pa.array([0, 1, 3, 3]), pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(RGB[[0, 1, 0]]))
        ),
    ],
    ids=lambda value: str(value.type)[:60],
)
def test_lists_have_images_of_any_kind(image, tmp_path):
    rows = _rows(tmp_path, image)
    one, two, none = rows[IMAGES].to_pylist()
    assert np.array_equal(_shown(one), RGB[:1])
    assert np.array_equal(_shown(two), RGB[[1, 0]])
    assert none is None
    assert rows[MESSAGE].to_pylist() == [None, None, "the list of images is empty"]


def test_text_is_an_image_if_it_begins_like_one_or_is_longer_than_paths():
    bmp = image_file(Image.new("RGB", (40, 40), "red"), "BMP")
    for data in (
        PNG,
        bmp,
        *(image_file(Image.new("RGB", (40, 40)), kind) for kind in ("JPEG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000")),
    ):
        text = base64.b64encode(data).decode()
        for spelling in (text, text.rstrip("="), text.replace("+", "-").replace("/", "_"), f" {text}\n"):
            assert of_text(spelling) == data
    for path in (
        "photo.jpg",
        "9j/" + "a" * 80,
        "A" * 80,
        "sha/" + "0123456789abcdef" * 8,
        "a" * 1999,
        "iVBORw0KGgo",
        "/9j/a",
    ):
        assert of_text(path) == path
    assert of_text("a" * 2000) == base64.b64decode("a" * 2000)
    assert plain_image({"bytes": None, "path": "a"}) == "a"
    assert plain_image({"bytes": memoryview(b"x"), "path": "a"}) == b"x"
    assert plain_image({}) is None
    assert plain_image(7) == 7


def test_a_column_of_text_is_refused_if_its_first_rows_are_paths_and_no_place_is_allowed(tmp_path):
    def refused(*images):
        pq.write_table(pa.table({"image": pa.array(images, pa.string())}), tmp_path / "a.parquet")
        source = open_source(caption_config(tmp_path, prompt="What?"))
        refuse_paths(source, (str(tmp_path),))
        refuse_paths(source, ())
        return read_rows(source, "What?")

    with pytest.raises(InputError, match=r"a.parquet: column 'image' has paths .* --allow-images-from: a.jpg is not"):
        refused(None, "a.jpg", "b.jpg")
    rows = refused("a.jpg", AS_TEXT, None)
    assert images_of(rows) == [None, PNG, None]
    assert rows[MESSAGE].to_pylist() == [
        "a.jpg is not inside any folder of --allow-images-from", None, "the image is null"
    ]  # fmt: skip
    assert refused(None, None)[STAGE].to_pylist() == ["image", "image"]
    assert refused(f"data:;base64,{AS_TEXT}")[STAGE].to_pylist() == [None]
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), tmp_path / "a.parquet")
    refuse_paths(open_source(caption_config(tmp_path, prompt="What?")), ())


def test_messages_have_images_in_base64_too(tmp_path):
    parts = [
        [{"type": "image", "image": AS_TEXT}],
        [{"type": "image", "bytes": AS_TEXT}],
        [{"type": "image", "image": {"bytes": AS_TEXT, "path": "a"}}],
        [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{AS_TEXT}"}}],
        [{"type": "image", "image": {"bytes": "no!"}}],
    ]
    messages = [json.dumps([{"role": "user", "content": [*part, "What?"]}]) for part in parts]
    pq.write_table(pa.table({"id": range(5), "messages": messages}), tmp_path / "a.parquet")
    rows = read_rows(open_source(caption_config(tmp_path, messages_column="messages")))
    assert images_of(rows) == [PNG] * 4 + [None]
    assert rows[MESSAGE][4].as_py().startswith("an image in base64 of 3 characters has invalid base64")


def test_a_column_of_nulls_has_no_image(tmp_path):
    for image in (
        pa.nulls(2),
        pa.nulls(2, pa.list_(pa.list_(pa.list_(UINT8)))),
        pa.nulls(2, SPARK),
        pa.nulls(2, pa.fixed_shape_tensor(UINT8, (2, 2, 3))),
    ):
        assert _rows(tmp_path, image)[MESSAGE].to_pylist() == ["the image is null"] * 2
