"""What the tests share: the tiny checkpoint, its bundle, and a Ray folder of their own."""

import fcntl
import functools
import hashlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pyarrow.parquet as pq
import pytest
import torch

from export.checkpoint import Checkpoint, load_checkpoint
from export.config import ExportConfig
from export.graphs import Traces
from export.package import export_bundle
from qvl_batch.bundle.loading import Bundle
from qvl_batch.pipeline.capacity import Node, machine_memory

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parent.parent
TINY = ROOT / "datasets" / "tiny-qwen2.5-vl"
QUESTIONS = ROOT / "datasets" / "demo" / "questions.parquet"
CONVERSATIONS = ROOT / "datasets" / "demo" / "conversations.parquet"
SCENES = ROOT / "datasets" / "demo" / "scenes.parquet"
SCENE = ROOT / "datasets" / "demo" / "scene.json"


class SharedTraces(Traces):
    """Traces that the processes of a run share, each made by the first that needs it."""

    #: Where they are, if there are several processes.
    folder: Path | None = None

    def once(self, trace: Callable[..., ir.Model], model: Any, *options: object) -> ir.Model:
        """As `Traces.once`."""

        @functools.wraps(trace)
        def shared(*made_of: Any) -> ir.Model:
            if self.folder is None:
                return trace(*made_of)
            known = repr((trace.__name__, model.config.to_json_string(), options))
            path = self.folder / hashlib.sha256(known.encode()).hexdigest()
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    ir.save(trace(*made_of), path)
                return ir.load(path)

        return super().once(shared, model, *options)


#: Of all exports in the tests: to trace the tiny model's graphs takes longer than all that follows.
TRACES = SharedTraces()

# Its threads wait for each other by spinning: where something else runs too, two of them take three times as long.
torch.set_num_threads(1)

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The scripts there are run by their path, as no package.
sys.path[:0] = [str(ROOT / "datasets"), str(ROOT / "jobs")]


def pytest_configure(config: pytest.Config) -> None:
    """Processes of a run have folders beside each other."""
    if hasattr(config, "workerinput"):
        TRACES.folder = Path(config.option.basetemp).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process waits for them at the end; then some that can do
    without the bundle, which takes a process twenty seconds to make.
    """
    first = ["test_job.py", "test_job_answers.py", "test_hostile_images.py", "test_fuzz.py", "test_fetch.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


def exported(output: Path, checkpoint: Path = TINY, traces: Traces | None = TRACES, **options: Any) -> Bundle:
    """A bundle of the tiny checkpoint, or of another one."""
    export_bundle(ExportConfig(checkpoint=checkpoint, output=output, **options), traces=traces)
    return Bundle.load(output)


def shared_bundle(folder: Path, name: str, **options: Any) -> Bundle:
    """A bundle of the tiny checkpoint that the processes of a run share, made by the first that needs it.

    Args:
        folder: for the bundle, if there is only one process.
        name: of the bundle.
        options: of the export.
    """
    folder = (TRACES.folder or folder) / "shared"
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Bundle.load(folder / name) if (folder / name).exists() else exported(folder / name, **options)


def nodes_of(*cpus: int) -> list[Node]:
    """Nodes that have so many CPUs, and the memory of this machine."""
    return [Node(f"node {number}", each, machine_memory()) for number, each in enumerate(cpus)]


@pytest.fixture(scope="session")
def demo() -> list[dict[str, Any]]:
    """All rows of the demo."""
    rows: list[dict[str, Any]] = pq.read_table(QUESTIONS).to_pylist()
    return rows


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint, exported once."""
    return shared_bundle(tmp_path_factory.getbasetemp(), "tiny")


@pytest.fixture(scope="session")
def native_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint for images at their own size, exported once."""
    return shared_bundle(tmp_path_factory.getbasetemp(), "native", image_size="native")


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    """The tiny checkpoint in PyTorch."""
    return load_checkpoint(TINY)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Chrome"]:
    """A browser without a window."""
    from selenium import webdriver  # noqa: PLC0415  (machines with a GPU may be without it)

    program, service = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or service is None:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(service, env={**os.environ, "LC_ALL": "C.UTF-8"}))
    yield driver
    driver.quit()


@pytest.fixture
def copied_bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


@contextmanager
def ray_folder() -> Iterator[str]:
    """A folder for Ray: a short one, since sockets' paths may not be long."""
    folder = tempfile.mkdtemp(prefix="qvl")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster with this process as its driver, whose workers are warm after the first job."""
    import ray  # noqa: PLC0415  (machines with a GPU may be without it)

    on_sigterm = signal.getsignal(signal.SIGTERM)
    with ray_folder() as folder:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING,
            _temp_dir=folder, _system_config={"metrics_report_interval_ms": 500},
        )  # fmt: skip
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in its place
        yield
        ray.shutdown()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs `jobs/caption.py` in this process, holds its exit status to be as wanted, and returns what it says."""
    import caption  # noqa: PLC0415  (machines with a GPU may be without Ray)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(caption, "stop_as_by_ctrl_c", lambda: lambda: False)  # the tests' own signals stay theirs

    def call(*options: object, status: int = 0) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["caption.py", *map(str, options)])
        found = caption.main()
        said = capsys.readouterr()
        assert found == status, said.err
        return SimpleNamespace(stdout=said.out, stderr=said.err)

    return call


@pytest.fixture
def refusal(tiny_bundle: Bundle, call: Callable[..., SimpleNamespace], tmp_path: Path) -> Callable[..., list[str]]:
    """Runs a job over the demo, with options in place of others, that cannot be done: lines that it says."""

    def refusal(options: dict[str, str]) -> list[str]:
        usual = {"--bundle": str(tiny_bundle.path), "--input": str(QUESTIONS), "--output": str(tmp_path / "out")}
        lines: list[str] = call(
            *(word for pair in (usual | options).items() for word in pair), status=1
        ).stderr.splitlines()
        assert lines[-1].startswith("caption: ")
        return lines

    return refusal


@pytest.fixture
def job(cluster: None, call: Callable[..., SimpleNamespace]) -> Callable[..., SimpleNamespace]:  # noqa: ARG001
    """Runs a job in this process, on the cluster."""
    return call


@pytest.fixture
def ray_env() -> Iterator[dict[str, str]]:
    """Environment for a job of its own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with ray_folder() as folder:
        yield env | {"RAY_TMPDIR": folder}
