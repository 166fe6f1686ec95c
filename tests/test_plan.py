"""A plan fits the machine: actors leave room for the tasks that feed them, whatever is asked for."""

import pytest
from conftest import ROOT, nodes_of

from qvl_batch.config import CaptionConfig
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.errors import ConfigError
from qvl_batch.pipeline.capacity import Card, Node, machine_memory
from qvl_batch.pipeline.plan import FOR_TASKS, TASK_CPUS, make_plan


def _plan_on_nodes(bundle, *cpus, is_cluster=False, **options):
    config = CaptionConfig(bundle=bundle.path, input=("x",), output=ROOT, **options)
    return make_plan(config, bundle.manifest, nodes_of(*cpus), is_cluster=is_cluster)


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
    with pytest.raises(ConfigError, match=r"--slots 99: .* 0.2 GB, and node 0 has 0.1 GB; by default .* be 8"):
        _plan_on_nodes(tiny_bundle, 4, slots=99)


@pytest.mark.parametrize(("limit", "memory"), [("33554432\n", 1 << 25), ("max\n", 1 << 26), (f"{1 << 60}\n", 1 << 26)])
def test_a_container_has_what_it_was_given(limit, memory, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr("qvl_batch.pipeline.capacity.CONTAINER_LIMITS", (tmp_path / "memory.max", tmp_path / "missing"))
    monkeypatch.setattr("qvl_batch.pipeline.capacity.os.sysconf", lambda _: 8192)
    assert machine_memory() == memory


@pytest.mark.parametrize(
    ("cpus", "places", "workers", "threads"),
    [
        ((2,), 2, 1, 1),
        ((2, 2), 4, 2, 1),
        ((8,), 2, 1, 4),
        ((8, 8), 4, 2, 4),
        ((2, 8, 8), 4, 2, 4),  # a small head has no place
        ((8,) * 10, 20, 18, 4),
        ((16,) * 4, 8, 6, 8),
        ((64, 64, 16), 17, 10, 8),
        ((192,), 24, 14, 8),
    ],
)
def test_vision_workers_have_the_places_that_decoders_leave(cpus, places, workers, threads, tiny_bundle):
    plan = _plan_on_nodes(tiny_bundle, *cpus, is_cluster=True)
    assert (plan.places.number_on(cpus), plan.vision_workers, plan.vision_threads) == (places, workers, threads)
    assert plan.on(cpus) == plan
    busy = workers * threads + plan.decoder_workers * plan.decoder_threads
    assert 0.75 * sum(cpus) <= busy <= 1.1 * sum(cpus)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16, 64, 192])
@pytest.mark.parametrize(("decoders", "least"), [(1, None), (5, None), (2, 7)])
@pytest.mark.parametrize("cards", [(), (Card("H100", 80 * 10**9, 80 * 10**9),) * 5])
def test_nodes_that_come_and_go_keep_room_for_tasks_and_decoders(size, decoders, least, cards, tiny_bundle):
    options = {"decoder_workers": decoders, "vision_workers": least}
    config = CaptionConfig(bundle=tiny_bundle.path, input=("x",), output=ROOT, **options)
    plan = make_plan(config, tiny_bundle.manifest, nodes_of(size, size), cards, is_cluster=True)
    assert plan.vision_workers >= (least or 1)
    assert plan.vision_cpus != TASK_CPUS  # Ray Data would fuse the stages
    for nodes in [(size,) * count for count in (2, 3, 50)] + [(size, size, 2 * size, size // 2)]:
        there = plan.on(nodes)
        claimed = there.vision_workers * plan.vision_cpus + plan.decoder_workers * plan.decoder_cpus
        assert claimed <= sum(max(each - FOR_TASKS, 0) for each in nodes) + 1e-9


def test_a_pool_follows_the_nodes_between_its_bounds_and_so_does_what_feeds_it(tiny_bundle):
    plan = _plan_on_nodes(tiny_bundle, 8, 8, is_cluster=True)
    assert [plan.on([8] * count).vision_workers for count in (0, 1, 2, 3, 10)] == [1, 1, 2, 4, 18]
    assert [plan.on([8] * count).tasks_at_once for count in (0, 1, 2, 10)] == [1, 2, 4, 20]
    assert plan.on([8] * 10).bytes_in_flight() > 2 * plan.bytes_in_flight()
    assert plan.on([32]).vision_workers == 7  # a larger node has as many more
    assert plan.on([4, 4]).vision_workers == 1  # smaller ones hold none, but one worker is kept
    bounded = _plan_on_nodes(tiny_bundle, 8, 8, is_cluster=True, vision_workers=2, max_vision_workers=5)
    assert [bounded.on([8] * count).vision_workers for count in (0, 1, 2, 3, 10)] == [2, 2, 2, 4, 5]
    fixed = _plan_on_nodes(tiny_bundle, 8, 8, is_cluster=True, vision_workers=2)
    assert [fixed.on([8] * count).vision_workers for count in (0, 1, 10)] == [2, 2, 2]
    alone = _plan_on_nodes(tiny_bundle, 64)
    assert alone.on([8]) == alone
    assert "of 4 threads (with the nodes, more or fewer, at most 5)" in str(bounded)
    assert "more or fewer" not in str(fixed) + str(alone)


def test_most_vision_workers_bound_one_machine_too(tiny_bundle):
    assert _plan_on_nodes(tiny_bundle, 64).vision_workers == 5
    assert _plan_on_nodes(tiny_bundle, 64, max_vision_workers=3).vision_workers == 3
    assert _plan_on_nodes(tiny_bundle, 64, vision_workers=7, max_vision_workers=9).vision_workers == 7
    with pytest.raises(ConfigError, match="--max-vision-workers 2 is below --vision-workers 3"):
        _plan_on_nodes(tiny_bundle, 64, vision_workers=3, max_vision_workers=2)
    with pytest.raises(ConfigError, match="--max-vision-workers must be at least 1, not 0"):
        _plan_on_nodes(tiny_bundle, 64, max_vision_workers=0)


def test_slots_fit_the_smallest_node_that_can_have_a_decoder(tiny_bundle):
    slot = slot_bytes(tiny_bundle.manifest)
    nodes = [Node("node a", 8, 4000 * slot), Node("node b", 8, 40 * slot), Node("node c", 2, 4 * slot)]

    def plan(**options):
        config = CaptionConfig(bundle=tiny_bundle.path, input=("x",), output=ROOT, **options)
        return make_plan(config, tiny_bundle.manifest, nodes, is_cluster=True)

    assert (plan().slots, plan(slots=40).slots) == (10, 40)  # a quarter of the memory; all of it
    with pytest.raises(ConfigError, match=r"--slots 41: .* and node b has 0\.1 GB; by default there would be 10"):
        plan(slots=41)
    assert plan(slots=20, decoder_workers=3).slots == 20  # two of them on one node
    with pytest.raises(ConfigError, match="node b has"):
        plan(slots=21, decoder_workers=3)
