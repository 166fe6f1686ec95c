"""How sure the model is of a value is the product of the probabilities of the tokens that spell it."""

import json
import math

import pyarrow as pa
import pytest

from qvl_batch.json_schema import arrow_type, confidence_type
from qvl_batch.value_confidence import value_confidence

SURE = pa.float64()


def _of_tokens(schema, *tokens, end=()):
    """Confidence of an answer whose tokens are given as pieces of text, each with its probability if that is not 1."""
    pieces = [(token, 1.0) if isinstance(token, str) else token for token in tokens]
    text = "".join(piece for piece, _ in pieces)
    json.loads(text)
    logprobs = [math.log(probability) for probability in [*(each for _, each in pieces), *end]]
    kind = confidence_type(schema)
    found = value_confidence(text, kind, [len(piece.encode()) for piece, _ in pieces], logprobs)
    assert pa.array([found], kind).to_pylist() == [found]
    return found


def _object(**properties):
    return {"type": "object", "properties": properties}


COLOR, BOOLEAN, COUNT = {"enum": ["red", "blue"]}, {"type": "boolean"}, {"type": "integer"}


def test_of_two_values_the_token_that_decides_has_the_probability():
    found = _of_tokens(_object(color=COLOR), '{"color"', ':"', ("bl", 0.3), "ue", '"}')
    assert found == {"color": pytest.approx(0.3)}
    assert _of_tokens(_object(a=BOOLEAN, b=BOOLEAN), '{"a":', ("true", 0.9), ',"b":', ("f", 0.2), "alse", "}") == {
        "a": pytest.approx(0.9), "b": pytest.approx(0.2)
    }  # fmt: skip


def test_a_string_that_begins_another_ends_with_its_quote():
    schema = _object(color={"enum": ["red", "reddish"]})
    assert _of_tokens(schema, '{"color":', '"', ("red", 0.8), ('"', 0.5), "}") == {"color": pytest.approx(0.4)}
    # The token of the quote can hold what follows.
    assert _of_tokens(schema, '{"color":', '"', ("red", 0.8), ('"}', 0.5)) == {"color": pytest.approx(0.4)}


def test_a_number_ends_with_the_token_behind_it():
    schema = _object(count=COUNT, sure=BOOLEAN)
    tokens = ('{"count":', ("1", 0.5), ("2", 0.5), (',"', 0.5), 'sure":', ("true", 0.9), "}")
    assert _of_tokens(schema, *tokens) == {"count": pytest.approx(0.125), "sure": pytest.approx(0.9)}
    assert _of_tokens(schema, '{"count":', ("-3}", 0.25)) == {"count": pytest.approx(0.25), "sure": None}
    assert _of_tokens(COUNT, ("1", 0.5), ("2", 0.5), end=(0.5,)) == pytest.approx(0.125)
    # Without an end token nothing else could follow, or the answer was cut off.
    assert _of_tokens(COUNT, ("1", 0.5), ("2", 0.5)) == pytest.approx(0.25)


def test_a_token_that_straddles_two_values_counts_for_both():
    found = _of_tokens({"type": "array", "items": COUNT}, "[", ("1,2", 0.5), (",", 0.5), ("3", 0.5), ("]", 0.5))
    assert found == [pytest.approx(0.5), pytest.approx(0.25), pytest.approx(0.25)]


def test_places_are_right_behind_letters_of_any_length_and_escapes():
    schema = {
        "type": "object",
        "properties": {"é\"'": {"type": "string"}, "note": {"type": "string"}, "color": COLOR, "红": BOOLEAN},
    }
    name = f"{{{json.dumps(next(iter(schema['properties'])), ensure_ascii=False)}:"
    tokens = (
        (name, 0.1), ('"红色 \\"color', 0.1), ('\\":\\u00e9\\\\"', 0.1), (',"note":"🙂', 0.1), ('","color":', 0.1),
        ('"', 0.9), ("red", 0.5), ('"', 1.0), (',"红":', 0.1), ("true", 0.7), ("}", 0.1),
    )  # fmt: skip
    assert _of_tokens(schema, *tokens) == {"color": pytest.approx(0.45), "红": pytest.approx(0.7)}


