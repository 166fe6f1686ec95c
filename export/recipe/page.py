"""The page of a recipe as one HTML file that needs nothing else: what was chosen, against what, and why.

What enters: the record of a recipe, as in `recipe.json`. What leaves: the page.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.comparison.page import LogAxis, figure
from export.recipe.record import PAGE, RECIPE, record
from export.recipe.search import CANDIDATES, Recipe
from export.recipe.trial import Goal
from qvl_batch.report.page import decimal_step, percent, printable, template

TEMPLATE = "page.html.jinja"


def write_recipe(recipe: Recipe, model: str, folder: Path) -> None:
    """Write `recipe.json` and `recipe.html`.

    Args:
        recipe: what was found.
        model: name of the checkpoint.
        folder: where to.
    """
    found = record(recipe)
    (folder / RECIPE).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render(found, model), encoding="utf-8")


def render(found: dict[str, Any], model: str) -> str:
    """The page of a record."""
    trials = {trial["name"]: trial for trial in found["trials"]}
    chosen, exact = trials[found["chosen"]], trials["fp32"]
    meeting = [trial for trial in trials.values() if trial["name"] in CANDIDATES and trial["meets"]]
    return template(
        Path(__file__).parent / TEMPLATE, {"percent": percent, "figure": figure}, finalize=printable
    ).render(
        found=found,
        model=model,
        chosen=chosen,
        exact=exact,
        uniform=min(meeting, key=lambda trial: float(trial[Goal(**found["goal"]).least])),
        counts=Counter(part["dtype"] for part in found["parts"].values()).most_common(),
        dtypes=CANDIDATES,
        plots=[
            Plot.of("Size", "MB", 1e-6, "bytes", found),
            Plot.of("Time of a row", "ms", 1e3, "seconds", found),
        ],
    )


@dataclass(frozen=True, slots=True)
class Point:
    """A trial in a plot: its place in % from the left and from the bottom, and what it is."""

    x: float
    y: float
    name: str
    kind: str
    title: str


@dataclass(frozen=True, slots=True)
class Plot:
    """Cost against drift. Places are in % of the plot's box, from the left or from the bottom.

    Args:
        title: what costs are.
        unit: their unit.
        points: of the trials.
        front: the trials that no other one beats in both cost and drift, as an SVG path in a box of 100 by 100.
        ticks: place and label along the drift.
        costs: place and label along the cost.
        bound: place of the largest drift allowed.
    """

    title: str
    unit: str
    points: list[Point]
    front: str
    ticks: list[tuple[float, str]]
    costs: list[tuple[float, str]]
    bound: float

    @classmethod
    def of(cls, title: str, unit: str, scale: float, measure: str, found: dict[str, Any]) -> "Plot":
        """The plot of one measure, in `unit` if it is multiplied by `scale`."""
        trials = found["trials"]
        drifts = [max(float(trial[name]) for name in ("vision", "prefill", "decode")) for trial in trials]
        values = [trial[measure] * scale for trial in trials]
        axis, step = LogAxis.of(drifts, found["goal"]["max_drift"]), decimal_step(max(values))
        top = step * -(-max(values) // step)
        places = [(axis.place(drift), round(100 * value / top, 2)) for drift, value in zip(drifts, values, strict=True)]
        points = [
            Point(
                x,
                y,
                trial["name"],
                "chosen" if trial["name"] == found["chosen"] else "uniform" if trial["name"] in CANDIDATES else "mixed",
                f"{trial['name']}: {value:,.3g} {unit}, drift {figure(drift)}, "
                f"{trial['equal']} of {trial['rows']} answers equal",
            )
            for trial, (x, y), value, drift in zip(trials, places, values, drifts, strict=True)
        ]
        return cls(
            title=title,
            unit=unit,
            points=points,
            front=_front(places),
            ticks=axis.ticks,
            costs=[(100 * step * at / top, f"{step * at:,.10g}") for at in range(round(top / step) + 1)],
            bound=axis.place(found["goal"]["max_drift"]),
        )


def _front(places: Sequence[tuple[float, float]]) -> str:
    """A stepped line along the points of which none has less of both coordinates."""
    line, lowest = "", float("inf")
    for x, y in sorted(places):
        if y < lowest:
            line += f"H{x:g}V{100 - y:g}" if line else f"M{x:g} {100 - y:g}"
            lowest = y
    return f"{line}H100"
