"""A bundle that is not whole, or breaks its contract, is refused by name before any work."""

import dataclasses
import json

import pytest

from qvl_batch.bundle import DECODER, Bundle
from qvl_batch.errors import BundleError
from qvl_batch.layout import RowLayout
from qvl_batch.vision import VisionEncoder


def _edit(path, change):
    manifest = json.loads((path / "bundle.json").read_text())
    change(manifest)
    (path / "bundle.json").write_text(json.dumps(manifest))


def test_a_whole_bundle_loads(copied_bundle, tiny_bundle):
    assert Bundle.load(copied_bundle).manifest == tiny_bundle.manifest


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"is no bundle .* make one with `python -m export`"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=1), "has bundle format 1, this qvl-batch reads 3"),
        (lambda m: m.pop("layout"), "layout: "),
        (lambda m: m["decoder"].update(layers="many"), "decoder.layers: "),
        (lambda m: m["files"].update({"../other": {"size": 1, "sha256": ""}}), "is outside the bundle"),
        (lambda m: m["files"].update({"more.onnx": {"size": 1, "sha256": ""}}), "lacks more.onnx"),
    ],
)
def test_a_wrong_manifest_is_refused(change, message, copied_bundle):
    _edit(copied_bundle, change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(copied_bundle)


def test_a_manifest_that_is_no_json_is_refused(copied_bundle):
    (copied_bundle / "bundle.json").write_text("[]")
    with pytest.raises(BundleError, match="is not valid JSON"):
        Bundle.load(copied_bundle)


def test_a_missing_file_is_named(copied_bundle):
    (copied_bundle / DECODER).unlink()
    with pytest.raises(BundleError, match=f"lacks {DECODER}"):
        Bundle.load(copied_bundle)


def test_a_cut_file_is_named(copied_bundle):
    data = (copied_bundle / DECODER).read_bytes()
    (copied_bundle / DECODER).write_bytes(data[:-1])
    with pytest.raises(BundleError, match=rf"{DECODER} has \d+ bytes"):
        Bundle.load(copied_bundle)


def test_a_flipped_bit_is_found(copied_bundle):
    path = copied_bundle / f"{DECODER}.data"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.load(copied_bundle)


@pytest.mark.parametrize(
    "change",
    [{"image_start": 16}, {"head_ids": ()}, {"tail_ids": (9999,)}],
    ids=["image moved by one", "nothing before the image", "no such token"],
)
def test_a_contract_of_tokens_that_are_not_the_tokenizers_is_refused(change, tiny_bundle):
    layout = dataclasses.replace(tiny_bundle.manifest.layout, **change)
    manifest = dataclasses.replace(tiny_bundle.manifest, layout=layout)
    with pytest.raises(BundleError, match="tokens of the contract are not the tokenizer's"):
        RowLayout(Bundle(tiny_bundle.path, manifest))


def test_a_contract_that_the_vision_graph_does_not_give_is_refused(tiny_bundle):
    layout = dataclasses.replace(tiny_bundle.manifest.layout, image_tokens=625)
    manifest = dataclasses.replace(tiny_bundle.manifest, layout=layout)
    with pytest.raises(BundleError, match=r"features of shape \[576, 128\], the contract says \[625, 128\]"):
        VisionEncoder(Bundle(tiny_bundle.path, manifest), threads=1)
