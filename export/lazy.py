"""Fills in the weights of a graph that was traced without them; each is computed when it is written.

A module built on a skeleton is traced with placeholders in place of its parameters. The values come
from building the same kind of module on real weights, one `Part` at a time, read by `Weights`.

1. Every parameter of the traced module belongs to one part, under the same name.
2. No constant that the tracer computed from a placeholder may stay in a graph: placeholders are NaN,
   and a constant that contains a NaN is refused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.decoder import Layer
from export.half import stream_unit
from export.layers import Linear
from export.smoothing import Scales, smooth
from export.vision import Block, Merger, patch_weights
from export.weights import Weights
from qvl_batch.bundle.manifest import Dtype
from qvl_batch.errors import ExportError

Tensors = dict[str, Tensor]
#: Bits of a quiet float32 NaN; the 22 lowest bits are free.
_FIRST_NAN = 0x7FC00000


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters of a traced module whose names begin with `prefix`, computed from one module of the checkpoint."""

    prefix: str
    module: str
    make: Callable[[Any], nn.Module | Tensors]

    def of(self, module: Any, scales: Scales | None = None) -> Tensors:
        """The parameters by name, smoothed by `scales`; of a module of the skeleton, meta tensors of these shapes."""
        with torch.no_grad():
            made = self.make(module)
        if isinstance(made, nn.Module):
            smooth(self.prefix, made, scales or {})
            made = dict(made.named_parameters())
        return {f"{self.prefix}.{name}" if name else self.prefix: tensor for name, tensor in made.items()}


def vision_parts(model: Any, std: list[float], dtype: Dtype) -> list[Part]:
    """Parts of `VisionTower`."""
    unit, blocks = stream_unit(dtype), range(len(model.model.visual.blocks))
    return [
        Part(
            "vision.patch_embed",
            "model.visual.patch_embed",
            lambda module: {"weight": patch_weights(module, std, unit)},
        ),
        *(Part(f"vision.blocks.{k}", f"model.visual.blocks.{k}", lambda block: Block(block, dtype)) for k in blocks),
        Part("vision.merger", "model.visual.merger", lambda merger: Merger(merger, dtype)),
    ]


def decoder_parts(model: Any, dtype: Dtype) -> list[Part]:
    """Parts of both decoders. Where the head is tied, only the full decoder has one of its own."""
    layers = range(len(model.model.language_model.layers))
    return [
        Part("decoder.embed", "model.language_model.embed_tokens", lambda table: table),
        *(
            Part(
                f"decoder.layers.{k}",
                f"model.language_model.layers.{k}",
                lambda layer: Layer(layer, dtype),
            )
            for k in layers
        ),
        Part("decoder.norm", "model.language_model.norm", lambda norm: {"": norm.weight}),
        Part("decoder.head", "lm_head", Linear.of),
    ]


def without_weights(module: nn.Module) -> nn.Module:
    """Replace the parameters on the meta device by placeholders of the same shapes, which take no memory."""
    placeholders: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                nans = _nan(len(placeholders)).expand(parameter.shape)
                # Tied parameters stay tied.
                setattr(owner, name, placeholders.setdefault(id(parameter), nn.Parameter(nans, requires_grad=False)))
    return module


def _nan(number: int) -> Tensor:
    """A NaN (1,) with distinct bits, since the tracer deduplicates equal initializers."""
    return torch.tensor([_FIRST_NAN + number], dtype=torch.int32).view(torch.float32)


class LazyWeights:
    """Values for the initializers of graphs; initializers of the same name share one value across graphs.

    Args:
        weights: of the checkpoint.
        parts: of the traced modules.
        scales: by which they are smoothed, if they are.
    """

    def __init__(self, weights: Weights, parts: Iterable[Part], scales: Scales | None = None) -> None:
        self._weights, self._parts, self._scales = weights, list(parts), scales or {}
        self._tensors: dict[str, ir.LazyTensor] = {}
        self._made: tuple[str, Tensors] = ("", {})

    def fill(self, graph: ir.Model) -> None:
        """Give each initializer a value that is computed when it is read.

        Raises:
            ExportError: a constant was computed from a placeholder.
        """
        for name, value in graph.graph.initializers.items():
            part = next((p for p in self._parts if name == p.prefix or name.startswith(f"{p.prefix}.")), None)
            if part is not None:
                value.const_value = self._tensor(name, value, part)
            elif value.const_value is not None and _has_nan(value.const_value.numpy()):
                raise ExportError(f"the tracer computed {name} from a weight: this version of torch cannot be used")

    def _tensor(self, name: str, value: ir.Value, part: Part) -> ir.LazyTensor:
        if name not in self._tensors:
            assert value.dtype is not None
            assert value.shape is not None

            def make() -> ir.TensorProtocol:
                return ir.tensor(self._values(part)[name].detach().contiguous().numpy(), name=name)

            self._tensors[name] = ir.LazyTensor(make, value.dtype, value.shape, name=name)
        return self._tensors[name]

    def _values(self, part: Part) -> Tensors:
        """Parameters of a part. Those of the last part are cached, since its tensors are read one after the other."""
        if self._made[0] != part.prefix:
            self._made = ("", {})
            self._made = (part.prefix, part.of(self._weights.module(part.module), self._scales))
        return self._made[1]


def _has_nan(values: Any) -> bool:
    return values.dtype.kind == "f" and bool(np.isnan(values).any())
