"""What a person sees of a job: a line while it runs, a summary at its end, and `_run.json`."""

import importlib.metadata
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from qvl_batch.sink import Tally

#: Without a terminal, progress is a line every so many seconds.
SECONDS_PER_LINE = 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """A finished job: `tally` counts what this run answered, `before` what earlier ones had.

    `seconds` is the time from the start of the pipeline to the last answer written. The first
    `workers_seconds` of it went until an image entered the vision graph, most of it on starting
    workers; `startup_seconds` went before it, most of it on starting Ray.
    """

    output: Path
    before: Tally
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    startup_seconds: float = 0.0
    workers_seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> Tally:
        """Counts of all answers."""
        return self.before + self.tally

    @property
    def images_per_second(self) -> float:
        """Rows, answered or failed, over `seconds`."""
        return self.tally.rows / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers over `seconds`."""
        return self.tally.answer_tokens / self.seconds if self.seconds else 0.0

    @property
    def steady_images_per_second(self) -> float:
        """Rows over the time since an image entered the vision graph, so without any start-up."""
        seconds = self.seconds - self.workers_seconds
        return self.tally.rows / seconds if seconds > 0 else 0.0

    def record(self) -> dict[str, Any]:
        """Contents of `_run.json`: counts are of all answers, times and speeds of this run."""
        total = self.total
        return {
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": total.rows,
            "finish_reasons": dict(total.finish_reasons),
            "errors": dict(total.errors),
            "prompt_tokens": total.prompt_tokens,
            "answer_tokens": total.answer_tokens,
            "rows_of_this_run": self.tally.rows,
            "seconds": round(self.seconds, 3),
            "startup_seconds": round(self.startup_seconds, 3),
            "workers_seconds": round(self.workers_seconds, 3),
            "images_per_second": round(self.images_per_second, 3),
            "steady_images_per_second": round(self.steady_images_per_second, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "output": str(self.output),
            **self.settings,
        }

    def __str__(self) -> str:
        total = self.total
        failed = total.finish_reasons["error"]
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(total.finish_reasons.items()))
        lines = [
            f"rows      {total.rows:,}" + (f" ({reasons})" if reasons else ""),
            *([f"          {self.before.rows:,} of them by earlier runs"] if self.before.rows else []),
            f"errors    {failed:,}",
            *(f"          {count:,} {kind}" for kind, count in total.errors.most_common()),
        ]
        if self.tally.rows:
            lines += [
                f"speed     {self.images_per_second:.2f} images/s, {self.tokens_per_second:.1f} tokens/s",
                f"time      {self.seconds:.1f} s, {self.workers_seconds:.1f} s of it to start workers",
                f"          {self.startup_seconds:.1f} s before it to start Ray",
            ]
        return "\n".join([*lines, f"answers   {self.output}"])


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions: dict[str, str] = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


class ProgressLine:
    """Rows done, failed and to do, on a terminal's last line or as a line now and then."""

    def __init__(self, rows: int, bar: Progress | None) -> None:
        self._rows, self._bar = rows, bar
        self._task: TaskID | None = bar.add_task("", total=rows, note="starting") if bar else None
        self._next_line = time.monotonic()

    def show(self, done: int, failed: int, seconds: float) -> None:
        """Show the counts of now; `seconds` since the first row."""
        note = f"{done / max(seconds, 1e-9):.1f} images/s" + (f", {failed:,} errors" if failed else "")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() >= self._next_line:
            print(f"{done:,} of {self._rows:,} rows, {note}", file=sys.stderr, flush=True)
            self._next_line = time.monotonic() + SECONDS_PER_LINE


@contextmanager
def progress_line(rows: int) -> Iterator[ProgressLine]:
    """Progress of `rows` rows on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLine(rows, None)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        yield ProgressLine(rows, bar)
