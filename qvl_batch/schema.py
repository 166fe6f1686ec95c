"""Answers and failures, and the columns of the output that hold them.

A row of the output has `id`, the kept columns, then the fields of `answer_fields`. A failed row has a null answer,
`finish_reason = error`, and the stage, type and message of its error; the output of a job then has `LOCATION_FIELD`. A
row that abstains has its answer and all else.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pyarrow as pa

from qvl_batch.errors import RowError, stable_message

FinishReason = Literal["stop", "length", "abstain", "error"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a row has no answer."""

    stage: str
    type: str
    message: str

    @classmethod
    def of(cls, error: RowError) -> "Failure":
        """Convert the error of a row."""
        return cls(error.stage, type(error).__name__, stable_message(error))

    def of_image(self, number: int, count: int) -> "Failure":
        """The same of image `number`, from 1 on, of a row's `count` images: if there are several, it says which."""
        return replace(self, message=f"image {number} of {count}: {self.message}") if count > 1 else self


def image_number(message: str, count: int) -> int | None:
    """Which of a row's `count` images a message of `Failure.of_image` is about; None if it does not say."""
    if count == 1:
        return 1
    found = re.match(rf"image (\d+) of {count}: ", message)
    return int(found[1]) if found is not None and 0 < int(found[1]) <= count else None


def first_failure(results: Sequence[object]) -> Failure | None:
    """The first failure among the results for a row's images, which says which image it is; None if there is none."""
    for number, result in enumerate(results, 1):
        if isinstance(result, Failure):
            return result.of_image(number, len(results))
    return None


#: Tests for Arrow's types of bytes, and of lists.
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
_LISTS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
    pa.types.is_large_list_view,
)  # fmt: skip
#: Columns of the output that hold the error of a failed row.
ERROR_FIELDS = tuple(pa.field(f"error_{part.name}", pa.string()) for part in fields(Failure))
#: Path or address of the image that failed a row; null of one that has neither.
LOCATION_FIELD = pa.field("error_location", pa.string())
ID = "id"
#: Answer of a conversation that had one already, with `--answer-last-turn-again`.
EXPECTED_FIELD = pa.field("expected", pa.string())
#: Width and height of an image in pixels: of the original, upright, and of what the model saw.
SIZE_NAMES = ("image_width", "image_height", "seen_width", "seen_height")
#: Boxes in pixels of the user's file: see `qvl_batch.grounding`.
BOXES_FIELD = pa.field(
    "boxes",
    pa.list_(
        pa.struct(
            [
                ("image", pa.int32()),
                ("label", pa.string()),
                *((name, pa.float64()) for name in ("x0", "y0", "x1", "y1")),
            ]
        )
    ),
)


#: Column of the value of an answer that is JSON of one schema.
PARSED = "parsed"
#: Column of how sure the model is of each of its values.
PARSED_CONFIDENCE = "parsed_confidence"
#: How sure the model is of an answer: see `Answer`.
CONFIDENCE_FIELDS = tuple(
    pa.field(name, pa.float64()) for name in ("confidence", "mean_logprob", "min_token_probability")
)
#: Probability of each choice, the most probable first.
CHOICES_FIELD = pa.field("choice_probabilities", pa.map_(pa.string(), pa.float64()))
#: Column of all answers that were drawn to a row.
SAMPLES = "samples"


def samples_type(parsed: pa.DataType | None, *, confidence: bool) -> pa.DataType:
    """Type of the column `SAMPLES`; the arguments are those of `answer_fields`."""
    return pa.list_(
        pa.struct(
            [
                pa.field("answer", pa.string()),
                *([pa.field(PARSED, parsed)] if parsed is not None else []),
                *(CONFIDENCE_FIELDS[:1] if confidence else ()),
                pa.field("finish_reason", pa.string()),
                pa.field("answer_tokens", pa.int32()),
                pa.field("error_message", pa.string()),
            ]
        )
    )


def answer_fields(
    *,
    lists: bool = False,
    boxes: bool = False,
    parsed: pa.DataType | None = None,
    parsed_confidence: pa.DataType | None = None,
    confidence: bool = False,
    choices: bool = False,
    samples: bool = False,
) -> tuple[pa.Field, ...]:
    """Fields of an answer.

    Args:
        lists: rows can have several images or none, so that sizes are lists.
        boxes: with the boxes that answers contain.
        parsed: type of the value of an answer that is JSON of one schema.
        parsed_confidence: type of how sure the model is of each of its values.
        confidence: with how sure the model is.
        choices: with the probability of each choice.
        samples: with all answers that were drawn.
    """
    size = pa.list_(pa.int32()) if lists else pa.int32()
    return (
        pa.field("answer", pa.string()),
        *([pa.field(PARSED, parsed)] if parsed is not None else []),
        *([pa.field(PARSED_CONFIDENCE, parsed_confidence)] if parsed_confidence is not None else []),
        *([BOXES_FIELD] if boxes else []),
        *(CONFIDENCE_FIELDS if confidence else ()),
        *([CHOICES_FIELD] if choices else []),
        *([pa.field(SAMPLES, samples_type(parsed, confidence=confidence))] if samples else []),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("answer_tokens", pa.int32()),
        *(pa.field(name, size) for name in SIZE_NAMES),
        *ERROR_FIELDS,
    )


