"""The progress line on standard error while a job runs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

#: Seconds between lines of progress if standard error is not a terminal.
SECONDS_PER_LINE = 10.0
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}


class ProgressLine:
    """Shows rows done, failed and left: as a bar in a terminal's last line, elsewhere as a line now and then.

    Args:
        rows: of the run.
        bar: None if there is no terminal.
    """

    def __init__(self, rows: int, bar: Progress | None) -> None:
        self._rows, self._bar = rows, bar
        self._task: TaskID | None = bar.add_task("", total=rows, note="starting") if bar else None
        self._next_line = time.monotonic()

    def show(self, done: int, failed: int, seconds: float) -> None:
        """Show the current counts.

        Args:
            done: rows answered or failed.
            failed: rows failed.
            seconds: since the run began.
        """
        note = f"{done / max(seconds, 1e-9):.1f} images/s" + (f", {failed:,} errors" if failed else "")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() >= self._next_line:
            left = span((self._rows - done) * seconds / max(done, 1)).replace("\u00a0", " ")
            print(f"{done:,} of {self._rows:,} rows, {note}, {left} left", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + SECONDS_PER_LINE


def span(seconds: float) -> str:
    """A duration in its two largest units, joined by non-breaking spaces."""
    if seconds < UNITS["min"]:
        return f"{seconds:.1f}\u00a0s"
    size, parts = round(seconds), []
    for name, unit in reversed(UNITS.items()):
        count, size = divmod(size, unit)
        parts.append(f"{count:,}\u00a0{name}" if count else "")
    first = next(at for at, part in enumerate(parts) if part)
    return "\u00a0".join(part for part in parts[first : first + 2] if part)


@contextmanager
def progress_line(rows: int) -> Iterator[ProgressLine]:
    """Show progress on standard error.

    Args:
        rows: of the run.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLine(rows, None)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield ProgressLine(rows, bar)
