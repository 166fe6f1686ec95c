"""Weights of a checkpoint, out of its files a module at a time.

What enters: safetensors files and the model's config. What leaves: a skeleton, which is the model
without its weights, and modules of it with theirs, in fp32. So a checkpoint of any size is exported
in the memory that its largest module takes.

The parity gate reads weights here too, so what is misread it cannot see. Files are those that
transformers would read, and a tensor that is not simply a parameter of the model is refused.

This module knows nothing of graphs.
"""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration as Model

from qvl_batch.errors import ExportError

#: Beginnings of names in published files, by the model's own. Other files have the model's.
_PUBLISHED = {"model.language_model.": "model.", "model.visual.": "visual."}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: Numbers that can be read as they are; others are codes, to which a scale belongs.
_NUMBERS = {"F32", "F16", "BF16", "F64"}
#: In old files, and computed from the config.
_COMPUTED = "rotary_emb.inv_freq"


class Weights:
    """Weights of a checkpoint.

    Args:
        path: its folder.
        config: of its model.

    Raises:
        ExportError: files are missing or damaged, lack weights that the model has, or hold others.
    """

    def __init__(self, path: Path, config: Any) -> None:
        self._path = path
        self._files = _names_of_tensors(path)
        if config.tie_word_embeddings and self._head_is_its_own():
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        self.skeleton = skeleton(config)
        names = [name for name, _ in self.skeleton.named_parameters()]
        missing = sorted(name for name in names if self._name_in_files(name) is None)
        if missing:
            raise ExportError(f"{path} lacks {len(missing)} weights, the first of them {missing[0]}")
        self._refuse_others({*names, HEAD})

    def module(self, name: str) -> nn.Module:
        """A copy of one of the skeleton's modules, with its weights.

        Raises:
            ExportError: a weight cannot be read, or has another shape.
        """
        module: nn.Module = copy.deepcopy(self.skeleton.get_submodule(name)).to_empty(device="cpu")
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                weight = self._read(f"{name}.{key}")
                if weight.shape != parameter.shape:
                    shapes = f"{tuple(weight.shape)}, where its config says {tuple(parameter.shape)}"
                    raise ExportError(f"{self._path}: {name}.{key} is {shapes}")
                parameter.copy_(weight)
        return module

    def streamed(self) -> Any:
        """The model as transformers runs it, of which each module has its weights while it runs, and no longer."""
        model = copy.deepcopy(self.skeleton)
        for name in _units(model):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda module, _, name=name: self._lend(module, name))
            module.register_forward_hook(lambda module, *_: self._take_back(module))
        return model

    def _lend(self, module: nn.Module, name: str) -> None:
        module.load_state_dict(self.module(name).state_dict(), assign=True)

    def _take_back(self, module: nn.Module) -> None:
        module.to("meta")

    def _head_is_its_own(self) -> bool:
        """Whether files hold a head that is not the embedding: transformers ties no such two, whatever its config."""
        head, embedding = self._in_files(HEAD), self._in_files(EMBEDDING)
        return head is not None and embedding is not None and not torch.equal(self._read(HEAD), self._read(EMBEDDING))

    def _refuse_others(self, names: Iterable[str]) -> None:
        known = {each for name in names for each in (name, published_name(name))}
        others = sorted(name for name in self._files if name not in known and not name.endswith(_COMPUTED))
        if others:
            raise ExportError(
                f"{self._path} holds {len(others)} tensors that are no weights of the model, the first of them "
                f"{others[0]}: merge an adapter into the weights, and take weights that are not quantized"
            )

    def _in_files(self, name: str) -> str | None:
        return next((each for each in (name, published_name(name)) if each in self._files), None)

    def _name_in_files(self, name: str) -> str | None:
        found = self._in_files(name)
        if found is None and name == HEAD and self.skeleton.config.tie_word_embeddings:
            return self._name_in_files(EMBEDDING)
        return found

    def _read(self, name: str) -> Tensor:
        found = self._name_in_files(name)
        assert found is not None, name
        # Opened for each: what was read stays mapped, and counts, as long as a file is open.
        with safe_open(self._files[found], "pt") as file:
            tensor: Tensor = file.get_tensor(found)
        return tensor


def published_name(name: str) -> str:
    """The name that published files have a parameter of the model under."""
    own = next((own for own in _PUBLISHED if name.startswith(own)), "")
    return _PUBLISHED.get(own, "") + name.removeprefix(own)


def _units(model: Any) -> list[str]:
    """Modules that hold all weights between them, as large as a layer."""
    visual, text = "model.visual", "model.language_model"
    blocks = [f"{visual}.blocks.{k}" for k in range(len(model.model.visual.blocks))]
    layers = [f"{text}.layers.{k}" for k in range(len(model.model.language_model.layers))]
    ends = [f"{text}.norm", "lm_head"]
    return [f"{visual}.patch_embed", *blocks, f"{visual}.merger", f"{text}.embed_tokens", *layers, *ends]


def weight_files(path: Path) -> list[Path]:
    """Files that hold the weights: one, or those that the index names, as transformers has it.

    Raises:
        ExportError: there are none, or not all.
    """
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    try:
        names = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        raise ExportError(
            f"{path} has no {SINGLE} and no {INDEX}: it is no checkpoint, or not all of it was downloaded"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path / INDEX} cannot be read: {error}; download it again") from error
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        raise ExportError(f"{path} lacks {missing[0]}, which its index names: download it")
    return sorted(path / name for name in names)


def _names_of_tensors(path: Path) -> dict[str, Path]:
    """The file that each tensor is in."""
    names: dict[str, Path] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{file} cannot be read: {error}; download it again") from error
        codes = next((f"{name} is {kind}" for name, kind in kinds.items() if kind not in _NUMBERS), None)
        if codes:
            raise ExportError(f"{file}: {codes}: take weights that are not quantized")
        names |= dict.fromkeys(kinds, file)
    return names


def skeleton(config: Any) -> Any:
    """The model on the meta device, but for its rotary frequencies, which no file holds."""
    with torch.device("meta"):
        # There is no public way without weights.
        model = Model._from_config(config, dtype=torch.float32, attn_implementation="sdpa")  # noqa: SLF001
    model.tie_weights()
    model.model.visual.rotary_pos_emb = type(model.model.visual.rotary_pos_emb)(config.vision_config)
    model.model.language_model.rotary_emb = type(model.model.language_model.rotary_emb)(config.text_config)
    return model.eval()
