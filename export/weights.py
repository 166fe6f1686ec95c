"""Reads the weights of a checkpoint from its files, one module at a time.

What enters: a checkpoint's files, the model's config, and perhaps an adapter. What leaves: a skeleton, which is the
model without weights, and single modules with their weights, in fp32. So the export of a checkpoint of any size takes
only the memory of its largest module.

The parity gate reads weights here too, so it cannot detect one that is read wrongly. Hence only the files that
transformers would read are read, and a tensor that is not a parameter of the model is refused.

This module knows nothing of graphs.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration as Model

from export.adapter import Adapter
from export.checkpoint_files import QUANTIZATION, weight_files
from export.quantized_files import QuantizedFiles
from export.rounding import Array
from export.spelling import is_usual, name_in
from export.tensor_files import TensorFiles, check_floats
from qvl_batch.bundle.manifest import Dtype
from qvl_batch.errors import ExportError

EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
#: Suffixes of tensors in old files that the model computes from its config.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")


class Weights:
    """Weights of a checkpoint.

    Args:
        path: its folder.
        config: of its model.
        adapter: folder of an adapter to merge into them.
        ignore_extra: leave out tensors that are not weights of the model.

    Attributes:
        skeleton: the model without weights.
        ignored: names of tensors that were left out.

    Raises:
        ExportError: files are missing or damaged, lack weights of the model, or contain other tensors; the
            quantization or the adapter is not supported or does not fit.
    """

    def __init__(self, path: Path, config: Any, adapter: Path | None = None, *, ignore_extra: bool = False) -> None:
        self._path, self._adapter = path, None
        stored = TensorFiles(weight_files(path))
        quantization = getattr(config, QUANTIZATION, None) or getattr(config.text_config, QUANTIZATION, None)
        self._files = QuantizedFiles(stored, quantization) if quantization else stored
        self.skeleton = skeleton(config)
        shapes = {name: tuple(each.shape) for name, each in self._parameters()}
        self._names = {name: found for name in shapes if (found := name_in(self._files.kinds, name)) is not None}
        check_floats(self._files.kinds, self._names.values(), str(path))
        if adapter is not None:
            merged = Adapter(adapter, shapes)
            if config.tie_word_embeddings and not self._head_differs():
                merged.tie(EMBEDDING, HEAD)
            self._adapter = merged
        if config.tie_word_embeddings and self._head_differs():
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
            self.skeleton = skeleton(config)
        missing = sorted(name for name, _ in self.skeleton.named_parameters() if not self._has(name))
        if missing:
            # Where most are missing, the files' names say why.
            instead = f"; its files have {min(self._files.kinds)}" if len(missing) > len(shapes) / 2 else ""
            raise ExportError(f"{path} lacks {len(missing)} weights, the first of them {missing[0]}{instead}")
        self.ignored = self._extra(ignore_extra=ignore_extra)

    @property
    def are_usual(self) -> bool:
        """Whether transformers itself reads the same weights from the files."""
        names = self._names.items()
        return self._adapter is None and isinstance(self._files, TensorFiles) and all(is_usual(*each) for each in names)

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

    def integers(self, name: str) -> tuple[Dtype, dict[str, Array]] | None:
        """Dtype and integers of a parameter as the checkpoint has them, None if it has it in floats.

        Raises:
            ExportError: a bundle cannot have them.
        """
        found = self._names.get(name)
        if found is None or isinstance(self._files, TensorFiles):
            return None
        return self._files.integers(found)

    def whole(self) -> Any:
        """The model as transformers runs it, with all weights in memory."""
        model = copy.deepcopy(self.skeleton)
        for name in _units(model):
            self._load(model.get_submodule(name), name)
        model.tie_weights()
        return model

    def _parameters(self) -> Any:
        """Names and values of the skeleton's parameters, the head too where it is tied."""
        return self.skeleton.named_parameters(remove_duplicate=False)

    def _head_differs(self) -> bool:
        """Whether files or adapter have a head that differs from the embedding: transformers ties no such head.

        Raises:
            ExportError: the adapter adds to one of them, which peft would then do to both.
        """
        adds = [name for name in (EMBEDDING, HEAD) if self._adapter and self._adapter.adds_to(name)]
        if adds and HEAD not in self._names:
            raise ExportError(
                f"--adapter {self._adapter and self._adapter.path} adds to {adds[0]}, and embedding and head of the "
                "checkpoint are one tensor: merge it with peft"
            )
        has_both = self._has(EMBEDDING) and (HEAD in self._names or self._changes(HEAD) or self._changes(EMBEDDING))
        return has_both and not torch.equal(self._read(HEAD), self._read(EMBEDDING))

    def _extra(self, *, ignore_extra: bool) -> list[str]:
        """Tensors that are not weights of the model.

        Raises:
            ExportError: there are some, and they are not to be ignored; or they are parts of the model's weights.
        """
        known = set(self._names.values())
        modules = {name.rpartition(".")[0] for name in known}
        extra = sorted(name for name in self._files.kinds if name not in known and not name.endswith(_COMPUTED))
        parts = [name for name in extra if not modules.isdisjoint(_around(name))]
        if parts or (extra and not ignore_extra):
            what = (
                "merge an adapter into the weights, and use weights that are not quantized"
                if parts
                else "leave them out with --ignore-extra-weights"
            )
            raise ExportError(
                f"{self._path} has {len(extra)} tensors that are not weights of the model, the first of them "
                f"{(parts or extra)[0]}: {what}"
            )
        return extra

    def _changes(self, name: str) -> bool:
        return self._adapter is not None and self._adapter.changes(name)

    def _is_replaced(self, name: str) -> bool:
        return self._adapter is not None and self._adapter.replaces(name)

    def _has(self, name: str) -> bool:
        return self._is_replaced(name) or self._name_in_files(name) is not None

    def _name_in_files(self, name: str) -> str | None:
        # A tied head is in no file.
        return self._names.get(name) or (self._names.get(EMBEDDING) if name == HEAD else None)

    def _read(self, name: str) -> Tensor:
        found = self._name_in_files(name)
        stored = None if found is None or self._is_replaced(name) else self._files.read(found)
        if self._adapter is not None:
            return self._adapter.merged(name, stored)
        assert stored is not None, name
        return stored


def _around(name: str) -> list[str]:
    """Names of the modules around a tensor."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _units(model: Any) -> list[str]:
    """Modules of about a layer's size that together have all weights."""
    visual, text = "model.visual", "model.language_model"
    blocks = [f"{visual}.blocks.{k}" for k in range(len(model.model.visual.blocks))]
    layers = [f"{text}.layers.{k}" for k in range(len(model.model.language_model.layers))]
    ends = [f"{text}.norm", "lm_head"]
    return [f"{visual}.patch_embed", *blocks, f"{visual}.merger", f"{text}.embed_tokens", *layers, *ends]


def skeleton(config: Any) -> Any:
    """The model on the meta device, except its rotary frequencies, which are in no file."""
    with torch.device("meta"):
        # No public function builds the model without weights.
        model = Model._from_config(config, dtype=torch.float32, attn_implementation="sdpa")  # noqa: SLF001
    model.tie_weights()
    model.model.visual.rotary_pos_emb = type(model.model.visual.rotary_pos_emb)(config.vision_config)
    model.model.language_model.rotary_emb = type(model.model.language_model.rotary_emb)(config.text_config)
    return model.eval()
