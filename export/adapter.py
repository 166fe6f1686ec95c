"""Adapters, merged into weights as these are read: of LoRA (Hu et al. 2021, arXiv 2106.09685) and of single tokens.

What enters: a folder as peft saves it, and the names of the model's parameters. What leaves: parameters with the
adapter merged, one at a time, equal to those of peft's `merge_and_unload` in fp32:

    LoRA      W + s B A, with s = alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)
    DoRA      m (W + s B A) / ||W + s B A||, the norm of each output (Liu et al. 2024, arXiv 2402.09353)
    bias      b + s b_B, of adapters with `lora_bias`
    whole parameters in place of the checkpoint's: `modules_to_save`, biases, embeddings
    single rows of embedding or head in place of the checkpoint's: `trainable_token_indices`, `TrainableTokens`

An adapter is refused if one of its settings or tensors is not among these, since a merge without it would be wrong.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.adapter_files import adapter_file, adapter_settings
from export.checkpoint_files import ADAPTER_CONFIG
from export.spelling import module_names
from export.tensor_files import TensorFiles, check_floats
from qvl_batch.errors import ExportError

#: Names of tensors: what the trainer's wrapper adds in front, and a module's part of an adapter.
_WRAPPER = re.compile(r"^(base_model\.model\.)+")
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.(?P<kind>weight|bias))?"
)
#: Names of tensors that have rows of a module's weight.
_ROWS = re.compile(r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_delta(\.default)?")
#: What is in the name of a whole parameter, and not in the model's.
_WRAPPED = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")


@dataclass(slots=True)
class _LowRank:
    """Names of an adapter's tensors for one module, and their scale.

    Args:
        scale: of the product of both matrices.
        parts: name of the tensor by its part.
    """

    scale: float = 0.0
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows in place of those of a weight: the name of their tensor, and the tokens whose rows they are."""

    stored: str
    tokens: list[int]


