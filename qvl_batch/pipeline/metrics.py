"""Metrics of a running job, for Ray's Prometheus endpoint and dashboards; `jobs/README.md` lists them.

What enters: counts of answers and of vision workers in the driver, and the load of each decoder in its actor. What
leaves: Ray metrics.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
from ray.util import metrics

from qvl_batch.columns import WORKERS
from qvl_batch.decoder.engine import Load
from qvl_batch.output.parts import Tally

#: Seconds between two looks at a decoder.
SECONDS = 2.0


class RunMetrics:
    """Counts of the answers of a run."""

    def __init__(self) -> None:
        def counter(name: str, what: str, *tags: str) -> metrics.Counter:
            return metrics.Counter(f"qvl_{name}", what, tag_keys=tags)

        self._rows = counter("rows", "Rows that have an answer or an error", "finish_reason")
        self._errors = counter("errors", "Rows that failed", "kind")
        self._prompt_tokens = counter("prompt_tokens", "Tokens before answers, those of images too")
        self._answer_tokens = counter("answer_tokens", "Tokens of answers")
        self._worker_rows = counter(
            "worker_rows", "Rows by the worker that encoded or answered them", "stage", "worker"
        )

    def add(self, table: pa.Table, tally: Tally) -> None:
        """Add a table of answers, whose counts are `tally`."""
        for reason, rows in tally.finish_reasons.items():
            self._rows.inc(rows, {"finish_reason": reason})
        for kind, rows in tally.errors.items():
            self._errors.inc(rows, {"kind": kind})
        for counter, tokens in ((self._prompt_tokens, tally.prompt_tokens), (self._answer_tokens, tally.answer_tokens)):
            if tokens:
                counter.inc(tokens)
        for stage, column in WORKERS.items():
            for worker, rows in Counter(table[column].to_pylist()).items():
                if worker is not None:
                    self._worker_rows.inc(rows, {"stage": stage, "worker": worker})


def vision_workers_gauge() -> metrics.Gauge:
    """Shows how many vision workers run."""
    return metrics.Gauge("qvl_vision_workers", "Vision workers that run")


def watch(worker: str, load: Callable[[], Load]) -> None:
    """Show the load of a decoder as long as its process runs.

    Args:
        worker: its name.
        load: says what it is.
    """
    whats = {
        "slots_busy": "Slots of a decoder with a row",
        "slots": "Slots of a decoder",
        "rows_waiting": "Answers that wait for a slot of a decoder",
    }
    gauges = {name: metrics.Gauge(f"qvl_{name}", what, tag_keys=("worker",)) for name, what in whats.items()}

    def show() -> None:
        while True:
            found = load()
            for name, value in (("slots_busy", found.busy), ("slots", found.slots), ("rows_waiting", found.waiting)):
                gauges[name].set(value, {"worker": worker})
            time.sleep(SECONDS)

    threading.Thread(target=show, name="qvl-metrics", daemon=True).start()
