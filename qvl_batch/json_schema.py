"""JSON schemas of answers: types of columns that hold their values and how sure these are, and their shortest value.

    {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer"}}}
    struct<color: string, count: int64>

What enters: a JSON schema, as Python objects. What leaves: the schema with what it leaves open decided, an Arrow type,
values of that type, text; or a `ConstraintError` that names the place in the schema.

This module knows nothing of tokens. Which keywords the decoder can follow is the business of its grammar.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from qvl_batch.errors import ConstraintError
from qvl_batch.shortest_match import shortest_match

#: Largest integer of a schema that bounds none: an int64 of any digits.
MOST_INTEGER = 10**18 - 1
#: Deepest value that `shortest` looks for: one that is deeper belongs to a schema that refers to itself.
DEEPEST = 64
#: Keywords that hold one schema, a list of schemas, or schemas by name.
_ONE, _SEVERAL, _NAMED = ("items", "additionalProperties"), ("anyOf", "oneOf", "allOf"), ("properties", "$defs")
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
#: What a value can be: a scalar one of these texts, None if it is a string of any text; an object, by property; an
#: array, by item.
_Possible = frozenset[str] | None | dict[str, "_Possible"] | list["_Possible"]
_SCALARS = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "null": pa.null(),
}


def decided(schema: Any) -> Any:
    """The schema with what it leaves open decided, so that its values fit into a column.

    An object has the properties that it names and no others, and an integer without bounds fits into an int64.
    """
    if not isinstance(schema, dict):
        return schema
    found = {key: _decided_in(key, value) for key, value in schema.items()}
    if "properties" in found:
        found.setdefault("additionalProperties", False)
    if found.get("type") in ("integer", ["integer", "null"], ["null", "integer"]):
        lower, upper = ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"})
        if not lower & found.keys():
            found["minimum"] = -MOST_INTEGER
        if not upper & found.keys():
            found["maximum"] = MOST_INTEGER
    return found


def _decided_in(key: str, value: Any) -> Any:
    if key in _ONE:
        return decided(value)
    if key in _SEVERAL and isinstance(value, list):
        return [decided(each) for each in value]
    if key in _NAMED and isinstance(value, dict):
        return {name: decided(each) for name, each in value.items()}
    return value


def arrow_type(schema: Any) -> pa.DataType:
    """Type of the column that holds the values of a schema.

    Objects are structs, arrays lists, integers int64, numbers float64. An enum has the type of its values. Where there
    are alternatives, they must have one type, beside null. Properties that are not required can be null.

    Raises:
        ConstraintError: no type follows from the schema; names the place in it.
    """
    return _Typed(schema).type_of(schema, "#")


class _Typed:
    """Finds the types of a schema."""

    def __init__(self, root: Any) -> None:
        self._root = root
        #: References that are being followed.
        self._following: list[str] = []

    def type_of(self, schema: Any, at: str) -> pa.DataType:
        if not isinstance(schema, dict):
            raise ConstraintError(f"{at} is {json.dumps(schema)}, which allows anything, so no column follows from it")
        if "$ref" in schema:
            return self._of_reference(schema["$ref"], at)
        if "const" in schema or "enum" in schema:
            return self._of_values(schema["enum"] if "enum" in schema else [schema["const"]], at)
        for key in _SEVERAL:
            if key in schema:
                return _common([self.type_of(each, f"{at}/{key}/{n}") for n, each in enumerate(schema[key])], at)
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if kinds is None:
            raise ConstraintError(f"{at} has no type, so no column follows from it")
        return _common([self._of_kind(kind, schema, at) for kind in _as_list(kinds)], at)

    def _of_reference(self, reference: Any, at: str) -> pa.DataType:
        if reference in self._following:
            raise ConstraintError(f"{at} refers to {reference} inside of it, so no column follows from it")
        self._following.append(reference)
        found = self.type_of(referred(self._root, reference), reference)
        self._following.pop()
        return found

    def _of_values(self, values: Any, at: str) -> pa.DataType:
        kinds = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string(), type(None): pa.null()}
        if not isinstance(values, list) or not values or any(type(value) not in kinds for value in values):
            raise ConstraintError(f"{at} must be an enum of strings, numbers, booleans or null")
        if any(type(value) is int and abs(value) > MOST_INTEGER for value in values):
            raise ConstraintError(f"{at} has an integer beyond {MOST_INTEGER:,}, so no column follows from it")
        return _common([kinds[type(value)] for value in values], at)

    def _of_kind(self, kind: Any, schema: Mapping[str, Any], at: str) -> pa.DataType:
        if kind == "integer" and any(abs(schema.get(name) or 0) > MOST_INTEGER for name in _BOUNDS):
            raise ConstraintError(f"{at} has a bound beyond {MOST_INTEGER:,}, so no column follows from it")
        if kind in _SCALARS:
            return _SCALARS[kind]
        if kind == "array":
            if "items" not in schema or "prefixItems" in schema:
                raise ConstraintError(
                    f"{at} is an array without one schema for its items, so no column follows from it"
                )
            return pa.list_(self.type_of(schema["items"], f"{at}/items"))
        if kind == "object":
            return self._struct(schema, at)
        raise ConstraintError(f"{at}/type is {json.dumps(kind)}, which is no type of JSON schemas")

    def _struct(self, schema: Mapping[str, Any], at: str) -> pa.DataType:
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not properties or schema.get("additionalProperties"):
            raise ConstraintError(
                f"{at} is an object whose properties are not all named, so no column follows from it: give properties, "
                "and no additionalProperties"
            )
        return pa.struct(
            [pa.field(name, self.type_of(each, f"{at}/properties/{name}")) for name, each in properties.items()]
        )


def _common(kinds: Sequence[pa.DataType], at: str) -> pa.DataType:
    """The one type of alternatives, beside null."""
    kinds = list(dict.fromkeys(kind for kind in kinds if not pa.types.is_null(kind)))
    if not kinds:
        return pa.null()
    if set(kinds) == {pa.int64(), pa.float64()}:
        return pa.float64()
    if len(kinds) > 1:
        names = " or ".join(map(str, kinds))
        raise ConstraintError(f"{at} can be {names}, so no column follows from it")
    return kinds[0]


def _as_list(kinds: Any) -> list[Any]:
    return kinds if isinstance(kinds, list) else [kinds]


def referred(root: Any, reference: Any) -> Any:
    """The part of a schema that a reference names, such as `#/$defs/color`.

    Raises:
        ConstraintError: it names none.
    """
    found = root
    parts = str(reference).split("/")
    for part in parts[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            break
        found = found[name]
    else:
        if parts[0] == "#":
            return found
    raise ConstraintError(f"{reference} is no part of the schema")


def confidence_type(schema: Any) -> pa.DataType | None:
    """Type of the column that holds how sure the model is of each value of a schema; None if nothing is left of it.

    It is the type of `arrow_type` with doubles for scalars: for numbers, booleans, and strings that must be one of
    several. Other strings are left out, and what can only have one value. A scalar that is one of these in one
    alternative and any string in another is left out.

    Raises:
        ConstraintError: as `arrow_type`.
    """
    arrow_type(schema)
    return _confidence_type(_possible(schema, schema))


def _possible(schema: Mapping[str, Any], root: Any) -> _Possible:
    if "$ref" in schema:
        return _possible(referred(root, schema["$ref"]), root)
    if "const" in schema or "enum" in schema:
        return frozenset(map(dumps, schema["enum"] if "enum" in schema else [schema["const"]]))
    for key in _SEVERAL:
        if key in schema:
            return _either(_possible(each, root) for each in schema[key])
    return _either(_possible_of(kind, schema, root) for kind in _as_list(schema.get("type", "object")))


def _possible_of(kind: str, schema: Mapping[str, Any], root: Any) -> _Possible:
    if kind == "object":
        return {name: _possible(each, root) for name, each in schema["properties"].items()}
    if kind == "array":
        return [_possible(schema["items"], root)]
    if kind == "string":
        return None
    return frozenset({"null": ("null",), "boolean": ("true", "false")}.get(kind, ("0", "1", "...")))


def _either(alternatives: Iterable[_Possible]) -> _Possible:
    """What a value of one of some alternatives can be. Beside null, all are objects, or arrays, or scalars."""
    several = list(alternatives)
    objects = [each for each in several if isinstance(each, dict)]
    if objects:
        return {name: _either(each[name] for each in objects) for name in objects[0]}
    arrays = [each for each in several if isinstance(each, list)]
    if arrays:
        return [_either(item for (item,) in arrays)]
    texts = [each for each in several if isinstance(each, frozenset)]
    return frozenset().union(*texts) if len(texts) == len(several) else None


def _confidence_type(possible: _Possible) -> pa.DataType | None:
    if isinstance(possible, dict):
        kinds = {name: _confidence_type(each) for name, each in possible.items()}
        kept = [pa.field(name, kind) for name, kind in kinds.items() if kind is not None]
        return pa.struct(kept) if kept else None
    if isinstance(possible, list):
        item = _confidence_type(possible[0])
        return None if item is None else pa.list_(item)
    return pa.float64() if possible is not None and len(possible) > 1 else None


def value_of(text: str, kind: pa.DataType) -> Any:
    """The value of an answer in JSON, as Arrow takes it for a type of `arrow_type`.

    Args:
        text: JSON that follows the schema.
        kind: type that follows from the schema.
    """
    return _as_kind(json.loads(text), kind)


def _as_kind(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {part.name: _as_kind(value.get(part.name), part.type) for part in kind}
    if pa.types.is_list(kind):
        return [_as_kind(each, kind.value_type) for each in value]
    if pa.types.is_floating(kind):
        return float(value)
    return int(value) if pa.types.is_integer(kind) else value


def shortest(schema: Any) -> str | None:
    """A value of the schema with little text, as JSON; None if none is found, as for a schema that refers to itself."""
    try:
        return _shortest(schema, schema, 0)
    except (ConstraintError, RecursionError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _shortest(schema: Any, root: Any, depth: int) -> str:
    def text(each: Any) -> str:
        return _shortest(each, root, depth + 1)

    if depth > DEEPEST:
        raise RecursionError
    if "$ref" in schema:
        return text(referred(root, schema["$ref"]))
    if "const" in schema or "enum" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return min((dumps(value) for value in values), key=len)
    for key in _SEVERAL:
        if key in schema:
            return min(map(text, schema[key]), key=len)
    kinds = _as_list(schema.get("type", "object"))
    by_kind: dict[str, Callable[[], str]] = {
        "null": lambda: "null",
        "boolean": lambda: "true",
        "string": lambda: dumps(_shortest_string(schema)),
        "integer": lambda: _shortest_number(schema),
        "number": lambda: _shortest_number(schema),
        "array": lambda: (
            "[" + ",".join([text(schema["items"])] * schema.get("minItems", 0)) + "]"
            if schema.get("minItems")
            else "[]"
        ),
        "object": lambda: "{" + ",".join(_members(schema, text)) + "}",
    }
    return min((by_kind[kind]() for kind in kinds), key=len)


def _members(schema: Mapping[str, Any], text: Callable[[Any], str]) -> Iterator[str]:
    required = schema.get("required", ())
    return (f"{dumps(name)}:{text(each)}" for name, each in schema["properties"].items() if name in required)


def _shortest_string(schema: Mapping[str, Any]) -> str:
    if "pattern" in schema:
        return shortest_match(schema["pattern"])
    if "format" in schema:
        raise ValueError
    return "a" * int(schema.get("minLength", 0))


def _shortest_number(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    inside = [each for each in range(1, 10) if (least is None or each >= least) and (most is None or each <= most)]
    return str(inside[0] if inside else least if least is not None else most)


def dumps(value: Any) -> str:
    """JSON as answers have it: compact, with characters beyond ASCII as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
