"""A bundle that is not whole, or breaks its contract, is refused by name before any work."""

import dataclasses
import shutil

import onnx
import pytest
from faults import edit_manifest, seal

from qvl_batch.bundle.external_data import FIELDS, external_locations
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL, FORMAT_VERSION, TOKENIZER, VISION
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import BundleError
from qvl_batch.runtime.session import Session
from qvl_batch.vision.encoder import VisionEncoder


def test_a_whole_bundle_loads(copied_bundle, tiny_bundle):
    assert Bundle.load(copied_bundle).manifest == tiny_bundle.manifest


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"is no bundle .* make one with `python -m export`"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=1), r"has bundle format 1, this qvl-batch reads \d+: export the checkpoint"),
        (
            lambda m: m.update(format_version=FORMAT_VERSION + 1),
            r"has bundle format \d+, .* reads \d+: update qvl-batch",
        ),
        (lambda m: m.pop("format_version"), "has bundle format None, .*: export the checkpoint again"),
        (lambda m: m.update(colour=1), "bundle.json has an unknown key colour: export the checkpoint again, or update"),
        (lambda m: m["layout"].update(sides=2), r"bundle.json has an unknown key layout\.sides"),
        (lambda m: m["files"][VISION].update(owner="me"), rf"has an unknown key files\.{VISION}\.owner"),
        (lambda m: m.pop("layout"), "layout: "),
        (lambda m: m["decoder"].update(layers="many"), "decoder.layers: "),
        (lambda m: m["files"].update({"../other": {"size": 1, "sha256": ""}}), "is outside the bundle"),
        (lambda m: m["files"].update({"/etc/hostname": {"size": 1, "sha256": ""}}), "is outside the bundle"),
        (lambda m: m["files"].update({"more.onnx": {"size": 1, "sha256": ""}}), "lacks more.onnx"),
    ],
)
def test_a_wrong_manifest_is_refused(change, message, copied_bundle):
    edit_manifest(copied_bundle, change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(copied_bundle)


@pytest.mark.parametrize("contents", [b"[]", b"", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(contents, copied_bundle):
    (copied_bundle / "bundle.json").write_bytes(contents)
    with pytest.raises(BundleError, match="is not valid JSON"):
        Bundle.load(copied_bundle)


@pytest.mark.parametrize("name", [VISION, f"{VISION}.data", DECODER, f"{DECODER}.data", DECODER_FULL, TOKENIZER])
def test_a_missing_file_is_named(name, copied_bundle):
    (copied_bundle / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}:"):
        Bundle.load(copied_bundle)


def test_a_link_out_of_the_bundle_is_refused(copied_bundle):
    path = copied_bundle / f"{DECODER}.data"
    path.rename(copied_bundle.parent / "elsewhere")
    path.symlink_to("../elsewhere")
    with pytest.raises(BundleError, match=f"lists {DECODER}.data, which is outside the bundle"):
        Bundle.load(copied_bundle)


def _relocate(path, location, *, every=False):
    """Say in a graph that its weights, or the first of them, are elsewhere."""
    model = onnx.load(path, load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    for tensor in external if every else external[:1]:
        (entry,) = [entry for entry in tensor.external_data if entry.key == "location"]
        entry.value = location
    onnx.save(model, path)


@pytest.mark.parametrize("graph", [VISION, DECODER, DECODER_FULL])
@pytest.mark.parametrize("location", ["../other.data", "/etc/hostname", "link.data", "unlisted.data", "sub/../x.data"])
def test_weights_that_the_manifest_does_not_list_are_refused(graph, location, copied_bundle):
    data = copied_bundle / f"{VISION if graph == VISION else DECODER}.data"
    shutil.copy(data, copied_bundle / "unlisted.data")
    (copied_bundle / "link.data").symlink_to("../other.data")
    _relocate(copied_bundle / graph, location)
    seal(copied_bundle)
    with pytest.raises(BundleError, match=rf"{graph} takes weights from {location}, which bundle.json does not list"):
        Bundle.load(copied_bundle)


@pytest.mark.parametrize("place", ["up", "absolute", "link", "folder"])
def test_onnx_runtime_itself_opens_no_weights_outside_the_bundle(place, copied_bundle):
    # So that what a worker opens is safe even where nobody has looked at the bundle before.
    other = copied_bundle.parent / "other"
    other.mkdir()
    shutil.copy(copied_bundle / f"{VISION}.data", other / "x.data")
    (copied_bundle / "x.data").symlink_to("../other/x.data")
    (copied_bundle / "sub").symlink_to("../other")
    locations = {"up": "../other/x.data", "absolute": str(other / "x.data"), "link": "x.data", "folder": "sub/x.data"}
    _relocate(copied_bundle / VISION, locations[place], every=True)
    with pytest.raises(BundleError, match=rf"{VISION} cannot be loaded: .*External data path"):
        Session(copied_bundle / VISION, threads=1)


def test_a_graph_that_is_none_is_refused(copied_bundle):
    for contents in (b"not a graph", b"\x3a\xff\xff\x03", b"\x3b", b"\x80" * 20):
        (copied_bundle / VISION).write_bytes(contents)
        seal(copied_bundle)
        with pytest.raises(BundleError, match=f"{VISION} is not an ONNX graph"):
            Bundle.load(copied_bundle)


def test_weights_are_found_wherever_a_graph_may_have_them():
    # Every way through ONNX's own messages to a tensor, and no other.
    ways, left = {}, [onnx.ModelProto.DESCRIPTOR]
    while left:
        message = left.pop()
        fields = {field.number: field.message_type for field in message.fields if field.message_type}
        ways[message.name] = fields
        left += [kind for kind in fields.values() if kind.name not in ways]
    leading = {"TensorProto"}
    while (
        more := {name for name, fields in ways.items() if {kind.name for kind in fields.values()} & leading} - leading
    ):
        leading |= more
    expected = {
        name: {number: kind.name for number, kind in ways[name].items() if kind.name in leading} for name in leading
    }
    entries = {13: "StringStringEntryProto"}
    assert expected | {"TensorProto": entries} == FIELDS

    tensor = onnx.TensorProto(external_data=[{"key": "location", "value": "found"}, {"key": "offset", "value": "0"}])
    inner = onnx.GraphProto(node=[{"attribute": [{"t": tensor}]}])
    model = onnx.ModelProto(graph={"node": [{"attribute": [{"g": inner}]}]})
    assert external_locations(model.SerializeToString()) == {"found"}


def test_a_field_number_that_onnx_runtime_would_cut_short_is_refused():
    entry = onnx.StringStringEntryProto(key="location", value="found").SerializeToString()
    tensor = b"\xea\x80\x80\x80\x10" + bytes([len(entry)]) + entry  # 13, where external data are, and a bit beyond 32
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    model = b"\x3a" + bytes([len(graph)]) + graph
    with pytest.raises(ValueError, match="a field number is too large"):
        external_locations(model)


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
    [{"bridge_ids": (5,)}, {"head_ids": ()}, {"tail_ids": (9999,)}],
    ids=["another token after the image", "nothing before the image", "no such token"],
)
def test_a_contract_of_tokens_that_are_not_the_tokenizers_is_refused(change, tiny_bundle):
    layout = dataclasses.replace(tiny_bundle.manifest.layout, **change)
    manifest = dataclasses.replace(tiny_bundle.manifest, layout=layout)
    with pytest.raises(BundleError, match="do not reproduce the tokens of the layout contract"):
        RowLayout(Bundle(tiny_bundle.path, manifest))


def test_a_contract_that_the_vision_graph_does_not_give_is_refused(tiny_bundle):
    resolution = dataclasses.replace(tiny_bundle.manifest.layout.resolution, image_size=700, max_pixels=700**2)
    layout = dataclasses.replace(tiny_bundle.manifest.layout, resolution=resolution)
    manifest = dataclasses.replace(tiny_bundle.manifest, layout=layout)
    with pytest.raises(BundleError, match=r"features of shape \[576, 128\], the contract says \[625, 128\]"):
        VisionEncoder(Bundle(tiny_bundle.path, manifest), threads=1)
