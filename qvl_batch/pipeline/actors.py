"""The stages as Ray's actors, and what they say of rows that may end them.

This module and `pipeline` are the only ones, apart from the jobs, that import ray.
"""

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from qvl_batch.pipeline.crash_guard import AttemptsInMemory, Guarded
from qvl_batch.pipeline.stages import DecoderStage, VisionStage
from qvl_batch.rows import Row


class RemoteAttempts:
    """`Attempts` in an actor, which outlives the workers."""

    def __init__(self) -> None:
        self._actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(AttemptsInMemory).remote()

    def begin(self, stage: str, rows: Sequence[Row]) -> bool:
        """As `Attempts.begin`."""
        return bool(ray.get(self._actor.begin.remote(stage, rows)))

    def begin_alone(self, stage: str, row: Row) -> bool:
        """As `Attempts.begin_alone`."""
        return bool(ray.get(self._actor.begin_alone.remote(stage, row)))

    def survived(self, stage: str, row: Row) -> None:
        """As `Attempts.survived`."""
        self._actor.survived.remote(stage, row)

    def done(self, stage: str, rows: Sequence[Row]) -> None:
        """As `Attempts.done`."""
        self._actor.done.remote(stage, rows)


class _Worker:
    """A stage in an actor of its own."""

    name: str
    stage: Callable[..., Any]

    def __init__(self, attempts: RemoteAttempts, *made_of: Any) -> None:
        self._guarded = Guarded(type(self).stage(*made_of), self.name, attempts)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._guarded(table)


class VisionWorker(_Worker):
    """Its arguments are those of `VisionStage`."""

    name, stage = "vision", VisionStage


class DecoderWorker(_Worker):
    """Its arguments are those of `DecoderStage`."""

    name, stage = "decode", DecoderStage


class JoinedWorker:
    """Both stages in one actor, which share a GPU: while one batch is answered, another's images are encoded.

    Args:
        attempts: what is known of rows that may end a worker.
        vision: arguments of `VisionStage`.
        decoder: arguments of `DecoderStage`.
    """

    def __init__(self, attempts: RemoteAttempts, vision: Sequence[Any], decoder: Sequence[Any]) -> None:
        # The decoder's memory is the larger part, and planned.
        self._decoder = DecoderWorker(attempts, *decoder)
        self._vision = VisionWorker(attempts, *vision)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode the images of a table, then answer its rows."""
        return self._decoder(self._vision(table))


def worker_name() -> str:
    """Machine, node of the cluster and process of an actor."""
    return f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}/{os.getpid()}"
