"""A plain graph that a tool has quantized is judged like a bundle, and what cannot be one is refused in one line."""

import json
import os
import re
import subprocess
import sys

import onnx
import pyarrow.parquet as pq
import pytest
from checkpoints import make_checkpoint
from conftest import CONVERSATIONS, QUESTIONS, ROOT, TINY, exported
from onnxruntime.quantization import quantize_dynamic

from export.comparison.config import CompareConfig
from export.comparison.run import compare
from qvl_batch.bundle.manifest import DECODER_FULL, VISION_FULL
from qvl_batch.errors import BundleError, ConfigError, OutputError


@pytest.fixture(scope="module")
def dynamic(tiny_bundle, tmp_path_factory):
    """The plain decoder graph with products in integers."""
    path = tmp_path_factory.mktemp("dynamic") / "decoder.onnx"
    quantize_dynamic(tiny_bundle.file(DECODER_FULL), path, nodes_to_exclude=["decoder.head/MatMul"])
    return path


def _config(bundle, output, **changes):
    options = {"bundle": bundle.path, "checkpoint": TINY, "input": (str(QUESTIONS),), "output": str(output), "limit": 6}
    return CompareConfig(**options | changes)


@pytest.mark.long
def test_a_quantized_graph_is_judged_by_answers_stages_and_layers(tiny_bundle, dynamic, tmp_path):
    bounds = {"max_drift": 0.2, "min_agreement": 0.5}
    outcome = compare(_config(tiny_bundle, tmp_path, decoder_graph=dynamic, layers=True, **bounds))
    assert outcome.passed
    drift = outcome.summary["drift"]
    assert drift["vision"]["max"] < 1e-5  # the bundle's own
    assert 1e-3 < drift["prefill"]["max"] < 0.2
    own = {depth["name"]: depth["own"]["median"] for depth in outcome.summary["layers"]["depths"]}
    assert all(own[f"decoder.layers.{k}"] > 1e-3 for k in range(4))
    assert 1e-4 < own["decoder.embed"] < 1e-2  # the tool rounds the table of tokens too
    assert max(own["decoder.head"], own["vision.blocks.3"]) < 1e-5
    assert str(dynamic) in outcome.page.read_text()
    answers = pq.read_table(tmp_path / "comparison.parquet").to_pylist()
    assert sum(row["answer"] == row["reference"] for row in answers) >= 5
    with pytest.raises(OutputError, match="graphs"):
        compare(_config(tiny_bundle, tmp_path, layers=True, **bounds))


@pytest.mark.long
def test_a_plain_graph_answers_as_the_bundle_whatever_rows_share_its_runs(tiny_bundle, tmp_path):
    outcome = compare(_config(tiny_bundle, tmp_path, decoder_graph=tiny_bundle.file(DECODER_FULL), limit=8))
    assert outcome.passed
    assert outcome.summary["agreement"]["count"] == 8


@pytest.mark.long
@pytest.mark.parametrize("size", [672, "native"])
def test_plain_graphs_agree_with_pytorch_at_every_depth(size, tmp_path):
    # With a repetition penalty, and windows that are cut at the edge.
    text, vision = {"num_hidden_layers": 2}, {"depth": 2, "fullatt_block_indexes": [1], "window_size": 140}
    path = make_checkpoint(tmp_path / "checkpoint", text=text, vision=vision, generation={"repetition_penalty": 1.3})
    bundle = exported(tmp_path / "bundle", path, None, image_size=size, with_vision_full=True)
    rows = {"messages_column": "messages", "input": (str(CONVERSATIONS),)} if size == "native" else {}
    outcome = compare(
        _config(
            bundle, tmp_path / "out", checkpoint=path, layers=True, max_new_tokens=8, **rows,
            decoder_graph=bundle.file(DECODER_FULL), vision_graph=bundle.file(VISION_FULL),
        )
    )  # fmt: skip
    assert outcome.passed, str(outcome)
    depths = outcome.summary["layers"]["depths"]
    assert max(max(depth["total"]["max"], depth["own"]["max"]) for depth in depths) < 1e-4


