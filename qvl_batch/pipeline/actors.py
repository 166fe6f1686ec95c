"""The stages as Ray actors, and the actor that counts attempts at rows that crash their process."""

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qvl_batch.pipeline.cluster import lost_nodes
from qvl_batch.pipeline.crash_guard import AttemptsInMemory, Guarded
from qvl_batch.pipeline.metrics import watch
from qvl_batch.pipeline.stages import DecoderStage, VisionStage
from qvl_batch.rows import Row


class RemoteAttempts:
    """`Attempts` in an actor of its own, which outlives the workers: it is where the driver is."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
        self._actor = ray.remote(**options)(AttemptsInMemory).remote(lost_nodes)

    def begin(self, stage: str, rows: Sequence[Row]) -> bool:
        """As `Attempts.begin`."""
        return bool(ray.get(self._actor.begin.remote(stage, rows, _node())))

    def begin_alone(self, stage: str, row: Row) -> bool:
        """As `Attempts.begin_alone`."""
        return bool(ray.get(self._actor.begin_alone.remote(stage, row, _node())))

    def survived(self, stage: str, row: Row) -> None:
        """As `Attempts.survived`."""
        self._actor.survived.remote(stage, row)

    def done(self, stage: str, rows: Sequence[Row]) -> None:
        """As `Attempts.done`."""
        self._actor.done.remote(stage, rows)


class _Worker:
    """A stage in an actor, which isolates rows that crash it.

    Args:
        attempts: counts attempts at rows.
        arguments: of the stage.
    """

    stage: Callable[..., Any]
    #: As failures of this stage name it.
    error_stage: str

    def __init__(self, attempts: RemoteAttempts, *arguments: Any) -> None:
        self._stage = type(self).stage(*arguments)
        self._guarded = Guarded(self._stage, self.error_stage, attempts)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._guarded(table)


class VisionWorker(_Worker):
    """An actor of the vision stage; its arguments are those of `VisionStage`."""

    stage, error_stage = VisionStage, "vision"


class DecoderWorker(_Worker):
    """An actor of the decoder stage; its arguments are those of `DecoderStage`."""

    stage, error_stage = DecoderStage, "decode"

    def __init__(self, attempts: RemoteAttempts, *arguments: Any) -> None:
        super().__init__(attempts, *arguments)
        watch(worker_name(), lambda: self._stage.load)


class JoinedWorker:
    """Both stages in one actor, which share a GPU: one batch is decoded while the images of another are encoded.

    Args:
        attempts: counts attempts at rows.
        vision: arguments of `VisionStage`.
        decoder: arguments of `DecoderStage`.
    """

    def __init__(self, attempts: RemoteAttempts, vision: Sequence[Any], decoder: Sequence[Any]) -> None:
        # The decoder first: it needs the larger part of the memory, which was planned for it.
        self._decoder = DecoderWorker(attempts, *decoder)
        self._vision = VisionWorker(attempts, *vision)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode the images of a table, then answer its rows."""
        return self._decoder(self._vision(table))


def worker_name() -> str:
    """Host, Ray node and process of this actor."""
    return f"{socket.gethostname()}/{_node()[:8]}/{os.getpid()}"


def _node() -> str:
    """ID of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())
