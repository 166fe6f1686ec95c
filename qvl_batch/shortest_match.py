"""A shortest string that a regular expression matches, to see whether an answer can be that short.

The expression is in the syntax of Rust's `regex`, which answers are held to, and read by Python's parser, which knows
the same syntax but for rare classes. What it cannot read has no shortest match.
"""

import re
from collections.abc import Callable, Iterable
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

#: Tried for a class of characters, in this order.
_LIKELY = "a0 A_-.,:/\n"
#: Repetitions beyond this are too long for any answer.
_MOST_CHARACTERS = 100_000


def shortest_match(pattern: str) -> str:
    """A string that matches, of as few characters as any.

    Raises:
        ValueError: Python cannot read the expression, or no character is known for a part of it.
    """
    try:
        return _text(parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error


def _text(nodes: Iterable[tuple[Any, Any]]) -> str:
    return "".join(_PIECES[code](value) if code in _PIECES else _unknown(code) for code, value in nodes)


def _repeated(value: tuple[int, int, Any]) -> str:
    least, _, part = value
    text = _text(part) if least else ""
    if least * len(text) > _MOST_CHARACTERS:
        raise ValueError(f"a match has more than {_MOST_CHARACTERS:,} characters")
    return text * least


def _unknown(code: Any) -> str:
    raise ValueError(f"{code} has no shortest match")


def _character(members: list[tuple[Any, Any]]) -> str:
    """A character of a class."""
    code, value = members[0]
    if code is codes.LITERAL:
        return chr(value)
    if code is codes.RANGE:
        return chr(value[0])
    if code is codes.CATEGORY:
        expression = {
            codes.CATEGORY_DIGIT: r"\d",
            codes.CATEGORY_NOT_DIGIT: r"\D",
            codes.CATEGORY_SPACE: r"\s",
            codes.CATEGORY_NOT_SPACE: r"\S",
            codes.CATEGORY_WORD: r"\w",
            codes.CATEGORY_NOT_WORD: r"\W",
        }[value]
        return next(each for each in _LIKELY if re.match(expression, each))
    banned = {chr(each) for kind, each in members[1:] if kind is codes.LITERAL}
    ranges = [each for kind, each in members[1:] if kind is codes.RANGE]
    for each in _LIKELY + "zZ9+":
        if each not in banned and not any(low <= ord(each) <= high for low, high in ranges):
            return each
    raise ValueError


#: What each code of Python's parser matches.
_PIECES: dict[Any, Callable[[Any], str]] = {
    codes.LITERAL: chr,
    codes.ANY: lambda _: "a",
    codes.NOT_LITERAL: lambda value: "b" if value == ord("a") else "a",
    codes.IN: _character,
    codes.MAX_REPEAT: _repeated,
    codes.MIN_REPEAT: _repeated,
    codes.SUBPATTERN: lambda value: _text(value[-1]),
    codes.BRANCH: lambda value: min(map(_text, value[1]), key=len),
    codes.AT: lambda _: "",
}
