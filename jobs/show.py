"""Print answers, and, where the input's `expected` column was kept, how many match it.

python jobs/show.py ANSWERS [--rows 20]
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from qvl_batch.command_line import exit_status, settings
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.json_schema import dumps
from qvl_batch.output.parts import PARTS, each_part
from qvl_batch.output.storage import folder_at
from qvl_batch.report.page import printable
from qvl_batch.schema import PARSED, is_textual, texts

EXPECTED, CONFIDENCE, REASON = "expected", "confidence", "finish_reason"
TEXTS = ("id", "prompt", "answer", EXPECTED, REASON, "error_type", "error_message")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowConfig:
    """Print some answers of a folder, and how many match what was expected."""

    answers: Annotated[str, tyro.conf.Positional]
    """Folder that `jobs/caption.py` wrote, or its address."""
    rows: int = 20
    """Rows to print."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: names the option, what it was, and what it may be.
        """
        if self.rows < 0:
            raise ConfigError(f"--rows must be at least 0, not {self.rows}")


@dataclass(frozen=True, slots=True)
class Row:
    """What is shown of a row: columns as text, fields of its parsed answer, and those that were expected, by name.

    A text is null where the column is missing or holds no text, fields are where there is no JSON object.
    """

    texts: dict[str, str | None]
    confidence: float | None
    fields: dict[str, Any] | None
    wanted: dict[str, Any] | None

    @property
    def error(self) -> str | None:
        """Why there is no answer, if there is none."""
        failed = self.texts["answer"] is None
        return f"({self.texts['error_type']}: {self.texts['error_message']})" if failed else None

    @property
    def abstains(self) -> bool:
        """Whether its confidence was too low."""
        return self.texts[REASON] == "abstain"

    @property
    def answer(self) -> str:
        """The answer, with a note if it abstains; or why there is none."""
        return self.error or f"{self.texts['answer']}{' (abstains)' * self.abstains}"

    @property
    def is_right(self) -> bool:
        """Whether the answer is the expected text or, parsed, has the expected values."""
        if self.texts["answer"] == self.texts[EXPECTED]:
            return True
        return self.fields is not None and self.wanted is not None and _set(self.fields) == _set(self.wanted)

    def field(self, name: str) -> str:
        """A field's value, and the expected one if it is another."""
        if self.fields is None:
            return ""
        given = _shown(self.fields[name])
        return given if self.has_right(name) else f"{given}, not {_shown((self.wanted or {}).get(name))}"

    def has_right(self, name: str) -> bool:
        """Whether a field's value is the expected one, or none was expected."""
        return self.wanted is None or (self.fields or {}).get(name) == self.wanted.get(name)


#: What stands above a column, and its cell of a row.
Shown = tuple[str, Callable[[Row], str]]


def show(config: ShowConfig, console: Console) -> None:
    """Print a table and lines of counts.

    Raises:
        InputError: the folder holds no answers, or they cannot be read.
    """
    try:
        folder = folder_at(config.answers)
        rows: list[Row] = []
        fields: list[str] = []
        for _, part in each_part(folder):
            rows += _rows(part)
            fields = _field_names(part)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{config.answers} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{config.answers} holds no answers")
    if prompt := _shared_prompt(rows, fields):
        console.print(_text(prompt))
    console.print(_table(rows[: config.rows], list(_columns(rows, fields))))
    for line in _counts(rows, fields):
        console.print(line, markup=False, emoji=False)
    console.print(f"all {len(rows)} answers: {config.answers}/{PARTS}", markup=False, emoji=False, soft_wrap=True)


def _rows(part: pa.Table) -> Iterator[Row]:
    held = {name: part[name] for name in TEXTS if name in part.column_names}
    columns = {name: texts(column) for name, column in held.items() if is_textual(column.type)}
    parsed = part[PARSED].to_pylist() if _field_names(part) else [None] * len(part)
    sure = part[CONFIDENCE].to_pylist() if CONFIDENCE in part.column_names else [None] * len(part)
    for at, (fields, confidence) in enumerate(zip(parsed, sure, strict=True)):
        row = {name: columns[name][at] if name in columns else None for name in TEXTS}
        yield Row(row, confidence, fields, _object(row[EXPECTED]))


