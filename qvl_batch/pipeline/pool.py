"""The stages follow the cluster while a job runs: what is planned for its nodes is planned again when these change.

What enters: the plan, and Ray Data's executor at each of its steps. What leaves: the executor's limits as the nodes
there are need them, how many vision workers there were, and a line where that changes or a stage has no worker.

Ray Data has pools that grow and shrink with their load, but not with the nodes: they take whatever CPUs no other stage
has reserved, tasks at a time and the object-store budget stay as they were at the start, and by default a pool grows
from 1.75 batches for each call of an actor on, which ours never have. So its limits are set here, and Ray Data starts
workers to keep them. It has no public name for that; what is used of it is of the release that pyproject.toml names.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from ray.data import DataContext
from ray.data._internal.actor_autoscaler import ActorPoolScalingRequest
from ray.data._internal.execution.execution_callback import ExecutionCallback

from qvl_batch.pipeline.cluster import node_cpus
from qvl_batch.pipeline.metrics import vision_workers_gauge
from qvl_batch.pipeline.plan import LEAST_CPUS, Plan, counted

#: Seconds between two looks at the nodes, and between two lines about workers that are awaited.
SECONDS, WAITING_SECONDS = 2.0, 60.0
#: Most workers of a pool that has no limit, as Ray Data wants a number.
NO_LIMIT = 1_000_000


class StepCallback(ExecutionCallback):
    """Hands on the steps of the executor. Ray Data makes one for each dataset, and sends the class to its workers."""

    #: Who gets them in this process.
    pool: ClassVar["WorkerPool | None"] = None

    def before_execution_starts(self, executor: Any) -> None:
        """See `ExecutionCallback`."""
        if self.pool is not None:
            self.pool.look(executor)

    def on_execution_step(self, executor: Any) -> None:
        """See `ExecutionCallback`."""
        if self.pool is not None:
            self.pool.step(executor)


class Level:
    """A number that changes with time."""

    def __init__(self) -> None:
        self._steps: list[tuple[float, int]] = []

    def set(self, value: int) -> None:
        """It is this from now on."""
        if value != self.now or not self._steps:
            self._steps.append((time.time(), value))

    @property
    def now(self) -> int:
        """What it is; 0 before it was set."""
        return self._steps[-1][1] if self._steps else 0

    @property
    def most(self) -> int:
        """The most that it was."""
        return max((value for _, value in self._steps), default=0)

    def mean(self, start: float, stop: float) -> float:
        """What it was on average between two Unix times; 0 if nothing is between them."""
        if not self._steps or stop <= start:
            return 0.0
        ends = [began for began, _ in self._steps[1:]] + [stop]
        sums = (
            value * max(min(end, stop) - max(began, start), 0.0)
            for (began, value), end in zip(self._steps, ends, strict=True)
        )
        return sum(sums) / (stop - start)

    def record(self, start: float, stop: float) -> dict[str, float]:
        """Its entry in `_run.json`."""
        return {"most": self.most, "mean": round(self.mean(start, stop), 2)}


class WorkerPool:
    """Keeps the stages at what a plan is on the nodes that there are, and counts vision workers.

    Args:
        plan: for the nodes at the start.
        say: receives a line about workers.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._plan, self._say = plan, say
        #: Vision workers that run, and tasks of a stage that may.
        self.vision_workers, self.tasks_at_once = Level(), Level()
        self._gauge = vision_workers_gauge()
        #: Vision workers and nodes, as they were at the last look and as they were said to be.
        self._seen = self._said = (0, 0)
        self._next_look = 0.0
        self._lacking: dict[str, float] = {}

    @contextmanager
    def followed(self, context: DataContext) -> Iterator[None]:
        """Follow the datasets that are run meanwhile."""
        StepCallback.pool = self
        context.custom_execution_callback_classes.append(StepCallback)
        try:
            yield
        finally:
            context.custom_execution_callback_classes.remove(StepCallback)
            StepCallback.pool = None

    def threads(self, start: float, first_image: float, stop: float) -> dict[str, float]:
        """Threads of each stage that there were on average.

        Args:
            start: Unix time from which on reading and decoding images count.
            first_image: the same of vision and decoder.
            stop: Unix time of the end.
        """
        tasks = self.tasks_at_once.mean(start, stop)
        threads: dict[str, float] = {**self._plan.threads, "read": tasks, "image": tasks}
        if not self._plan.is_joined:
            threads["vision"] = self._plan.vision_threads * self.vision_workers.mean(first_image, stop)
        return threads

    def step(self, executor: Any) -> None:
        """Count vision workers, and look at the nodes if it is time."""
        vision = dict(_actor_pools(executor)).get("vision")
        if vision is not None:
            self.vision_workers.set(vision.num_alive_actors())
            self._gauge.set(self.vision_workers.now)
        if time.monotonic() >= self._next_look:
            self.look(executor)

    def look(self, executor: Any) -> None:
        """Fit the executor of a dataset to the nodes that there are now."""
        self._next_look = time.monotonic() + SECONDS
        cpus, pools = node_cpus(), dict(_actor_pools(executor))
        plan = self._plan.on(cpus)
        self.tasks_at_once.set(plan.tasks_at_once)
        if self._plan.places is not None:
            self._fit(executor, pools["vision"], plan)
            self._tell(pools["vision"], sum(each >= LEAST_CPUS for each in cpus))
        for stage, pool in pools.items():
            self._tell_lack(stage, pool)

    def _fit(self, executor: Any, vision: Any, plan: Plan) -> None:
        """Give the executor the limits of a plan."""
        executor._options.resource_limits = executor._options.resource_limits.copy(  # noqa: SLF001
            object_store_memory=plan.bytes_in_flight()
        )
        for policy in executor._backpressure_policies:  # noqa: SLF001
            caps = getattr(policy, "_concurrency_caps", {})
            for operator in executor._topology:  # noqa: SLF001
                if getattr(operator, "_max_concurrency", None) is not None:
                    operator._max_concurrency = caps[operator] = plan.tasks_at_once  # noqa: SLF001
        assert self._plan.places is not None
        size, most = plan.vision_workers, self._plan.places.most or NO_LIMIT
        vision._config = replace(vision._config, min_size=size, max_size=max(most, size), initial_size=size)  # noqa: SLF001
        if (over := vision.current_size() - size) > 0:
            # Those that wait for CPUs or for work: there is no room for them.
            vision.scale(ActorPoolScalingRequest.downscale(delta=-over, force=True, reason="nodes are fewer"))

    def _tell(self, vision: Any, nodes: int) -> None:
        """Say how many vision workers there are, if that is not what it was and has been so since the last look."""
        seen, self._seen = self._seen, (vision.num_alive_actors(), nodes)
        if self._seen == seen and seen != self._said:
            self._say(f"workers   {counted(seen[0], 'vision worker')} on {counted(nodes, 'node')}")
            self._said = seen

    def _tell_lack(self, stage: str, pool: Any) -> None:
        """Say that a stage has no worker, if that lasts."""
        if pool.num_alive_actors() or not pool.current_size():
            self._lacking.pop(stage, None)
            return
        since = self._lacking.setdefault(stage, time.monotonic())
        if time.monotonic() - since >= WAITING_SECONDS:
            each = pool.per_actor_resource_usage()
            needs = f"{each.cpu or 0:g} CPUs" + (f" and {each.gpu:g} GPU" if each.gpu else "")
            self._say(
                f"waiting   no {stage} worker runs, {pool.current_size()} start or wait for a node that has {needs} "
                "free; `ray status` shows what there is"
            )
            self._lacking[stage] = time.monotonic()


def _actor_pools(executor: Any) -> Iterator[tuple[str, Any]]:
    """Ray Data's pools of workers, by stage."""
    for operator in executor._topology:  # noqa: SLF001
        stage = "vision" if "VisionWorker" in operator.name else "decoder"
        yield from ((stage, pool) for pool in operator.get_autoscaling_actor_pools())
