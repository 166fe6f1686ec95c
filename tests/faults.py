"""Damage done to a bundle, so that a comparison can be seen to find it."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from export.comparison.run import Outcome
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import FP32, MANIFEST, VISION, file_sha256
from qvl_batch.decoder import decoder


def assert_points_at(outcome: Outcome, begins_at: str, own: set[str]) -> None:
    """A comparison failed, and what it says of layers points at those that are wrong."""
    assert not outcome.passed
    layers = outcome.summary["layers"]
    assert layers["begins_at"] == begins_at
    assert {depth["name"] for depth in layers["depths"] if depth["own"]["median"] > 1e-3} == own
    assert layers["largest_own_error"] in own
    page = outcome.page.read_text()
    assert '<header class="bad"' in page
    assert f'Drift begins at <b class="over">{begins_at}</b>' in page


def without_normalisation(bundle: Path) -> None:
    """Pixels are divided by 255 and no more: what is in the patch embedding beyond that is taken out."""
    std = json.loads((bundle / "preprocessor_config.json").read_text())["image_std"]
    with _graph(bundle, VISION) as graph:
        initializers = {initializer.name: initializer for initializer in graph.initializer}
        weights = _weights(bundle, initializers["vision.patch_embed.weight"])
        weights *= np.tile(np.array(std, np.float32), len(weights) // 3)[:, None]
        weights.flush()
        mean = initializers["vision.mean"]
        mean.CopyFrom(numpy_helper.from_array(np.zeros(mean.dims, np.float32), mean.name))


def merge_groups_in_raster_order(bundle: Path) -> None:
    """Patches are taken row by row, in place of 2 x 2 groups."""
    with _graph(bundle, VISION) as graph:
        (transpose,) = (node for node in graph.node if node.op_type == "Transpose")
        (order,) = transpose.attribute
        assert list(order.ints) == [0, 1, 4, 2, 5, 3, 6, 7]
        order.ints[:] = [0, 1, 2, 4, 5, 3, 6, 7]


def positions_of_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker gives the decoder the positions of a row of text."""

    def of_text(length: int, _: object) -> NDArray[np.int64]:
        return np.tile(np.arange(length), (3, 1))

    monkeypatch.setattr(decoder, "mrope_positions", of_text)


def quantize_layer(bundle: Path, graph: str, prefix: str, bits: int = 4) -> None:
    """Round the weights of one layer to so many bits, symmetric, a scale for each column."""
    model = onnx.load(bundle / graph, load_external_data=False)
    chosen = [i for i in model.graph.initializer if i.name.startswith(prefix) and i.name.endswith(".weight")]
    assert chosen
    for initializer in chosen:
        weights = _weights(bundle, initializer)
        scale = np.abs(weights).max(axis=0) / (2 ** (bits - 1) - 1)
        weights[:] = np.round(weights / scale) * scale
        weights.flush()
    seal(bundle)


def spoil(bundle: Path, name: str, prefix: str, value: float = np.inf) -> None:
    """Set all weights and biases whose names begin so to a value."""
    with _graph(bundle, name) as graph:
        chosen = [initializer for initializer in graph.initializer if initializer.name.startswith(prefix)]
        assert chosen
        for initializer in chosen:
            if initializer.external_data:
                weights = _weights(bundle, initializer)
                weights[:] = value
                weights.flush()
            else:
                filled = np.full(initializer.dims, value, np.float32)
                initializer.CopyFrom(numpy_helper.from_array(filled, initializer.name))


def _weights(bundle: Path, initializer: onnx.TensorProto) -> np.memmap:
    """An initializer's values, where they are on disk."""
    where = {entry.key: entry.value for entry in initializer.external_data}
    return np.memmap(bundle / where["location"], np.float32, "r+", int(where["offset"]), tuple(initializer.dims))


@contextmanager
def _graph(bundle: Path, name: str) -> Iterator[onnx.GraphProto]:
    """A graph to change in place."""
    model = onnx.load(bundle / name, load_external_data=False)
    yield model.graph
    onnx.save(model, bundle / name)
    seal(bundle)


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what `bundle.json` says."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def seal(bundle: Path) -> None:
    """Write sizes and hashes of the files as they are now."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name in manifest["files"]:
        path = bundle / name
        manifest["files"][name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def add_fp32(bundle: Path, exact: Bundle) -> Bundle:
    """Let a bundle hold another one for rows that fail, as one exported with --with-fp32 does."""
    shutil.copytree(exact.path, bundle / FP32)
    edit_manifest(bundle, lambda m: m["files"].update({f"{FP32}/{MANIFEST}": {"size": 0, "sha256": ""}}))
    seal(bundle)
    return Bundle.load(bundle)


def forget_known_answers(bundle: Path) -> None:
    """As if it had been exported without the parity gate."""
    edit_manifest(bundle, lambda manifest: manifest.update(tolerance=None))
