"""Intel's Neural Compressor and Olive take the plain graphs, as the page says (`make quantizers` installs them)."""

import os
import re
import shutil
import subprocess

import pytest
from conftest import QUESTIONS, ROOT, TINY

from export.calibration import CalibrationConfig, calibrate
from export.comparison.config import CompareConfig
from export.comparison.run import compare
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL

PROGRAMS = ROOT / "build" / "quantizers" / "bin"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (PROGRAMS.parent / ".ready").exists(),
        reason="`make quantizers` has not installed Neural Compressor and Olive",
    ),
]
PAGE = (ROOT / "export" / "README.md").read_text()


def _run(program, *words, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [PROGRAMS / program, *map(str, words)]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr


def _drift(bundle, graph, output):
    config = CompareConfig(
        bundle=bundle.path, checkpoint=TINY, input=(str(QUESTIONS),), output=str(output), decoder_graph=graph, limit=3,
        layers=True,
    )  # fmt: skip
    return compare(config).summary["drift"]["prefill"]["max"]


def test_neural_compressor_takes_the_plain_graph(tiny_bundle, tmp_path):
    """`python compress.py`, the script of the page."""
    (script,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "neural_compressor" in code)
    (tmp_path / "compress.py").write_text(script)
    calibrate(
        CalibrationConfig(
            bundle=tiny_bundle.path, input=(str(QUESTIONS),), output=str(tmp_path / "rows"), limit=4, pad_to=640
        )
    )
    graph = tmp_path / "quantized.onnx"
    _run("python", "compress.py", tiny_bundle.file(DECODER_FULL), tmp_path / "rows", graph, folder=tmp_path)
    assert 1e-3 < _drift(tiny_bundle, graph, tmp_path / "comparison") < 0.7


def test_olive_takes_the_plain_graph(tiny_bundle, tmp_path):
    """The command of the page, by what `make quantizers` has installed."""
    for name in (DECODER_FULL, f"{DECODER}.data"):
        shutil.copyfile(tiny_bundle.path / name, tmp_path / name)
    (line,) = re.findall(r"`olive (quantize [^`]+)`", PAGE)
    _run("olive", *line.split(), "--disable_telemetry", folder=tmp_path)
    assert 1e-3 < _drift(tiny_bundle, tmp_path / "out" / "model.onnx", tmp_path / "comparison") < 0.7
