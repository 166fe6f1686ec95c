"""Weights are rounded so that the products of the rows at hand change least, and outliers do no harm."""

import re

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import with_outliers
from conftest import CONVERSATIONS, QUESTIONS, TINY, TRACES
from onnx import numpy_helper

from export.activations import Inputs, visit_decoder, visit_vision
from export.calibrated import plain_tower
from export.calibration import CalibrationConfig, decoder_feeds
from export.calibration import calibrate as write_calibration
from export.checkpoint import load_checkpoint
from export.comparison.config import CompareConfig
from export.comparison.run import compare
from export.config import ExportConfig
from export.decoder import FullDecoder, Layer
from export.package import export_bundle
from export.rounding import BLOCK, PAIR_LEVELS, from_blocks, from_int8, largest_pair, rounded, to_blocks, to_int8
from export.sample import read_sample
from export.smoothing import ChannelPath, find_scale, paths, smooth
from export.vision import SquareTower
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL, VISION
from qvl_batch.decoder.decoder import PrefillRow
from qvl_batch.distances import relative_error
from qvl_batch.errors import JobError
from qvl_batch.runtime.session import Session
from qvl_batch.vision.encoder import VisionEncoder

DTYPES = ("int8", "int8wo", "int4wo")


@pytest.fixture(scope="module")
def product():
    """Correlated inputs (n, in), their second moment, and a weight (in, out)."""
    chance = np.random.default_rng(0)
    mixing = chance.normal(size=(129, 129)) * np.geomspace(1, 0.03, 129)[:, None]
    x = (chance.normal(size=(2000, 129)) @ mixing).astype(np.float32)
    return x, torch.from_numpy(x.T @ x / len(x)), chance.normal(size=(129, 40)).astype(np.float32)


