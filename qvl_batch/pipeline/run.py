"""The job on Ray Data: from parquet files to a folder of answers, and a report.

    row groups ─ read ─ prepare ─ VisionStage ─ DecodeStage ─ AnswerWriter
                (tasks)  (tasks)    (actors)      (actors)      (driver)

The stages are in `prepare` and `stages`; here they are strung together and given their share of the machine.
This module and `workers` are the only ones, apart from the jobs, that import ray.
"""

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pyarrow as pa

# Read when ray is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy

from qvl_batch.bundle.manifest import Bundle
from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ConfigError, DeviceError, JobError
from qvl_batch.input.discovery import passed_over
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import Lost, read_unit
from qvl_batch.input.source import Source, Unit, open_source
from qvl_batch.output.parts import AnswerWriter
from qvl_batch.output.resume import Job, OutputFolder
from qvl_batch.output.storage import folder_at
from qvl_batch.pipeline.actors import DecoderWorker, JoinedWorker, RemoteAttempts, VisionWorker, worker_name
from qvl_batch.pipeline.crash_guard import Guarded, GuardedRead
from qvl_batch.pipeline.plan import (
    CALLS_PER_VISION_WORKER,
    ROWS_PER_BLOCK,
    TASK_CPUS,
    Card,
    Plan,
    card_of_this_process,
    make_plan,
)
from qvl_batch.pipeline.prepare import prepare
from qvl_batch.pipeline.stages import open_vision_cache
from qvl_batch.report.page import render
from qvl_batch.report.run_stats import Arrivals
from qvl_batch.report.sample import choose
from qvl_batch.report.summary import Report, progress_line, recorded_settings
from qvl_batch.report.utilization import timed
from qvl_batch.rows import Row
from qvl_batch.runtime.memory import RealDevice
from qvl_batch.runtime.session import require_cuda, resolve_device, resolve_vision_device, usable_cpus
from qvl_batch.schema import InputColumns

#: With fewer, the actors would leave no CPU to the tasks that feed them.
LEAST_CPUS = 2
#: Rows of one pipeline; a longer job is several, one after the other. Ray remembers every block of a
#: pipeline to its end, and new workers take seconds.
ROWS_AT_ONCE = 200_000
#: Rows of one reading task, if files are small: a task takes Ray 10 ms.
ROWS_PER_READ = 256
#: The decoder comes first: rows that are alive hold slots, and images can wait.
VISION_NICENESS = 5
#: Ray's own progress is replaced by rows done, an error's traceback by its line (Ray's log folder
#: has it all), and that Ray makes itself a token is no news.
QUIET = {
    "ray": logging.WARNING,
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,
    "ray.data.exceptions": logging.CRITICAL,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
}


def run(
    config: CaptionConfig, say: Callable[[str], None] = lambda _: None, is_stopped: Callable[[], bool] = lambda: False
) -> Report:
    """Answer every row of the input that the output does not answer yet.

    Args:
        config: what to answer, with what, and where to.
        say: receives a line about each decision made at the start.
        is_stopped: is asked now and then whether to stop, as by Ctrl-C.

    Raises:
        JobError: input, output, bundle, device or settings make the job impossible. Answers
            that were ready by then are in the output.
        KeyboardInterrupt: stopped; the same. Its text says how far the job is.
    """
    began = time.time()
    output = folder_at(config.output)
    held = None if config.overwrite else Job.of(output)
    source = open_source(config, held.files if held else ())
    bundle = Bundle.load(config.bundle)
    devices = _devices(config, bundle)
    fetcher = Fetcher(config.allow_images_from)
    if config.vision_cache:
        # Workers open it too: here it is refused before they start.
        open_vision_cache(config.vision_cache, config.vision_cache_gb, bundle.manifest)
    job = Job(_answers_depend_on(config, bundle), source.files)
    schema = source.columns.output_schema()
    retry = source.wanted if config.retry_errors else None
    with OutputFolder(output, job, schema, overwrite=config.overwrite, retry=retry) as folder:
        left = source.without(folder.done)
        say(f"input     {source.rows:,} rows in {len(source.files):,} files")
        others = passed_over(config)
        if (first := next(others, None)) is not None:
            count = 1 + sum(1 for _ in others)
            say(f"note      {count:,} files of its folders do not end in .parquet and are passed over, such as {first}")
        if folder.tally.rows:
            say(f"resuming  {folder.tally.rows:,} rows are answered already, {left.rows:,} are left")
        where = ", ".join(f"{stage} on {device}" for stage, device in devices.items())
        say(f"bundle    {bundle.manifest.source.name}, {bundle.manifest.dtype}, {where}")
        if bundle.manifest.tolerance is None:
            say("note      it was exported with --skip-parity, so no worker sees whether its machine computes it right")
        settings = recorded_settings(config, source, bundle, devices)
        report = Report(str(output), folder.tally, price_per_hour=config.price_per_hour, settings=settings)
        if left.rows:
            report = replace(report, startup_seconds=time.time() - began)
            report = _work(config, devices, left, fetcher, bundle, folder, report, say, is_stopped)
        elif not source.rows:
            folder.write_none()
        if left.rows or not folder.reported():
            record = report.record()
            folder.write_report(record, render(record, report.sample))
    return report


