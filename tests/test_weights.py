"""A checkpoint of any size is read a module at a time, and what is read is what transformers reads."""

import json
import shutil

import make_model
import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from export.checkpoint import load_checkpoint
from export.checkpoint_files import NAMES
from export.lazy import LazyWeights, without_weights
from export.weights import Weights
from qvl_batch.errors import ExportError

(_, INDEX), _ = NAMES
UP = "model.layers.1.mlp.up_proj.weight"
CONFIG = Qwen2_5_VLConfig.from_pretrained(TINY)
MODULES = ("model.visual.blocks.1", "model.visual.merger", "model.language_model.layers.2", "lm_head")


def _copy(tmp_path, tensors):
    folder = tmp_path / "checkpoint"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for number, part in enumerate(tensors):
        save_file(part, folder / f"model-{number}.safetensors")
    names = {name: f"model-{number}.safetensors" for number, part in enumerate(tensors) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def _tensors():
    return load_file(TINY / "model.safetensors")


@pytest.mark.parametrize("names", ["as published", "as transformers has them"])
def test_weights_may_be_in_shards_and_under_either_name(names, tiny_checkpoint, tmp_path):
    tensors = _tensors()
    if names != "as published":
        own = {"model.": "model.language_model.", "visual.": "model.visual."}
        tensors = {
            next(new + k[len(old) :] for old, new in own.items() if k.startswith(old)): t for k, t in tensors.items()
        }
    keys = sorted(tensors)
    folder = _copy(tmp_path, [{key: tensors[key] for key in keys[at::3]} for at in range(3)])
    weights = Weights(folder, CONFIG)
    for name in MODULES:
        expected = tiny_checkpoint.model.get_submodule(name).state_dict()
        found = weights.module(name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_a_weight_of_another_shape_is_named(tmp_path):
    tensors = _tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
    with pytest.raises(ExportError, match=r"layers.1.mlp.up_proj.weight is \(3, 4\), where its config says \("):
        Weights(_copy(tmp_path, [tensors]), CONFIG).module("model.language_model.layers.1")


def test_a_damaged_file_is_named(tmp_path):
    folder = _copy(tmp_path, [_tensors()])
    (folder / "model-0.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ExportError, match=r"model-0.safetensors cannot be read: .*; download it again"):
        Weights(folder, CONFIG)


def test_files_that_transformers_would_not_read_are_not_read(tiny_checkpoint, tmp_path):
    other = {name: torch.zeros_like(tensor) for name, tensor in _tensors().items()}
    sharded, whole = _copy(tmp_path / "sharded", [_tensors()]), _copy(tmp_path / "whole", [other])
    save_file(other, sharded / "model-9-of-9.safetensors")
    save_file(other, sharded / "training.safetensors")
    shutil.copy(TINY / "model.safetensors", whole)  # goes before an index
    for folder in (sharded, whole):
        for name in MODULES:
            expected = tiny_checkpoint.model.get_submodule(name).state_dict()
            found = Weights(folder, CONFIG).module(name).state_dict()
            assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_may_be_in_files_that_torch_wrote(shards, tiny_checkpoint, tmp_path):
    folder = _copy(tmp_path, [])
    (folder / INDEX).unlink()
    keys = sorted(_tensors())
    names = [f"pytorch_model-{at}.bin" for at in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    for at, name in enumerate(names):
        torch.save({key: _tensors()[key] for key in keys[at::shards]}, folder / name)
    if shards > 1:
        places = {key: names[at] for at in range(shards) for key in keys[at::shards]}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    weights = load_checkpoint(folder).weights
    for name in MODULES:
        expected = tiny_checkpoint.model.get_submodule(name).state_dict()
        found = weights.module(name).state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


class _Harm:
    def __reduce__(self):
        return print, ("harm",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: file.write_bytes(bytes(100)), "cannot be read as tensors alone .*: download it again, or save"),
        (lambda file: torch.save({"a": _Harm()}, file), "cannot be read as tensors alone .UnpicklingError."),
        (lambda file: torch.save({"epoch": 3}, file), "has more than tensors: save the model as safetensors"),
        (lambda file: torch.save([torch.zeros(1)], file), "has more than tensors"),
        (
            lambda file: torch.save({UP: torch.zeros(1, dtype=torch.int8)}, file),
            f"{UP} is torch.int8: use weights that",
        ),
    ],
    ids=["damaged", "code", "more", "a list", "int8"],
)
def test_a_file_of_torch_that_has_more_than_weights_is_refused(write, message, tmp_path, capsys):
    folder = _copy(tmp_path, [])
    (folder / INDEX).unlink()
    write(folder / "pytorch_model.bin")
    with pytest.raises(ExportError, match=f"(pytorch_model.bin|checkpoint):? {message}"):
        Weights(folder, CONFIG)
    assert "harm" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda index: index.unlink(),
            "has no model.safetensors and no model.safetensors.index.json and no py",
        ),
        (lambda index: index.write_text("[]"), "index.json cannot be read: .*; download it again"),
        (lambda index: index.write_text('{"weight_map": {"a": "b"}}'), "lacks b, which its index names: download it"),
    ],
)
def test_an_index_that_is_of_no_use_is_refused(write, message, tmp_path):
    folder = _copy(tmp_path, [_tensors()])
    write(folder / INDEX)
    with pytest.raises(ExportError, match=message):
        Weights(folder, CONFIG)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({UP: torch.zeros(384, 128, dtype=torch.int8)}, rf"{UP} is I8: use weights that are not quantized"),
        ({UP: torch.zeros(384, 128).to(torch.float8_e4m3fn)}, rf"{UP} is F8_E4M3: use weights that are not"),
        ({f"{UP}_scale": torch.zeros(384)}, rf"has 1 tensors that are not weights of the model, .* {UP}_scale: merge"),
        ({"model.layers.1.mlp.up_proj.lora_A.default.weight": torch.zeros(2, 128)}, r"lora_A.default.weight: merge an"),
    ],
    ids=["int8", "fp8", "scale", "adapter"],
)
def test_weights_that_are_not_plain_numbers_of_the_model_are_refused(added, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        Weights(_copy(tmp_path, [_tensors() | added]), CONFIG)


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq"])
def test_rotary_frequencies_in_old_files_are_left_out(name, tmp_path):
    Weights(_copy(tmp_path, [_tensors() | {name: torch.zeros(8)}]), CONFIG)


def test_where_most_weights_are_missing_a_name_of_the_files_is_shown(tmp_path):
    renamed = {f"transformer.{name}": tensor for name, tensor in _tensors().items()}
    with pytest.raises(
        ExportError, match=r"lacks \d+ weights, the first of them .*; its files have transformer.model."
    ):
        Weights(_copy(tmp_path, [renamed]), CONFIG)


@pytest.mark.parametrize("is_another", [True, False])
def test_a_head_is_tied_unless_files_hold_another(is_another, tmp_path):
    assert CONFIG.tie_word_embeddings
    head = _tensors()["model.embed_tokens.weight"] + (1 if is_another else 0)
    checkpoint = load_checkpoint(_copy(tmp_path, [_tensors() | {"lm_head.weight": head}]))
    assert checkpoint.config.tie_word_embeddings is not is_another
    assert torch.equal(checkpoint.weights.module("lm_head").weight, head.float())
    assert torch.equal(checkpoint.model.lm_head.weight, head.float())
    embedding = checkpoint.model.get_input_embeddings().weight
    assert torch.equal(embedding, _tensors()["model.embed_tokens.weight"].float())


def test_the_streamed_model_is_the_model_and_keeps_nothing(tiny_checkpoint):
    ids = torch.tensor([[5, 6, 7, 8]])
    model = tiny_checkpoint.weights.streamed()
    with torch.inference_mode():
        found = model(input_ids=ids, use_cache=False).logits
        expected = tiny_checkpoint.model(input_ids=ids, use_cache=False).logits
        again = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.is_meta for parameter in tiny_checkpoint.weights.skeleton.parameters())


