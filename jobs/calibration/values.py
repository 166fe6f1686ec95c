"""Values of answers and of what is true: where they are in a table, and when they are the same.

What enters: columns. What leaves: their values, and types by path. This module knows nothing of files.
"""

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.schema import is_text, plain_type, readable


def type_at(kind: pa.DataType, path: Sequence[str]) -> pa.DataType | None:
    """Type of a field, given by its path of names, of nested structs; None if there is no such field."""
    for name in path:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return kind


def column_at(column: pa.ChunkedArray, path: Sequence[str]) -> pa.ChunkedArray:
    """The field of a column of structs; null where a struct around it is."""
    return pc.struct_field(column, list(path)) if path else column


def is_single(kind: pa.DataType) -> bool:
    """Whether values of this type can be compared: text, numbers, booleans, dictionaries of these, nulls."""
    kind = plain_type(kind)
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean, pa.types.is_null)
    return is_text(kind) or any(check(kind) for check in checks)


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """Values of a column for which `is_single`."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_float32(column.type):
        column = column.cast(pa.string())  # 0.1 rather than the double nearest to its float
    return readable(column)


def same(value: Any, truth: Any) -> bool:
    """Whether an answer is the right one.

    Texts are compared letter by letter. Where one of the two is a number or a boolean, a text is read as one: 3 is the
    same as 3.0 and "3", and true as "True". A null is the same as nothing.
    """
    if value is None or truth is None:
        return False
    if isinstance(value, bool) or isinstance(truth, bool):
        return _equal(_boolean(value), _boolean(truth))
    if isinstance(value, str) and isinstance(truth, str):
        return value == truth
    return _equal(_number(value), _number(truth))


def _equal(value: bool | Decimal | None, truth: bool | Decimal | None) -> bool:
    return value is not None and value == truth


def _boolean(value: Any) -> bool | None:
    return {"true": True, "false": False, "1": True, "0": False}.get(str(value).strip().lower())


def _number(value: Any) -> Decimal | None:
    """A number, a float by its shortest decimal form; None if it is none."""
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    return None if number.is_nan() else number
