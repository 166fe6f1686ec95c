"""Answers a sample with one bundle and its settings, and keeps what a forecast needs of it.

What enters: a job, and the sample as a source. What leaves: a `Trial`: the answers, when each table of them came, busy
seconds of stages, and memory. Nothing is written. This module does not know how the sample was drawn.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import pyarrow as pa

from qvl_batch.columns import STARTED, located, places_of
from qvl_batch.forecast.memory import PeakMemory
from qvl_batch.input.source import Source
from qvl_batch.output.parts import Tally
from qvl_batch.pipeline.capacity import Node
from qvl_batch.pipeline.plan import Plan
from qvl_batch.pipeline.run import OpenedJob
from qvl_batch.report.progress import progress_line
from qvl_batch.report.run_stats import RunStats
from qvl_batch.report.utilization import Utilization
from qvl_batch.rows import Row


@dataclass(frozen=True, slots=True)
class Arrival:
    """A table of answers as it came, times in seconds since the stages began.

    Args:
        at: when it came.
        started: when the vision stage began with it.
        places: of its rows.
    """

    at: float
    started: float
    places: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Trial:
    """A sample that was answered.

    Args:
        job: by which bundle, and with which settings.
        plan: of workers, threads and slots.
        tables: the answers, with the columns `FILE`, `ROW`, `THUMBNAIL` and `ASKED`.
        arrivals: of these tables.
        seconds: from the start of the stages to the last answer.
        workers_seconds: of those, before the first image entered the vision graph.
        busy: thread-seconds of each kind of work.
        stages: utilization of each.
        examples: rows of each kind of error.
        memory: peak in bytes by role, and of all together (`all`); empty if it is not known.
    """

    job: OpenedJob
    plan: Plan
    tables: Sequence[pa.Table]
    arrivals: Sequence[Arrival]
    seconds: float
    workers_seconds: float
    busy: Mapping[str, float]
    stages: Mapping[str, Utilization]
    examples: Mapping[str, Sequence[Mapping[str, object]]]
    memory: Mapping[str, int]

    @property
    def rows_at_once(self) -> int:
        """Rows that all decoders answer at a time."""
        return self.plan.slots * self.plan.decoder_workers


def answer(
    job: OpenedJob, sample: Source, nodes: Sequence[Node], is_stopped: Callable[[], bool], say: Callable[[str], None]
) -> Trial:
    """Answer the rows of a sample.

    Args:
        job: bundle and settings.
        sample: rows to answer.
        nodes: of the cluster.
        is_stopped: is asked at each table whether to stop.
        say: receives a line about the workers.

    Raises:
        JobError: the plan or a stage failed.
        KeyboardInterrupt: stopped.
    """
    pipeline = job.pipeline(nodes, None, say)
    stats, tables, arrivals = RunStats(frozenset()), list[pa.Table](), list[Arrival]()
    answered = failed = 0
    with PeakMemory() as memory, closing(pipeline.answers(sample)) as answers, progress_line(sample.rows) as progress:
        for table in map(located, answers):
            if is_stopped():
                raise KeyboardInterrupt
            tally = Tally.of(table)
            stats.add(table, tally)
            began = min(table[STARTED].to_pylist()) - stats.began
            arrivals.append(Arrival(time.time() - stats.began, began, places_of(table)))
            tables.append(table)
            answered, failed = answered + tally.rows, failed + tally.finish_reasons["error"]
            progress.show(answered, failed, stats.seconds)
        seconds = stats.seconds
    workers_seconds, ended = min(stats.seconds_to_first_image, seconds), stats.began + seconds
    threads = pipeline.pool.threads(stats.began, stats.began + workers_seconds, ended)
    by_role = {**memory.by_role, "all": memory.peak} if memory.peak else {}
    return Trial(
        job,
        pipeline.plan,
        tables,
        arrivals,
        seconds,
        workers_seconds,
        stats.busy_seconds,
        stats.utilization(threads, seconds),
        stats.examples,
        # Workers of a cluster that was there before can be on other machines, and are no children of this process.
        {"driver": by_role["driver"]} if by_role and "RAY_ADDRESS" in os.environ else by_role,
    )
