"""Weights whose rounding was calibrated on a user's own rows: see `export.rounding` and `export.smoothing`.

What enters: a checkpoint, its contract, the dtypes of products, and rows. What leaves: the rounded weights of all
products, and the scales that were moved from activations into weights.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from export.activations import InputsOf, visit_decoder, visit_vision
from export.checkpoint import Checkpoint
from export.disk import Keep, in_memory
from export.layers import Linear
from export.progress import Progress, Update
from export.rounding import Rounded, rounded
from export.sample import SampleRow
from export.smoothing import Scales, find_scale, paths, smooth
from export.vision import VisionTower, vision_tower
from qvl_batch.bundle.layout import Layout
from qvl_batch.bundle.manifest import INTEGERS, Dtype

#: Dtypes that a product will have, or may have.
DtypesOf = Callable[[str], Iterable[Dtype]]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration found.

    Args:
        rounded: by product and dtype, arrays as those of `to_int8` and `to_blocks`.
        scales: what norms and products were divided by.
    """

    rounded: Rounded = field(default_factory=dict)
    scales: Scales = field(default_factory=dict)


def calibrate(
    checkpoint: Checkpoint,
    layout: Layout,
    rows: Sequence[SampleRow],
    dtypes_of: DtypesOf,
    progress: Progress,
    smoothed_for: DtypesOf | None = None,
    keep: Keep = in_memory,
) -> Calibrated:
    """Show rows to the model and round its weights.

    Args:
        checkpoint: the model.
        layout: of its rows.
        rows: to calibrate on.
        dtypes_of: by the name of a product; those in fp32 or half precision are left as they are.
        progress: receives each step.
        smoothed_for: dtypes that products are smoothed for; by default their own.
        keep: where rounded weights go; by default they stay in memory.
    """
    found = Calibrated()
    with progress.step("calibration") as update:
        side = layout.resolution.image_size
        visitor = _Visitor(found, dtypes_of, smoothed_for or dtypes_of, keep, update)
        tower = plain_tower(checkpoint, layout)
        update(f"vision, {len(rows)} rows")
        features = visit_vision(tower, [pixels for row in rows for pixels in row.pixels], visitor.visit)
        del tower
        merged_side = None if side is None else side // layout.resolution.unit
        visit_decoder(checkpoint.weights, merged_side, rows, features, visitor.visit)
    return found


def plain_tower(checkpoint: Checkpoint, layout: Layout) -> VisionTower:
    """The vision tower in standard operators, with its weights in memory."""
    visual: Any = checkpoint.weights.module("model.visual")
    # Its frequencies are in no file.
    visual.rotary_pos_emb = checkpoint.weights.skeleton.model.visual.rotary_pos_emb
    processor = checkpoint.image_processor
    return vision_tower(visual, layout.resolution.image_size, processor.image_mean, processor.image_std, plain=True)


class _Visitor:
    def __init__(
        self, found: Calibrated, dtypes_of: DtypesOf, smoothed_for: DtypesOf, keep: Keep, update: Update
    ) -> None:
        self._found, self._dtypes_of, self._smoothed_for = found, dtypes_of, smoothed_for
        self._keep, self._update = keep, update

    def visit(self, prefix: str, module: nn.Module, inputs: InputsOf) -> None:
        """Smooth a module's weights and round them."""
        self._update(prefix)
        self._smooth(prefix, module, inputs)
        for name, each in module.named_modules():
            if not isinstance(each, Linear):
                continue
            product = f"{prefix}.{name}" if name else prefix
            weight, moment = each.weight.detach().numpy(), inputs[product].second_moment
            for dtype in self._dtypes_of(product):
                if dtype in INTEGERS:
                    made = rounded(dtype, weight, moment)
                    self._found.rounded[product, dtype] = {name: self._keep(array) for name, array in made.items()}

    def _smooth(self, prefix: str, module: nn.Module, inputs: InputsOf) -> None:
        for path in paths(module):
            products = [f"{prefix}.{product}" for product in path.products]
            dtypes = sorted({dtype for product in products for dtype in self._smoothed_for(product)} & set(INTEGERS))
            if not dtypes:
                continue
            own = inputs[products[0]]
            weights: list[Any] = [module.get_submodule(product).weight for product in path.products]
            scale = find_scale(path, weights, own, dtypes)
            if scale is not None:
                self._found.scales[f"{prefix}.{path.source}"] = scale.numpy()
                own.divide(path.at_inputs(scale, len(own.largest)))
        smooth(prefix, module, self._found.scales)
