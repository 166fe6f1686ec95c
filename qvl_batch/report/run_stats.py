"""What the driver sees of a run as its answers arrive, in bounded memory however many there are.

What enters: tables of answers with the pipeline's own columns. What leaves: what the report says
besides counts.
"""

import math
import time
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.output.parts import Tally
from qvl_batch.pipeline.plan import Plan
from qvl_batch.pipeline.stages import STARTED, WORKERS
from qvl_batch.report.sample import sampled, short
from qvl_batch.report.timeline import Timeline
from qvl_batch.report.utilization import BUSY, Stage, seconds_of
from qvl_batch.rows import Row
from qvl_batch.schema import ID, readable

#: Rows of each kind of error that are kept.
EXAMPLES = 5


class Arrivals:
    """Collects; times count from when it is made.

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
        self._worked = dict.fromkeys(BUSY, 0.0)
        #: Unix seconds.
        self.began = time.time()
        self._first_image = math.inf

    @property
    def seconds(self) -> float:
        """How long ago this began."""
        return time.time() - self.began

    @property
    def seconds_to_first_image(self) -> float:
        """When an image entered the vision graph; infinite if none did."""
        return max(self._first_image - self.began, 0.0)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The sample, in the order of the input."""
        return [row for _, row in sorted(self._shown.items())]

    def add(self, table: pa.Table, tally: Tally) -> None:
        """Take answers, and what they count."""
        self.timeline.add(
            self.seconds, rows=tally.rows, answer_tokens=tally.answer_tokens, errors=tally.finish_reasons["error"]
        )
        self._first_image = min(self._first_image, pc.min(table[STARTED]).as_py())
        for stage, column in WORKERS.items():
            self.workers[stage].update(table[column].to_pylist())
        for work, seconds in seconds_of(table).items():
            self._worked[work] += seconds
        self._shown |= sampled(table, self._sample)
        if tally.errors:
            self._keep_errors(table.filter(pc.is_valid(table["error_stage"])))

    def stages(self, plan: Plan, seconds: float) -> dict[str, Stage]:
        """Work of each stage in a run of so many seconds.

        Reading and decoding images begin with the run, the graphs when their workers have started.
        """
        steady = max(seconds - self.seconds_to_first_image, 0.0)
        parts = {stage: {stage: self._worked[stage]} for stage in ("read", "image", "vision")}
        parts["decoder"] = {work: self._worked[work] for work in ("prefill", "decode")}
        return {
            stage: Stage(parts[stage], at_once, seconds if stage in ("read", "image") else steady)
            for stage, at_once in plan.at_once.items()
        }

    def _keep_errors(self, failed: pa.Table) -> None:
        columns = (readable(failed[name]) for name in (ID, "error_stage", "error_type", "error_message"))
        for id_, stage, kind, message in zip(*columns, strict=True):
            kept = self.examples.setdefault(f"{stage}: {kind}", [])
            if len(kept) < EXAMPLES:
                kept.append({"id": short(id_) if isinstance(id_, str) else id_, "message": short(message)})
