"""How long the whole job takes, from the times at which answers to the sample came.

What enters: a trial, and how its sample was drawn. What leaves: the steady rate, and seconds of the job.

The rate is taken where the pipeline is full: from the first answers to the moment when the vision stage began with the
last images. There, seconds per unit of work are a ratio over batches of consecutive tables (`intervals.ratio`). A row's
work is an index of its cost: the busy seconds of each stage are divided among rows by what they grow with, and by the
stage's threads. So it does not matter that the rows of some files come first, and the job's work is a total like that
of tokens. Start-up, and what it takes to fill and drain the pipeline, are added once, as they were in the sample.

Reading is left out of the work: a single row can take as long as its group, so that its seconds are more than those of
a job that reads rows in order.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvl_batch.forecast.intervals import LEAST_FREEDOM, Design, Estimate, ratio, student
from qvl_batch.forecast.rows import SampledRow
from qvl_batch.forecast.trial import Arrival, Trial

#: Most batches that the full pipeline's time is cut into, and fewest tables and seconds of it for an interval.
BATCHES, LEAST_TABLES, LEAST_SECONDS = 10, 8, 5.0
#: What the seconds of a kind of work grow with, and the stage that does it.
GROWS_WITH = {
    "image": ("pixels", "image"),
    "vision": ("image_tokens", "vision"),
    "prefill": ("prompt_tokens", "decoder"),
    "decode": ("answer_tokens", "decoder"),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """Time of the job.

    Args:
        once: seconds that any number of rows takes: start-up, filling and draining.
        left: seconds of the rows that are left, on the machines of the trial.
        rows_per_second: the steady rate.
        why_no_interval: why there is none; None if there is one.
    """

    once: float
    left: Estimate
    rows_per_second: Estimate
    why_no_interval: str | None

    def on(self, times: int) -> Estimate:
        """Seconds of the job on so many times the machines of the trial."""
        return self.left.scaled(1 / times, self.once)


def work_of(rows: Sequence[SampledRow], busy: Mapping[str, float], threads: Mapping[str, int]) -> NDArray[np.float64]:
    """Work of each row, in seconds of the machine if stages did not overlap."""
    work = np.zeros(len(rows))
    for kind, (quantity, stage) in GROWS_WITH.items():
        amounts = np.asarray([getattr(row, quantity) for row in rows], np.float64)
        if amounts.sum():
            work += amounts * busy[kind] / threads[stage] / amounts.sum()
    # A trial whose rows all failed before vision has none: then rows are alike.
    return work if work.sum() else np.ones(len(rows))


def speed_of(trial: Trial, rows: Sequence[SampledRow], design: Design, startup_seconds: float) -> Speed:
    """The time of the job.

    Args:
        trial: of the sample.
        rows: of the sample, in the order of the design.
        design: how they were drawn.
        startup_seconds: before the stages began.
    """
    work = work_of(rows, trial.busy, trial.plan.threads)
    all_seconds = startup_seconds + trial.seconds
    if design.is_all:
        steady = trial.seconds - trial.workers_seconds
        exact, rate = Estimate(steady, steady, steady), design.rows / steady if steady else 0.0
        return Speed(all_seconds - steady, exact, Estimate(rate, rate, rate), None)
    batches = batches_of(trial.arrivals, dict(zip((row.place for row in rows), work, strict=True)), trial.rows_at_once)
    total = design.total(work.tolist())
    if len(batches) <= LEAST_FREEDOM:
        per_work = (trial.seconds - trial.workers_seconds) / float(work.sum())
        error, freedom, why = None, 0, "the pipeline was not full for long enough: give more rows to --plan"
    else:
        per_work, error = ratio([seconds for seconds, _ in batches], [amount for _, amount in batches])
        freedom, why = len(batches) - 1, None
    left = Estimate(per_work * total.value)
    if design.freedom < LEAST_FREEDOM:
        why = "so few rows do not say how rows differ: give more to --plan"
    elif error is not None:
        spread = math.sqrt(design.variance(work)) / float(design.weights @ work)
        reach = math.exp(student(min(freedom, design.freedom)) * math.hypot(error, spread))
        left = Estimate(left.value, left.value / reach, left.value * reach)
    once = max(all_seconds - per_work * float(work.sum()), startup_seconds + trial.workers_seconds)
    rate = design.population / left.value
    ends = (None if end is None else design.population / end for end in (left.high, left.low))
    return Speed(once, left, Estimate(rate, *ends), why)


def batches_of(
    arrivals: Sequence[Arrival], work: Mapping[tuple[int, int], float], at_once: int
) -> list[tuple[float, float]]:
    """Seconds and work of batches of consecutive tables while the pipeline was full; none if that was too short.

    Args:
        arrivals: of tables.
        work: of each row.
        at_once: rows that are answered at a time; a batch has at least half as many, since they can end together.
    """
    coming = sorted(arrivals, key=lambda arrival: arrival.at)
    last_began = max(arrival.started for arrival in coming)
    full = [arrival for arrival in coming[1:] if arrival.at <= last_began]
    if len(full) < LEAST_TABLES or full[-1].at - coming[0].at < LEAST_SECONDS:
        return []
    count = min(BATCHES, sum(len(arrival.places) for arrival in full) // max(1, at_once // 2))
    if count < 1:
        return []
    batches, since = [], coming[0].at
    for part in np.array_split(np.arange(len(full)), min(count, len(full))):
        until = full[part[-1]].at
        batches.append((until - since, sum(work[place] for at in part for place in full[at].places)))
        since = until
    return batches
