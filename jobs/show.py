"""Print answers, and, where the input's `expected` column was kept, how many match it.

python jobs/show.py ANSWERS [--rows 20]
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.console import Console
from rich.table import Table

from qvl_batch.sink import PARTS


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowConfig:
    """Print some answers of a folder, and how many match what was expected."""

    answers: Annotated[Path, tyro.conf.Positional]
    """Folder that `jobs/caption.py` wrote."""
    rows: int = 20
    """Rows to print."""


def show(config: ShowConfig, console: Console) -> None:
    """Print a table and a line of counts."""
    rows = [row for path in sorted(config.answers.glob(PARTS)) for row in pq.read_table(path).to_pylist()]
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
    if not any(config.answers.glob(PARTS)):
        print(f"show: {config.answers} holds no answers", file=sys.stderr)
        return 1
    try:
        show(config, Console())
    except (OSError, ValueError, pa.ArrowException) as error:
        print(f"show: {config.answers} cannot be read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