class Adapter:
    """An adapter.

    Args:
        path: its folder.
        parameters: shapes of the model's parameters by name.

    Raises:
        ExportError: there is none, it is of a kind that is not supported, or for another model.
    """

    def __init__(self, path: Path, parameters: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self._parameters = path, parameters
        self._settings = adapter_settings(path)
        self._files = TensorFiles([adapter_file(path)])
        check_floats(self._files.kinds, self._files.kinds, f"--adapter {path}")
        self._low_rank: dict[str, _LowRank] = {}
        self._whole: dict[str, str] = {}
        self._rows: dict[str, _Rows] = {}
        modules = module_names(parameters)
        for stored in self._files.kinds:
            self._place(stored, modules)
        if not self._files.kinds:
            raise ExportError(f"--adapter {path} has no tensors: {adapter_file(path).name} was saved without them")
        for module, low_rank in self._low_rank.items():
            self._check(module, low_rank)
        both = next((name for name in self._rows if name in self._whole or self.adds_to(name)), None)
        if both:
            raise ExportError(f"--adapter {path} has single rows of {both} and changes all of it: merge it with peft")

    def tie(self, first: str, second: str) -> None:
        """Change the same rows of two parameters that are one tensor, where the adapter has rows of either.

        Raises:
            ExportError: it has other rows of the one than of the other.
        """
        found = [self._rows[name] for name in (first, second) if name in self._rows]
        values = [self._files.read(rows.stored) for rows in found]
        if any(rows.tokens != found[0].tokens for rows in found) or not all(torch.equal(values[0], v) for v in values):
            raise ExportError(
                f"--adapter {self.path} has other rows of {first} than of {second}, which are one tensor of the "
                f"checkpoint: {self._other_model()}"
            )
        for rows in found:
            self._rows[first] = self._rows[second] = rows

    def changes(self, parameter: str) -> bool:
        """Whether a parameter is another one than the checkpoint's."""
        return parameter in self._whole or parameter in self._rows or self.adds_to(parameter)

    def adds_to(self, parameter: str) -> bool:
        """Whether a product of two matrices is added to a parameter."""
        module, _, kind = parameter.rpartition(".")
        parts = self._low_rank[module].parts if module in self._low_rank else {}
        return bool(parts) and (kind == "weight" or f"B.{kind}" in parts)

    def replaces(self, parameter: str) -> bool:
        """Whether the adapter holds a whole parameter, so that the checkpoint's is not needed."""
        return parameter in self._whole

    def merged(self, parameter: str, value: Tensor | None) -> Tensor:
        """A parameter with the adapter merged, in fp32.

        Args:
            parameter: its name.
            value: the checkpoint's; None if the adapter has the whole parameter.
        """
        if parameter in self._whole:
            value = self._files.read(self._whole[parameter])
        assert value is not None
        value = value.float()
        if parameter in self._rows:
            rows = self._rows[parameter]
            return value.index_copy(0, torch.tensor(rows.tokens), self._files.read(rows.stored).float())
        if not self.adds_to(parameter):
            return value
        module, _, kind = parameter.rpartition(".")
        low_rank = self._low_rank[module]
        parts = {part: self._files.read(name).float() for part, name in low_rank.parts.items()}
        if kind == "bias":
            return value + low_rank.scale * parts["B.bias"]
        is_table = "embedding_A" in parts  # whose outputs are columns
        if is_table:
            added = (parts["embedding_B"] @ parts["embedding_A"]).t()
        else:
            added = parts["B"].flatten(1) @ parts["A"].flatten(1)
        merged = value + (added * low_rank.scale).reshape(value.shape)
        if "magnitude" not in parts:
            return merged
        norm = merged.norm(dim=0) if is_table else merged.flatten(1).norm(dim=1)
        factor = parts["magnitude"].flatten() / norm
        shape = (1, -1) if is_table else (-1, *[1] * (merged.dim() - 1))
        merged *= factor.view(shape)
        return merged

    def _place(self, stored: str, modules: Mapping[str, str]) -> None:
        """Find out what a tensor is for."""
        name = _WRAPPER.sub("", stored)
        found = _PART.fullmatch(name)
        if found:
            module = modules.get(found["module"])
            if module is None or f"{module}.weight" not in self._parameters:
                raise self._not_in_model(stored, found["module"])
            part = found["part"].removeprefix("lora_").removesuffix("_vector")
            part += ".bias" if found["kind"] == "bias" else ""
            low_rank = self._low_rank.setdefault(module, _LowRank())
            low_rank.parts[part] = stored
            if part in ("A", "embedding_A"):
                low_rank.scale = self._scale(found["module"], next(iter(self._files.shapes[stored]), 0))
            return
        found = _ROWS.fullmatch(name)
        if found:
            parameter = f"{modules.get(found['module'])}.weight"
            if parameter not in self._parameters:
                raise self._not_in_model(stored, found["module"])
            self._rows[parameter] = _Rows(stored, self._tokens(stored, found["module"], self._parameters[parameter]))
            return
        module, _, kind = _WRAPPED.sub("", name).rpartition(".")
        parameter = f"{modules.get(module)}.{kind}"
        if parameter not in self._parameters:
            raise self._not_in_model(stored, f"{module}.{kind}")
        self._whole[parameter] = stored
        shape = self._files.shapes[stored]
        if shape != self._parameters[parameter]:
            raise ExportError(
                f"--adapter {self.path}: {stored} is {shape}, where the checkpoint has {self._parameters[parameter]}: "
                f"{self._other_model()}"
            )

    def _scale(self, module: str, rank: int) -> float:
        """Scale of a module, which patterns name as the trained model did."""
        settings = self._settings
        expected = _of_pattern(settings.get("rank_pattern"), module, settings["r"])
        if rank != expected:
            raise ExportError(
                f"--adapter {self.path}: {module} has rank {rank}, and {ADAPTER_CONFIG} says {expected}: it was saved "
                "incompletely, or its files are of two adapters"
            )
        alpha = _of_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))

    def _tokens(self, stored: str, module: str, shape: tuple[int, ...]) -> list[int]:
        """Tokens whose rows are in a tensor, for a module that has a weight of this shape."""
        settings = self._settings
        tokens = settings.get("token_indices") or settings.get("trainable_token_indices")
        if isinstance(tokens, dict):
            tokens = next((each for key, each in tokens.items() if module.endswith(key)), None)
        if not isinstance(tokens, list) or self._files.shapes[stored] != (len(tokens), *shape[1:]):
            count = f"{len(tokens)} tokens" if isinstance(tokens, list) else "no tokens"
            raise ExportError(
                f"--adapter {self.path}: {stored} is {self._files.shapes[stored]}, where {module} is {shape} and "
                f"{ADAPTER_CONFIG} has {count}: it was saved incompletely, or {self._other_model()}"
            )
        if any(token not in range(shape[0]) for token in tokens) or len(set(tokens)) < len(tokens):
            raise ExportError(
                f"--adapter {self.path}: tokens of {module} must be different ones from 0 to {shape[0] - 1}, and "
                f"{ADAPTER_CONFIG} has {tokens[:9]}: {self._other_model()}"
            )
        return tokens

    def _check(self, module: str, low_rank: _LowRank) -> None:
        """Refuse parts that do not fit each other or the module's weight."""
        parts, shape = low_rank.parts, self._parameters[f"{module}.weight"]
        a, b = next(((a, b) for a, b in (("A", "B"), ("embedding_A", "embedding_B")) if a in parts), ("A", "B"))
        missing = [part for part in (a, b) if part not in parts]
        if self._settings.get("use_dora") and "magnitude" not in parts:
            missing.append("magnitude_vector")
        if missing:
            raise ExportError(f"--adapter {self.path}: there is no lora_{missing[0]} of {module}: save it again")
        first, second = (self._files.shapes[parts[part]] for part in (a, b))
        if a == "A":
            fits = second[0] == shape[0] and math.prod(first[1:]) == math.prod(shape[1:]) and first[0] == second[1]
        else:
            fits = (second[0], first[1], first[0]) == (shape[1], shape[0], second[1])
        if not fits:
            raise ExportError(
                f"--adapter {self.path}: its matrices {first} and {second} do not fit {module}, whose weight is "
                f"{shape}: {self._other_model()}"
            )
        if "B.bias" in parts and f"{module}.bias" not in self._parameters:
            raise ExportError(f"--adapter {self.path}: it has a bias for {module}, which has none (lora_bias)")

    def _not_in_model(self, stored: str, what: str) -> ExportError:
        if "token_adapter" in stored or "lora_" in what:
            return ExportError(
                f"--adapter {self.path}: {stored} is of a kind that is not supported: merge it with peft"
            )
        return ExportError(f"--adapter {self.path}: {stored} is for {what}, which is not there: {self._other_model()}")

    def _other_model(self) -> str:
        return f"the adapter is for another model ({self._settings.get('base_model_name_or_path')})"


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value for a module: that of the first pattern which ends its name, as peft has it."""
    matching = (value for key, value in (pattern or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module))
    return next(matching, default)