def test_placeholders_take_no_memory_differ_and_stay_tied():
    module = torch.nn.Module()
    module.first, module.second = (torch.nn.Parameter(torch.empty(1 << 20, 1 << 20, device="meta")) for _ in range(2))
    module.tied = module.first
    without_weights(module)
    assert module.first.shape == (1 << 20, 1 << 20)
    assert module.tied is module.first
    bits = [parameter[0, 0].view(torch.int32).item() for parameter in (module.first, module.second)]
    assert bits[0] != bits[1]
    assert all(torch.isnan(parameter[0, 0]) for parameter in (module.first, module.second))


def test_a_constant_that_was_computed_of_a_placeholder_is_refused(tiny_checkpoint):
    tensor = ir.tensor(np.array([1, np.nan], np.float32), name="folded")
    value = ir.Value(name="folded", shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph = ir.Graph([], [], nodes=[], initializers=[value], name="g", opset_imports={"": 21})
    with pytest.raises(ExportError, match="the tracer computed folded from a weight"):
        LazyWeights(tiny_checkpoint.weights, []).fill(ir.Model(graph, ir_version=10))


def test_a_made_up_checkpoint_is_one_and_is_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(make_model, "SHAPES", {"small": ({"num_hidden_layers": 2}, {"depth": 2})})
    monkeypatch.setattr(make_model, "SHARD", 1 << 19)
    counts = {make_model.make_model(tmp_path / name, "small") for name in ("a", "b")}
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert counts == {sum(parameter.numel() for parameter in model.parameters())}
    assert index["metadata"]["total_size"] == 2 * counts.pop()


@pytest.mark.parametrize(
    "names",
    [
        {"model.": "base_model.model.model.language_model.", "visual.": "base_model.model.model.visual."},
        {"model.": "base_model.model.model.", "visual.": "base_model.model.visual."},
        {"model.": "model.model.", "visual.": "model.visual."},
        {"model.": "module.model.", "visual.": "module.visual."},
        {"model.": "language_model.model."},
        {"model.": "model.language_model.model.", "visual.": "model.visual."},
    ],
    ids=lambda names: next(iter(names.values())),
)
def test_names_may_follow_what_a_trainer_wrapped_around_the_model(names, tiny_checkpoint, tmp_path):
    named = {
        next((new + name[len(old) :] for old, new in names.items() if name.startswith(old)), name): tensor
        for name, tensor in _tensors().items()
    }
    checkpoint = load_checkpoint(_copy(tmp_path, [named]))
    assert not checkpoint.weights.are_usual
    expected, found = tiny_checkpoint.model.state_dict(), checkpoint.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_further_head_is_left_out_if_that_is_wanted(tmp_path):
    folder = _copy(tmp_path, [_tensors() | {"value_head.weight": torch.zeros(1, 128)}])
    with pytest.raises(ExportError, match=r"value_head.weight: leave them out with --ignore-extra-weights"):
        load_checkpoint(folder)
    weights = load_checkpoint(folder, ignore_extra=True).weights
    assert weights.ignored == ["value_head.weight"]
    assert weights.are_usual


@pytest.mark.parametrize("name", [f"{UP}_scale", "model.layers.1.mlp.up_proj.lora_A.default.weight"])
def test_parts_of_the_models_own_weights_are_never_left_out(name, tmp_path):
    with pytest.raises(ExportError, match=f"the first of them {name}: merge an adapter"):
        load_checkpoint(_copy(tmp_path, [_tensors() | {name: torch.zeros(384)}]), ignore_extra=True)
