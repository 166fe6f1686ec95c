"""How busy the stages were, and which of them the others waited for.

What enters: busy seconds of each stage, and how many of its threads could work at a time. What leaves: shares of that
time, and a line of advice where one stage limits the job.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Utilization:
    """Busy time of one stage of a run.

    Args:
        parts: busy thread-seconds, by kind of work.
        threads: that can work at a time.
        duration: seconds in which they could.
    """

    parts: Mapping[str, float]
    threads: int
    duration: float

    @property
    def seconds(self) -> float:
        """Busy thread-seconds of all kinds of work."""
        return sum(self.parts.values())

    @property
    def busy(self) -> float:
        """Busy thread-seconds / (threads x duration)."""
        return self.share(self.seconds)

    def share(self, seconds: float) -> float:
        """Share of the available thread-seconds that so many are, at most 1."""
        available = self.threads * self.duration
        return min(seconds / available, 1.0) if available > 0 else 0.0

    def record(self, rows: int) -> dict[str, Any]:
        """As `_run.json` has it; `images_per_second` is what the stage would do if it never waited."""
        parts = {
            name: {"seconds": round(took, 3), "busy": round(self.share(took), 4)} for name, took in self.parts.items()
        }
        return {
            "seconds": round(self.seconds, 3),
            "at_once": self.threads,
            "busy": round(self.busy, 4),
            "images_per_second": round(rows * self.threads / self.seconds, 3) if self.seconds else None,
            **({"parts": parts} if len(parts) > 1 else {}),
        }


def advice(busy: Mapping[str, float]) -> str | None:
    """A line on the stage that limits a job, None where none clearly does.

    Args:
        busy: share of its time that each stage was busy.
    """
    if not busy:
        return None
    first, *others = sorted(busy, key=lambda stage: -busy[stage])
    clear = busy[first] >= LIMITS and all(busy[stage] <= WAITS for stage in others)
    return ADVICE[first] if clear else None
