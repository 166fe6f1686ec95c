"""The job as a whole: from files of rows to a folder of answers, and a report.

discovery ─ source ─┐
                    ├─ Pipeline ─ tables of answers ─ AnswerWriter ─ files, report
bundle ─ plan ──────┘ (on Ray)                          (driver)
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa

from qvl_batch.bundle.cache import BundleCache
from qvl_batch.bundle.loading import Bundle
from qvl_batch.config import CaptionConfig, Device, option_of
from qvl_batch.constraints import Constraint
from qvl_batch.decoder.answerer import grammars_of
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import ConstraintError, DeviceError, JobError
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.input_columns import BY_PLACE
from qvl_batch.input.reader import refuse_paths
from qvl_batch.input.source import Source, open_source
from qvl_batch.output.parts import Tally
from qvl_batch.output.resume import Job, OutputFolder, read_listing
from qvl_batch.output.storage import folder_at
from qvl_batch.output.writer import AnswerWriter
from qvl_batch.pipeline.cluster import cards, cluster, is_shared
from qvl_batch.pipeline.dataset import Pipeline
from qvl_batch.pipeline.metrics import RunMetrics
from qvl_batch.pipeline.plan import make_plan
from qvl_batch.pipeline.pool import WorkerPool
from qvl_batch.report.page import render
from qvl_batch.report.progress import progress_line
from qvl_batch.report.run_stats import RunStats
from qvl_batch.report.sample import choose
from qvl_batch.report.summary import Report, recorded_settings
from qvl_batch.runtime.devices import require_cuda, resolve_device, resolve_vision_device
from qvl_batch.vision.cache import open_vision_cache

#: Rows from which on a run can be stopped for its errors.
ROWS_BEFORE_STOP = 200
Say = Callable[[str], None]
IsStopped = Callable[[], bool]


def run(config: CaptionConfig, say: Say = lambda _: None, is_stopped: IsStopped = lambda: False) -> Report:
    """Answer every row of the input that the output does not answer yet.

    Args:
        config: what to answer, with what, and where to.
        say: receives a line about each decision made at the start.
        is_stopped: is asked at each table of answers whether to stop, as by Ctrl-C.

    Raises:
        JobError: input, output, bundle, device or settings make the job impossible. Answers
            that were ready by then are in the output.
        KeyboardInterrupt: stopped; the same. Its text says how far the job is.
    """
    began = time.time()
    storage = folder_at(config.output)
    earlier = None if config.overwrite else Job.of(storage)
    source = open_source(config, earlier.files if earlier else (), partial(read_listing, storage), say)
    refuse_paths(source, config.allow_images_from)
    cache = BundleCache(config.bundle_cache, config.bundle_cache_gb)
    bundle = Bundle.load(config.bundle, cache=cache)
    devices = _devices(config, bundle)
    view = View.of(bundle.manifest.layout.resolution, config.fit, config.max_pixels)
    if config.system_prompt is not None:
        # Workers put it in front too: here it is refused before they start.
        RowLayout(bundle, config.system_prompt)
    constraint = _constraint(config, bundle)
    fetcher = Fetcher.of(config)
    if config.vision_cache:
        # Workers open it too: here it is refused before they start.
        open_vision_cache(config.vision_cache, config.vision_cache_gb, bundle.manifest)
    job = Job(_answers_depend_on(config, bundle, view, constraint), source.files, source.listings)
    schema = source.columns.output_schema(
        boxes=config.boxes,
        parsed=constraint.parsed_type if constraint else None,
        parsed_confidence=constraint.confidence_type if constraint and config.confidence else None,
        confidence=config.confidence,
        choices=config.scores_choices,
        samples=config.has_samples,
    )
    retry = source.wanted if config.retry_errors else None
    with OutputFolder(storage, job, schema, overwrite=config.overwrite, retry=retry) as folder:
        left = source.without(folder.done)
        _announce(say, source, folder, left, bundle, devices)
        settings = recorded_settings(config, len(source.files), bundle, view, devices)
        report = Report(str(storage), folder.tally, price_per_hour=config.price_per_hour, settings=settings)
        if left.rows:
            report = replace(report, startup_seconds=time.time() - began)
            report = _answer(config, devices, left, view, fetcher, bundle, folder, report, say, is_stopped, constraint)
        elif not source.rows:
            folder.write_none()
        if left.rows or not folder.reported():
            record = report.record()
            folder.write_report(record, render(record, report.sample, report.least_sure))
    return report


def _constraint(config: CaptionConfig, bundle: Bundle) -> Constraint | None:
    """What every answer must be. Workers compile it too: here it is refused before they start.

    Raises:
        ConfigError: it cannot be used.
    """
    constraint = config.constraint()
    if constraint is not None:
        try:
            grammars_of(bundle, RowLayout(bundle), threads=1).compile(constraint).check_room(config.max_new_tokens)
        except ConstraintError as error:
            raise config.refused(error) from error
    return constraint


def _devices(config: CaptionConfig, bundle: Bundle) -> dict[str, Device]:
    """Where decoder and vision tower run.

    Raises:
        DeviceError: they cannot, or not together.
    """
    device = resolve_device(config.device, bundle.manifest)
    vision_device = resolve_vision_device(config.vision_device, bundle.manifest)
    if vision_device == "cuda" and device == "cpu":
        raise DeviceError(
            "a job runs the vision tower on a GPU only beside a decoder there: export with --dtype bf16, or take "
            "--vision-device cpu and a vision tower in fp32 or int8"
        )
    if device == "cuda" and "RAY_ADDRESS" not in os.environ:
        require_cuda("--device cuda")
    return {"decoder": device, "vision": vision_device}


def _announce(
    say: Say,
    source: Source,
    folder: OutputFolder,
    left: Source,
    bundle: Bundle,
    devices: Mapping[str, Device],
) -> None:
    """Say what is there to do, and with what."""
    manifest = bundle.manifest
    say(f"input     {source.rows:,} rows in {len(source.files):,} files")
    if source.columns.id is None:
        say(f"note      {BY_PLACE}")
    for kept in source.columns.kept:
        if kept.missing:
            files = f"{kept.missing:,} of {len(source.files):,} files"
            say(f"note      column {kept.name!r} (--keep-columns) is missing in {files}: it is null there")
    count, example = source.passed_over
    if count:
        say(f"note      {count:,} other files of its folders are passed over, such as {example}")
    if folder.tally.rows:
        say(f"resuming  {folder.tally.rows:,} rows are answered already, {left.rows:,} are left")
    where = ", ".join(f"{stage} on {device}" for stage, device in devices.items())
    place = f", from {bundle.address}" if bundle.address else ""
    say(f"bundle    {manifest.source.name}, {manifest.dtype}, {where}{place}")
    if manifest.tolerance is None:
        say("note      it was exported with --skip-parity, so no worker sees whether its machine computes it right")


def _answer(
    config: CaptionConfig,
    devices: Mapping[str, Device],
    left: Source,
    view: View,
    fetcher: Fetcher,
    bundle: Bundle,
    folder: OutputFolder,
    report: Report,
    say: Say,
    is_stopped: IsStopped,
    constraint: Constraint | None,
) -> Report:
    """Answer what is left; the report of it, from one of what was before."""
    began = time.time()
    with cluster() as nodes:
        gpus = cards() if devices["decoder"] == "cuda" else ()
        plan = make_plan(config, bundle.manifest, nodes, gpus, devices["vision"], is_cluster=is_shared())
        say(f"workers   {plan}")
        pool = WorkerPool(plan, say)
        sample = choose(left.rows, left.spans())
        stats = RunStats(sample)
        # Which rows the model is least sure of is known only afterwards.
        shown = None if config.confidence else sample
        shared = fetcher.shared_by(plan.tasks_at_once)
        pipeline = Pipeline(config, bundle, plan, left.columns, view, shared, shown, pool, constraint)
        # Closed before Ray is: threads of a dataset that is still running would start another Ray.
        with closing(pipeline.answers(left)) as answers:
            tally = _write(answers, folder, stats, left.rows, is_stopped, config.max_error_rate)
        seconds = stats.seconds
        first_image = stats.began + min(stats.seconds_to_first_image, seconds)
        ended = stats.began + seconds
        threads = pool.threads(stats.began, first_image, ended)
    if tally.rows != left.rows:
        raise JobError(f"{tally.rows:,} of {left.rows:,} rows came back; {config.going_on} answers the others")
    return replace(
        report,
        tally=tally,
        seconds=seconds,
        startup_seconds=report.startup_seconds + stats.began - began,
        workers_seconds=min(stats.seconds_to_first_image, seconds),
        stages=stats.utilization(threads, seconds),
        sample=stats.rows,
        least_sure=stats.confidence.least_sure,
        details={
            "timeline": stats.timeline.record(),
            "error_examples": stats.examples,
            **({} if (hosts := stats.hosts.record()) is None else {"hosts": hosts}),
            **({} if stats.unreadable_boxes is None else {"unreadable_boxes": stats.unreadable_boxes}),
            **({"confidence": stats.confidence.record()} if stats.confidence.answers else {}),
        },
        settings=report.settings
        | {
            "plan": asdict(plan),
            "rows_of_workers": stats.workers,
            **({} if plan.is_joined else {"vision_workers": pool.vision_workers.record(first_image, ended)}),
        },
    )


def _write(
    answers: Iterable[pa.Table],
    folder: OutputFolder,
    stats: RunStats,
    rows: int,
    is_stopped: IsStopped,
    max_error_rate: float | None,
) -> Tally:
    """Write answers as they come, and count them.

    Raises:
        KeyboardInterrupt: stopped; all answers that have come are written.
        JobError: too many rows fail; the same.
    """
    before, metrics = folder.tally.rows, RunMetrics()
    writer = AnswerWriter(folder.folder, folder.schema, folder.failed)
    try:
        with writer, progress_line(rows) as progress:
            for table in _until(is_stopped, answers):
                tally = writer.add(table)
                stats.add(table, tally)
                metrics.add(table, tally)
                progress.show(writer.tally.rows, writer.tally.finish_reasons["error"], stats.seconds)
                if max_error_rate is not None:
                    _check_errors(writer.tally, stats, max_error_rate)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{before + writer.tally.rows:,} of {before + rows:,} rows are answered") from None
    return writer.tally


def _check_errors(tally: Tally, stats: RunStats, max_error_rate: float) -> None:
    """Stop a run that goes wrong.

    Raises:
        JobError: names the commonest errors, with an example of each.
    """
    failed = tally.finish_reasons["error"]
    if tally.rows < ROWS_BEFORE_STOP or failed <= max_error_rate * tally.rows:
        return
    commonest = [
        f"{count:,} {kind} ({stats.examples[kind][0]['id']}: {stats.examples[kind][0]['message']})"
        for kind, count in tally.errors.most_common(3)
    ]
    raise JobError(
        f"{failed:,} of {tally.rows:,} rows failed, more than --max-error-rate {max_error_rate:g}: "
        f"{'; '.join(commonest)}. Answers are kept; mend the cause, and --retry-errors answers these rows again"
    )


def _until(is_stopped: IsStopped, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        if is_stopped():
            raise KeyboardInterrupt
        yield table


def _answers_depend_on(
    config: CaptionConfig, bundle: Bundle, view: View, constraint: Constraint | None
) -> dict[str, Any]:
    """What the answers of one output must have in common, by the names that a user knows.

    Not which images are shown (`config.image_rules`): errors alone become answers by it, and by `--retry-errors`.
    """
    return {
        "bundle": bundle.sha256,
        "--prompt": config.prompt,
        "--id-column": config.id_column,
        "--image-column": config.image_column,
        "--prompt-column": config.prompt_column,
        "--messages-column": config.messages_column,
        "--answer-last-turn-again": config.answer_last_turn_again,
        "--system-prompt": config.system_prompt,
        "--keep-columns": list(config.keep_columns),
        "--max-new-tokens": config.max_new_tokens,
        "--allow-repetition": config.allow_repetition,
        "--fit": view.fit,
        "--max-pixels": view.resolution.max_pixels if view.resolution.is_native else None,
        "--boxes": config.boxes,
        "--confidence": config.confidence,
        **{option_of(name): value for name, value in asdict(config.sampling).items()},
        "--sampling-column": config.sampling_column,
        "--stop": list(config.stop),
        "--include-stop": config.include_stop,
        "--min-new-tokens": config.min_new_tokens,
        "--abstain-below": config.abstain_below,
        "--choices": constraint.choices if constraint else [],
        "--regex": config.regex,
        "--json-schema": constraint.text if constraint and config.json_schema else None,
        "--choices-column": config.choices_column,
        "--regex-column": config.regex_column,
        "--json-schema-column": config.json_schema_column,
    }
