"""Print answers, and, where the input's `expected` column was kept, how many match it.

python jobs/show.py ANSWERS [--rows 20]
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from qvl_batch.errors import ConfigError
from qvl_batch.folder import folder_at
from qvl_batch.sink import PARTS, read_part


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowConfig:
    """Print some answers of a folder, and how many match what was expected."""

    answers: Annotated[str, tyro.conf.Positional]
    """Folder that `jobs/caption.py` wrote, or its address."""
    rows: int = 20
    """Rows to print."""


def show(config: ShowConfig, console: Console) -> None:
    """Print a table and a line of counts."""
    folder = folder_at(config.answers)
    rows = [row for name in folder.names(PARTS) for row in read_part(folder, name).to_pylist()]
    judged = [row for row in rows if row.get("expected") is not None]
    table = Table("id", "prompt", "answer", *(["expected", ""] if judged else []))
    for row in rows[: config.rows]:
        table.add_row(*_cells(row, judged=bool(judged)))
    console.print(table)
    if judged:
        right = sum(row["answer"] == row["expected"] for row in judged)
        console.print(f"{right} of {len(judged)} answers match what was expected ({right / len(judged):.1%})")
    console.print(f"all {len(rows)} answers: {config.answers}/{PARTS}", soft_wrap=True)


def _cells(row: dict[str, Any], *, judged: bool) -> list[str]:
    answer = row["answer"] if row["answer"] is not None else f"({row['error_type']}: {row['error_message']})"
    cells = [str(row["id"]), row.get("prompt") or "", answer]
    if judged:
        cells += [str(row["expected"]), "✓" if row["answer"] == row["expected"] else "✗"]
    return cells


def main() -> int:
    """Run the command."""
    config = tyro.cli(ShowConfig)
    try:
        if not folder_at(config.answers).names(PARTS):
            print(f"show: {config.answers} holds no answers", file=sys.stderr)
            return 1
        show(config, Console())
    except (OSError, ValueError, pa.ArrowException, ConfigError) as error:
        print(f"show: {config.answers} cannot be read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
