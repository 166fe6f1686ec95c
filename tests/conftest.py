"""What the tests share: the tiny checkpoint, its bundle, and a Ray folder of their own."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.checkpoint import Checkpoint, load_checkpoint
from export.package import ExportConfig, export_bundle
from qvl_batch.bundle import Bundle

ROOT = Path(__file__).parent.parent
TINY = ROOT / "datasets" / "tiny-qwen2.5-vl"
QUESTIONS = ROOT / "datasets" / "demo" / "questions.parquet"

# The scripts there are run by their path, as no package.
sys.path[:0] = [str(ROOT / "datasets"), str(ROOT / "jobs")]


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny checkpoint, exported once."""
    output = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(ExportConfig(checkpoint=TINY, output=output))
    return Bundle.load(output)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    """The tiny checkpoint in PyTorch."""
    return load_checkpoint(TINY)


@pytest.fixture
def copied_bundle(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


@pytest.fixture
def ray_env() -> Iterator[dict[str, str]]:
    """Environment for a job of its own: a short folder, since sockets' paths may not be long."""
    import os  # noqa: PLC0415

    folder = tempfile.mkdtemp(prefix="qvl")
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    yield env | {"RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)
