"""A type in common of the values that a column has in several files, and casts that change no value.

What enters: types of columns, and columns. What leaves: the narrowest type that Arrow finds for all of them, and the
columns in it. Where a type holds nearly all values of another, as a double does of 64-bit integers, each value is
checked when it is read, and one that would change is the error of its row.
"""

from collections.abc import Callable

import pyarrow as pa

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
            pa.nulls(0, kind).cast(joined)
    except pa.ArrowException:
        return None
    return joined if _is_kept(a, joined) and _is_kept(b, joined) else None


def exact(column: pa.ChunkedArray, name: str, kind: pa.DataType) -> tuple[pa.ChunkedArray, list[RowError | None]]:
    """A column in another type: its values, and for each row whose value would change a null and its error."""
    try:
        return column.cast(kind), [None] * len(column)
    except pa.ArrowInvalid:
        # A cast of a slice would look at all items of its lists; `take` copies, but not views.
        column = column.cast(without_views(column.type))
        parts = [_exact(column.take([row]), name, kind) for row in range(len(column))]
    return pa.chunked_array([part for part, _ in parts], kind), [error for _, error in parts]


def _exact(value: pa.ChunkedArray, name: str, kind: pa.DataType) -> tuple[pa.Array, RowError | None]:
    try:
        return value.cast(kind).combine_chunks(), None
    except pa.ArrowInvalid:
        found = value_of(value[0])
        shown = f"the {value.type}" if isinstance(found, RecordError) else f"{str(found)[:_SHOWN]}, {value.type}"
        what = f"column {name!r} (--keep-columns) has {shown}"
        return pa.nulls(1, kind), RecordError(f"{what}, which {kind}, the type for all files, would change")


def without_views(kind: pa.DataType) -> pa.DataType:
    """The type with contiguous values in place of views: Arrow's `take` does not support views."""
    return _changed(kind, _contiguous)


def _contiguous(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _changed(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `leaf` of each type in it that is no struct, list or map; lists are without views."""

    def of(field: pa.Field) -> pa.Field:
        return field.with_type(_changed(field.type, leaf))

    if pa.types.is_struct(kind):
        return pa.struct([of(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(of(kind.key_field), of(kind.item_field), kind.keys_sorted)
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
