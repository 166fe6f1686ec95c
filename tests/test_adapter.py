"""Adapters, merged while weights are read, are those that peft merges; others are refused by what they are."""

import json
import shutil
import warnings

import pytest
import torch
from checkpoints import untied
from conftest import TINY, exported
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration as Model

from export.adapter_files import FILES
from export.checkpoint import load_checkpoint
from export.checkpoint_files import ADAPTER_CONFIG
from export.weights import EMBEDDING, HEAD, Weights
from qvl_batch.errors import ExportError

Q = ["q_proj"]


def _base(path=TINY):
    return Model.from_pretrained(path, dtype=torch.float32)


def _saved(folder, base=TINY, *, seed=0, config=None, **settings):
    """An adapter with random weights in all that training would change: of LoRA, or of another `config`."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config or LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": Q} | settings)
        model = get_peft_model(_base(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def _merged(folder, base=TINY):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(_base(base), folder).merge_and_unload().state_dict()


def _check_merge(folder, base=TINY, least=1):
    """Compare with peft's merge; returns the names of weights that are not the checkpoint's."""
    expected, before = _merged(folder, base), _base(base).state_dict()
    found = load_checkpoint(base, adapter=folder).model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    changed = {name for name in expected if not torch.equal(expected[name], before[name])}
    assert len(changed) >= least
    return changed


EVERY_LINEAR = {"target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 4),
        (EVERY_LINEAR, 50),
        (EVERY_LINEAR | {"use_rslora": True}, 50),
        (
            EVERY_LINEAR
            | {
                "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2},
                "alpha_pattern": {"blocks.0.attn.qkv": 32},
            },
            50,
        ),
        (EVERY_LINEAR | {"use_dora": True}, 50),
        ({"target_modules": ["proj"]}, 5),  # the convolution of patches is among these
        ({"target_modules": ["proj"], "use_dora": True}, 5),
        ({"bias": "all"}, 38),
        ({"bias": "lora_only"}, 8),
        ({"lora_bias": True}, 8),
        ({"modules_to_save": ["merger"]}, 8),
        ({"modules_to_save": ["embed_tokens"]}, 5),
        ({"modules_to_save": ["lm_head"]}, 5),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, 6),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, 6),
        ({"layers_to_transform": [2], "init_lora_weights": "gaussian"}, 1),
    ],
    ids=str,
)
def test_a_merge_is_that_of_peft_bit_by_bit(settings, least, tmp_path):
    _check_merge(_saved(tmp_path / "adapter", **settings), least=least)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_embedding_and_head_of_a_checkpoint_that_has_both(module, dora, tmp_path):
    base = untied(tmp_path / "untied")
    changed = _check_merge(_saved(tmp_path / "adapter", base, target_modules=[module], use_dora=dora), base)
    assert {name.split(".")[-2] for name in changed} == {module}


def _change_settings(**changes):
    def change(folder):
        file = folder / ADAPTER_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _change_tensors(change_all):
    def change(folder):
        tensors = load_file(folder / FILES[0])
        save_file(change_all(tensors), folder / FILES[0])

    return change


def _renamed(old, new):
    return _change_tensors(lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()})


TOKENS = [3, 500, 7]


@pytest.mark.parametrize("tokens", [TOKENS, {"embed_tokens": TOKENS}, {"lm_head": TOKENS}], ids=str)
def test_trained_tokens_of_a_tied_pair_are_in_both(tokens, tmp_path):
    changed = _check_merge(_saved(tmp_path / "adapter", trainable_token_indices=tokens))
    assert {name for name in changed if "q_proj" not in name} == {EMBEDDING, HEAD}
    assert Weights(TINY, _base().config, tmp_path / "adapter").skeleton.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("settings", "tables"),
    [
        ({"trainable_token_indices": TOKENS}, [EMBEDDING]),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": TOKENS}}, [EMBEDDING, HEAD]),
        ({"trainable_token_indices": [9], "modules_to_save": ["merger"], "use_dora": True}, [EMBEDDING]),
        ({"config": TrainableTokensConfig(token_indices=TOKENS)}, [EMBEDDING]),
        ({"config": TrainableTokensConfig(token_indices=TOKENS, target_modules=["lm_head"])}, [HEAD]),
    ],
    ids=str,
)
def test_trained_tokens_of_a_checkpoint_that_has_both(settings, tables, tmp_path):
    base = untied(tmp_path / "untied")
    changed = _check_merge(_saved(tmp_path / "adapter", base, **settings), base)
    assert changed & {EMBEDDING, HEAD} == set(tables)


def test_trained_tokens_alone_of_a_tied_pair(tmp_path):
    config = TrainableTokensConfig(token_indices=TOKENS)
    assert _check_merge(_saved(tmp_path / "adapter", config=config)) == {EMBEDDING, HEAD}


def _other_row_of_the_head(tensors):
    (name,) = tensors
    return tensors | {name.replace("model.model.language_model.embed_tokens", "model.lm_head"): tensors[name] + 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _change_settings(token_indices=[3, 7]),
            r"trainable_tokens_delta is \(3, 128\), where .*embed_tokens is \(512, 128\) and adapter_config.json has 2",
        ),
        (_change_settings(token_indices=None), r"and adapter_config.json has no tokens: it was"),
        (
            _change_settings(token_indices=[3, 512, 7]),
            r"tokens of .*embed_tokens must be different ones from 0 to 511, and .* has \[3, 512, 7\]: the ada",
        ),
        (_change_settings(token_indices=[3, 7, 7]), r"must be different ones .* \[3, 7, 7\]"),
        (_change_settings(token_indices=[3, -1, 7]), r"must be different ones .* \[3, -1, 7\]"),
        (
            _change_tensors(_other_row_of_the_head),
            r"has other rows of .*embed_tokens.weight than of lm_head.weight, which are one tensor of the checkpoint",
        ),
        (_renamed("embed_tokens", "embed"), r"is for .*language_model.embed, which is not there"),
    ],
)
def test_trained_tokens_that_cannot_be_merged_are_named(change, message, tmp_path):
    folder = _saved(tmp_path / "adapter", config=TrainableTokensConfig(token_indices=TOKENS))
    tensors = load_file(folder / FILES[0])
    save_file({name: tensor for name, tensor in tensors.items() if "embed_tokens" in name}, folder / FILES[0])
    change(folder)
    with pytest.raises(ExportError, match=message):
        load_checkpoint(TINY, adapter=folder)


def test_trained_tokens_beside_a_whole_table_are_refused(tmp_path):
    folder = _saved(tmp_path / "adapter", trainable_token_indices=TOKENS)
    whole = {"base_model.model.lm_head.weight": torch.zeros(512, 128)}
    rows = {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": torch.zeros(3, 128)}
    save_file(load_file(folder / FILES[0]) | whole | rows, folder / FILES[0])
    with pytest.raises(
        ExportError, match=r"has single rows of lm_head.weight and changes all of it: merge it with peft"
    ):
        load_checkpoint(TINY, adapter=folder)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_what_peft_would_add_to_both_of_a_tied_pair_is_refused(module, tmp_path):
    folder = _saved(tmp_path / "adapter", target_modules=[module])
    with pytest.raises(
        ExportError, match=rf"adds to .*{module}.weight, and embedding and head .* are one tensor: merge"
    ):
        load_checkpoint(TINY, adapter=folder)


@pytest.mark.parametrize("old", ["names", "file"])
def test_adapters_of_older_versions(old, tmp_path):
    folder = _saved(tmp_path / "adapter", **EVERY_LINEAR)
    expected = _merged(folder)
    tensors = load_file(folder / FILES[0])
    if old == "names":
        new = {"base_model.model.model.language_model.": "base_model.model.model."}
        new |= {"base_model.model.model.visual.": "base_model.model.visual."}
        renamed = {
            next(b + name[len(a) :] for a, b in new.items() if name.startswith(a)): tensor
            for name, tensor in tensors.items()
        }
        assert renamed.keys().isdisjoint(tensors)
        save_file(renamed, folder / FILES[0])
    else:
        (folder / FILES[0]).unlink()
        torch.save(tensors, folder / FILES[1])
    found = load_checkpoint(TINY, adapter=folder).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_is_merged_in_fp32(tmp_path):
    folder = _saved(tmp_path / "adapter")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(folder / FILES[0]).items()}, folder / FILES[0])
    _check_merge(folder, least=4)


def _without(part):
    return _change_tensors(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def _wider(tensors):
    return {n: torch.zeros(t.shape[0], 2 * t.shape[1]) if "lora_A" in n else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change_settings(peft_type="IA3"), "adapter is IA3; only LORA and TRAINABLE_TOKENS are supported: merge"),
        (_change_settings(init_lora_weights="pissa"), "began with init_lora_weights pissa, which changed the"),
        (_change_settings(init_lora_weights="loftq"), "began with init_lora_weights loftq"),
        (_change_settings(token_indices=[3]), "has token_indices, which is not supported: merge it with peft"),
        (_change_settings(layer_replication=[[0, 2]]), "has layer_replication, which is not supported"),
        (_change_settings(of_next_year=1), "has of_next_year, which is not supported"),
        (_change_settings(r=8), "q_proj has rank 4, and adapter_config.json says 8: it was saved incompletely"),
        (_change_settings(lora_alpha=None), "adapter_config.json has no number lora_alpha"),
        (_change_settings(use_dora=True), "no lora_magnitude_vector of .*q_proj: save it again"),
        (_without("lora_B"), "there is no lora_B of .*q_proj: save it again"),
        (_without("lora_A"), "there is no lora_A of .*q_proj: save it again"),
        (_without("lora"), "has no tensors: adapter_model.safetensors was saved without them"),
        (_renamed("layers.3", "layers.30"), r"layers.30.*lora_A.* is for .*layers.30.*, which is not there: the ad"),
        (_renamed("lora_A", "lora_X"), "lora_X.weight is of a kind that is not supported: merge it with peft"),
        (_change_tensors(_wider), r"matrices \(4, 256\) and \(128, 4\) do not fit .*q_proj, whose weight is \(128, 12"),
        (lambda folder: (folder / FILES[0]).write_bytes(bytes(9)), "adapter_model.safetensors cannot be read: .*; d"),
        (lambda folder: (folder / FILES[0]).unlink(), "has no adapter_model.safetensors and no adapter_model.bin: gi"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text("[]"), "is not an adapter: adapter_config.json holds no"),
        (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "is not an adapter: adapter_config.json: .*No such file"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_merged_is_named(change, message, tmp_path):
    folder = _saved(tmp_path / "adapter")
    change(folder)
    with pytest.raises(ExportError, match=message):
        load_checkpoint(TINY, adapter=folder)


def test_a_whole_module_of_another_size_is_of_another_model(tmp_path):
    folder = _saved(tmp_path / "adapter", modules_to_save=["lm_head"])
    tensors = load_file(folder / FILES[0])
    (name,) = [name for name in tensors if "lm_head" in name]
    save_file(tensors | {name: torch.zeros(600, 128)}, folder / FILES[0])
    with pytest.raises(
        ExportError, match=r"lm_head.weight is \(600, 128\), where the checkpoint has \(512, 128\): the ad"
    ):
        load_checkpoint(TINY, adapter=folder)


def test_an_adapter_in_place_of_a_checkpoint_is_named_with_its_base(tmp_path):
    folder = _saved(tmp_path / "adapter")
    with pytest.raises(ExportError, match=rf"holds an adapter of .*{TINY.name} .* and this folder to --adapter"):
        load_checkpoint(folder)
    shutil.copy(TINY / "model.safetensors", folder)
    with pytest.raises(ExportError, match=r"holds weights and an adapter .*, which may be merged or not"):
        load_checkpoint(folder)


@pytest.mark.long
def test_a_bundle_names_its_adapter_and_passes_the_gate(tmp_path):
    folder = _saved(tmp_path / "colours", **EVERY_LINEAR)
    bundle = exported(tmp_path / "bundle", adapter=folder)
    plain, merged = load_checkpoint(TINY).source, load_checkpoint(TINY, adapter=folder).source
    assert bundle.manifest.source == merged
    assert merged.name == f"{plain.name} + colours"
    assert merged.sha256 != plain.sha256
    assert bundle.manifest.parity is not None
    other = load_checkpoint(TINY, adapter=_saved(tmp_path / "more" / "colours", seed=1, **EVERY_LINEAR)).source
    assert other.name == merged.name
    assert other.sha256 != merged.sha256
