"""How busy the stages were, and which of them the others waited for.

Seconds of work travel in columns of the tables: the first row of a table has what its stage worked
since the table before, the others 0. So tables may be cut and joined on the way, and the sum of a
column is the stage's work. What a worker that died had not handed on is lost.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.clock import Clock
from qvl_batch.input.source import OWN, with_columns

#: Columns of seconds, by what they were spent on. The decoder's thread does the last two.
BUSY = {work: f"{OWN}{work}_seconds" for work in ("read", "image", "vision", "prefill", "decode")}
#: A stage limits the job if it was busy for this share of the time, and no other was beyond that one.
LIMITS, WAITS = 0.85, 0.7
ADVICE = {
    "read": "Reading is what the job waits for: bring input and images nearer, or give it more CPUs.",
    "image": "Decoding images is what the job waits for: give it more CPUs, or smaller images.",
    "vision": "Vision is what the job waits for: more cores for it make the job faster, and so does a vision graph "
    "in reduced precision.",
    "decoder": "The decoder is what the job waits for: the job is as fast as this decoder. More of them on more cores, "
    "reduced precision and shorter answers make it faster.",
}


def seconds_column(work: str, seconds: float, rows: int) -> dict[str, pa.Array]:
    """The column of a table of so many rows, at least one, that hands seconds on."""
    return {BUSY[work]: pa.array([seconds, *[0.0] * (rows - 1)], pa.float64())}


def timed(tables: Iterable[pa.Table], work: str) -> Iterator[pa.Table]:
    """Tables with the seconds that each took to come; what is done with them meanwhile does not count."""
    clock, coming = Clock(), iter(tables)
    while True:
        with clock.running():
            table = next(coming, None)
        if table is None:
            return
        yield with_columns(table, seconds_column(work, clock.take(), table.num_rows)) if table.num_rows else table


def seconds_of(table: pa.Table) -> dict[str, float]:
    """What the columns `BUSY` of a table hand on."""
    return {work: float(pc.sum(table[column]).as_py() or 0) for work, column in BUSY.items()}


@dataclass(frozen=True, slots=True)
class Stage:
    """Work of one stage of a run.

    `parts` is what the seconds of work went to; up to `at_once` pieces of it, each by one thread of
    the stage's, could go on at a time, for `duration` seconds.
    """

    parts: Mapping[str, float]
    at_once: int
    duration: float

    @property
    def seconds(self) -> float:
        """Seconds of work, of all its threads together."""
        return sum(self.parts.values())

    @property
    def busy(self) -> float:
        """Share of the seconds in which it could have worked."""
        return self.share(self.seconds)

    def share(self, seconds: float) -> float:
        """Share that so many seconds are."""
        could = self.at_once * self.duration
        return min(seconds / could, 1.0) if could > 0 else 0.0

    def record(self, rows: int) -> dict[str, Any]:
        """As `_run.json` has it; `images_per_second` is what the stage would do if it never waited."""
        parts = {
            name: {"seconds": round(took, 3), "busy": round(self.share(took), 4)} for name, took in self.parts.items()
        }
        return {
            "seconds": round(self.seconds, 3),
            "at_once": self.at_once,
            "busy": round(self.busy, 4),
            "images_per_second": round(rows * self.at_once / self.seconds, 3) if self.seconds else None,
            **({"parts": parts} if len(parts) > 1 else {}),
        }


def advice(busy: Mapping[str, float]) -> str | None:
    """A line on the stage that limits a job, by the share that each was busy; None where no one does alone."""
    if not busy:
        return None
    first, *others = sorted(busy, key=lambda stage: -busy[stage])
    clear = busy[first] >= LIMITS and all(busy[stage] <= WAITS for stage in others)
    return ADVICE[first] if clear else None
