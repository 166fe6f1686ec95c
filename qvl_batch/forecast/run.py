"""`--plan`: the forecast of a job as a whole.

input, output, bundles ─ draw ─ Trial of each bundle ─ Outlook ─ _plan.json, _plan.html, a few lines
                                (on Ray)

Nothing else is written, and no job may be writing to the output meanwhile. If it is stopped, nothing is written at all.
With `--plan-keep`, the answers become parts of the output, before the forecast is written.
"""

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ConfigError, JobError
from qvl_batch.forecast.draw import Sample, draw
from qvl_batch.forecast.intervals import LEVEL
from qvl_batch.forecast.outlook import Outlook, compared
from qvl_batch.forecast.page import render
from qvl_batch.forecast.text import summary
from qvl_batch.forecast.trial import Trial, answer
from qvl_batch.output.parts import cannot_write
from qvl_batch.output.resume import PLAN, PLAN_PAGE
from qvl_batch.output.writer import AnswerWriter
from qvl_batch.pipeline.cluster import cluster
from qvl_batch.pipeline.run import IsStopped, OpenedJob, Say, open_job


def forecast(config: CaptionConfig, say: Say = lambda _: None, is_stopped: IsStopped = lambda: False) -> str:
    """Forecast a job from a sample of the rows that its output does not answer yet.

    Args:
        config: of the job, with `plan`.
        say: receives a line about each decision made at the start.
        is_stopped: is asked at each table of answers whether to stop.

    Returns:
        The forecast in a few lines.

    Raises:
        JobError: input, output, bundle, device or settings make the job or its forecast impossible.
        KeyboardInterrupt: stopped; nothing is written.
    """
    assert config.plan is not None
    rows, began = config.plan, time.time()
    if config.vision_cache is not None:
        say("note      the sample does not use --vision-cache: a job that finds features there takes less time")
        config = replace(config, vision_cache=None)
    job = open_job(config, say)
    folder = job.folder().look()
    left = job.source.without(folder.done)
    if not left.rows:
        all_rows = job.source.rows
        what = f"all {all_rows:,} rows are answered already" if all_rows else "the input has no rows"
        raise ConfigError(f"--plan: {what}, so there is nothing to forecast")
    say(
        f"input     {left.rows:,} rows to answer in {len(job.source.files):,} files, {folder.tally.rows:,} are answered"
    )
    opened_seconds = time.time() - began
    others = {name: open_job(each, say, job.source) for name, each in _others(config)}
    sample = draw(left, rows, config.allow_images_from, config.image_rules, say)
    try:
        outlooks = _outlooks({config.bundle: job, **others}, sample, opened_seconds, say, is_stopped)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing is written") from None
    record = _record(job, folder.tally.rows, sample, outlooks)
    page = render(record, outlooks)
    try:
        job.storage.put({})
        if config.plan_keep:
            _keep(job, outlooks[0].trial)
        text = json.dumps(record, indent=1).encode() + b"\n"
        # The page can name a path that is not UTF-8.
        job.storage.put({PLAN: text, PLAN_PAGE: page.encode(errors="replace")})
    except OSError as error:
        raise cannot_write(job.storage, error) from error
    return summary(record)


def _others(config: CaptionConfig) -> list[tuple[str, CaptionConfig]]:
    """Settings of the other trials, by their names."""
    bundles = [(bundle, replace(config, bundle=bundle)) for bundle in config.plan_bundles]
    pixels = [(f"--max-pixels {each}", replace(config, max_pixels=each)) for each in config.plan_max_pixels]
    return bundles + pixels


def _outlooks(
    jobs: dict[str, OpenedJob], sample: Sample, opened_seconds: float, say: Say, is_stopped: IsStopped
) -> list[Outlook]:
    """Answer the sample by each job, one after the other, and forecast each.

    Args:
        jobs: by name, of the same input.
        sample: to answer.
        opened_seconds: that the job took before Ray was started.
        say: receives lines about each trial.
        is_stopped: is asked at each table of answers whether to stop.
    """
    source = sample.of(next(iter(jobs.values())).source)
    outlooks: list[Outlook] = []
    began = time.time()
    with cluster() as nodes:
        startup_seconds = opened_seconds + time.time() - began
        for name, job in jobs.items():
            say(f"trial     {name}")
            trial = answer(job, source, nodes, is_stopped, say)
            answered = sum(table.num_rows for table in trial.tables)
            if answered != len(sample.places):
                raise JobError(f"{answered:,} of {len(sample.places):,} sampled rows came back; try again")
            outlooks.append(Outlook.of(name, trial, sample, startup_seconds))
    return outlooks


def _keep(job: OpenedJob, trial: Trial) -> None:
    """Write the answers of a trial as parts of the output."""
    with job.folder() as folder:
        folder.begin()
        with AnswerWriter(folder.folder, folder.schema, folder.failed, folder.notes) as writer:
            for table in trial.tables:
                writer.add(table)
        folder.write_list()


def _record(job: OpenedJob, answered: int, sample: Sample, outlooks: list[Outlook]) -> dict[str, Any]:
    """Contents of `_plan.json`."""
    design = sample.design
    first, *others = outlooks
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "output": str(job.storage),
        "rows_answered": answered,
        "rows_left": design.population,
        "kept": job.config.plan_keep,
        "level": LEVEL,
        "price_per_hour": job.config.price_per_hour,
        "max_error_rate": job.config.max_error_rate,
        "sample": {
            "rows": design.rows,
            "is_all": design.is_all,
            "candidates": design.candidates,
            "strata": len(design.strata),
            "by_size": sample.by_size,
        },
        "trials": [first.record(), *(other.record() | {"compared": compared(first, other)} for other in others)],
    }
