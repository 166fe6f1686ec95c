"""Workers come and go with the nodes of a cluster, and every row is answered once, as on a quiet day."""

import json
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUESTIONS, ROOT, nodes_of
from output_folders import rows_by_id

from qvl_batch import Captioner
from qvl_batch.config import CaptionConfig
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.source import open_source
from qvl_batch.pipeline.capacity import Card
from qvl_batch.pipeline.dataset import Pipeline
from qvl_batch.pipeline.plan import make_plan
from qvl_batch.pipeline.pool import Level, WorkerPool

#: Of the demo's rows in the job.
COPIES = 8


@pytest.fixture
def seconds(monkeypatch):
    """The time, to be set."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(
        "qvl_batch.pipeline.pool.time", SimpleNamespace(time=lambda: now.time, monotonic=lambda: now.time)
    )
    return now


def test_workers_that_come_and_go_are_counted_for_the_time_that_they_were_there(seconds):
    level = Level()
    assert (level.now, level.most, level.mean(0.0, 9.0)) == (0, 0, 0.0)
    for at, workers in ((10.0, 2), (12.0, 2), (20.0, 5), (30.0, 1), (40.0, 0)):
        seconds.time = at
        level.set(workers)
    assert (level.now, level.most) == (0, 5)
    assert level.mean(10.0, 40.0) == pytest.approx((20 + 50 + 10) / 30)
    assert level.mean(15.0, 25.0) == pytest.approx((2 * 5 + 5 * 5) / 10)
    assert level.mean(0.0, 20.0) == pytest.approx(1.0)  # none before the first
    assert level.mean(35.0, 75.0) == pytest.approx(5 / 40)
    assert level.mean(20.0, 20.0) == 0.0
    assert level.record(10.0, 40.0) == {"most": 5, "mean": 2.67}


def test_a_stage_without_a_worker_is_named_each_minute_until_it_has_one(seconds):
    said, workers = [], SimpleNamespace(alive=1)
    stage = SimpleNamespace(
        num_alive_actors=lambda: workers.alive,
        current_size=lambda: 2,
        per_actor_resource_usage=lambda: SimpleNamespace(cpu=3.25, gpu=1),
    )
    pool = WorkerPool(SimpleNamespace(), said.append)
    for at, alive in ((0, 1), (10, 0), (69, 0), (70, 0), (129, 0), (130, 0), (140, 1), (150, 0), (209, 0)):
        seconds.time, workers.alive = float(at), alive
        pool._tell_lack("decoder", stage)  # noqa: SLF001  (a job without nodes takes minutes)
    assert len(said) == 2
    assert said[0].startswith(
        "waiting   no decoder worker runs, 2 start or wait for a node that has 3.25 CPUs and 1 GPU"
    )


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("vision_device", "workers"), [("cpu", ["VisionWorker", "DecoderWorker"]), ("cuda", ["JoinedWorker"])]
)
def test_ray_data_takes_the_stages_of_a_job_on_gpus(vision_device, workers, tiny_bundle):
    config = CaptionConfig(bundle=tiny_bundle.path, input=(str(QUESTIONS),), output="out")
    card = Card("H100", 80 * 10**9, 80 * 10**9)
    plan = make_plan(config, tiny_bundle.manifest, nodes_of(8), [card] * 2, vision_device, is_cluster=True)
    source, view = open_source(config), View.of(tiny_bundle.manifest.layout.resolution)
    pool = WorkerPool(plan, print)
    pipeline = Pipeline(config, tiny_bundle, plan, source.columns, view, Fetcher(()), frozenset(), pool)
    assert re.findall(r"\w+Worker", str(pipeline.dataset(list(source.units())))) == workers[::-1]


class Nodes:
    """Simulated nodes, and a job on them.

    Args:
        env: of all processes.
    """

    def __init__(self, env):
        # The head has no CPUs for workers, so that all of them are on nodes that can go.
        self._cluster = subprocess.Popen(
            [sys.executable, "tests/cluster.py", "1", "0"],
            cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.env = env | {"RAY_ADDRESS": next(line for line in self._cluster.stdout if ":" in line).strip()}
        self.said = []

    def add(self):
        self._command("add 2")
        return self._cluster.stdout.readline().strip()

    def remove(self, node):
        self._command(f"remove {node}")

    def _command(self, line):
        print(line, file=self._cluster.stdin, flush=True)

    def start(self, *options):
        command = [sys.executable, "jobs/caption.py", *map(str, options)]
        self._job = subprocess.Popen(
            command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for(self, text, times=1):
        """Read on until the job has said something so many times."""
        for line in self._job.stdout:
            self.said.append(line)
            times -= text in line
            if not times:
                return
        pytest.fail(f"no {text!r}:\n" + "".join(self.said))

    def finish(self):
        self.said += self._job.stdout
        return self._job.wait()

    def close(self):
        for process in (self._job, self._cluster):
            process.kill() if process is self._job else process.stdin.close()
            process.wait(60)


@pytest.mark.long
def test_nodes_that_join_are_used_and_those_that_go_take_no_row_with_them(tiny_bundle, ray_env, tmp_path):
    demo = pq.read_table(QUESTIONS)
    rows = pa.concat_tables([demo] * COPIES).drop_columns(["id"])
    rows = rows.append_column("id", pa.array([f"{number:04}" for number in range(rows.num_rows)]))
    pq.write_table(rows, tmp_path / "rows.parquet")
    nodes = Nodes(ray_env)
    try:
        first = nodes.add()
        nodes.start(
            "--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", tmp_path / "out",
            "--max-new-tokens", 8,
        )  # fmt: skip
        nodes.wait_for("1 vision worker of 1 thread (with the nodes, more or fewer), 1 decoder of 1 thread")
        nodes.wait_for(" rows, ")
        second = nodes.add()
        nodes.wait_for("workers   3 vision workers on 2 nodes")
        nodes.wait_for(" rows, ", times=2)
        # The decoder was there before there was another node.
        nodes.remove(first)
        nodes.wait_for("workers   1 vision worker on 1 node\n")
        assert nodes.finish() == 0, "".join(nodes.said)
    finally:
        nodes.close()
    run = json.loads((tmp_path / "out" / "_run.json").read_text())
    for stage in ("vision", "decoder"):
        by_node = Counter()
        for worker, count in run["rows_of_workers"][stage].items():
            by_node[worker.split("/")[1]] += count
        assert set(by_node) == {first, second}
        assert sum(by_node.values()) == rows.num_rows
    assert run["vision_workers"]["most"] == 3
    assert 1 < run["vision_workers"]["mean"] < 3
    assert run["stages"]["vision"]["at_once"] == run["vision_workers"]["mean"]
    assert run["errors"] == {}
    with Captioner(tiny_bundle.path) as captioner:
        images = [image["bytes"] for image in demo["image"].to_pylist()]
        expected = captioner.caption(images, demo["prompt"].to_pylist(), max_new_tokens=8)
    answers = rows_by_id(tmp_path / "out")
    assert [row["id"] for row in answers] == rows["id"].to_pylist()
    assert [row["answer"] for row in answers] == [answer.answer for answer in expected] * COPIES
