"""The report as one HTML file that needs nothing else: verdict, drift, groups, and a gallery of rows."""

import base64
import difflib
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from export.comparison.summary import STAGES, Kind
from qvl_batch.report.page import printable, template

Record = dict[str, Any]
TEMPLATE = "page.html.jinja"
#: Most dots of one stage in the drift plot, and most prompts in the filter.
MOST_DOTS, MOST_PROMPTS = 400, 100
#: Kinds of rows that are shown in preference to equal ones, in this order.
NOTABLE: tuple[Kind, ...] = ("real", "failed", "tie", "not compared")
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


def render(rows: Sequence[Record], summary: dict[str, Any], gallery: int) -> str:
    """The page.

    Args:
        rows: of `comparison.parquet`, with `difference` and `thumbnail`.
        summary: of the comparison.
        gallery: rows to show.
    """
    shown = _chosen(rows, gallery)
    prompts = Counter(row["prompt"] for row in shown if row["prompt"]).most_common(MOST_PROMPTS)
    filters = {"percent": _percent, "figure": figure}
    return template(Path(__file__).parent / TEMPLATE, filters, finalize=printable).render(
        summary=summary,
        stages=_stages(rows, summary["bounds"]["max_drift"]),
        depths=_depths(summary),
        cards=[_card(row) for row in shown],
        prompts=[prompt for prompt, _ in prompts],
        total=len(rows),
    )


@dataclass(frozen=True, slots=True)
class LogAxis:
    """A logarithmic axis over whole decades, across a box from 0 to 100 %."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Sequence[float], bound: float) -> "LogAxis":
        """An axis for the positive finite `values`, and for `bound` with a decade before it."""
        shown = [math.log10(value) for value in [*values, bound / 10, bound] if 0 < value < math.inf]
        low, high = math.floor(min(shown, default=-8)), math.ceil(max(shown, default=0))
        return cls(low, max(high, low + 1))

    def place(self, value: float) -> float:
        """Position of a value in %: 0 is at the left, values that are not finite at the right."""
        if not math.isfinite(value):
            return 100.0
        at = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return round(100 * min(1.0, max(0.0, at)), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and label of the decades, at most seven of them."""
        step = math.ceil((self.high - self.low) / 6)
        return [(self.place(10.0**power), f"1e{power}") for power in range(self.low, self.high + 1, step)]


def _stages(rows: Sequence[Record], max_drift: float) -> dict[str, Any]:
    """Lanes of dots, one for each row that has the stage."""
    values = {name: [row[column] for row in rows if row[column] is not None] for name, column in STAGES.items()}
    axis = LogAxis.of([value for lane in values.values() for value in lane], max_drift)
    chance = random.Random(0)  # noqa: S311  (which dots are drawn, and how they are spread)
    lanes = []
    for name, lane in values.items():
        # The worst value is always drawn.
        drawn = lane if len(lane) <= MOST_DOTS else [max(lane, key=_badness), *chance.sample(lane, MOST_DOTS)]
        dots = [(axis.place(v), round(chance.uniform(15, 85)), not v <= max_drift) for v in drawn]
        lanes.append({"name": name, "dots": dots, "rows": len(lane)})
    return {"lanes": lanes, "ticks": axis.ticks, "bound": axis.place(max_drift)}


def _depths(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Lines of the layer plot: median accumulated drift and median own error of each depth."""
    if not summary["layers"]:
        return None
    bound = summary["bounds"]["max_drift"]
    depths = [
        (depth["name"], float(depth["total"]["median"]), float(depth["own"]["median"]))
        for depth in summary["layers"]["depths"]
    ]
    axis = LogAxis.of([value for _, total, own in depths for value in (total, own)], bound)
    lines = [
        {
            "name": name,
            "total": axis.place(total),
            "own": axis.place(own),
            "over": not total <= bound,
            "own_over": not own <= bound,
            "title": f"{name}: accumulated {total:.1e}, own {own:.1e}",
        }
        for name, total, own in depths
    ]
    return {"lines": lines, "ticks": axis.ticks, "bound": axis.place(bound)}


def _chosen(rows: Sequence[Record], gallery: int) -> list[Record]:
    """At most `gallery` rows: notable ones first, then others at random; in the order of the input."""
    kinds = {kind: [index for index, row in enumerate(rows) if row["difference"] == kind] for kind in NOTABLE}
    notable = list(chain.from_iterable(kinds.values()))[:gallery]
    others = [index for index, row in enumerate(rows) if row["difference"] == "equal"]
    chosen = random.Random(0).sample(others, min(len(others), gallery - len(notable)))  # noqa: S311
    return [rows[index] for index in sorted([*notable, *chosen])]


def _card(row: Record) -> dict[str, Any]:
    thumbnail = base64.b64encode(row["thumbnail"]).decode() if row["thumbnail"] else None
    reference, answer = marked(*(str(printable(row[side] or "")) for side in ("reference", "answer")))
    return {**row, "thumbnail": thumbnail, "reference_marked": reference, "answer_marked": answer}


def marked(a: str, b: str) -> tuple[Markup, Markup]:
    """Two texts with the words in which they differ marked, each escaped."""
    words = _WORDS.findall(a), _WORDS.findall(b)
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, *bounds in matcher.get_opcodes():
        for side, start, stop in ((0, *bounds[:2]), (1, *bounds[2:])):
            text = "".join(words[side][start:stop])
            core = text.strip()
            if kind == "equal" or not core:
                sides[side].append(escape(text))
            else:
                before, _, after = text.partition(core)
                sides[side].append(Markup("{}<mark>{}</mark>{}").format(before, core, after))
    return Markup("").join(sides[0]), Markup("").join(sides[1])


def _badness(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def figure(value: float | str | None) -> str:
    """An error with two digits; text, and None, as what they stand for."""
    if not isinstance(value, float):
        return value or "none"
    if not math.isfinite(value):
        return str(value)
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"
