"""Values of JSON as columns: which type holds the values of a field, and values as arrays of that type.

What enters: objects that were parsed from JSON. What leaves: a schema, and arrays.

A field has the narrowest type that holds all its values, of the whole file and of all files of its kind:

    bool, int64, double       booleans; integers; numbers
    string                    strings
    list<string>              lists of strings; a string among them is a list of one
    string                    all else, also where kinds are mixed: strings as they are, other values as compact JSON

A field that an object lacks is null in its row. The type is a matter of the values alone, so it is the same whenever
the files are looked through, and however rows are divided among tasks.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from qvl_batch.errors import RecordError

TEXTS = pa.list_(pa.string())
#: Most fields of all objects of a file; with more, they are no rows of a table.
MOST_FIELDS = 10_000
#: Most values of one row: as Python objects, more would take gigabytes.
MOST_VALUES = 1_000_000
_INT64 = range(-(1 << 63), 1 << 63)
#: Floats below this are exact integers if they are whole.
_EXACT = 2.0**53


def parse_object(data: bytes) -> dict[str, Any]:
    """An object from its JSON.

    Raises:
        RecordError: it is no JSON in UTF-8, no object, names a key twice, or has too many values.
    """
    try:
        text = data.decode()
        if sum(map(text.count, "[{,")) > MOST_VALUES:
            raise RecordError(f"it is JSON of more than {MOST_VALUES:,} values")
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair can be in no column
    except UnicodeDecodeError as error:
        raise RecordError(f"it is not UTF-8: {error}") from error
    except UnicodeEncodeError as error:
        raise RecordError(f"it has half of a surrogate pair: {error}") from error
    except RecursionError as error:
        raise RecordError("it is JSON that is nested too deeply") from error
    except ValueError as error:
        raise RecordError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecordError(f"it is JSON, but no object: {text[:40]!r}")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise RecordError(f"the key {name!r} is there twice")
    return found


class Types:
    """Collects the types of fields from objects."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in an object.

        Raises:
            ValueError: there are too many fields.
        """
        for name, value in record.items():
            known, kind = self._types.get(name), type_of(value)
            if known is None:
                if len(self._types) == MOST_FIELDS:
                    raise ValueError(f"its objects have more than {MOST_FIELDS:,} different fields")
                self._types[name] = kind
            elif kind is not known:
                self._types[name] = _joined(known, kind)

    def schema(self) -> pa.Schema:
        """Fields of all objects, in the order in which they came; a schema for `joined_schema` alone."""
        return pa.schema(list(self._types.items()))


_NULL, _BOOL, _INT, _DOUBLE, _TEXT = pa.null(), pa.bool_(), pa.int64(), pa.float64(), pa.string()
#: Of all else, while types are joined: text too, but not that of strings, which lists of strings take in.
_MIXED = pa.large_string()


def type_of(value: Any) -> pa.DataType:
    """The type that one value needs."""
    if isinstance(value, str):
        return _TEXT
    if value is None:
        return _NULL
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _INT if value in _INT64 else _MIXED
    if isinstance(value, float):
        return _DOUBLE
    is_texts = isinstance(value, list) and all(item is None or isinstance(item, str) for item in value)
    return TEXTS if is_texts else _MIXED


def _joined(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The type that holds values of both."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    both = {a, b}
    if both == {_INT, _DOUBLE}:
        return _DOUBLE
    return TEXTS if both == {TEXTS, _TEXT} else _MIXED


def joined_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The schema that holds the values of all files."""
    types: dict[str, pa.DataType] = {}
    for schema in dict.fromkeys(schemas):
        for field in schema:
            known = types.get(field.name)
            types[field.name] = field.type if known is None else _joined(known, field.type)
    return pa.schema([(name, _TEXT if kind == _MIXED else kind) for name, kind in types.items()])


def column(values: Sequence[Any], kind: pa.DataType | None) -> pa.Array:
    """Values of one field as an array.

    Args:
        values: None where there is none.
        kind: the type of the field; None for text, or lists of text if one of these values is such a list.
    """
    if kind is None:
        kind = TEXTS if any(type_of(value) is TEXTS for value in values) else _TEXT
    return pa.array([None if value is None else _as(kind, value) for value in values], kind)


def _as(kind: pa.DataType, value: Any) -> Any:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return value if type_of(value) is TEXTS else [as_text(value)]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return as_text(value)
    return float(value) if pa.types.is_floating(kind) else value


def as_text(value: Any) -> str:
    """A string as it is, any other value as compact JSON; a whole number has no point."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        value = int(value)
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
