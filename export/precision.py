"""Precision of the matrix products: of each tower, and of single layers or products.

What enters: the options of an export, and the products of the model. What leaves: a `Precision`, which knows the dtype
of every product.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, get_args

from export.lazy import decoder_parts, vision_parts
from export.names import EMBEDDING, TOWERS, Tower
from qvl_batch.bundle.manifest import HALVES, INTEGERS, Dtype, dtypes_of, is_in
from qvl_batch.config import Device
from qvl_batch.errors import ExportError


@dataclass(frozen=True, slots=True)
class Precision:
    """Precision of each tower's matrix products, of modules that differ from their tower, and the device that the
    decoder is made for.
    """

    decoder: Dtype = "fp32"
    vision: Dtype = "fp32"
    layers: Mapping[str, Dtype] = field(default_factory=dict)
    device: Device = "cpu"

    def of(self, module: str) -> Dtype:
        """Dtype of the product of a module: that of the innermost module around it that has one, or its tower's."""
        around = [name for name in self.layers if is_in(module, [name])]
        return self.layers[max(around, key=len)] if around else self.of_tower(tower_of(module))

    def of_tower(self, tower: Tower) -> Dtype:
        """Dtype of a tower's products, except of modules that differ from it."""
        return self.vision if tower == "vision" else self.decoder

    def dtypes(self, tower: Tower) -> set[Dtype]:
        """All dtypes of a tower's products."""
        return dtypes_of(tower, self.of_tower(tower), self.layers)

    def rounded_to(self, tower: Tower) -> set[Dtype]:
        """The same, without integers that are the checkpoint's own: beside half precision there are no others."""
        dtypes = self.dtypes(tower)
        return dtypes - set(INTEGERS) if self.of_tower(tower) in HALVES else dtypes

    @property
    def has_full(self) -> bool:
        """Whether there is a `decoder_full.onnx` too; it shares the weights of a decoder in fp32."""
        return self.dtypes("decoder") == {"fp32"}


def tower_of(module: str) -> Tower:
    """The tower that a module is in."""
    return "vision" if is_in(module, ["vision"]) else "decoder"


def products(model: Any, decoder: Dtype = "fp32", vision: Dtype = "fp32") -> list[str]:
    """Names of the modules with a matrix product, in the order of the forward pass, of towers in these dtypes."""
    parts = vision_parts(model, [1.0, 1.0, 1.0], vision) + decoder_parts(model, decoder)
    weights = (name for part in parts for name in part.of(model.get_submodule(part.module)))
    return [name.removesuffix(".weight") for name in weights if name.endswith(".weight") and name != EMBEDDING]


def layers_of(layers_dtype: Iterable[str], fp32_layers: Iterable[str], known: Iterable[str]) -> dict[str, Dtype]:
    """The dtypes that options give to modules.

    Args:
        layers_dtype: `MODULE=DTYPE` each; a star in the name stands for any number of a layer. Of two that give the
            same module a dtype, the later one counts.
        fp32_layers: names of modules; they count more than the others.
        known: all products.

    Raises:
        ExportError: there is no such module or dtype.
    """
    known = list(known)
    # Modules around products, too.
    modules = list(dict.fromkeys(m for product in known for m in _around(product)))
    found: dict[str, Dtype] = {}
    for option, asked in (("--layers-dtype", layers_dtype), ("--fp32-layers", fp32_layers)):
        for each in asked:
            name, separator, dtype = each.partition("=") if option == "--layers-dtype" else (each, "=", "fp32")
            if not separator or dtype not in get_args(Dtype):
                raise ExportError(f"{option} {each}: write MODULE=DTYPE, with one of {', '.join(get_args(Dtype))}")
            fitting = [m for m in modules if m.count(".") == name.count(".") and fnmatchcase(m, name)]
            if not fitting:
                raise ExportError(
                    f"{option} {each}: there is no such layer; products are {', '.join(_examples(known))}"
                )
            for module in fitting:
                found.pop(module, None)
                found[module] = dtype  # type: ignore[assignment] # it is one of them
    return found


def by_layers(dtypes: Mapping[str, Dtype]) -> dict[str, Dtype]:
    """Dtypes of all products, by layer where those of a layer are equal."""
    layer = {product: ".".join(product.split(".")[:3]) for product in dtypes}  # of one in no layer, its own name
    found: dict[str, set[Dtype]] = defaultdict(set)
    for product, dtype in dtypes.items():
        found[layer[product]].add(dtype)
    return {layer[each] if len(found[layer[each]]) == 1 else each: dtype for each, dtype in dtypes.items()}


def check_mix(precision: Precision, kept: Mapping[str, Dtype]) -> None:
    """Refuse dtypes that cannot be in one tower.

    Args:
        precision: of both towers.
        kept: modules with integers that are the checkpoint's own, which can be beside half precision.

    Raises:
        ExportError: half precision beside another reduced one, or integers in a decoder for a GPU.
    """
    for tower in TOWERS:
        own = precision.of_tower(tower)
        given = {
            name: dtype
            for name, dtype in precision.layers.items()
            if tower_of(name) == tower and kept.get(name) != dtype
        }
        for name, dtype in given.items():
            halves = {own, dtype} & set(HALVES)
            if halves and dtype not in ("fp32", own):
                raise ExportError(
                    f"--layers-dtype {name}={dtype}: its tower is in {own}, and beside half precision only fp32 is "
                    "possible"
                )
        integers = sorted({own, *given.values()} & set(INTEGERS))
        if tower == "decoder" and precision.device == "cuda" and integers:
            raise ExportError(f"--device cuda: {integers[0]} is for a decoder on the CPU")


def _around(product: str) -> list[str]:
    """A product's name, and those of the modules around it within the tower."""
    parts = product.split(".")
    return [".".join(parts[:count]) for count in range(2, len(parts) + 1)]


def _examples(products: list[str]) -> list[str]:
    """Products with a dot and a star in place of what all layers have."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", product) for product in products))
