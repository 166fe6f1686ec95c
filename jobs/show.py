"""Print answers. Where the input's `expected` column was kept: how many match it, also without those that abstain.

python jobs/show.py ANSWERS [--rows 20]
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qvl_batch.command_line import exit_status, settings
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.json_schema import dumps
from qvl_batch.output.parts import PARTS, read_part
from qvl_batch.output.storage import folder_at
from qvl_batch.report.page import printable
from qvl_batch.schema import PARSED, is_textual, texts

EXPECTED, REASON = "expected", "finish_reason"
COLUMNS = ("id", "prompt", "answer", EXPECTED, REASON, "error_type", "error_message")
#: Begins the names of the fields of parsed answers, which are shown in place of their text.
FIELDS = f"{PARSED}."


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


def show(config: ShowConfig, console: Console) -> None:
    """Print a table and a line of counts.

    Raises:
        InputError: the folder holds no answers, or they cannot be read.
    """
    try:
        folder = folder_at(config.answers)
        rows = [row for name in folder.names(PARTS) for row in _rows(read_part(folder, name))]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{config.answers} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{config.answers} holds no answers")
    judged = [row for row in rows if row[EXPECTED] is not None]
    fields = [name for name in rows[0] if name.startswith(FIELDS)]
    table = Table("id", "prompt", *(fields or ["answer"]), *([EXPECTED, ""] if judged else []))
    for row in rows[: config.rows]:
        table.add_row(*(Text(str(printable(cell))) for cell in _cells(row, fields, judged=bool(judged))))
    console.print(table)
    if judged:
        right = sum(map(_is_right, judged))
        console.print(f"{right} of {len(judged)} answers match what was expected ({right / len(judged):.1%})")
        given = [row for row in judged if not _abstains(row)]
        if len(given) < len(judged):
            right = sum(map(_is_right, given))
            share = f" ({right / len(given):.1%})" if given else ""
            console.print(f"{len(judged) - len(given)} abstain; of the others, {right} of {len(given)} match{share}")
    console.print(f"all {len(rows)} answers: {config.answers}/{PARTS}", markup=False, emoji=False, soft_wrap=True)


def _rows(table: pa.Table) -> list[dict[str, str | None]]:
    """The shown columns of each row; null where a column is missing or cannot be shown as text."""
    held = {name: table[name] for name in COLUMNS if name in table.column_names}
    columns = {name: texts(column) for name, column in held.items() if is_textual(column.type)}
    if PARSED in table.column_names and pa.types.is_struct(table[PARSED].type):
        for field in table[PARSED].type:
            values = pc.struct_field(table[PARSED], field.name).to_pylist()
            columns[FIELDS + field.name] = [each if isinstance(each, str) else dumps(each) for each in values]
    names = [*COLUMNS, *(name for name in columns if name not in COLUMNS)]
    return [{name: columns[name][row] if name in columns else None for name in names} for row in range(len(table))]


def _cells(row: dict[str, str | None], fields: list[str], *, judged: bool) -> list[str]:
    answer, expected = row["answer"], row[EXPECTED]
    shown = [row[name] or "" for name in fields] or [answer or ""]
    if answer is None:
        shown[0] = f"({row['error_type']}: {row['error_message']})"
    elif _abstains(row):
        shown[0] += " (abstains)"
    cells = ["(no id)" if row["id"] is None else row["id"], row["prompt"] or "", *shown]
    if judged:
        cells += ["", ""] if expected is None else [expected, "✓" if _is_right(row) else "✗"]
    return cells


def _is_right(row: dict[str, str | None]) -> bool:
    return row["answer"] == row[EXPECTED]


def _abstains(row: dict[str, str | None]) -> bool:
    return row[REASON] == "abstain"


def work() -> int:
    """Show; returns the exit status."""
    show(settings(ShowConfig), Console())
    return 0


def main() -> int:
    """Run the command; 0 if there were answers to print, 1 if not, 130 if it was stopped."""
    return exit_status("show", work)


if __name__ == "__main__":
    sys.exit(main())