def _field_names(part: pa.Table) -> list[str]:
    """Names of the fields of parsed answers."""
    is_object = PARSED in part.column_names and pa.types.is_struct(part[PARSED].type)
    return [field.name for field in part[PARSED].type] if is_object else []


def _object(text: str | None) -> dict[str, Any] | None:
    """The object that a text in JSON is, or null."""
    try:
        value = json.loads(text or "")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _columns(rows: Sequence[Row], fields: Sequence[str]) -> Iterator[Shown]:
    """The columns that these rows fill."""
    judged = _judged(rows)
    yield "id", lambda row: "(no id)" if row.texts["id"] is None else row.texts["id"]
    if not _shared_prompt(rows, fields):
        yield "prompt", lambda row: row.texts["prompt"] or ""
    for name in fields:
        yield name, partial(_field, name=name, first=fields[0])
    if not fields:
        yield "answer", lambda row: row.answer
    if any(row.confidence is not None for row in rows):
        yield CONFIDENCE, lambda row: "" if row.confidence is None else f"{row.confidence:.2f}"
    # Where all that was expected has fields, it is in their cells.
    if judged and not (fields and all(row.wanted is not None for row in judged)):
        yield EXPECTED, lambda row: row.texts[EXPECTED] or ""
    if judged:
        yield "", lambda row: "" if row.texts[EXPECTED] is None else "✓" if row.is_right else "✗"


def _shared_prompt(rows: Sequence[Row], fields: Sequence[str]) -> str | None:
    """The prompt of all rows, which stands above their fields then, if they have one."""
    prompts = {row.texts["prompt"] for row in rows}
    return prompts.pop() if fields and len(prompts) == 1 else None


def _field(row: Row, name: str, first: str) -> str:
    """The cell of a field; the first says why there are none."""
    if row.fields is None and name == first:
        return row.error or ""
    return row.field(name) + " (abstains)" * (row.abstains and name == first)


def _table(rows: Sequence[Row], columns: Sequence[Shown]) -> Table:
    table = Table(*(Column(_text(name), min_width=min(len(name), len(CONFIDENCE))) for name, _ in columns))
    for row in rows:
        table.add_row(*(_text(cell(row)) for _, cell in columns))
    return table


def _counts(rows: Sequence[Row], fields: Sequence[str]) -> Iterator[str]:
    """How many answers are right, and how many are in each field."""
    judged = _judged(rows)
    if not judged:
        return
    right = sum(row.is_right for row in judged)
    yield f"{right} of {len(judged)} answers match what was expected ({right / len(judged):.1%})"
    given = [row for row in judged if not row.abstains]
    if len(given) < len(judged):
        right = sum(row.is_right for row in given)
        share = f" ({right / len(given):.1%})" if given else ""
        yield f"{len(judged) - len(given)} abstain; of the others, {right} of {len(given)} match{share}"
    by_field = [row for row in judged if row.wanted is not None]
    if fields and by_field:
        counts = (f"{name} {sum(row.has_right(name) for row in by_field)}" for name in fields)
        yield f"of {len(by_field)}, right in {printable(', '.join(counts))}"


def _judged(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.texts[EXPECTED] is not None]


def _set(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without those that are null, as a property is that an answer lacks."""
    return {name: value for name, value in fields.items() if value is not None}


def _shown(value: Any) -> str:
    """A value of JSON to be read: texts, and lists of them, without quotes."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return value if isinstance(value, str) else dumps(value)


def _text(cell: str) -> Text:
    return Text(str(printable(cell)))


def work() -> int:
    """Show; returns the exit status."""
    show(settings(ShowConfig), Console())
    return 0


def main() -> int:
    """Run the command; 0 if there were answers to print, 1 if not, 130 if it was stopped."""
    return exit_status("show", work)


if __name__ == "__main__":
    sys.exit(main())