def _without_names(source, path):
    model = onnx.load(source, load_external_data=False)
    names = {}
    for node in model.graph.node:
        node.name = ""
        for at, name in enumerate(node.output):
            names[name] = f"value_{len(names)}"
            node.output[at] = names[name]
        node.input[:] = [names.get(name, name) for name in node.input]
    model.graph.output[0].name = names["logits"]
    del model.graph.value_info[:]
    onnx.save(model, path)


def test_what_cannot_take_a_graphs_place_is_refused_in_one_line(tiny_bundle, tmp_path):
    source = tiny_bundle.file(DECODER_FULL)
    alone = tmp_path / "alone" / "decoder.onnx"
    alone.parent.mkdir()
    alone.write_bytes(source.read_bytes())
    (tmp_path / "page.onnx").write_text("<html>not found</html>")
    other = onnx.load(source, load_external_data=False)
    other.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 1000
    onnx.save(other, tmp_path / "other.onnx")
    for path, message in (
        (tmp_path / "nowhere.onnx", r"--decoder-graph .*nowhere.onnx: No such file or directory"),
        (tmp_path / "page.onnx", r"--decoder-graph .*page.onnx: it is not an ONNX graph"),
        (alone, r"has weights in decoder.onnx.data, which is not beside it: copy it there"),
        (
            tiny_bundle.path / "vision.onnx",
            r"has the inputs pixels uint8\(B, 672, 672, 3\), not input_ids int64\(B, S\),",
        ),
        (
            tmp_path / "other.onnx",
            r"has the outputs logits float\(B, S, 1000\), not logits float\(B, S, 512\): it must",
        ),
    ):
        if path.name == "other.onnx":
            (tmp_path / "decoder.onnx.data").symlink_to(tiny_bundle.path / "decoder.onnx.data")
        with pytest.raises(ConfigError, match=message) as held:
            compare(_config(tiny_bundle, tmp_path / "out", decoder_graph=path))
        assert "\n" not in str(held.value)


def test_a_graph_without_our_names_is_judged_but_not_by_layers(tiny_bundle, tmp_path):
    path = tmp_path / "nameless.onnx"
    _without_names(tiny_bundle.file(DECODER_FULL), path)
    (tmp_path / "decoder.onnx.data").write_bytes((tiny_bundle.path / "decoder.onnx.data").read_bytes())
    assert compare(_config(tiny_bundle, tmp_path / "out", decoder_graph=path, limit=2)).passed
    with pytest.raises(BundleError, match=r"'decoder.embed/Where:0' is not there: .* or leave out --layers"):
        compare(_config(tiny_bundle, tmp_path / "layers", decoder_graph=path, layers=True, limit=2))


@pytest.mark.long
@pytest.mark.parametrize("tool", ["8", "static", "dynamic"])
def test_a_day_with_tools_that_quantize_runs_as_the_page_says(tool, tiny_bundle, tmp_path):
    """The commands of the page, `python -m export.calibration` and `quantize.py` among them, on fewer rows."""
    section = (ROOT / "export" / "README.md").read_text().partition("## With tools that quantize")[2]
    script = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    _, calibration, quantize, comparison, export = re.search(r"```\n(.*?)```", section, re.DOTALL)[1].splitlines()
    (tmp_path / "quantize.py").write_text(script)
    (tmp_path / "sample.parquet").symlink_to(QUESTIONS)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    (tmp_path / "CHECKPOINT").symlink_to(TINY)
    (tmp_path / "bundle").symlink_to(tiny_bundle.path)
    calibration = calibration.replace("--limit 32", "--limit 4")
    # The last takes half a minute; `test_from_quantized.py` does it with more tools.
    exports = [] if tool == "8" else [f"{export} --skip-parity"]
    for line in (calibration, quantize.replace(" static ", f" {tool} "), *exports, f"{comparison} --limit 3"):
        command = [sys.executable, *line.split()[1:]]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0 or tool == "static", result.stderr
    drift = json.loads((tmp_path / "comparison" / "summary.json").read_text())["drift"]["prefill"]["max"]
    assert 1e-4 < drift < 0.7
    assert "equal     " in result.stdout