#: Fields of an answer to a row of one image.
ANSWER_FIELDS = answer_fields()


def error_values(failure: Failure | None) -> dict[str, str | None]:
    """Values of `ERROR_FIELDS` by column name, all None if there is no failure."""
    return {f"error_{part.name}": getattr(failure, part.name, None) for part in fields(Failure)}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a row, or its failure. `str()` gives the text of the answer, or in brackets why there is none.

    `prompt_tokens` counts all tokens before the answer, images included; `answer_tokens` leaves out the end token.
    Both are None if the row failed. `image_sizes` has five numbers for each image: those that `SIZE_NAMES` names, and
    the EXIF orientation of its file (see `images.view.ImageSize`). It is empty if the row failed before its images were
    seen.

    `logprobs` has the log-probability of each token, and of the end token if one came, after the repetition penalty and
    among the tokens that a constraint allows; it is empty if nobody asked. `confidence` is the probability of the whole
    answer, the product of these. With choices, `choice_probabilities` has the probability of each. With a JSON schema,
    `parsed_confidence` has the probability of each value, as `qvl_batch.value_confidence` says: objects are
    dictionaries, arrays lists; it is None if the schema has no values to be sure of, or no type follows from it.

    `samples` has all answers that were drawn to the row, of which this is the first that did not fail; it is empty if
    nothing was drawn.
    """

    answer: str | None
    finish_reason: FinishReason
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    failure: Failure | None = None
    image_sizes: tuple[tuple[int, ...], ...] = ()
    logprobs: tuple[float, ...] = ()
    choice_probabilities: Mapping[str, float] | None = None
    parsed_confidence: Any = None
    samples: "tuple[Answer, ...]" = ()

    @property
    def confidence(self) -> float | None:
        """Probability of the whole answer; None if it is not known."""
        return math.exp(math.fsum(self.logprobs)) if self.logprobs else None

    @property
    def mean_logprob(self) -> float | None:
        """Mean of `logprobs`; None if they are not known."""
        return math.fsum(self.logprobs) / len(self.logprobs) if self.logprobs else None

    @property
    def min_token_probability(self) -> float | None:
        """Probability of the token that the model was least sure of; None if it is not known."""
        return math.exp(min(self.logprobs)) if self.logprobs else None

    def _by_probability(self) -> list[tuple[str, float]] | None:
        """Choices and their probabilities, the most probable first."""
        if self.choice_probabilities is None:
            return None
        return sorted(self.choice_probabilities.items(), key=lambda each: -each[1])

    def held_to(self, least: float | None) -> "Answer":
        """The answer, which abstains if its confidence is below `least`; None is no bound.

        One that was cut off stays so: its confidence is that of an answer that begins so.
        """
        if least is None or self.finish_reason != "stop" or self.confidence is None or self.confidence >= least:
            return self
        return replace(self, finish_reason="abstain")

    @classmethod
    def failed(cls, failure: Failure) -> "Answer":
        """The answer of a row that failed."""
        return cls(None, "error", failure=failure)

    def __str__(self) -> str:
        if self.failure is not None:
            return f"({self.failure.type}: {self.failure.message})"
        return self.answer or ""

    def record(self, *, lists: bool = False, confidence: bool = False, choices: bool = False) -> dict[str, Any]:
        """Values of `answer_fields` by column name, but for boxes, samples and parsed values. Sizes are lists, or those
        of the only image.
        """
        sizes: list[Any] = [list(each) for each in zip(*self.image_sizes, strict=True)] or [[]] * (len(SIZE_NAMES) + 1)
        if not lists:
            sizes = [each[0] if each else None for each in sizes]
        elif self.failure is not None and not self.image_sizes:
            sizes = [None] * (len(SIZE_NAMES) + 1)
        return {
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
            **({field.name: getattr(self, field.name) for field in CONFIDENCE_FIELDS} if confidence else {}),
            **({CHOICES_FIELD.name: self._by_probability()} if choices else {}),
            **dict(zip(SIZE_NAMES, sizes, strict=False)),
            **error_values(self.failure),
        }


def readable(column: pa.ChunkedArray) -> list[Any]:
    """Values for display. Ids and kept columns can hold invalid UTF-8; its invalid bytes are replaced."""
    if not is_text(column.type):
        return list(column.to_pylist())
    values = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode(errors="replace") for value in values]


def is_textual(kind: pa.DataType) -> bool:
    """Whether `texts` accepts columns of this type: strings, integers, dictionaries of them, nulls."""
    kind = plain_type(kind)
    return bool(is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def texts(column: pa.ChunkedArray) -> list[str | None]:
    """Values of a column as text; invalid UTF-8 is replaced."""
    return readable(column.cast(pa.large_string()))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type itself, or the value type of a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's string types: `string`, `large_string` or `string_view`."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's types of bytes, of fixed size or not."""
    return any(is_kind(kind) for is_kind in _BYTES)


def item_type(kind: pa.DataType) -> pa.DataType | None:
    """Type of the items of a list type, None for any other type."""
    return kind.value_type if any(is_kind(kind) for is_kind in _LISTS) else None
