"""`recipe.json`: a recipe with all that was measured, to read and to apply again.

What enters: a recipe that was found; or such a file. What leaves: the record of the first, the precision that the
second says.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.precision import Precision, layers_of
from export.recipe.search import CANDIDATES, Recipe
from export.recipe.trial import Trial
from qvl_batch.bundle.manifest import Dtype, MeasuredRecipe
from qvl_batch.errors import ExportError
from qvl_batch.runtime.devices import machine_of
from qvl_batch.runtime.memory import HostMemory

RECIPE, PAGE = "recipe.json", "recipe.html"
#: Fields of the file that say the precision, as in a bundle's manifest.
FIELDS = ("dtype", "vision_dtype", "layers_dtype")


def record(recipe: Recipe) -> dict[str, Any]:
    """Everything about a recipe, for JSON."""
    precision = recipe.precision
    return {
        **dict(zip(FIELDS, (precision.decoder, precision.vision, dict(precision.layers)), strict=True)),
        "goal": asdict(recipe.goal),
        "chosen": recipe.chosen.name,
        "lost": recipe.chosen.lost,
        "machine": machine_of(HostMemory()),
        "workload": asdict(recipe.workload),
        "parts": {part: _part(recipe, part) for part in recipe.chosen.choice},
        "trials": [_trial(recipe, trial) for trial in recipe.trials],
    }


def in_manifest(recipe: Recipe) -> MeasuredRecipe:
    """What the bundle's manifest says of it."""
    goal, chosen = recipe.goal, recipe.chosen
    return MeasuredRecipe(
        max_drift=goal.max_drift,
        min_agreement=goal.min_agreement,
        prefer=goal.prefer,
        features=chosen.vision,
        logits=chosen.logits,
        answers=chosen.rows,
        answers_equal=chosen.equal,
    )


def read_recipe(path: Path, products: Iterable[str]) -> Precision:
    """The precision that a recipe's file says.

    Args:
        path: the file.
        products: names of the modules with a product, of the checkpoint that it is for.

    Raises:
        ExportError: it cannot be read, or is not a recipe for such a checkpoint.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(
            f"--recipe {path} cannot be read: {error}; give auto, or the recipe.json of a bundle"
        ) from error
    missing = next((name for name in FIELDS if not isinstance(found, dict) or name not in found), None)
    if missing is not None:
        raise ExportError(f"--recipe {path} has no {missing}: give auto, or the recipe.json of a bundle")
    decoder, vision, layers = (found[name] for name in FIELDS)
    for name, dtype in (("dtype", decoder), ("vision_dtype", vision)):
        if dtype not in CANDIDATES:
            raise ExportError(f"--recipe {path}: {name} is {dtype!r}, not one of {', '.join(CANDIDATES)}")
    if not isinstance(layers, dict):
        raise ExportError(f"--recipe {path}: layers_dtype is not an object of modules and dtypes")
    try:
        return Precision(
            decoder, vision, layers_of((f"{part}={dtype}" for part, dtype in layers.items()), (), products)
        )
    except ExportError as error:
        raise ExportError(f"--recipe {path}: {str(error).removeprefix('--layers-dtype ')}") from error


def _part(recipe: Recipe, part: str) -> dict[str, Any]:
    """A part's dtype, why it has it, and what was measured of it in each dtype."""
    costs, chosen = recipe.costs, recipe.chosen.choice[part]
    options: dict[Dtype, dict[str, Any]] = {
        dtype: {
            "own_error": recipe.sensitivity.own.get((part, dtype), 0.0),
            "takes": dict(zip(("features", "logits"), recipe.shares[part, dtype], strict=True)),
            "bytes": costs.bytes[part, dtype],
            "seconds": costs.seconds[part, dtype],
        }
        for dtype in CANDIDATES
    }
    return {"dtype": chosen, "why": _why(recipe, part, options), "options": options}


def _why(recipe: Recipe, part: str, options: Mapping[Dtype, Mapping[str, Any]]) -> str:
    """Why a part has no cheaper dtype."""
    measure = recipe.goal.least
    unit, scale = ("ms a row", 1e3) if measure == "seconds" else ("MB", 1e-6)
    chosen = recipe.chosen.choice[part]
    saved = {dtype: options[chosen][measure] - each[measure] for dtype, each in options.items()}
    cheaper = sorted((dtype for dtype in saved if saved[dtype] > 0), key=saved.__getitem__)
    if not cheaper:
        return "nothing is faster here" if measure == "seconds" else "nothing is smaller"
    reasons = [
        f"{dtype} would save {saved[dtype] * scale:.3g} {unit} and take "
        f"{max(recipe.shares[part, dtype]):.0%} of what is allowed, in place of {max(recipe.shares[part, chosen]):.0%}"
        for dtype in cheaper
    ]
    return "; ".join(reasons)


def _trial(recipe: Recipe, trial: Trial) -> dict[str, Any]:
    """A trial; figures that are not finite are text."""
    figures = {name: getattr(trial, name) for name in ("vision", "prefill", "decode")}
    return asdict(trial) | {
        **{name: value if value < float("inf") else "inf" for name, value in figures.items()},
        "meets": trial.meets(recipe.goal),
    }
