"""The job as a whole: from files of rows to a folder of answers, and a report.

discovery ─ source ─┐
                    ├─ Pipeline ─ tables of answers ─ AnswerWriter ─ files, report
bundle ─ plan ──────┘ (on Ray)                          (driver)
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa

from qvl_batch.bundle.cache import BundleCache
from qvl_batch.bundle.loading import Bundle
from qvl_batch.columns import located
from qvl_batch.config import CaptionConfig, Device, option_of
from qvl_batch.constraints import Constraint
from qvl_batch.decoder.answerer import grammars_of
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import ConstraintError, DeviceError, JobError, OutputError
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.input_columns import BY_PLACE
from qvl_batch.input.reader import refuse_paths
from qvl_batch.input.source import Source, open_source
from qvl_batch.output.compaction import compact
from qvl_batch.output.parts import Tally
from qvl_batch.output.resume import Job, OutputFolder, read_listing
from qvl_batch.output.storage import Folder, folder_at
from qvl_batch.output.writer import AnswerWriter
from qvl_batch.pipeline.capacity import Node
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
from qvl_batch.rows import Row
from qvl_batch.runtime.devices import require_cuda, resolve_device, resolve_vision_device
from qvl_batch.vision.cache import open_vision_cache

#: Rows from which on a run can be stopped for its errors.
ROWS_BEFORE_STOP = 200
T = TypeVar("T")
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
    opened = open_job(config, say)
    source = opened.source
    with opened.folder() as folder:
        left = source.without(folder.done)
        _announce(say, source, folder, left, opened.bundle, opened.devices)
        settings = recorded_settings(config, len(source.files), opened.bundle, opened.view, opened.devices)
        report = Report(str(opened.storage), folder.tally, price_per_hour=config.price_per_hour, settings=settings)
        if left.rows:
            report = replace(report, startup_seconds=time.time() - began)
            folder.begin()
            try:
                report = _answer(opened, left, folder, report, say, is_stopped)
            except BaseException:
                with suppress(OutputError):  # what ended the job is said; a list that is not there, the next run writes
                    folder.write_list()
                raise
        elif not source.rows:
            folder.write_none()
        return _finish(folder, report, say, is_stopped, has_answered=left.rows > 0)


def _finish(folder: OutputFolder, report: Report, say: Say, is_stopped: IsStopped, *, has_answered: bool) -> Report:
    """Merge small parts, list what could not be read, and write the report, of a job that has answered all rows.

    The report comes last: whoever waits for it finds all else done.

    Raises:
        OutputError: the folder cannot be written to.
        KeyboardInterrupt: stopped before all small parts were merged; all else is done.
    """
    stopped, merged = None, list[int]()
    try:
        for count in _until(is_stopped, compact(folder.folder, folder.schema, folder.notes)):
            merged.append(count)
    except KeyboardInterrupt:
        stopped = KeyboardInterrupt(f"all {report.total.rows:,} rows are answered, not all small parts are merged")
    if merged:
        say(f"compacted {sum(merged):,} parts into {len(merged):,}")
    has_report = folder.reported() and not has_answered
    if not (has_report and folder.listed()):
        report = replace(report, unreadable=folder.write_list())
    if not has_report:
        record = report.record()
        folder.write_report(record, render(record, report.sample, report.least_sure))
    if stopped is not None:
        raise stopped
    return report


@dataclass(frozen=True, slots=True)
class OpenedJob:
    """A job whose input, bundle and settings go together; nothing is written yet.

    Args:
        config: its settings.
        storage: where its answers go.
        source: the whole input.
        bundle: what answers.
        devices: where decoder and vision tower run.
        view: how images are seen.
        fetcher: reads images that are not in the input's files.
        constraint: what all answers must be, if that is anything.
    """

    config: CaptionConfig
    storage: Folder
    source: Source
    bundle: Bundle
    devices: Mapping[str, Device]
    view: View
    fetcher: Fetcher
    constraint: Constraint | None

    def folder(self) -> OutputFolder:
        """Its output folder, not entered yet."""
        config, source, constraint = self.config, self.source, self.constraint
        job = Job(_answers_depend_on(config, self.bundle, self.view, constraint), source.files, source.listings)
        schema = source.columns.output_schema(
            boxes=config.boxes,
            parsed=constraint.parsed_type if constraint else None,
            parsed_confidence=constraint.confidence_type if constraint and config.confidence else None,
            confidence=config.confidence,
            choices=config.scores_choices,
            samples=config.has_samples,
        )
        retry = source.wanted if config.retry_errors else None
        return OutputFolder(self.storage, job, schema, overwrite=config.overwrite, retry=retry)

    def pipeline(self, nodes: Sequence[Node], sample: frozenset[Row] | None, say: Say) -> Pipeline:
        """Its stages, planned for a cluster that runs.

        Args:
            nodes: of the cluster.
            sample: places of rows that the report can show; None for all.
            say: receives lines about workers.

        Raises:
            JobError: the plan is impossible there.
        """
        config, bundle = self.config, self.bundle
        gpus = cards() if self.devices["decoder"] == "cuda" else ()
        plan = make_plan(config, bundle.manifest, nodes, gpus, self.devices["vision"], is_cluster=is_shared())
        say(f"workers   {plan}")
        fetcher, pool = self.fetcher.shared_by(plan.tasks_at_once), WorkerPool(plan, say)
        columns = self.source.columns
        return Pipeline(config, bundle, plan, columns, self.view, fetcher, sample, pool, self.constraint)


def open_job(config: CaptionConfig, say: Say = lambda _: None, source: Source | None = None) -> OpenedJob:
    """Look through the input, load the bundle, and refuse what cannot go together. Writes nothing.

    Args:
        config: of the job.
        say: receives a line now and then if it takes long.
        source: of the input, if it is known already.

    Raises:
        JobError: as `run`.
    """
    storage = folder_at(config.output)
    if source is None:
        earlier = None if config.overwrite else Job.of(storage)
        source = open_source(config, earlier.files if earlier else (), partial(read_listing, storage), say)
        refuse_paths(source, config.allow_images_from)
    bundle = Bundle.load(config.bundle, cache=BundleCache(config.bundle_cache, config.bundle_cache_gb))
    devices = _devices(config, bundle)
    view = View.of(bundle.manifest.layout.resolution, config.fit, config.max_pixels)
    if config.system_prompt is not None:
        # Workers put it in front too: here it is refused before they start.
        RowLayout(bundle, config.system_prompt)
    constraint = _constraint(config, bundle)
    if config.vision_cache:
        # Workers open it too: here it is refused before they start.
        open_vision_cache(config.vision_cache, config.vision_cache_gb, bundle.manifest)
    return OpenedJob(config, storage, source, bundle, devices, view, Fetcher.of(config), constraint)


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
    opened: OpenedJob, left: Source, folder: OutputFolder, report: Report, say: Say, is_stopped: IsStopped
) -> Report:
    """Answer what is left; the report of it, from one of what was before."""
    began, config = time.time(), opened.config
    with cluster() as nodes:
        sample = choose(left.rows, left.spans())
        stats = RunStats(sample)
        # Which rows the model is least sure of is known only afterwards.
        pipeline = opened.pipeline(nodes, None if config.confidence else sample, say)
        plan, pool = pipeline.plan, pipeline.pool
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
    writer = AnswerWriter(folder.folder, folder.schema, folder.failed, folder.notes)
    try:
        with writer, progress_line(rows) as progress:
            for table in map(located, _until(is_stopped, answers)):
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


def _until(is_stopped: IsStopped, coming: Iterable[T]) -> Iterator[T]:
    for each in coming:
        if is_stopped():
            raise KeyboardInterrupt
        yield each


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
