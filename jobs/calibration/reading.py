"""Reads confidences and right answers from the parts of an answers folder, one part at a time.

What enters: a folder, and the names of columns. What leaves: for each row 9 bytes, its confidence and whether it is
right, with counts of the others; and, for few rows that are asked for, what people need to look at them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from calibration.values import column_at, is_single, same, type_at, values_of
from qvl_batch.errors import InputError
from qvl_batch.json_schema import dumps
from qvl_batch.output.parts import each_part
from qvl_batch.output.storage import Folder
from qvl_batch.schema import ID, PARSED, PARSED_CONFIDENCE, is_textual, readable, texts

CONFIDENCE = "confidence"
#: Finish reasons of answers, with those that abstained; of rows that failed; and of answers that are cut off, whose
#: confidence is that of all answers that begin so.
ANSWERED, FAILED, CUT = pa.array(["stop", "abstain"]), pa.array(["error"]), pa.array(["length"])
#: States of a row: nobody knows what is right, or the answer is wrong or right.
UNKNOWN, WRONG, RIGHT = -1, 0, 1


@dataclass(frozen=True, slots=True)
class Columns:
    """Where answers, confidences and right answers are.

    Args:
        expected: column of right answers.
        field: path of a field of `parsed`; empty for the whole answer.
    """

    expected: str
    field: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """Column of the answers."""
        return PARSED if self.field else "answer"

    @property
    def confidence(self) -> str:
        """Column of the confidences."""
        return PARSED_CONFIDENCE if self.field else CONFIDENCE

    @property
    def needed(self) -> list[str]:
        """Columns to read."""
        return list(dict.fromkeys(["answer", self.answer, self.confidence, self.expected, "finish_reason"]))

    def truth(self, schema: pa.Schema) -> tuple[str, ...]:
        """Path of right answers in the expected column, which may have structs as `parsed` does."""
        return self.field if pa.types.is_struct(schema.field(self.expected).type) else ()

    def check(self, place: str, schema: pa.Schema) -> None:
        """Refuse parts that lack what is needed.

        Raises:
            InputError: says which column or field is missing or cannot be used, and what to do.
        """
        if not {"answer", "finish_reason"} <= set(schema.names):
            raise InputError(f"{place} is not a file of answers: it has no columns answer and finish_reason")
        if self.field:
            _check_field(place, schema, self.field)
        elif CONFIDENCE not in schema.names:
            raise InputError(f"{place} has no column {CONFIDENCE}: answer again with --confidence")
        if self.expected not in schema.names:
            raise InputError(
                f"{place} has no column {self.expected!r} (--expected-column), but {', '.join(schema.names)}: "
                "keep it with --keep-columns when you answer"
            )
        kind = type_at(schema.field(self.expected).type, self.truth(schema))
        if kind is None or not (is_single(kind) if self.field else is_textual(kind)):
            what = "values like those of the field" if self.field else "strings or integers"
            raise InputError(
                f"column {self.expected!r} (--expected-column) is {schema.field(self.expected).type}, not {what}"
            )


def _check_field(place: str, schema: pa.Schema, field: tuple[str, ...]) -> None:
    name = ".".join(field)
    for column, option in ((PARSED, "--json-schema and --confidence"), (PARSED_CONFIDENCE, "--confidence")):
        if column not in schema.names:
            raise InputError(f"{place} has no column {column} for --field {name}: answer again with {option}")
    kinds = [type_at(schema.field(column).type, field) for column in (PARSED, PARSED_CONFIDENCE)]
    known = ", ".join(_paths(schema.field(PARSED_CONFIDENCE).type)) or "none"
    if kinds[0] is None:
        raise InputError(f"{PARSED} has no field {name} (--field); fields with a confidence: {known}")
    if kinds[1] is None or not is_single(kinds[0]) or not pa.types.is_floating(kinds[1]):
        raise InputError(f"field {name} (--field) has no confidence of one value; fields that have one: {known}")


def _paths(kind: pa.DataType) -> Iterator[str]:
    """Paths of all fields that have one confidence."""
    for field in kind if pa.types.is_struct(kind) else ():
        if pa.types.is_floating(field.type):
            yield field.name
        yield from (f"{field.name}.{below}" for below in _paths(field.type))


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one part, in order.

    Args:
        confidence: of each row, (N,) float64; NaN if it has no answer with a confidence.
        state: of each row, (N,) int8: `UNKNOWN`, `WRONG` or `RIGHT`.
        failed: rows with an error.
        cut: rows whose answer is cut off, which is none here.
        labelled: rows with a right answer, those without an answer of the model too.
        labelled_failed: rows of these with an error.
    """

    confidence: NDArray[np.float64]
    state: NDArray[np.int8]
    failed: int
    cut: int
    labelled: int
    labelled_failed: int


