"""A plan fits the machine: actors leave room for the tasks that feed them, whatever is asked for."""

import pytest
from conftest import ROOT

from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ConfigError
from qvl_batch.pipeline.capacity import machine_memory
from qvl_batch.pipeline.plan import FOR_TASKS, make_plan


def _plan_on_nodes(bundle, *nodes, **options):
    config = CaptionConfig(bundle=bundle.path, input=("x",), output=ROOT, **options)
    return make_plan(config, bundle.manifest, nodes)


@pytest.mark.parametrize("cpus", [2, 3, 4, 8, 16, 61, 192])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision_workers": 5, "decoder_workers": 3},
        {"decoder_workers": 40},
        {"vision_workers": 64},
        {"vision_workers": 1000},
    ],
)
def test_actors_leave_cpus_to_tasks(cpus, options, tiny_bundle):
    plan = _plan_on_nodes(tiny_bundle, cpus, **options)
    claimed = plan.vision_workers * plan.vision_cpus + plan.decoder_workers * plan.decoder_cpus
    assert 0 < claimed <= cpus - FOR_TASKS + 1e-9
    for name, value in options.items():
        assert getattr(plan, name) == value


def test_more_workers_than_ray_can_share_cpus_among_are_refused(tiny_bundle):
    with pytest.raises(ConfigError, match=r"2 CPUs are too few for 9999 --vision-workers and 1 --decoder-workers"):
        _plan_on_nodes(tiny_bundle, 2, vision_workers=9999)


@pytest.mark.parametrize("nodes", [(2, 2), (2, 2, 2, 2), (4, 1, 1, 1, 1, 1, 1), (64, 16), (2, 1)])
def test_some_node_has_a_whole_cpu_for_a_task_wherever_actors_go(nodes, tiny_bundle):
    plan = _plan_on_nodes(tiny_bundle, *nodes, vision_workers=len(nodes), decoder_workers=len(nodes))
    claimed = plan.vision_workers * plan.vision_cpus + plan.decoder_workers * plan.decoder_cpus
    # At worst every node has what is left of it and no whole CPU.
    assert claimed <= sum(max(each - 1, 0) for each in nodes)
    assert claimed > 0


@pytest.mark.parametrize("cpus", [2, 3, 4, 8, 16, 61, 192])
def test_by_default_threads_are_about_as_many_as_cores(cpus, tiny_bundle):
    plan = _plan_on_nodes(tiny_bundle, cpus)
    threads = plan.vision_workers * plan.vision_threads + plan.decoder_workers * plan.decoder_threads
    assert 0.8 * cpus <= threads <= cpus + 1


def test_slots_fit_memory_unless_asked_for(tiny_bundle, monkeypatch):
    assert _plan_on_nodes(tiny_bundle, 4).slots == 32
    assert _plan_on_nodes(tiny_bundle, 4, slots=99).slots == 99
    monkeypatch.setattr("qvl_batch.pipeline.capacity.os.sysconf", lambda _: 8192)  # a machine of 64 MiB
    assert _plan_on_nodes(tiny_bundle, 4).slots == 8
    with pytest.raises(ConfigError, match=r"--slots 99: .* 0.2 GB, and this machine has 0.1 GB; by default .* be 8"):
        _plan_on_nodes(tiny_bundle, 4, slots=99)


@pytest.mark.parametrize(("limit", "memory"), [("33554432\n", 1 << 25), ("max\n", 1 << 26), (f"{1 << 60}\n", 1 << 26)])
def test_a_container_has_what_it_was_given(limit, memory, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr("qvl_batch.pipeline.capacity.CONTAINER_LIMITS", (tmp_path / "memory.max", tmp_path / "missing"))
    monkeypatch.setattr("qvl_batch.pipeline.capacity.os.sysconf", lambda _: 8192)
    assert machine_memory() == memory