def test_a_letter_of_several_tokens_is_found_by_its_bytes():
    schema, text = _object(kind={"enum": ["红", "绿"]}, sure=BOOLEAN), '{"kind":"红","sure":true}'
    # The letter is three bytes, each a token of its own.
    lengths = [9, 1, 1, 1, 1, 8, 4, 1]
    assert sum(lengths) == len(text.encode())
    logprobs = [math.log(each) for each in (0.1, 0.9, 0.8, 0.7, 1.0, 0.1, 0.6, 0.1)]
    found = value_confidence(text, confidence_type(schema), lengths, logprobs)
    assert found == {"kind": pytest.approx(0.1 * 0.9 * 0.8 * 0.7), "sure": pytest.approx(0.6)}


def test_objects_and_lists_have_theirs_inside_and_null_is_a_value():
    schema = _object(
        place=_object(x=COUNT, name={"type": "string"}),
        tags={"type": "array", "items": COLOR},
        none={"type": "array", "items": COLOR},
        maybe={"enum": ["a", None]},
        lost={"anyOf": [_object(sure=BOOLEAN), {"type": "null"}]},
        absent=BOOLEAN,
    )
    tokens = (
        '{"place":{"x":', ("7", 0.5), ',"name":"{[\\"x\\":1', '"},"tags":[', ('"red', 0.4), '"', ",", ('"blue"', 0.3),
        '],"none":[]', ',"maybe":', ("null", 0.2), ',"lost":', ("null", 0.6), "}",
    )  # fmt: skip
    assert _of_tokens(schema, *tokens) == {
        "place": {"x": pytest.approx(0.5)},
        "tags": [pytest.approx(0.4), pytest.approx(0.3)],
        "none": [],
        "maybe": pytest.approx(0.2),
        "lost": None,
        "absent": None,
    }


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        (COLOR, SURE),
        (BOOLEAN, SURE),
        (COUNT, SURE),
        ({"type": "number"}, SURE),
        ({"enum": ["red"]}, None),
        ({"const": 1}, None),
        ({"type": "null"}, None),
        ({"type": "string", "pattern": "[ab]"}, None),
        ({"type": ["string", "null"]}, None),
        ({"type": ["integer", "null"]}, SURE),
        ({"anyOf": [{"const": "a"}, {"const": "b"}]}, SURE),
        ({"anyOf": [{"const": "a"}, {"type": "string"}]}, None),
        ({"oneOf": [{"const": "a"}, {"type": "null"}]}, SURE),
        ({"allOf": [{"$ref": "#/$defs/c"}], "$defs": {"c": COLOR}}, SURE),
        ({"type": "array", "items": {"type": "string"}}, None),
        ({"type": "array", "items": COLOR}, pa.list_(SURE)),
        (_object(note={"type": "string"}), None),
        (_object(note={"type": "string"}, a=BOOLEAN, b=_object(c={"const": 1})), pa.struct({"a": SURE})),
        ({"anyOf": [{"type": "null"}, _object(a=COUNT)]}, pa.struct({"a": SURE})),
        # One of several forms: its name is a choice, and a property that can be any text in one of them is left out.
        (
            {
                "anyOf": [
                    _object(form={"const": "x"}, size=COLOR, sure=BOOLEAN),
                    _object(form={"const": "y"}, size={"type": "string"}, sure=BOOLEAN),
                ]
            },
            pa.struct({"form": SURE, "sure": SURE}),
        ),
        (
            {
                "$defs": {"p": _object(c=COLOR, n=COUNT)},
                **_object(a={"$ref": "#/$defs/p"}, b={"type": "array", "items": {"$ref": "#/$defs/p"}}),
            },
            pa.struct({"a": pa.struct({"c": SURE, "n": SURE}), "b": pa.list_(pa.struct({"c": SURE, "n": SURE}))}),
        ),
    ],
)
def test_a_schema_has_values_to_be_sure_of(schema, kind):
    arrow_type(schema)
    assert confidence_type(schema) == kind
