"""What happened when, in a bounded number of bins: a run may last minutes or weeks."""

from typing import Any

#: Bins at most, an even number, and seconds of one at first.
BINS, SECONDS = 240, 0.25


class Timeline:
    """Counts of what arrived, in bins of equal width.

    Where time goes beyond the last bin, each two become one of twice the width.

    Args:
        counts: names of what is counted.
    """

    def __init__(self, *counts: str) -> None:
        self.seconds_per_bin = SECONDS
        self.bins: dict[str, list[int]] = {name: [] for name in counts}

    def add(self, seconds: float, **counts: int) -> None:
        """Count what arrived so many seconds after the beginning."""
        place = self._place(seconds)
        for name, values in self.bins.items():
            values.extend([0] * (place + 1 - len(values)))
            values[place] += counts[name]

    def record(self) -> dict[str, Any]:
        """As `_run.json` has it."""
        return {"seconds_per_bin": self.seconds_per_bin, **self.bins}

    def _place(self, seconds: float) -> int:
        while (place := max(0, int(seconds / self.seconds_per_bin))) >= BINS:
            self.seconds_per_bin *= 2
            self.bins = {name: paired(values) for name, values in self.bins.items()}
        return place


def paired(values: list[int]) -> list[int]:
    """Sums of each two that follow each other; a last one alone stays."""
    return [sum(values[at : at + 2]) for at in range(0, len(values), 2)]
