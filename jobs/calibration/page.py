"""The calibration as one self-contained HTML file: no network, no script. All text in it is escaped.

What enters: the record of the calibration. What leaves: HTML.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_batch.report.page import decimal_step, printable, template

TEMPLATE = "page.html.jinja"
Record = dict[str, Any]
#: Least coverage whose risk must be in the picture: that of the first few answers is 0 or 1, 1/2, ...
SHOWN_COVERAGE = 0.1
#: Part of a step that a label may be beyond the end.
ROUNDING = 1e-6
#: Share of a bar's width that is left free.
GAP = 0.2


def render(record: Record) -> str:
    """The page of a record, as `calibration.json` has it."""
    filters = {"percent": lambda share: f"{share:.1%}"}
    return template(Path(__file__).parent / TEMPLATE, filters, finalize=printable).render(
        record=record,
        reliability=_reliability(record),
        risk=_risk(record),
        histogram=_histogram(record),
        has_prompts=any(row["prompt"] is not None for rows in record["next"].values() for row in rows),
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis from `low` to `high`, over a box from 0 to 100 %."""

    low: float
    high: float

    @classmethod
    def up_to(cls, most: float) -> "Axis":
        """From 0 to the next label above `most`."""
        step = decimal_step(most)
        return cls(0.0, step * math.ceil(most / step) or 1.0)

    def place(self, value: float) -> float:
        """Position of a value in %; beyond the ends, that of the end."""
        at = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, at)), 3)

    @property
    def values(self) -> list[float]:
        """Values of the labels, the end included."""
        step = decimal_step(self.high - self.low)
        count = math.floor((self.high - self.low) / step + ROUNDING)
        return [self.high - step * at for at in reversed(range(count + 1))]

    def ticks(self, form: str = ".10g") -> list[tuple[float, str]]:
        """Place and label of each."""
        return [(self.place(value), format(round(value, 10), form)) for value in self.values]

    @property
    def shares(self) -> list[tuple[float, str]]:
        """The same in percent."""
        return [(self.place(value), f"{round(100 * value, 8):g} %") for value in self.values]


def _reliability(record: Record) -> dict[str, Any]:
    """Points and intervals of the bins; both axes are the same."""
    bins = record["reliability"]["bins"]
    lowest = min(min(each["confidence"], each["interval"][0]) for each in bins)
    axis = Axis(math.floor(10 * min(lowest, 0.9)) / 10, 1.0)
    points = [
        {
            "x": axis.place(each["confidence"]),
            "y": 100 - axis.place(each["share"]),
            "top": 100 - axis.place(each["interval"][1]),
            "bottom": 100 - axis.place(each["interval"][0]),
            "off": not each["interval"][0] <= each["confidence"] <= each["interval"][1],
            "title": f"confidence {each['low']:.4g} to {each['high']:.4g}, {each['confidence']:.4g} on average: "
            f"{each['count']:,} of {each['of']:,} right ({each['share']:.1%})",
        }
        for each in bins
    ]
    return {"points": points, "ticks": axis.ticks(), "shares": axis.shares, "off": sum(each["off"] for each in points)}


def _risk(record: Record) -> dict[str, Any]:
    """The curve, the risk that may be, and where the threshold is on it."""
    curve, allowed, threshold = record["risk"]["curve"], 1 - record["target_precision"], record["threshold"]
    shown = [each["risk"] for each in curve if each["coverage"] >= SHOWN_COVERAGE]
    across, up = Axis(0.0, 1.0), Axis.up_to(max(*shown, 2 * allowed))
    path = [f"{across.place(each['coverage'])} {round(100 - up.place(each['risk']), 3)}" for each in curve]
    coverage = threshold["rows"] / record["accuracy"]["of"]
    return {
        "path": "M" + "L".join(path),
        "allowed": up.place(allowed),
        "kept": None if threshold["confidence"] is None else across.place(coverage),
        "along": across.shares,
        "up": up.shares,
    }


def _histogram(record: Record) -> dict[str, Any]:
    """Bars of right and wrong answers, and where the threshold is."""
    bars, threshold = record["histogram"], record["threshold"]["confidence"]
    across, up = Axis(bars[0]["low"], 1.0), Axis.up_to(max(each["right"] + each["wrong"] for each in bars))
    return {
        "bars": [
            {
                "left": across.place(each["low"]) + GAP * 50 / len(bars),
                "width": (1 - GAP) * 100 / len(bars),
                "right": up.place(each["right"]),
                "wrong": up.place(each["wrong"]),
                "title": f"{each['low']:.4g} to {each['high']:.4g}: {each['right']:,} right, {each['wrong']:,} wrong",
            }
            for each in bars
        ],
        "kept": None if threshold is None or threshold < across.low else across.place(threshold),
        "along": across.ticks(),
        "up": up.ticks(",.10g"),
    }
