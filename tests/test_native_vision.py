"""The vision graph for images at their own size computes what transformers' tower does, whatever the size."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from conftest import ROOT, exported
from PIL import Image
from test_export import SHAPES

from export.checkpoint import load_checkpoint
from export.half import emulated_graph
from qvl_batch.bundle.manifest import VISION
from qvl_batch.distances import cosine, relative_error
from qvl_batch.errors import BundleError
from qvl_batch.vision.encoder import VisionEncoder

#: Rows and columns of image tokens: single ones, long ones, primes, windows whole and cut at either edge.
GRIDS = (
    (1, 1), (1, 2), (2, 1), (1, 20), (20, 1), (3, 3), (4, 4), (4, 5), (5, 4), (7, 11), (8, 8), (13, 3), (12, 16),
    (17, 9), (24, 24), (31, 2), (5, 37), (19, 19),
)  # fmt: skip


def _pictures(grids, seed=0):
    chance = np.random.default_rng(seed)
    return [chance.integers(0, 256, (28 * rows, 28 * columns, 3), dtype=np.uint8) for rows, columns in grids]


def _by_transformers(checkpoint, image):
    inputs = checkpoint.image_processor([Image.fromarray(image)], do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        visual = checkpoint.model.model.visual
        return visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.numpy()


def test_any_grid_in_any_order(native_bundle, tiny_checkpoint):
    vision = VisionEncoder(native_bundle, threads=1)
    for image in _pictures(np.random.default_rng(1).permutation(GRIDS)):
        found, expected = vision.encode(image), _by_transformers(tiny_checkpoint, image)
        assert found.shape == expected.shape
        assert relative_error(found, expected) < 1e-5, image.shape


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
def test_any_shape_of_the_model(name, tmp_path):
    text, vision, _ = SHAPES[name]
    path = make_checkpoint(tmp_path / "checkpoint", text=text, vision=vision)
    checkpoint = load_checkpoint(path)
    bundle = exported(tmp_path / "bundle", checkpoint=path, image_size="native", traces=None)
    encoder = VisionEncoder(bundle, threads=1)
    for image in _pictures(GRIDS, seed=2):
        assert relative_error(encoder.encode(image), _by_transformers(checkpoint, image)) < 1e-5, image.shape


@pytest.mark.parametrize(
    ("dtype", "error"),
    [("int8", 0.1), *[pytest.param(*half, marks=pytest.mark.long) for half in (("bf16", 3e-2), ("fp16", 3e-3))]],
)
def test_reduced_precision_stays_near(dtype, error, native_bundle, tmp_path):
    bundle = exported(tmp_path / "bundle", dtype="fp32", vision_dtype=dtype, image_size="native", skip_parity=True)
    graph = None if dtype == "int8" else emulated_graph(bundle.file(VISION))
    encoder, exact = VisionEncoder(bundle, threads=1, graph=graph), VisionEncoder(native_bundle, threads=1)
    for image in _pictures(GRIDS[:12], seed=3):
        found, expected = encoder.encode(image), exact.encode(image)
        assert relative_error(found, expected) < error, image.shape
        assert cosine(found, expected).min() > 0.99


@pytest.mark.long
def test_windows_do_not_mix(tmp_path):
    path = make_checkpoint(tmp_path / "checkpoint", text={}, vision={"fullatt_block_indexes": []})
    encoder = VisionEncoder(
        exported(tmp_path / "bundle", checkpoint=path, image_size="native", skip_parity=True, traces=None), threads=1
    )
    rows, columns = 10, 7  # windows of four by four, cut at both edges
    (image,) = _pictures([(rows, columns)])
    before = encoder.encode(image).reshape(rows, columns, -1)
    for row, column in ((0, 0), (9, 6), (5, 4)):
        changed = image.copy()
        changed[28 * row + 3, 28 * column + 3] ^= 255
        differs = (encoder.encode(changed).reshape(before.shape) != before).any(-1)
        window = np.zeros_like(differs)
        window[4 * (row // 4) : 4 * (row // 4) + 4, 4 * (column // 4) : 4 * (column // 4) + 4] = True
        assert differs[row, column]
        assert not (differs & ~window).any()


def test_the_largest_image_takes_no_memory_for_all_pairs_of_patches(native_bundle):
    """Scores of all pairs of 12,000 patches would take 1.7 GB."""
    script = f"""if True:
        import numpy as np
        from pathlib import Path
        from qvl_batch.bundle.loading import Bundle
        from qvl_batch.vision.encoder import VisionEncoder
        vision = VisionEncoder(Bundle.load({str(native_bundle.path)!r}, verify=False), threads=1)
        vision.encode(np.random.default_rng(0).integers(0, 256, (50 * 28, 60 * 28, 3), dtype=np.uint8))
        print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(result.stdout) * 1024 < 900_000_000


@pytest.mark.parametrize("size", [(28, 30), (0, 28), (28 * 60, 28 * 60)])
def test_sizes_outside_the_contract_are_refused(size, native_bundle):
    with pytest.raises(ValueError, match="not within the contract"):
        VisionEncoder(native_bundle, threads=1).encode(np.ones((*size, 3), np.uint8))


def test_a_native_graph_is_not_taken_for_one_of_squares(tiny_bundle, native_bundle):
    with pytest.raises(BundleError, match="has features of shape"):
        VisionEncoder(tiny_bundle, threads=1, graph=native_bundle.file(VISION).read_bytes())
