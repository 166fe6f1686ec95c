"""Answers and failures, and the columns of the output that hold them.

A row of the output has `id`, the kept columns, then `ANSWER_FIELDS`. A failed row has a null answer,
`finish_reason = error`, and the stage, type and message of its error.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import pyarrow as pa

from qvl_batch.errors import RowError, stable_message

FinishReason = Literal["stop", "length", "error"]


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


#: Columns of the output that hold the error of a failed row.
ERROR_FIELDS = tuple(pa.field(f"error_{part.name}", pa.string()) for part in fields(Failure))
ID = "id"
ANSWER_FIELDS = (
    pa.field("answer", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("answer_tokens", pa.int32()),
    *ERROR_FIELDS,
)


def error_values(failure: Failure | None) -> dict[str, str | None]:
    """Values of `ERROR_FIELDS` by column name, all None if there is no failure."""
    return {f"error_{part.name}": getattr(failure, part.name, None) for part in fields(Failure)}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a row, or its failure. `str()` gives the text of the answer, or in brackets why there is none.

    `prompt_tokens` counts all tokens before the answer, image included; `answer_tokens` leaves out the end token.
    Both are None if the row failed.
    """

    answer: str | None
    finish_reason: FinishReason
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    failure: Failure | None = None

    @classmethod
    def failed(cls, failure: Failure) -> "Answer":
        """The answer of a row that failed."""
        return cls(None, "error", failure=failure)

    def __str__(self) -> str:
        if self.failure is not None:
            return f"({self.failure.type}: {self.failure.message})"
        return self.answer or ""

    def record(self) -> dict[str, str | int | None]:
        """Values of `ANSWER_FIELDS` by column name."""
        return {
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
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