@dataclass(frozen=True, slots=True)
class Rows(_Part):
    """All rows of a folder, in the order of its parts.

    Args:
        parts: names of the parts.
        stops: for each part, the number of rows up to its end.
    """

    parts: list[str]
    stops: NDArray[np.int64]

    @property
    def is_answered(self) -> NDArray[np.bool_]:
        """Whether each row has an answer with a confidence, (N,)."""
        return ~np.isnan(self.confidence)

    @property
    def is_compared(self) -> NDArray[np.bool_]:
        """Whether each row also has a right answer, (N,)."""
        compared: NDArray[np.bool_] = self.is_answered & (self.state != UNKNOWN)
        return compared


def read_rows(folder: Folder, columns: Columns) -> Rows:
    """Read all parts.

    Raises:
        InputError: there are none, they cannot be read, lack a column, or nothing in them can be compared.
    """
    names: list[str] = []
    found: list[_Part] = []
    try:
        for name, table in each_part(folder, partial(_read_part, columns)):
            names.append(name)
            found.append(_judged(table, columns))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    if not sum(len(part.state) for part in found):
        raise InputError(f"{folder} holds no answers")
    counts = ("failed", "cut", "labelled", "labelled_failed")
    rows = Rows(
        parts=names,
        stops=np.cumsum([len(part.state) for part in found]),
        confidence=np.concatenate([part.confidence for part in found]),
        state=np.concatenate([part.state for part in found]),
        **{name: sum(getattr(part, name) for part in found) for name in counts},
    )
    if not rows.labelled:
        raise InputError(
            f"column {columns.expected!r} (--expected-column) is null in all {len(rows.state):,} rows of {folder}"
        )
    if not rows.is_compared.any():
        raise InputError(
            f"none of the {rows.labelled:,} rows of {folder} that have a right answer has an answer with a confidence"
        )
    return rows


def _read_part(columns: Columns, folder: Folder, name: str) -> pa.Table:
    """The columns of a part that are needed."""
    with folder.open(name) as file:
        parquet = pq.ParquetFile(file)
        columns.check(f"{folder}/{name}", parquet.schema_arrow)
        return parquet.read(columns=columns.needed)


def _judged(table: pa.Table, columns: Columns) -> _Part:
    truth = column_at(table[columns.expected], columns.truth(table.schema))
    is_labelled = truth.is_valid().to_numpy()
    failed, cut = (pc.is_in(table["finish_reason"], kind).to_numpy() for kind in (FAILED, CUT))
    has_answer = pc.and_(pc.is_in(table["finish_reason"], ANSWERED), table["answer"].is_valid()).to_numpy()
    confidence = column_at(table[columns.confidence], columns.field).to_numpy().astype(np.float64)
    confidence = np.where(has_answer, confidence, np.nan)
    state = np.full(len(table), UNKNOWN, np.int8)
    judged = np.flatnonzero(is_labelled & ~np.isnan(confidence))
    value_of = values_of if columns.field else texts
    answers = value_of(column_at(table[columns.answer], columns.field).take(judged))
    state[judged] = [same(*pair) for pair in zip(answers, value_of(truth.take(judged)), strict=True)]
    counts = (int(each.sum()) for each in (failed, cut, is_labelled, failed & is_labelled))
    return _Part(confidence, state, *counts)


def details(folder: Folder, columns: Columns, rows: Rows, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """Id, prompt if it was kept, answer and confidence of a few rows, given by their place among all.

    Raises:
        InputError: their parts cannot be read any more.
    """
    found: dict[int, dict[str, Any]] = {}
    parts = np.searchsorted(rows.stops, chosen, side="right")
    for part in np.unique(parts):
        places = np.asarray(chosen)[parts == part]
        start = rows.stops[part - 1] if part else 0
        try:
            with folder.open(rows.parts[part]) as file:
                table = pq.ParquetFile(file).read(columns=[ID, "prompt", columns.answer])
            if table.num_rows != rows.stops[part] - start:
                raise InputError(f"{folder}/{rows.parts[part]} has changed meanwhile: try again when its job has ended")
            table = table.take(places - start)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InputError(f"{folder} cannot be read: {error}") from error
        shown = _shown(table, columns)
        for place, row in zip(places, shown, strict=True):
            found[int(place)] = row | {"confidence": float(rows.confidence[place])}
    return [found[place] for place in chosen]


def _shown(table: pa.Table, columns: Columns) -> list[dict[str, Any]]:
    """Rows for people: texts, and values as JSON."""
    nothing: list[Any] = [None] * len(table)
    prompts = nothing
    if "prompt" in table.column_names and is_textual(table["prompt"].type):
        prompts = texts(table["prompt"])
    answers = readable(column_at(table[columns.answer], columns.field))
    ids = readable(table[ID]) if ID in table.column_names else nothing
    return [
        {"id": id_, "prompt": prompt, "answer": answer if isinstance(answer, str) else dumps(answer)}
        for id_, prompt, answer in zip(ids, prompts, answers, strict=True)
    ]
