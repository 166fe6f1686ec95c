"""Ray itself: the cluster that a job runs on, its nodes and GPUs, and its errors as errors of the job."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray
import ray.data
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qvl_batch.errors import ConfigError, DeviceError, JobError
from qvl_batch.pipeline.capacity import Card, Node, card_of_this_process, machine_memory
from qvl_batch.pipeline.plan import LEAST_CPUS
from qvl_batch.runtime.devices import usable_cpus

#: Seconds in which nodes say how much memory they have. A node that Ray installs this package on takes a minute.
MEMORY_SECONDS = 180.0
#: Loggers of Ray and their levels here. Ray's progress bars are replaced by rows done and tracebacks by one line (Ray's
#: log folder has all of it); that Ray creates a token for itself is of no interest.
QUIET = {
    "ray": logging.WARNING,
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,
    "ray.data.exceptions": logging.CRITICAL,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
}


def cards() -> list[Card]:
    """GPUs of the cluster.

    Raises:
        DeviceError: there is none, or NVML does not answer.
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
        raise job_error(error) from error


def node_cpus() -> list[int]:
    """CPUs of each node that there is now."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def lost_nodes() -> set[str]:
    """IDs of the nodes that are gone."""
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def _nodes() -> list[Node]:
    """The nodes that there are now and that answer.

    Raises:
        ConfigError: no node has enough CPUs, or none of those answers.
    """
    alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    cpus = {node_id: int(node["Resources"].get("CPU", 0)) for node_id, node in alive.items()}
    if max(cpus.values(), default=0) < LEAST_CPUS:
        found = list(cpus.values())
        raise ConfigError(f"no node of the Ray cluster has {LEAST_CPUS} CPUs, which this job needs: {found}")
    asking = {}
    for node_id in (each for each, count in cpus.items() if count >= LEAST_CPUS):
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        asking[ray.remote(num_cpus=0, scheduling_strategy=there)(machine_memory).remote()] = node_id
    answered, _ = ray.wait(list(asking), num_returns=len(asking), timeout=MEMORY_SECONDS)
    nodes = []
    for answer in answered:
        node = alive[asking[answer]]
        with suppress(ray.exceptions.RayError):  # a node that went away meanwhile is none
            name = f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            nodes.append(Node(name, cpus[node["NodeID"]], ray.get(answer)))
    if not nodes:
        raise ConfigError(
            f"none of the {len(asking)} nodes of the Ray cluster ran a task in {MEMORY_SECONDS:.0f} s: see `ray status`"
        )
    return nodes


def is_shared() -> bool:
    """Whether the cluster is one that others started, whose nodes may come and go."""
    return "RAY_ADDRESS" in os.environ or len(ray.nodes()) > 1


@contextmanager
def cluster() -> Iterator[list[Node]]:
    """A cluster: the one this job was submitted to, else a private one that ends with the job.

    Yields:
        its nodes that have enough CPUs.

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
    # It would advise to reserve memory for each worker as soon as its graph is loaded.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1
    try:
        if not joined:
            on_sigterm = signal.getsignal(signal.SIGTERM)
            _start_ray()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)  # ray.init replaced it
        yield _nodes() if is_shared() else [Node("this machine", sum(node_cpus()), machine_memory())]
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
            # ray.init would retry for minutes.
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(logging_level=logging.WARNING)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(f"no Ray cluster at RAY_ADDRESS={address} ({first_line}); unset it to run here") from error


def job_error(error: Exception) -> JobError:
    """The error of the job that Ray wrapped, or one that names the error of a worker."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().split("\n")
    if isinstance(cause, ray.exceptions.ActorDiedError) and cause.actor_init_failed:
        own = lines[-1].removeprefix(f"{JobError.__module__}.")  # Ray passes on the traceback as text
        return JobError(f"a worker failed: {own}" if own == lines[-1] else own.partition(": ")[2])
    message = lines[0]  # the rest is Ray's advice on its settings
    if isinstance(cause, JobError):
        return type(cause)(message)
    return JobError(f"a worker failed: {type(cause).__name__}: {message}")
