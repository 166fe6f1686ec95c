"""How busy the stages were, and which of them was the bottleneck.

What enters: busy thread-seconds of each stage, its mean number of threads, and the wall time. What leaves: the share of
the thread-seconds that there were that was busy, and a line of advice if one stage is the bottleneck.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: A stage is the bottleneck if it was busy for at least the first share of its time, and every other stage for at most
#: the second share.
BOTTLENECK, OTHERS = 0.85, 0.7
ADVICE = {
    "read": "Reading is the bottleneck: store input and images closer to the workers, or add CPUs.",
    "image": "Decoding images is the bottleneck: add CPUs, or use smaller images.",
    "vision": "Vision is the bottleneck: more cores for it make the job faster, and so does a vision graph in reduced "
    "precision.",
    "decoder": "The decoder is the bottleneck: more decoders on more cores, reduced precision and shorter answers make "
    "the job faster.",
}


@dataclass(frozen=True, slots=True)
class Utilization:
    """Busy time of one stage of a run.

    Args:
        parts: busy thread-seconds, by kind of work.
        threads: of the stage, on average while it could work: workers may come and go.
        duration: wall seconds in which they could work.
    """

    parts: Mapping[str, float]
    threads: float
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
        """Thread-seconds as a share of the available ones, at most 1."""
        available = self.threads * self.duration
        return min(seconds / available, 1.0) if available > 0 else 0.0

    def record(self, rows: int) -> dict[str, Any]:
        """The stage's entry in `_run.json`; `images_per_second` is its throughput if it were busy all the time."""
        parts = {
            name: {"seconds": round(took, 3), "busy": round(self.share(took), 4)} for name, took in self.parts.items()
        }
        return {
            "seconds": round(self.seconds, 3),
            "at_once": round(self.threads, 2),
            "busy": round(self.busy, 4),
            "images_per_second": round(rows * self.threads / self.seconds, 3) if self.seconds else None,
            **({"parts": parts} if len(parts) > 1 else {}),
        }


def advice(busy: Mapping[str, float]) -> str | None:
    """What to do about the stage that is the bottleneck, None if no stage clearly is.

    Args:
        busy: for each stage, the share of its time that it was busy.
    """
    if not busy:
        return None
    first, *others = sorted(busy, key=lambda stage: -busy[stage])
    is_clear = busy[first] >= BOTTLENECK and all(busy[stage] <= OTHERS for stage in others)
    return ADVICE[first] if is_clear else None
