"""The column that follows from a JSON schema, and what no column follows from."""

import json

import pyarrow as pa
import pytest

from qvl_batch.constraints import constraint_of
from qvl_batch.errors import ConstraintError
from qvl_batch.json_schema import MOST_INTEGER, arrow_type, decided, shortest, value_of
from qvl_batch.shortest_match import shortest_match

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"type": "string"}, pa.string()),
        ({"enum": ["a", "b"]}, pa.string()),
        ({"const": True}, pa.bool_()),
        ({"enum": [1, 2.5, None]}, pa.float64()),
        ({"type": ["integer", "null"]}, pa.int64()),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, pa.float64()),
        ({"type": "null"}, pa.null()),
        ({"type": "array", "items": PERSON}, pa.list_(pa.struct({"name": pa.string(), "age": pa.int64()}))),
        (
            {"$defs": {"p": PERSON}, "type": "object", "properties": {"a": {"$ref": "#/$defs/p"}}},
            pa.struct({"a": pa.struct({"name": pa.string(), "age": pa.int64()})}),
        ),
    ],
)
def test_a_column_has_the_type_of_its_schema(schema, kind):
    assert arrow_type(schema) == kind


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (True, "# is true, which allows anything"),
        ({}, "# has no type"),
        ({"type": "object"}, "# is an object whose properties are not all named"),
        ({"type": "object", "properties": {}}, "# is an object whose properties are not all named"),
        (PERSON | {"additionalProperties": {"type": "string"}}, "# is an object whose properties are not all named"),
        ({"type": "array"}, "# is an array without one schema for its items"),
        ({"type": ["string", "integer"]}, "# can be string or int64"),
        ({"anyOf": [PERSON, {"type": "string"}]}, "# can be struct<name: string, age: int64> or string"),
        ({"enum": ["a", 1]}, "# can be string or int64"),
        ({"enum": [["a"]]}, "# must be an enum of strings, numbers, booleans or null"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, '#/properties/a/type is "strin"'),
        ({"$ref": "#"}, "# refers to # inside of it"),
        ({"$ref": "#/$defs/x"}, "#/\\$defs/x is no part of the schema"),
        (
            {
                "type": "object",
                "properties": {"name": {"type": "string"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
            },
            "#/properties/next/anyOf/0 refers to # inside of it",
        ),
        ({"enum": [1, 2**70]}, "# has an integer beyond 999,999,999,999,999,999"),
        ({"type": "integer", "maximum": 2**70}, "# has a bound beyond 999,999,999,999,999,999"),
    ],
)
def test_a_schema_without_a_column_is_refused_at_its_place(schema, message):
    with pytest.raises(ConstraintError, match=f"^{message}"):
        arrow_type(schema)


def test_what_a_schema_leaves_open_is_decided():
    found = decided({"type": "array", "items": PERSON})
    assert found["items"]["additionalProperties"] is False
    assert found["items"]["properties"]["age"] == {
        "type": "integer", "minimum": -MOST_INTEGER, "maximum": MOST_INTEGER,
    }  # fmt: skip
    assert found["items"]["properties"]["name"] == {"type": "string"}
    # A property can be called as a keyword is.
    named = {"type": "object", "properties": {"properties": {"type": "string"}}}
    assert decided(named) == named | {"additionalProperties": False}


def test_values_are_those_that_arrow_takes():
    kind = arrow_type(
        {
            "type": "object",
            "properties": {"n": {"type": "number"}, "m": {"type": "integer"}, "l": {"type": "array", "items": PERSON}},
        }
    )
    values = [value_of(text, kind) for text in ('{"n":9007199254740993,"l":[{"name":"é"}]}', '{"n":1e999,"m":1}')]
    assert pa.array(values, kind).to_pylist() == [
        {"n": 9007199254740992.0, "m": None, "l": [{"name": "é", "age": None}]},
        {"n": float("inf"), "m": 1, "l": None},
    ]


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (PERSON, "{}"),
        (PERSON | {"required": ["name", "age"]}, '{"name":"","age":1}'),
        ({"type": "array", "items": {"enum": ["long", "ab"]}, "minItems": 2}, '["ab","ab"]'),
        ({"type": "integer", "minimum": 1000}, "1000"),
        ({"type": "string", "pattern": "[0-9]{3}-x?"}, '"000-"'),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, '""'),
        ({"type": "string", "format": "date"}, None),
        ({"$ref": "#"}, None),
    ],
)
def test_a_schema_has_a_short_value(schema, text):
    assert shortest(schema) == text
    assert text is None or json.loads(text) is not ...


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("yes|no", "no"),
        (r"\d{2,}(\.\d+)?", "00"),
        ("[^a0 ]+", "A"),
        ("(?:ab){3}[x-z]", "abababx"),
        (r"^\w\s\S\D\W?$", "a aa"),
        (".", "a"),
    ],
)
def test_a_regular_expression_has_a_short_match(pattern, text):
    assert shortest_match(pattern) == text


@pytest.mark.parametrize("pattern", ["(", r"(a)\1", r"\p{L}", "a{99999}{99999}"])
def test_what_python_cannot_read_has_no_short_match(pattern):
    with pytest.raises(ValueError):  # noqa: PT011
        shortest_match(pattern)
    assert constraint_of("regex", pattern).shortest() == []