def _weight(made, inputs):
    """What rounded weights stand for, (in, out)."""
    return from_int8(made) if "int8" in made and "zero_points" in made else from_blocks(made, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_the_inputs_change_less_than_by_rounding_to_nearest(product, dtype):
    x, moment, weight = product
    errors = [
        np.linalg.norm(x @ (_weight(rounded(dtype, weight, each), len(weight)) - weight)) for each in (None, moment)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest(product, dtype):
    _, _, weight = product
    nearest, found = rounded(dtype, weight), rounded(dtype, weight, torch.eye(len(weight)))
    assert nearest.keys() == found.keys()
    for name, values in nearest.items():
        assert values.dtype == found[name].dtype
        assert np.mean(values != found[name]) < 1e-3, name  # ties, and sums of pairs


def test_inputs_that_are_always_zero_and_outputs_without_weights_do_no_harm(product):
    _, moment, weight = product
    moment, weight = moment.clone(), weight.copy()
    moment[5], moment[:, 5], weight[:, 3] = 0, 0, 0
    for dtype in DTYPES:
        found = _weight(rounded(dtype, weight, moment), len(weight))
        assert np.isfinite(found).all()
        assert not found[:, 3].any()
    assert np.isfinite(_weight(rounded("int8", weight, torch.zeros_like(moment)), len(weight))).all()


def test_neighbours_of_the_same_sign_stay_within_what_kernels_add(product):
    _, moment, weight = product
    levels = to_int8(np.abs(weight), moment)["int8"]
    assert largest_pair(levels) == largest_pair(-levels) == PAIR_LEVELS
    assert levels.max() > 100


def test_the_largest_weight_of_a_block_has_the_lowest_level(product):
    *_, weight = product
    made = to_blocks(weight, 4)
    found = _weight(made, len(weight))
    for block in range(0, len(weight), BLOCK):
        largest = np.abs(weight[block : block + BLOCK]).argmax(axis=0) + block
        each = np.arange(weight.shape[1])
        assert np.allclose(found[largest, each], weight[largest, each], rtol=1e-6)


def test_a_smoothed_layer_computes_the_same_numbers():
    checkpoint = load_checkpoint(TINY)
    text = checkpoint.weights.module("model.language_model.layers.1")
    decoder = FullDecoder(checkpoint.weights.skeleton, 24)
    chance = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, 9, checkpoint.config.text_config.hidden_size), generator=chance)
    angles = torch.randn((1, 1, 9, decoder.head_dim // 2), generator=chance)
    rest = ((angles.cos(), angles.sin()), torch.ones((1, 1, 9, 9), dtype=torch.bool))
    with torch.inference_mode():
        layer = Layer(text)
        before = layer(decoder.run_layer, hidden, *rest)
        found = paths(layer)
        assert [path.source for path in found] == ["norm1", "attention.v", "norm2", "mlp.up"]
        exponents = {path.source: torch.randint(-6, 7, (path.channels,), generator=chance) for path in found}
        smooth("here", layer, {f"here.{source}": 2.0**powers for source, powers in exponents.items()})
        after = layer(decoder.run_layer, hidden, *rest)
    assert torch.equal(before, after)


@pytest.fixture
def outlier():
    """Inputs (n, in) of which channel 7 is 64 times as large as the others, and a weight (in, out)."""
    chance = torch.Generator().manual_seed(0)
    x, weight = torch.randn((400, 32), generator=chance), torch.randn((32, 64), generator=chance)
    x[:, 7] *= 64
    return x, weight


def _scale(x, weight, dtype):
    inputs = Inputs(32, 400)
    inputs.add(x, torch.ones(1))
    return find_scale(ChannelPath("norm1", ("attention.q",), 32, None), [weight], inputs, [dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_are_moved_into_weights(dtype, outlier):
    scale = _scale(*outlier, dtype)
    assert scale is not None
    assert scale[7] >= 8 * scale[torch.arange(32) != 7].max()
    assert torch.equal(scale, 2.0 ** scale.log2().round())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_channel_that_no_row_of_the_sample_uses_stays_within_bounds(dtype, outlier):
    x, weight = outlier
    x[:, 9], weight[11] = 0, 0
    scale = _scale(x, weight, dtype)
    assert scale is not None
    assert scale.min() >= 1 / 8 * scale.median()
    assert scale.isfinite().all()


@pytest.mark.parametrize("bundle", ["tiny_bundle", "native_bundle"])
def test_products_are_shown_what_they_are_given_in_a_job(bundle, request):
    """The features and logits of the calibration's own pass are the bundle's."""
    bundle, checkpoint = request.getfixturevalue(bundle), load_checkpoint(TINY)
    (row,) = read_sample(QUESTIONS, 1, bundle, print)
    seen = {}
    tower = plain_tower(checkpoint, bundle.manifest.layout)
    features = visit_vision(tower, row.pixels, lambda *_: None)
    (expected,) = [VisionEncoder(bundle, 2).encode(pixels) for pixels in row.pixels]
    assert relative_error(features[0].numpy(), expected) < 1e-5
    side = tower.merged_side if isinstance(tower, SquareTower) else None
    visit_decoder(checkpoint.weights, side, [row], features, lambda name, *given: seen.update({name: given}))
    head, inputs = seen["decoder.head"]
    logits = inputs["decoder.head"].kept @ head.weight
    feeds = decoder_feeds(PrefillRow(row.input_ids, row.images, [expected]), bundle.manifest)
    whole = Session(bundle.file(DECODER_FULL), 2).run(["logits"], feeds)[0][0]
    assert logits.shape == whole.shape
    assert relative_error(logits.detach().numpy(), whole) < 1e-5


#: Some of what a sample changes, in int8 and in int4wo.
WITH_SAMPLE = {
    DECODER: {"decoder.layers.*.mlp.down.int8", "decoder.layers.*.norm1"},
    VISION: {"vision.blocks.*.mlp.down.int4", "vision.blocks.*.norm2"},
}


def _calibrated(output, checkpoint=TINY, **options):
    settings = {"sample": QUESTIONS, "sample_rows": 4, "image_size": 224, "skip_parity": True} | options
    export_bundle(ExportConfig(checkpoint=checkpoint, output=output, **settings), traces=TRACES)
    return Bundle.load(output)


def test_a_bundle_says_what_it_was_calibrated_on_and_has_the_operators_of_any_other(tmp_path):
    bundle = _calibrated(tmp_path / "rows", dtype="int8", vision_dtype="int4wo")
    nearest = _calibrated(tmp_path / "nearest", dtype="int8", vision_dtype="int4wo", sample=None)
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.rows == 4
    assert nearest.manifest.calibration is None
    for name in (VISION, DECODER):
        graphs = [onnx.load(each.file(name)).graph for each in (bundle, nearest)]
        first, second = ([(node.name, node.op_type) for node in graph.node] for graph in graphs)
        assert first == second
        weights, others = ({each.name: numpy_helper.to_array(each) for each in g.initializer} for g in graphs)
        assert weights.keys() == others.keys()
        changed = {name for name, values in weights.items() if not np.array_equal(values, others[name])}
        kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in changed}
        assert kinds > (WITH_SAMPLE[name])


@pytest.mark.long
def test_rows_and_their_calibration_folder_are_one_sample(native_bundle, tmp_path):
    """The folder serves inputs that a job reads by options, such as conversations."""
    options = {"input": (str(QUESTIONS),), "output": str(tmp_path / "folder"), "limit": 3, "pad_to": 700}
    write_calibration(CalibrationConfig(bundle=native_bundle.path, **options))
    wanted = {"image_size": "native", "dtype": "int8wo", "sample_rows": 3}
    found = [
        _calibrated(tmp_path / f"bundle-{at}", **wanted, sample=sample).manifest.calibration
        for at, sample in enumerate((QUESTIONS, tmp_path / "folder"))
    ]
    assert found[0] == found[1]


@pytest.mark.long
def test_conversations_of_several_images_are_a_sample(native_bundle, tmp_path):
    options = {"input": (str(CONVERSATIONS),), "output": str(tmp_path / "folder"), "messages_column": "messages"}
    write_calibration(CalibrationConfig(bundle=native_bundle.path, limit=6, **options))
    found = _calibrated(tmp_path / "bundle", dtype="int4wo", image_size="native", sample=tmp_path / "folder")
    assert found.manifest.calibration is not None
    assert found.manifest.calibration.rows == 4


def test_rows_that_cannot_be_used_are_left_out_or_refused(demo, tmp_path):
    rows = [demo[0], demo[1] | {"image": {"bytes": b"no image", "path": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert (
        _calibrated(tmp_path / "one", dtype="int8wo", sample=tmp_path / "rows.parquet").manifest.calibration.rows == 1
    )
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "rows.parquet")
    with pytest.raises(JobError, match=r"--sample .*rows.parquet: none of its rows can be used"):
        _calibrated(tmp_path / "none", dtype="int8wo", sample=tmp_path / "rows.parquet")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--sample is for weights in integers"),
        ({"dtype": "bf16"}, "--sample is for weights in integers"),
        ({"dtype": "int8", "sample": TINY / "nothing"}, r"--sample .*nothing: no file found that ends in"),
        ({"dtype": "int8", "sample_rows": 0}, "--sample-rows must be at least 1, not 0"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(JobError, match=message):
        _calibrated(tmp_path / "bundle", **options)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["int8", "int4wo"])
def test_outliers_in_activations_do_no_harm(dtype, tmp_path):
    """Between norms and products, every fortieth channel is 64 times as large: drift is then no worse than without."""
    checkpoint = with_outliers(tmp_path / "checkpoint")
    drifts = {}
    for name, settings in {
        "plain": {"checkpoint": TINY, "sample": None}, "outliers": {"sample": None}, "smoothed": {"sample_rows": 16}
    }.items():  # fmt: skip
        bundle = _calibrated(tmp_path / name, **{"checkpoint": checkpoint, "dtype": dtype} | settings)
        config = CompareConfig(
            bundle=bundle.path, checkpoint=settings.get("checkpoint", checkpoint), input=(str(QUESTIONS),),
            output=str(tmp_path / f"{name}-compared"), limit=16,
        )  # fmt: skip
        drifts[name] = compare(config).summary["drift"]
    for stage in ("vision", "decode"):
        plain, outliers, smoothed = (drifts[name][stage]["median"] for name in ("plain", "outliers", "smoothed"))
        assert outliers > 1.5 * plain
        assert smoothed <= plain
