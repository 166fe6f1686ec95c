"""How sure the model is of each value in an answer that is JSON.

What enters: the text of an answer, the bytes and log-probability of each of its tokens, and the type of
`json_schema.confidence_type`. What leaves: probabilities, as Arrow takes them for this type.

The probability of a value, given the text before it, is that of all ways to spell it in tokens. Known is that of the
way that came, and it is what is given: the product over the tokens that have a character of the value's JSON, quotes
included. After a number the next token counts too: it decides that `1` is not `12`. A token that holds more than the
value, as `3}` does, counts whole. So the product is at most the probability of the value, and equals it where the
value could be spelled, and its neighbours in the same tokens could follow, in one way.

This module knows nothing of schemas.
"""

import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa

_DECODER = json.JSONDecoder()


def value_confidence(text: str, kind: pa.DataType, lengths: Iterable[int], logprobs: Sequence[float]) -> Any:
    """Probabilities of the values of an answer: a dictionary for a struct, a list for a list, a number.

    A property that is absent is None, and so is an object or list that is null. A scalar that is null has the
    probability of that.

    Args:
        text: compact JSON that follows the schema.
        kind: type that follows from the schema.
        lengths: bytes of each token; all together are the UTF-8 of the text.
        logprobs: of each token, and of the end token if one came.
    """
    return _Answer(text, lengths, logprobs).value(0, kind)[0]


class _Answer:
    """The text of an answer and its tokens. Places in the text are characters."""

    def __init__(self, text: str, lengths: Iterable[int], logprobs: Sequence[float]) -> None:
        self._text, self._logprobs = text, logprobs
        #: First byte of each character, and of the end.
        self._bytes = list(accumulate((len(each.encode()) for each in text), initial=0))
        #: End of each token, in bytes.
        self._ends = list(accumulate(lengths))

    def value(self, at: int, kind: pa.DataType | None) -> tuple[Any, int]:
        """Probabilities of the value that begins at a place, and where it ends. None is asked for without a type."""
        if kind is not None and self._text[at] == "{":
            return self._object(at + 1, {part.name: part.type for part in kind})
        if kind is not None and self._text[at] == "[":
            return self._array(at + 1, kind.value_type)
        _, end = _DECODER.raw_decode(self._text, at)
        is_scalar = kind is not None and pa.types.is_floating(kind)
        return self._probability(at, end) if is_scalar else None, end

    def _object(self, at: int, kinds: dict[str, pa.DataType]) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = dict.fromkeys(kinds)
        while self._text[at] != "}":
            name, at = _DECODER.raw_decode(self._text, at + (self._text[at] == ","))
            probability, at = self.value(at + 1, kinds.get(name))
            if name in kinds:
                found[name] = probability
        return found, at + 1

    def _array(self, at: int, kind: pa.DataType) -> tuple[list[Any], int]:
        found: list[Any] = []
        while self._text[at] != "]":
            probability, at = self.value(at + (self._text[at] == ","), kind)
            found.append(probability)
        return found, at + 1

    def _probability(self, start: int, end: int) -> float:
        """Probability of the scalar between two places."""
        is_number = self._text[start] in "-0123456789"
        first = bisect_right(self._ends, self._bytes[start])
        # Beyond the last token is the end token.
        last = bisect_left(self._ends, self._bytes[end] + is_number)
        return math.exp(math.fsum(self._logprobs[first : last + 1]))
