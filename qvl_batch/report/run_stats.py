"""What the driver sees of a run as its answers arrive, in bounded memory however many there are.

What enters: tables of answers with the pipeline's own columns. What leaves: what the report says besides counts.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.columns import SECONDS, STARTED, WORKERS, seconds_of
from qvl_batch.output.parts import Tally
from qvl_batch.report.sample import sampled, short
from qvl_batch.report.utilization import Utilization
from qvl_batch.rows import Row
from qvl_batch.schema import ID, readable

#: Rows of each kind of error that are kept.
EXAMPLES = 5
#: Bins of a timeline at most, an even number, and seconds of one at first.
BINS, BIN_SECONDS = 240, 0.25


class RunStats:
    """Collects statistics of a run; times count from when it is made.

    Args:
        sample: places of rows to keep.
    """

    def __init__(self, sample: frozenset[Row]) -> None:
        self.timeline = Timeline("rows", "answer_tokens", "errors")
        #: Rows of each worker of a stage.
        self.workers: dict[str, Counter[str]] = {stage: Counter() for stage in WORKERS}
        #: The first rows of each kind of error, as id and message.
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self._sample, self._shown = sample, dict[Row, dict[str, Any]]()
        self._busy_seconds = dict.fromkeys(SECONDS, 0.0)
        #: Unix seconds.
        self.began = time.time()
        self._first_image = math.inf

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.time() - self.began

    @property
    def seconds_to_first_image(self) -> float:
        """Seconds until the first image entered the vision graph; infinite if none did."""
        return max(self._first_image - self.began, 0.0)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The sample, in the order of the input."""
        return [row for _, row in sorted(self._shown.items())]

    def add(self, table: pa.Table, tally: Tally) -> None:
        """Take a table of answers, and its counts."""
        self.timeline.add(
            self.seconds, rows=tally.rows, answer_tokens=tally.answer_tokens, errors=tally.finish_reasons["error"]
        )
        self._first_image = min(self._first_image, pc.min(table[STARTED]).as_py())
        for stage, column in WORKERS.items():
            self.workers[stage].update(table[column].to_pylist())
        for work, seconds in seconds_of(table).items():
            self._busy_seconds[work] += seconds
        self._shown |= sampled(table, self._sample)
        if tally.errors:
            self._keep_errors(table.filter(pc.is_valid(table["error_stage"])))

    def utilization(self, threads: Mapping[str, int], seconds: float) -> dict[str, Utilization]:
        """Utilization of each stage in a run of so many seconds.

        Reading and decoding images begin with the run, the graphs when their workers have started.

        Args:
            threads: of each stage, how many can work at a time.
            seconds: that the run took.
        """
        steady = max(seconds - self.seconds_to_first_image, 0.0)
        parts = {stage: {stage: self._busy_seconds[stage]} for stage in ("read", "image", "vision")}
        parts["decoder"] = {work: self._busy_seconds[work] for work in ("prefill", "decode")}
        return {
            stage: Utilization(parts[stage], count, seconds if stage in ("read", "image") else steady)
            for stage, count in threads.items()
        }

    def _keep_errors(self, failed: pa.Table) -> None:
        columns = (readable(failed[name]) for name in (ID, "error_stage", "error_type", "error_message"))
        for id_, stage, kind, message in zip(*columns, strict=True):
            kept = self.examples.setdefault(f"{stage}: {kind}", [])
            if len(kept) < EXAMPLES:
                kept.append({"id": short(id_) if isinstance(id_, str) else id_, "message": short(message)})


class Timeline:
    """Counts over time, in a bounded number of bins of equal width: a run may last minutes or weeks.

    Where time goes beyond the last bin, each two become one of twice the width.

    Args:
        counts: names of what is counted.
    """

    def __init__(self, *counts: str) -> None:
        self.seconds_per_bin = BIN_SECONDS
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
    """Sums of each two values that follow each other; a last one alone stays."""
    return [sum(values[at : at + 2]) for at in range(0, len(values), 2)]
