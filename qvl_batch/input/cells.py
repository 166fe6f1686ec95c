"""Values of a column as Python objects.

What enters: columns, with values that nobody has checked. What leaves: objects, with a `RecordError` in place of each
value that Python has none for.
"""

from collections.abc import Iterator

import pyarrow as pa

from qvl_batch.errors import RecordError
from qvl_batch.schema import item_type


def values_of(column: pa.ChunkedArray) -> list[object]:
    """Values of all rows."""
    try:
        values: list[object] = column.to_pylist()
    except (ValueError, OverflowError):  # a string that is not UTF-8, or a date outside Python's range
        return [value_of(scalar) for scalar in column]
    return values


def value_of(scalar: pa.Scalar) -> object:
    """One value."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RecordError(f"a string is not valid Unicode text: {error}")
    except (ValueError, OverflowError) as error:
        return RecordError(f"a {scalar.type} cannot be read: {error}")


def one_by_one(column: pa.ChunkedArray, most: int) -> Iterator[object]:
    """Values as `values_of` has them, each made when it is asked for: messages can take much more memory as objects.

    Those with more than `most` items in lists and maps are errors.
    """
    for chunk in column.chunks:
        for index in range(len(chunk)):
            if _items(chunk.slice(index, 1)) > most:
                yield RecordError(f"the messages have more than {most:,} values")
            else:
                yield value_of(chunk[index])


def _items(column: pa.Array) -> int:
    """Number of items in all lists and maps of a column."""
    if pa.types.is_map(column.type):
        # Not as lists of structs: Arrow's cast of a slice ends the process where there are fields of type null.
        start, stop = (int(column.offsets[end].as_py()) for end in (0, -1))
        return stop - start + sum(_items(part.slice(start, stop - start)) for part in (column.keys, column.items))
    if item_type(column.type) is not None:
        items = column.flatten()
        return len(items) + _items(items)
    return sum(map(_items, column.flatten())) if pa.types.is_struct(column.type) else 0
