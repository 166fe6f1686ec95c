"""The stages as Ray's actors, and what they say of rows that may end them.

This module and `pipeline` are the only ones, apart from the jobs, that import ray.
"""

import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from qvl_batch.errors import DeviceError
from qvl_batch.plan import Card
from qvl_batch.quarantine import AttemptsInMemory, Guarded
from qvl_batch.rowset import Row
from qvl_batch.stages import DecodeStage, VisionStage


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
    """Its arguments are those of `DecodeStage`."""

    name, stage = "decode", DecodeStage


class JoinedWorker:
    """Both stages in one actor, which share a GPU: while one batch is answered, another's images are encoded.

    Args:
        attempts: what is known of rows that may end a worker.
        vision: arguments of `VisionStage`.
        decoder: arguments of `DecodeStage`.
    """

    def __init__(self, attempts: RemoteAttempts, vision: Sequence[Any], decoder: Sequence[Any]) -> None:
        # The decoder's memory is the larger part, and planned.
        self._decoder = DecoderWorker(attempts, *decoder)
        self._vision = VisionWorker(attempts, *vision)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode the images of a table, then answer its rows."""
        return self._decoder(self._vision(table))


def card_of_this_process() -> Card:
    """The GPU that Ray gave this process, as the driver's own tool sees it: to ask CUDA would take memory of it.

    Raises:
        DeviceError: the tool is missing or fails.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = [
        "nvidia-smi",
        f"--id={wanted}",
        "--query-gpu=name,memory.free,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout  # noqa: S603
        name, free, total = found.strip().split("\n")[0].rsplit(", ", 2)
        return Card(name, int(free) << 20, int(total) << 20)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise DeviceError(
            f"nvidia-smi does not say how much memory the GPU has ({error}): install it with the driver"
        ) from error


def worker_name() -> str:
    """Machine, node of the cluster and process of an actor."""
    return f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}/{os.getpid()}"
