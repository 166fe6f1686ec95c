"""Images as columns have them, to bytes of files, paths and addresses.

What enters: values of an image column, and of messages, that nobody has checked. What leaves: bytes, text that names
an image elsewhere, or the error of a cell that is neither.

A cell is the bytes of a file; text, which is a `data:` address, base64, or else a path or an address; a struct of
`bytes`, which text holds in base64, and `path`; pixels, in nested lists (H, W, C) or tensors of Arrow or Ray; or an
image of Spark's. Pixels leave as `.npy` files, which hold any dtype and shape: what they mean is not decided here.
"""

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qvl_batch.errors import ImageError
from qvl_batch.input.cells import values_of
from qvl_batch.schema import is_bytes, is_text, item_type, plain_type

#: What a column of images can be, for messages.
WANTED = "bytes, text, structs of bytes and path, tensors or lists (height, width, channels) of pixels, or lists of it"
#: Text that can be base64 of an image: such characters alone, at least 64 of them.
_BASE64 = re.compile(r"[\w+/\s-]{64,}=*\s*", re.ASCII)
#: How images begin. What does not is base64 only if it is longer than paths usually are.
_IMAGE = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....(ftyp|jP  )|\x93NUMPY", re.DOTALL)
_LONGEST_PATH = 2_000
_URL_SAFE = str.maketrans("-_", "+/")
#: Fields of Spark's image schema, and the order of the channels that makes its BGR the RGB that it stands for.
_SPARK = ("origin", "height", "width", "nChannels", "mode", "data")
_FROM_BGR = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}
#: OpenCV's type of no pixels, and its step from one type of bytes to that of one channel more.
_UNDEFINED, _BITS = -1, 8
_RAY_TENSORS = {"ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"}
_VARIABLE_TENSOR = "arrow.variable_shape_tensor"

Read = Callable[[pa.ChunkedArray], list[object]]


def is_image(field: pa.Field) -> bool:
    """Whether a column can have single images."""
    return _reading(field) is not None


def is_list_of_images(field: pa.Field) -> bool:
    """Whether a column can have lists of images."""
    return not is_image(field) and item_type(field.type) is not None and is_image(field.type.value_field)


def image_values(column: pa.ChunkedArray, field: pa.Field) -> list[object]:
    """For each row bytes, text, None or the error of its image; or a list of them.

    Args:
        column: of images or lists of them.
        field: its type, with the metadata that say what it stands for.
    """
    read = _reading(field)
    if read is not None:
        return read(column)
    items = iter(image_values(pc.list_flatten(column), field.type.value_field))
    counts = pc.list_value_length(column).to_pylist()
    return [None if count is None else list(islice(items, count)) for count in counts]


def plain_image(image: object) -> object:
    """An image as bytes or as the path or address of a file, if it is text or a mapping of `bytes` and `path`; anything
    else unchanged.

    Raises:
        ImageError: it is base64, and damaged.
    """
    if isinstance(image, Mapping):
        data = image.get("bytes")
        if isinstance(data, str):
            return of_text(data, is_bytes=True)
        image = image.get("path") if data is None else data
    return of_text(image) if isinstance(image, str) else image


def of_text(text: str, *, is_bytes: bool = False) -> bytes | str:
    """The image that a text holds, a `data:` address or base64; or the text, if it is a path or an address.

    Args:
        text: of any length.
        is_bytes: it stands for bytes, so it is no path.

    Raises:
        ImageError: it is damaged, or a `data:` address that is not in base64.
    """
    if text[:5].lower() == "data:":
        head, comma, data = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ImageError("a data: address of an image must be in base64: data:image/...;base64,...")
        return _decoded(unquote(data), "a data: address")
    if is_bytes or (_BASE64.fullmatch(text) and (len(text) >= _LONGEST_PATH or _begins_like_an_image(text))):
        return _decoded(text, f"an image in base64 of {len(text):,} characters")
    return text


def _begins_like_an_image(text: str) -> bool:
    return _IMAGE.match(_decoded("".join(text[:64].split())[:16], "")) is not None


def _decoded(text: str, what: str) -> bytes:
    """Bytes in base64, in the alphabet of URLs or the usual one, with or without padding."""
    text = "".join(text.split()).rstrip("=").translate(_URL_SAFE)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"{what} has invalid base64: {error}") from error


def _reading(field: pa.Field) -> Read | None:
    """How images of a column are read, None if its type has none."""
    kind, name, about = _stored(field)
    if name == _VARIABLE_TENSOR and "permutation" in about:
        return None  # Arrow does not yet say in Python which one
    tensor = _tensor(field.type, name, about)
    if tensor is not None:
        return partial(_each, partial(_reshaped, *tensor))
    if pa.types.is_struct(kind):
        return _reading_structs(kind)
    if is_bytes(kind) or is_text(kind) or pa.types.is_null(kind):
        return values_of
    return partial(_each, _nested) if _depth(kind) == len(("height", "width", "channels")) else None


def _reading_structs(kind: pa.StructType) -> Read | None:
    names = Counter(part.name for part in kind)
    if {**names} == dict.fromkeys(_SPARK, 1):
        return _of_spark
    if {**names} == {"data": 1, "shape": 1} and {_depth(part.type) for part in kind} == {1}:
        return _of_tensors
    both = {names["bytes"], names["path"]}
    return _bytes_or_paths if 1 in both and max(both) == 1 else None


