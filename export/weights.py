"""Reads the weights of a checkpoint from its files, one module at a time.

What enters: a checkpoint's files and the model's config. What leaves: a skeleton, which is the model
without weights, and single modules with their weights, in fp32. So the export of a checkpoint of any
size takes only the memory of its largest module.

The parity gate reads weights here too, so it cannot detect one that is read wrongly. Hence only the
files that transformers would read are read, and a tensor that is not a parameter of the model is refused.

This module knows nothing of graphs.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration as Model

from export.tensor_files import TYPES, read_tensor, types_in, weight_files
from qvl_batch.errors import ExportError

#: Prefixes of parameter names: the model's own, and those in published files. Other files have the model's own.
_PUBLISHED = {"model.language_model.": "model.", "model.visual.": "visual."}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
#: Suffixes of tensors in old files that the model computes from its config.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")


class Weights:
    """Weights of a checkpoint.

    Args:
        path: its folder.
        config: of its model.

    Raises:
        ExportError: files are missing or damaged, lack weights of the model, or contain other tensors.
    """

    def __init__(self, path: Path, config: Any) -> None:
        self._path = path
        self._files = _tensor_files(path)
        if config.tie_word_embeddings and self._head_differs():
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        self.skeleton = skeleton(config)
        names = [name for name, _ in self.skeleton.named_parameters()]
        missing = sorted(name for name in names if self._name_in_files(name) is None)
        if missing:
            # Where most are missing, the files' names say why.
            instead = f"; its files have {min(self._files)}" if len(missing) > len(names) / 2 else ""
            raise ExportError(f"{path} lacks {len(missing)} weights, the first of them {missing[0]}{instead}")
        self._refuse_unknown({*names, HEAD})

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
        """The model as transformers runs it; each module's weights are in memory only while it runs."""
        model = copy.deepcopy(self.skeleton)
        for name in _units(model):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda module, _, name=name: self._load(module, name))
            module.register_forward_hook(lambda module, *_: self._unload(module))
        return model

    def _load(self, module: nn.Module, name: str) -> None:
        module.load_state_dict(self.module(name).state_dict(), assign=True)

    def _unload(self, module: nn.Module) -> None:
        module.to("meta")

    def _head_differs(self) -> bool:
        """Whether the files have a head that differs from the embedding: transformers ties no such head."""
        head, embedding = self._in_files(HEAD), self._in_files(EMBEDDING)
        return head is not None and embedding is not None and not torch.equal(self._read(HEAD), self._read(EMBEDDING))

    def _refuse_unknown(self, names: Iterable[str]) -> None:
        known = {each for name in names for each in (name, published_name(name))}
        unknown = sorted(name for name in self._files if name not in known and not name.endswith(_COMPUTED))
        if unknown:
            raise ExportError(
                f"{self._path} has {len(unknown)} tensors that are not weights of the model, the first of them "
                f"{unknown[0]}: merge an adapter into the weights, and use weights that are not quantized"
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
        return read_tensor(self._files[found], found)


def published_name(name: str) -> str:
    """Name of a parameter of the model in published files."""
    own = next((own for own in _PUBLISHED if name.startswith(own)), "")
    return _PUBLISHED.get(own, "") + name.removeprefix(own)


def _units(model: Any) -> list[str]:
    """Modules of about a layer's size that together have all weights."""
    visual, text = "model.visual", "model.language_model"
    blocks = [f"{visual}.blocks.{k}" for k in range(len(model.model.visual.blocks))]
    layers = [f"{text}.layers.{k}" for k in range(len(model.model.language_model.layers))]
    ends = [f"{text}.norm", "lm_head"]
    return [f"{visual}.patch_embed", *blocks, f"{visual}.merger", f"{text}.embed_tokens", *layers, *ends]


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file that each tensor is in."""
    names: dict[str, Path] = {}
    for file in weight_files(path):
        kinds = types_in(file)
        quantized = next((f"{name} is {kind}" for name, kind in kinds.items() if kind not in TYPES.values()), None)
        if quantized:
            raise ExportError(f"{file}: {quantized}: use weights that are not quantized")
        names |= dict.fromkeys(kinds, file)
    return names


def skeleton(config: Any) -> Any:
    """The model on the meta device, except its rotary frequencies, which are in no file."""
    with torch.device("meta"):
        # No public function builds the model without weights.
        model = Model._from_config(config, dtype=torch.float32, attn_implementation="sdpa")  # noqa: SLF001
    model.tie_weights()
    model.model.visual.rotary_pos_emb = type(model.model.visual.rotary_pos_emb)(config.vision_config)
    model.model.language_model.rotary_emb = type(model.model.language_model.rotary_emb)(config.text_config)
    return model.eval()