def _devices(config: CaptionConfig, bundle: Bundle) -> dict[str, RealDevice]:
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


def _work(
    config: CaptionConfig,
    devices: Mapping[str, RealDevice],
    left: Source,
    fetcher: Fetcher,
    bundle: Bundle,
    folder: OutputFolder,
    report: Report,
    say: Callable[[str], None],
    is_stopped: Callable[[], bool],
) -> Report:
    """Answer what is left; the report of it, from one of what was before."""
    began = time.time()
    with _ray() as nodes:
        cards = _cards() if devices["decoder"] == "cuda" else ()
        plan = make_plan(config, bundle.manifest, nodes, cards, devices["vision"])
        say(f"workers   {plan}")
        sample = choose(left)
        arrivals = Arrivals(sample)
        try:
            with (
                AnswerWriter(folder.folder, folder.schema, folder.failed) as writer,
                progress_line(left.rows) as progress,
            ):
                for table in _until(is_stopped, _answers(config, left, sample, fetcher, bundle, plan)):
                    arrivals.add(table, writer.add(table))
                    tally = writer.tally
                    progress.show(tally.rows, tally.finish_reasons["error"], arrivals.seconds)
        except KeyboardInterrupt:
            done = report.before.rows + writer.tally.rows
            raise KeyboardInterrupt(f"{done:,} of {report.before.rows + left.rows:,} rows are answered") from None
        seconds = arrivals.seconds
    if writer.tally.rows != left.rows:
        raise JobError(f"{writer.tally.rows:,} of {left.rows:,} rows came back; {config.going_on} answers the others")
    return replace(
        report,
        tally=writer.tally,
        seconds=seconds,
        startup_seconds=report.startup_seconds + arrivals.began - began,
        workers_seconds=min(arrivals.seconds_to_first_image, seconds),
        stages=arrivals.stages(plan, seconds),
        sample=arrivals.rows,
        details={"timeline": arrivals.timeline.record(), "error_examples": arrivals.examples},
        settings=report.settings | {"plan": asdict(plan), "rows_of_workers": arrivals.workers},
    )


def _until(is_stopped: Callable[[], bool], tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        if is_stopped():
            raise KeyboardInterrupt
        yield table


def _answers(
    config: CaptionConfig, source: Source, sample: frozenset[Row], fetcher: Fetcher, bundle: Bundle, plan: Plan
) -> Iterator[pa.Table]:
    """Tables of answers as they come, in no particular order."""
    options = DataContext.get_current().execution_options
    options.resource_limits = options.resource_limits.copy(object_store_memory=plan.bytes_under_way(bundle.manifest))
    try:
        for part in source.parts(ROWS_AT_ONCE):
            dataset = _dataset(config, source.columns, part, sample, fetcher, bundle, plan)
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ray.exceptions.RayError as error:
        raise _job_error(error) from error


def _dataset(
    config: CaptionConfig,
    columns: InputColumns,
    units: Sequence[Unit],
    sample: frozenset[Row],
    fetcher: Fetcher,
    bundle: Bundle,
    plan: Plan,
) -> Dataset:
    """The pipeline, in the order of its stages."""
    prompt, rules = config.prompt, config.image_rules
    tasks = TaskPoolStrategy(size=plan.tasks_at_once)
    cache = (config.vision_cache.resolve(), config.vision_cache_gb) if config.vision_cache else None

    attempts = RemoteAttempts()
    image_size = bundle.manifest.layout.image_size

    def read(units: pa.Table) -> Iterator[pa.Table]:
        def work(unit: Unit, rows_per_table: int, lost: Lost | None = None) -> Iterator[pa.Table]:
            return read_unit(unit, columns, prompt, rows_per_table, fetcher, lost)

        guarded = GuardedRead(work, ROWS_PER_BLOCK, attempts)
        yield from timed(guarded([Unit(**unit) for unit in units.to_pylist()]), "read")

    def prepare_guarded(table: pa.Table) -> pa.Table:
        work = partial(prepare, image_size=image_size, fit=config.fit, sample=sample, rules=rules)
        return Guarded(work, "image", attempts)(table)

    vision = (bundle.path, plan.vision_threads, worker_name, cache, VISION_NICENESS)
    decoder = (
        bundle.path,
        plan.slots,
        plan.decoder_threads,
        config.max_new_tokens,
        config.allow_repetition,
        worker_name,
    )
    gpus = 1 if plan.card else 0

    reads = min(len(units), math.ceil(sum(unit.rows for unit in units) / ROWS_PER_READ))
    prepared = (
        ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=reads)
        .map_batches(read, batch_size=None, batch_format="pyarrow", compute=tasks, num_cpus=TASK_CPUS)
        .repartition(target_num_rows_per_block=ROWS_PER_BLOCK)
        .map_batches(prepare_guarded, batch_format="pyarrow", compute=tasks, num_cpus=TASK_CPUS)
    )
    decoders = _actors(plan.decoder_workers, plan.calls_per_decoder, plan.calls_per_decoder)
    if plan.is_joined:
        return prepared.map_batches(
            JoinedWorker,
            batch_format="pyarrow",
            fn_constructor_args=(attempts, (*vision[:-1], 0, "cuda"), decoder),
            compute=decoders,
            num_cpus=plan.decoder_cpus,
            num_gpus=gpus,
        )
    return prepared.map_batches(
        VisionWorker,
        batch_format="pyarrow",
        fn_constructor_args=(attempts, *vision),
        compute=_actors(plan.vision_workers, CALLS_PER_VISION_WORKER, CALLS_PER_VISION_WORKER + 1),
        num_cpus=plan.vision_cpus,
    ).map_batches(
        DecoderWorker,
        batch_format="pyarrow",
        fn_constructor_args=(attempts, *decoder),
        compute=decoders,
        num_cpus=plan.decoder_cpus,
        num_gpus=gpus,
    )