def _stored(field: pa.Field) -> tuple[pa.DataType, str, str]:
    """What a column is stored as, and of an extension its name and what else is known of it; registered or not."""
    kind, metadata = field.type, field.metadata or {}
    if isinstance(kind, pa.ExtensionType):  # one of a library that this process has imported
        return kind.storage_type, kind.extension_name, kind.__arrow_ext_serialize__().decode(errors="replace")
    if getattr(kind, "extension_name", None) == _VARIABLE_TENSOR:
        return kind.storage_type, _VARIABLE_TENSOR, str(kind)
    name, about = (metadata.get(f"ARROW:extension:{part}".encode(), b"") for part in ("name", "metadata"))
    return plain_type(kind), name.decode(errors="replace"), about.decode(errors="replace")


def _tensor(kind: pa.DataType, name: str, about: str) -> tuple[Sequence[int], Sequence[int] | None] | None:
    """Shape of a tensor as it is stored, and the order of its axes that is meant; None for other types."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return kind.shape, kind.permutation
    if name not in _RAY_TENSORS:
        return None
    try:
        return [int(size) for size in json.loads(about)], None
    except (ValueError, TypeError):  # Ray 2.49 to 2.54 wrote pickles, which are not opened
        return None


def _depth(kind: pa.DataType) -> int | None:
    """How many lists of lists a type is whose innermost items are numbers; None if they are not."""
    depth = 0
    while (item := item_type(kind)) is not None:
        kind, depth = item, depth + 1
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return depth if is_number else None


def _each(pixels_of: Callable[[pa.Array], NDArray[Any]], column: pa.ChunkedArray) -> list[object]:
    """Images of lists of pixels, each as a `.npy` file."""
    return [_result(partial(pixels_of, cell.values)) if cell.is_valid else None for cell in _storage(column)]


def _storage(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column itself, or of an extension what it is stored as."""
    if not isinstance(column.type, pa.BaseExtensionType):
        return column
    return pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)


def _result(pixels: Callable[[], NDArray[Any]]) -> bytes | ImageError:
    try:
        file = io.BytesIO()
        np.save(file, pixels(), allow_pickle=False)
    except ImageError as error:
        return error
    return file.getvalue()


def _nested(values: pa.Array) -> NDArray[Any]:
    """Pixels of lists of lists of lists.

    Raises:
        ImageError: lists beside one another differ in length, or a pixel is null.
    """
    shape = [len(values)]
    while item_type(values.type) is not None:
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) > 1:
            raise ImageError(f"the lists of its pixels have different lengths: {', '.join(map(str, lengths[:3]))}")
        shape += lengths or [0]
        values = values.flatten()
    return _reshaped(shape, None, values)


def _reshaped(shape: Sequence[int], permutation: Sequence[int] | None, values: pa.Array) -> NDArray[Any]:
    """Pixels of a flat list of them.

    Raises:
        ImageError: they are more or less than the shape has, or one is null.
    """
    if values.null_count:
        raise ImageError("a pixel of the image is null")
    pixels = _of_shape(values.to_numpy(zero_copy_only=False), shape)
    return pixels if permutation is None else pixels.transpose(permutation)


def _of_shape(values: NDArray[Any], shape: Sequence[Any]) -> NDArray[Any]:
    if None in shape or min(shape, default=0) < 0 or math.prod(shape) != len(values):
        raise ImageError(f"the image has {len(values):,} values, which is not what the shape {tuple(shape)} has")
    return values.reshape(tuple(shape))


def _parts(column: pa.ChunkedArray, *names: str) -> list[tuple[Any, ...]]:
    """Values of fields of each struct."""
    fields = (pc.struct_field(column, column.type.get_field_index(name)) for name in names)
    return list(zip(*map(values_of, fields), strict=True))


def _bytes_or_paths(column: pa.ChunkedArray) -> list[object]:
    """The `bytes` of each struct, or if they are null its `path`. Other fields are not looked at."""
    values: list[object] = [None] * len(column)
    for name in ("path", "bytes"):
        if column.type.get_field_index(name) >= 0:
            parts = [_text_as_bytes(part) if name == "bytes" else part for (part,) in _parts(column, name)]
            values = [value if part is None else part for part, value in zip(parts, values, strict=True)]
    return values


def _text_as_bytes(value: object) -> object:
    try:
        return of_text(value, is_bytes=True) if isinstance(value, str) else value
    except ImageError as error:
        return error


def _of_tensors(column: pa.ChunkedArray) -> list[object]:
    """Images of structs of pixels and a shape."""
    column = _storage(column)
    cells = zip(pc.struct_field(column, "data"), _parts(column, "shape"), strict=True)
    return [
        _result(partial(_reshaped, shape, None, cell.values)) if cell.is_valid and shape is not None else None
        for cell, (shape,) in cells
    ]


def _of_spark(column: pa.ChunkedArray) -> list[object]:
    """Images of Spark's image schema."""
    return [_spark_image(*row) for row in _parts(column, *_SPARK)]


def _spark_image(origin: object, height: object, width: object, channels: Any, mode: object, data: Any) -> object:
    """An image of which Spark has the place, the size, the number of channels, and the bytes: rows from the top, in the
    order of blue, green, red and alpha. The mode is OpenCV's number for a type of pixels.
    """

    def pixels() -> NDArray[Any]:
        if mode == _UNDEFINED:
            raise ImageError(f"Spark could not read the image {origin}")
        if channels not in _FROM_BGR or mode != _BITS * (channels - 1):
            raise ImageError(f"Spark's image has {channels} channels and mode {mode}: it must be of 1, 3 or 4 bytes")
        return _of_shape(np.frombuffer(data, np.uint8), (height, width, channels))[..., _FROM_BGR[channels]]

    return None if data is None else _result(pixels)
