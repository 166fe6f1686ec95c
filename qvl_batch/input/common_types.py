"""A type in common of the values that a column has in several files, and casts that change no value.

What enters: types of columns, and columns. What leaves: the narrowest type that Arrow finds for all of them, and the
columns in it. Where a type holds nearly all values of another, as a double does of 64-bit integers, each value is
checked when it is read, and one that would change is the error of its row.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.errors import RecordError, RowError
from qvl_batch.input.cells import value_of
from qvl_batch.schema import is_text, item_type

#: List types: their test, and the constructor of such a type without views.
_LISTS = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.large_list),
    (pa.types.is_large_list_view, pa.large_list),
)
#: Characters of a value that a message repeats.
_SHOWN = 80


def common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """A type that holds the values of both unchanged, None if there is none.

    Integers and floats become wider ones, or doubles; times the finer unit; lists and structs what their items and
    fields become, where a field that one of them lacks is null; dictionaries the values that they stand for.
    """
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    try:
        plain = [pa.schema([("", _changed(kind, _decoded))]) for kind in (a, b)]
        joined = pa.unify_schemas(plain, promote_options="permissive").field(0).type
        for kind in (a, b):
            _cast(pa.nulls(1, kind), joined)
    except pa.ArrowException:
        return None
    return joined if _is_kept(a, joined) and _is_kept(b, joined) else None


def exact(column: pa.ChunkedArray, name: str, kind: pa.DataType) -> tuple[pa.ChunkedArray, list[RowError | None]]:
    """A column in another type: its values, and for each row whose value would change a null and its error.

    Args:
        column: the values.
        name: of the column, for messages.
        kind: what `common_type` makes of its type and those of other files.
    """
    try:
        parts = [_cast(chunk, kind) for chunk in column.chunks]
        return pa.chunked_array(parts, kind), [None] * len(column)
    except pa.ArrowInvalid:
        rows = [_exact(chunk.slice(row, 1), name, kind) for chunk in column.chunks for row in range(len(chunk))]
    return pa.chunked_array([values for values, _ in rows], kind), [error for _, error in rows]


def _exact(value: pa.Array, name: str, kind: pa.DataType) -> tuple[pa.Array, RowError | None]:
    try:
        return _cast(value, kind), None
    except pa.ArrowInvalid:
        found = value_of(value[0])
        shown = f"the {value.type}" if isinstance(found, RecordError) else f"{str(found)[:_SHOWN]}, {value.type}"
        what = f"column {name!r} (--keep-columns) has {shown}"
        return pa.nulls(1, kind), RecordError(f"{what}, which {kind}, the type for all files, would change")


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """An array in another type, made from the inside out: what Arrow's own cast makes of lists can have other values,
    where they are views or slices, or types in them are null.

    Raises:
        pa.ArrowInvalid: a value would change.
    """
    if array.type == kind:
        return array
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), kind)
    if pa.types.is_dictionary(array.type):
        return _cast(array.dictionary_decode(), kind)
    nested = {pa.types.is_struct: _structs, pa.types.is_map: _maps, item_type: _lists}
    make = next((make for is_kind, make in nested.items() if is_kind(kind)), None)
    return array.cast(kind) if make is None else make(array, kind)


def _structs(array: pa.StructArray, kind: pa.StructType) -> pa.StructArray:
    fields, names = array.flatten(), [field.name for field in array.type]
    if names != [field.name for field in kind]:  # then no name is there twice
        given = dict(zip(names, fields, strict=True))
        fields = [given.get(field.name, pa.nulls(len(array))) for field in kind]
    fields = [_cast(*each) for each in zip(fields, (field.type for field in kind), strict=True)]
    return pa.StructArray.from_arrays(fields, fields=list(kind), mask=array.is_null())


def _maps(array: pa.MapArray, kind: pa.MapType) -> pa.MapArray:
    start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
    keys, items = (part.slice(start, stop - start) for part in (array.keys, array.items))
    keys, items = _cast(keys, kind.key_type), _cast(items, kind.item_type)
    return pa.MapArray.from_arrays(pc.subtract(array.offsets, start), keys, items, type=kind, mask=array.is_null())


def _lists(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        values = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        return pa.FixedSizeListArray.from_arrays(_cast(values, kind.value_type), type=kind, mask=array.is_null())
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    made, ends = (pa.LargeListArray, pa.int64()) if pa.types.is_large_list(kind) else (pa.ListArray, pa.int32())
    offsets = pa.array(np.append(0, np.cumsum(lengths)), ends)
    return made.from_arrays(offsets, _cast(array.flatten(), kind.value_type), type=kind, mask=array.is_null())


def without_views(kind: pa.DataType) -> pa.DataType:
    """The type with contiguous values in place of views, which Arrow's `take` does not support, and nullable fields."""
    return _changed(kind, _contiguous)


def _contiguous(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _changed(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `leaf` of each type in it that is no struct, list or map; lists without views, fields nullable."""

    def of(field: pa.Field) -> pa.Field:
        return field.with_type(_changed(field.type, leaf)).with_nullable(nullable=True)

    if pa.types.is_struct(kind):
        return pa.struct([of(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_changed(kind.key_type, leaf), of(kind.item_field), kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(of(kind.value_field), kind.list_size)
    make = next((make for is_kind, make in _LISTS if is_kind(kind)), None)
    return leaf(kind) if make is None else make(of(kind.value_field))


def _is_kept(kind: pa.DataType, joined: pa.DataType) -> bool:
    """Whether values stay what they are in a type that Arrow casts them to: text is not bytes, nor a decimal a float.

    Args:
        kind: of the values.
        joined: what `pa.unify_schemas` makes of it.
    """
    if pa.types.is_struct(kind):
        return all(_is_kept(field.type, joined.field(field.name).type) for field in kind)
    if pa.types.is_map(kind):
        pairs = ((kind.key_type, joined.key_type), (kind.item_type, joined.item_type))
        return all(_is_kept(*pair) for pair in pairs)
    item = item_type(kind)
    if item is not None:
        return _is_kept(item, item_type(joined))
    kind = _decoded(kind)
    same = all(is_kind(kind) == is_kind(joined) for is_kind in (pa.types.is_decimal, is_text))
    return same or bool(pa.types.is_null(kind))