def _actors(count: int, calls: int, waiting: int) -> ActorPoolStrategy:
    """So many actors, which take `calls` batches at a time, and to which `waiting` are assigned."""
    return ActorPoolStrategy(
        size=count,
        max_tasks_in_flight_per_actor=waiting,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=True,
    )


def _cards() -> list[Card]:
    """GPUs of the cluster.

    Raises:
        DeviceError: there is none, or it cannot be asked.
    """
    count = int(ray.cluster_resources().get("GPU", 0))
    if not count:
        raise DeviceError(
            "the decoder needs a GPU, and Ray sees none on any node of the cluster: start Ray where there is one "
            "(`ray status` lists GPUs), or export the checkpoint for the CPU (--dtype fp32 or int8)"
        )
    probe = ray.remote(num_cpus=0, num_gpus=1)(card_of_this_process)
    try:
        return list(ray.get([probe.remote() for _ in range(count)]))
    except ray.exceptions.RayError as error:
        raise _job_error(error) from error


@contextmanager
def _ray() -> Iterator[list[int]]:
    """A cluster: the one this job was submitted to, else a private one that ends with the job.

    Yields:
        CPUs of each of its nodes.

    Raises:
        ConfigError: there is no cluster where `RAY_ADDRESS` says, or no node has 2 CPUs.
    """
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    joined = ray.is_initialized()
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    # It would advise to reserve for a worker, as of its third second, all memory that its graph takes.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    try:
        if not joined:
            on_sigterm = signal.getsignal(signal.SIGTERM)
            _start_ray()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in its place
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if max(nodes, default=0) < LEAST_CPUS:
            raise ConfigError(f"no node of the Ray cluster has {LEAST_CPUS} CPUs, which this job needs: {nodes}")
        yield nodes
    finally:
        if not joined:
            ray.shutdown()


def _start_ray() -> None:
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        cpus = max(LEAST_CPUS, usable_cpus())
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Ray cannot be started: {type(error).__name__}: {str(error).strip().split(chr(10))[0]} (it needs a "
                "home folder to write to, and in RAY_TMPDIR or /tmp a folder with a short path)"
            ) from error
        return
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit() and "/" not in host:
            # Ray itself tries for minutes.
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(f"no Ray cluster at RAY_ADDRESS={address} ({first_line}); unset it to run here") from error


def _job_error(error: Exception) -> JobError:
    """The job's own error inside what Ray wrapped it in, or one that names the stage's."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().split("\n")
    if isinstance(cause, ray.exceptions.ActorDiedError) and cause.actor_init_failed:
        own = lines[-1].removeprefix(f"{JobError.__module__}.")  # of the traceback, all that Ray hands on
        return JobError(f"a worker failed: {own}" if own == lines[-1] else own.partition(": ")[2])
    message = lines[0]  # behind it, Ray adds advice on its own settings
    if isinstance(cause, JobError):
        return type(cause)(message)
    return JobError(f"a worker failed: {type(cause).__name__}: {message}")


def _answers_depend_on(config: CaptionConfig, bundle: Bundle) -> dict[str, Any]:
    """What the answers of one output must have in common, by the names that a user knows.

    Not which images are shown (`config.image_rules`): errors alone become answers by it, and by `--retry-errors`.
    """
    return {
        "bundle": bundle.sha256,
        "--prompt": config.prompt,
        "--id-column": config.id_column,
        "--image-column": config.image_column,
        "--prompt-column": config.prompt_column,
        "--keep-columns": list(config.keep_columns),
        "--max-new-tokens": config.max_new_tokens,
        "--allow-repetition": config.allow_repetition,
        "--fit": config.fit,
    }
