"""The stages strung together on Ray Data, each with its share of the machine.

What enters: units of rows. What leaves: tables of answers, in no particular order.

    units ─ read ─ prepare ─ VisionStage ─ DecoderStage ─ tables of answers
           (tasks) (tasks)    (actors)      (actors)
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError

from qvl_batch.bundle.loading import Bundle, BundleReference
from qvl_batch.config import CaptionConfig
from qvl_batch.constraints import Constraint
from qvl_batch.errors import JobError
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.input_columns import InputColumns
from qvl_batch.input.source import Source
from qvl_batch.input.units import Unit
from qvl_batch.pipeline.actors import DecoderWorker, JoinedWorker, RemoteAttempts, VisionWorker, worker_name
from qvl_batch.pipeline.cluster import job_error
from qvl_batch.pipeline.plan import CALLS_PER_VISION_WORKER, ROWS_PER_BLOCK, TASK_CPUS, Plan
from qvl_batch.pipeline.pool import WorkerPool
from qvl_batch.pipeline.prepare import prepare_guarded
from qvl_batch.pipeline.read import read_units
from qvl_batch.pipeline.stages import AnswerForm
from qvl_batch.rows import Row

#: Rows of one dataset; a longer job is several, one after the other. Ray remembers every block of a dataset to its
#: end, and new workers take seconds.
ROWS_PER_DATASET = 200_000
#: Rows of one reading task, if files are small: a task takes Ray 10 ms.
ROWS_PER_READ = 256
#: The decoder comes first: rows that are alive hold slots, and images can wait.
VISION_NICENESS = 5
#: Of every stage: batches are Arrow tables.
ARROW = {"batch_format": "pyarrow"}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of a job, and what they are made of.

    Args:
        config: settings of the job.
        bundle: what answers.
        plan: workers, threads, slots.
        columns: of the input, that are read.
        view: how images are seen.
        fetcher: reads images that are not in the input's files.
        sample: places of rows that the report can show; None for all.
        pool: keeps the stages at what the nodes are enough for.
        constraint: what all answers must be, if that is anything.
    """

    config: CaptionConfig
    bundle: Bundle
    plan: Plan
    columns: InputColumns
    view: View
    fetcher: Fetcher
    sample: frozenset[Row] | None
    pool: WorkerPool
    constraint: Constraint | None = None
    attempts: RemoteAttempts = field(default_factory=RemoteAttempts)

    def answers(self, source: Source) -> Generator[pa.Table, None, None]:
        """Tables of answers to the rows of a source, as they come. Closing it ends the stages.

        Raises:
            JobError: a stage failed.
        """
        context = DataContext.get_current()
        context.target_max_block_size = self.plan.block_bytes
        limits = context.execution_options.resource_limits
        context.execution_options.resource_limits = limits.copy(object_store_memory=self.plan.bytes_in_flight())
        try:
            with self.pool.followed(context):
                for units in source.parts(ROWS_PER_DATASET):
                    yield from self.dataset(units).iter_batches(batch_size=None, prefetch_batches=0, **ARROW)
        except ray.exceptions.RayError as error:
            raise job_error(error) from error
        except ExecutionTimeoutError as error:
            minutes = context.execution_no_progress_timeout_s / 60
            raise JobError(
                f"no stage went on for {minutes:.3g} minutes: nodes are missing (`ray status`), or a worker hangs; "
                f"{self.config.going_on} goes on from here"
            ) from error

    def dataset(self, units: Sequence[Unit]) -> Dataset:
        """Units of rows to answers, through all stages."""
        prepared = self._prepare(self._read(units))
        if self.plan.is_joined:
            return self._encode_and_decode(prepared)
        return self._decode(self._encode(prepared))

    def _read(self, units: Sequence[Unit]) -> Dataset:
        read = partial(
            read_units,
            columns=self.columns,
            prompt=self.config.prompt,
            fetcher=self.fetcher,
            rows_per_table=ROWS_PER_BLOCK,
            attempts=self.attempts,
        )
        tasks = min(len(units), math.ceil(sum(unit.rows for unit in units) / ROWS_PER_READ))
        return (
            ray.data.from_items([asdict(unit) for unit in units], override_num_blocks=tasks)
            .map_batches(read, batch_size=None, compute=self._tasks(), num_cpus=TASK_CPUS, **ARROW)
            .repartition(target_num_rows_per_block=ROWS_PER_BLOCK)
        )

    def _prepare(self, rows: Dataset) -> Dataset:
        prepare = partial(
            prepare_guarded,
            view=self.view,
            rules=self.config.image_rules,
            sample=self.sample,
            attempts=self.attempts,
        )
        return rows.map_batches(prepare, compute=self._tasks(), num_cpus=TASK_CPUS, **ARROW)

    def _encode(self, rows: Dataset) -> Dataset:
        return rows.map_batches(
            VisionWorker,
            fn_constructor_args=(self.attempts, *self._vision(VISION_NICENESS, "cpu")),
            compute=_actors(self.plan.vision_workers, CALLS_PER_VISION_WORKER, CALLS_PER_VISION_WORKER + 1),
            num_cpus=self.plan.vision_cpus,
            **ARROW,
        )

    def _decode(self, rows: Dataset) -> Dataset:
        return rows.map_batches(
            DecoderWorker, fn_constructor_args=(self.attempts, *self._decoder()), **self._decoder_actors()
        )

    def _encode_and_decode(self, rows: Dataset) -> Dataset:
        arguments = (self.attempts, self._vision(0, "cuda"), self._decoder())
        return rows.map_batches(JoinedWorker, fn_constructor_args=arguments, **self._decoder_actors())

    def _vision(self, niceness: int, device: str) -> tuple[Any, ...]:
        """Arguments of `VisionStage`."""
        folder = self.config.vision_cache
        cache = (folder.resolve(), self.config.vision_cache_gb) if folder else None
        return (BundleReference.of(self.bundle), self.plan.vision_threads, worker_name, cache, niceness, device)

    def _decoder(self) -> tuple[Any, ...]:
        """Arguments of `DecoderStage`."""
        config = self.config
        form = AnswerForm(
            config.max_new_tokens,
            config.allow_repetition,
            config.system_prompt,
            self.view.fit,
            lists=self.columns.has_lists,
            boxes=config.boxes,
            constraint=self.constraint,
            guided=self.constraint is not None or self.columns.constraint is not None,
            sampling=config.sampling,
            drawn=config.is_drawn,
            samples=config.has_samples,
            stop=config.stop,
            include_stop=config.include_stop,
            min_new_tokens=config.min_new_tokens or 0,
            confidence=config.confidence,
            choices=config.scores_choices,
            abstain_below=config.abstain_below,
        )
        return (BundleReference.of(self.bundle), self.plan.slots, self.plan.decoder_threads, form, worker_name)

    def _decoder_actors(self) -> dict[str, Any]:
        calls = self.plan.calls_per_decoder
        return {
            "compute": _actors(self.plan.decoder_workers, calls, calls),
            "num_cpus": self.plan.decoder_cpus,
            # With a GPU, Ray Data refuses to take blocks as they are.
            **({"num_gpus": 1, "batch_size": ROWS_PER_BLOCK} if self.plan.card else {}),
            **ARROW,
        }

    def _tasks(self) -> TaskPoolStrategy:
        return TaskPoolStrategy(size=self.plan.tasks_at_once)


def _actors(count: int, calls: int, assigned: int) -> ActorPoolStrategy:
    """So many actors, which work on `calls` batches at a time and have `assigned` of them at hand."""
    return ActorPoolStrategy(
        size=count,
        max_tasks_in_flight_per_actor=assigned,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=True,
    )
