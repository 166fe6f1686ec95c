"""Statistics of a run that the driver collects as answers arrive, in bounded memory for any number of answers.

What enters: tables of answers with the pipeline's own columns. What leaves: the contents of the report besides counts.
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
from qvl_batch.report.confidence import ConfidenceStats
from qvl_batch.report.hosts import HostFailures
from qvl_batch.report.sample import sampled, short
from qvl_batch.report.utilization import Utilization
from qvl_batch.rows import Row
from qvl_batch.schema import BOXES_FIELD, ID, readable

#: Rows that are kept of each kind of error.
EXAMPLES = 5
#: Most bins of a timeline, an even number; and the initial width of a bin in seconds.
BINS, BIN_SECONDS = 240, 0.25


class RunStats:
    """Collects statistics of a run. Times count from its creation.

    Args:
        sample: places of the rows to show.
    """

    def __init__(self, sample: frozenset[Row]) -> None:
        self.timeline = Timeline("rows", "answer_tokens", "errors")
        #: For each stage, rows by worker.
        self.workers: dict[str, Counter[str]] = {stage: Counter() for stage in WORKERS}
        #: The first rows of each kind of error, as id and message.
        self.examples: dict[str, list[dict[str, Any]]] = {}
        #: Answers that are not readable as boxes; None if no boxes are asked for.
        self.unreadable_boxes: int | None = None
        self.confidence = ConfidenceStats()
        self.hosts = HostFailures()
        self._sample, self._shown = sample, dict[Row, dict[str, Any]]()
        #: Busy thread-seconds by kind of work.
        self.busy_seconds = dict.fromkeys(SECONDS, 0.0)
        #: Unix time of the creation.
        self.began = time.time()
        self._first_image = math.inf

    @property
    def seconds(self) -> float:
        """Seconds since the creation."""
        return time.time() - self.began

    @property
    def seconds_to_first_image(self) -> float:
        """Seconds until the first image entered the vision graph; infinite if none has."""
        return max(self._first_image - self.began, 0.0)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The sample, in the order of the input."""
        return [row for _, row in sorted(self._shown.items())]

    def add(self, table: pa.Table, tally: Tally) -> None:
        """Add a table of answers, whose counts are `tally`."""
        self.timeline.add(
            self.seconds, rows=tally.rows, answer_tokens=tally.answer_tokens, errors=tally.finish_reasons["error"]
        )
        self._first_image = min(self._first_image, pc.min(table[STARTED]).as_py())
        for stage, column in WORKERS.items():
            self.workers[stage].update(table[column].to_pylist())
        for work, seconds in seconds_of(table).items():
            self.busy_seconds[work] += seconds
        self._shown |= sampled(table, self._sample)
        self.confidence.add(table)
        self.hosts.add(table)
        if BOXES_FIELD.name in table.column_names:
            answered = table.filter(pc.is_valid(table["answer"]))
            self.unreadable_boxes = (self.unreadable_boxes or 0) + answered[BOXES_FIELD.name].null_count
        if tally.errors:
            self._keep_errors(table.filter(pc.is_valid(table["error_stage"])))

    def utilization(self, threads: Mapping[str, float], seconds: float) -> dict[str, Utilization]:
        """Utilization of each stage.

        The stages that read and decode images could work from the start of the run, vision and decoder only once their
        workers had started.

        Args:
            threads: of each stage, on average over the time in which it could work.
            seconds: of the run.
        """
        steady = max(seconds - self.seconds_to_first_image, 0.0)
        parts = {stage: {stage: self.busy_seconds[stage]} for stage in ("read", "image", "vision")}
        parts["decoder"] = {work: self.busy_seconds[work] for work in ("prefill", "decode")}
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
    """Counts over time, in a bounded number of bins of equal width: a run can last minutes or weeks.

    When time exceeds the last bin, neighbouring bins are merged in pairs, and the width of a bin doubles.

    Args:
        counts: names of the counts.
    """

    def __init__(self, *counts: str) -> None:
        self.seconds_per_bin = BIN_SECONDS
        self.bins: dict[str, list[int]] = {name: [] for name in counts}

    def add(self, seconds: float, **counts: int) -> None:
        """Add counts to the bin of a time, which is in seconds after the start."""
        index = self._bin_at(seconds)
        for name, values in self.bins.items():
            values.extend([0] * (index + 1 - len(values)))
            values[index] += counts[name]

    def record(self) -> dict[str, Any]:
        """The timeline's entry in `_run.json`."""
        return {"seconds_per_bin": self.seconds_per_bin, **self.bins}

    def _bin_at(self, seconds: float) -> int:
        """Index of the bin of a time; merges bins as long as the time is beyond the last one."""
        while (index := max(0, int(seconds / self.seconds_per_bin))) >= BINS:
            self.seconds_per_bin *= 2
            self.bins = {name: paired(values) for name, values in self.bins.items()}
        return index


def paired(values: list[int]) -> list[int]:
    """Sums of neighbouring values in pairs; a last value without a neighbour stays as it is."""
    return [sum(values[at : at + 2]) for at in range(0, len(values), 2)]
