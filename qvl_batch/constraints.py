"""What an answer must be: one of some choices, a match of a regular expression, or JSON of a schema.

What enters: values of options, of columns or of callers. What leaves: a `Constraint`, or a `ConstraintError` that says
what is wrong with them.

This module knows nothing of tokens: `decoder.grammar` follows constraints.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from qvl_batch.errors import ConstraintError
from qvl_batch.json_schema import arrow_type, confidence_type, decided, dumps, shortest
from qvl_batch.shortest_match import shortest_match

Kind = Literal["choices", "regex", "json_schema"]
#: Most choices of an answer.
MOST_CHOICES = 10_000
#: Characters of a value in a message.
SHOWN = 60


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be.

    Args:
        kind: of the constraint.
        text: choices as a JSON list, a regular expression, or a JSON schema with what it leaves open decided.
    """

    kind: Kind
    text: str

    @property
    def choices(self) -> list[str]:
        """The choices; of another kind of constraint none."""
        found: list[str] = json.loads(self.text) if self.kind == "choices" else []
        return found

    @property
    def parsed_type(self) -> pa.DataType | None:
        """Type of the column that holds the values of a JSON schema; None for another kind of constraint.

        Raises:
            ConstraintError: no type follows from the schema.
        """
        return arrow_type(json.loads(self.text)) if self.kind == "json_schema" else None

    @property
    def confidence_type(self) -> pa.DataType | None:
        """Type of the column that holds how sure the model is of each value of a JSON schema; None for another kind of
        constraint, or if it has no values to be sure of.

        Raises:
            ConstraintError: no type follows from the schema.
        """
        return confidence_type(json.loads(self.text)) if self.kind == "json_schema" else None

    def shortest(self) -> list[str]:
        """A short match or JSON. Empty if none is known."""
        if self.kind == "json_schema":
            found = shortest(json.loads(self.text))
            return [] if found is None else [found]
        try:
            return [shortest_match(self.text)]
        except ValueError:
            return []

    def to_json(self) -> str:
        """As text, for a column of a table; `from_json` reads it."""
        return json.dumps([self.kind, self.text])

    @classmethod
    def from_json(cls, text: str) -> "Constraint":
        """The inverse of `to_json`."""
        return cls(*json.loads(text))


def constraint_of(kind: Kind, value: object) -> Constraint:
    """A constraint of a value as people give it.

    Args:
        kind: of the constraint.
        value: choices as a list of strings or as JSON text of one, a regular expression, or a JSON schema as text or as
            Python objects.

    Raises:
        ConstraintError: the value is none of the kind.
    """
    if kind == "choices":
        return Constraint(kind, dumps(_choices(value)))
    if kind == "json_schema":
        return Constraint(kind, dumps(decided(_schema(value))))
    if not isinstance(value, str) or not value:
        raise ConstraintError(f"the regular expression is {_shown(value)}; it must be text")
    return Constraint(kind, _unicode(value))


def _choices(value: object) -> list[str]:
    if isinstance(value, str):
        value = _loaded(value, "the choices are")
    if not isinstance(value, list | tuple) or not value:
        raise ConstraintError(f"the choices are {_shown(value)}; they must be a list of at least one text")
    if len(value) > MOST_CHOICES:
        raise ConstraintError(f"there are {len(value):,} choices; the limit is {MOST_CHOICES:,}")
    found: dict[str, None] = {}  # in order
    for number, choice in enumerate(value, 1):
        if not isinstance(choice, str) or not choice.strip():
            raise ConstraintError(f"choice {number} is {_shown(choice)}; it must be text")
        if choice in found:
            raise ConstraintError(f"choice {number}, {choice!r}, occurs twice")
        found[_unicode(choice)] = None
    return list(found)


def _schema(value: object) -> dict[str, Any]:
    if isinstance(value, str):
        value = _loaded(value, "the schema is")
    if not isinstance(value, dict):
        raise ConstraintError(f"the schema is {_shown(value)}; it must be an object")
    try:
        _unicode(dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"the schema is not JSON: {error}") from error
    return value


def _loaded(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(f"{what} not JSON: {error}") from error


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeError as error:
        raise ConstraintError(f"{text!r} is not valid Unicode text: {error}") from error
    return text


def _shown(value: object) -> str:
    return "null" if value is None else excerpt(repr(value))


def excerpt(text: str) -> str:
    """The start of a text, for a message."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
