"""The report of a run as one self-contained HTML file: no network, no script.

What enters: the record of the run, as in `_run.json`, and rows to show. What leaves: the page. Ids, prompts, answers,
paths and messages in it are untrusted text: everything is escaped, and control characters are replaced.
"""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from qvl_batch.report.confidence import probability
from qvl_batch.report.progress import UNITS, span
from qvl_batch.report.run_stats import paired

TEMPLATE = "page.html.jinja"
#: Most points of the throughput line. Beyond `FEW_POINTS` points, each must average at least `ROWS_PER_POINT` rows:
#: rows arrive in tables, and finer points would show that as noise.
POINTS, FEW_POINTS, ROWS_PER_POINT = 80, 12, 24
#: Most steps between the labels of an axis.
TICKS = 6
#: Control characters are shown as Unicode's control pictures, or as U+FFFD if they have none; not line breaks and tabs.
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
#: Seconds between labels of the time axis; beyond these, 1, 2 or 5 times a power of ten days.
TIME_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200)


def render(record: dict[str, Any], sample: Sequence[dict[str, Any]], least_sure: Sequence[dict[str, Any]] = ()) -> str:
    """Render the page.

    Args:
        record: of the run.
        sample: rows with `id`, `prompt`, `thumbnail` and the columns of an answer.
        least_sure: the same of the rows that the model was least sure of, the least sure first.

    Returns:
        HTML.
    """
    filters = {"percent": percent, "span": span, "figure": figure, "probability": probability}
    return template(Path(__file__).parent / TEMPLATE, filters, finalize=printable).render(
        run=record,
        failed=record["finish_reasons"].get("error", 0),
        abstained=record["finish_reasons"].get("abstain", 0),
        chart=Chart.of(record) if record["rows_of_this_run"] else None,
        sure=Histogram.of(record["confidence"]["histogram"]) if "confidence" in record else None,
        cards=[_card(row) for row in sample],
        least_sure=[_card(row) for row in least_sure],
    )


def template(
    path: Path, filters: dict[str, Callable[..., Any]], finalize: Callable[[object], object] | None = None
) -> Template:
    """Load the template of a page. It escapes values, and raises if one is undefined. It can include this folder's.

    Args:
        path: of the template.
        filters: in addition to `count`, which formats a number with separators.
        finalize: applied to each value before it is inserted.
    """
    environment = Environment(
        loader=FileSystemLoader([path.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    environment.filters |= {"count": lambda number: f"{number:,}"} | filters
    return environment.get_template(path.name)


@dataclass(frozen=True, slots=True)
class Chart:
    """Images/s over the seconds of a run. All positions are in % of the chart's box, from its left or its bottom.

    Args:
        steps: right end and height of each step of the line.
        errors: left end, width and height of each bar of failed rows, and the number of rows.
        steady: height of the steady rate.
        started: left position of the first image that entered the vision graph.
        rates: height and label of each tick of the rate.
        times: left position and label of each tick of the time.
    """

    steps: list[tuple[float, float]]
    errors: list[tuple[float, float, float, int]]
    steady: float
    started: float
    rates: list[tuple[float, str]]
    times: list[tuple[float, str]]

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Chart":
        """The chart of a run that answered rows."""
        seconds: float = record["seconds"]
        bins = _bins(record["timeline"], seconds)
        starts = [0.0, *(end for end, _, _ in bins)]
        rates = [rows / (end - start) for start, (end, rows, _) in zip(starts, bins, strict=False)]
        steady: float = record["steady_images_per_second"]
        rate_step = decimal_step(max(*rates, steady))
        top = rate_step * math.ceil(max(*rates, steady) / rate_step)

        def across(at: float) -> float:
            return round(100 * at / seconds, 3)

        def up(rate: float) -> float:
            return round(100 * rate / top, 3)

        step = time_step(seconds)
        return cls(
            steps=[(across(end), up(rate)) for (end, _, _), rate in zip(bins, rates, strict=True)],
            errors=[
                (across(start), across(end - start), up(errors / (end - start)), errors)
                for start, (end, _, errors) in zip(starts, bins, strict=False)
                if errors
            ],
            steady=up(steady),
            started=across(record["workers_seconds"]),
            rates=[(up(rate_step * at), f"{rate_step * at:,.10g}") for at in range(round(top / rate_step) + 1)],
            times=[(across(at), _tick(at, step)) for at in range(0, math.floor(seconds) + 1, step)],
        )

    @property
    def line(self) -> str:
        """An SVG path in a box of 100 by 100."""
        return f"M0 {100 - self.steps[0][1]:g}" + "".join(f"V{100 - height:g}H{end:g}" for end, height in self.steps)

    @property
    def area(self) -> str:
        """The SVG path of the area below the line."""
        return f"{self.line}V100H0Z"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of values from 0 to 1. All positions are in % of the chart's box, from its left or its bottom.

    Args:
        bars: left end, width and height of each bar, its values and their number; none of an empty bin.
        counts: height and label of each tick of the number.
        values: left position and label of each tick of the value.
    """

    bars: list[tuple[float, float, float, str, int]]
    counts: list[tuple[float, str]]
    values: list[tuple[float, str]]

    @classmethod
    def of(cls, bins: Sequence[int]) -> "Histogram":
        """The chart of the counts in bins of equal width."""
        step = max(1, round(decimal_step(max(bins))))
        top, width = step * math.ceil(max(bins) / step), 1 / len(bins)
        return cls(
            bars=[
                (100 * width * at, 100 * width, 100 * count / top, f"{width * at:.4g} to {width * (at + 1):.4g}", count)
                for at, count in enumerate(bins)
                if count
            ],
            counts=[(100 * at / top, f"{at:,}") for at in range(0, top + 1, step)],
            values=[(20 * at, f"{at / 5:g}") for at in range(6)],
        )


def _bins(timeline: dict[str, Any], seconds: float) -> list[tuple[float, int, int]]:
    """End in seconds, rows and errors of each bin to draw: bins of the timeline, merged in pairs until wide enough."""
    width, rows, errors = timeline["seconds_per_bin"], timeline["rows"], timeline["errors"]
    total = sum(rows)
    while (count := round(seconds / width)) > POINTS or (count > FEW_POINTS and total < count * ROWS_PER_POINT):
        width, rows, errors = 2 * width, paired(rows), paired(errors)
    # The last bin ends with the run; it is half to one and a half times as wide as the others.
    last = max(count, 1) - 1
    counts = [[*(values + [0] * last)[:last], sum(values[last:])] for values in (rows, errors)]
    return list(zip([*(width * (at + 1) for at in range(last)), seconds], *counts, strict=True))


def decimal_step(most: float) -> float:
    """Step between labels: 1, 2 or 5 times a power of ten."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most / TICKS))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * TICKS >= most)


def time_step(seconds: float) -> int:
    """Step between labels of a time axis, in whole seconds."""
    day = UNITS["d"]
    days = round(day * max(1.0, decimal_step(seconds / day)))
    return next((step for step in TIME_STEPS if step * TICKS >= seconds), days)


def _tick(at: int, step: int) -> str:
    """Label of a time, in the largest unit that is not above the step."""
    unit = max((name for name, size in UNITS.items() if size <= step), key=UNITS.__getitem__)
    return f"{at / UNITS[unit]:g} {unit}" if at else "0"


def _card(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its thumbnail in base64, and None for how sure the model is if that was not asked for."""
    thumbnail = row["thumbnail"]
    sure = {name: row.get(name) for name in ("confidence", "choice_probabilities")}
    return row | sure | {"thumbnail": base64.b64encode(thumbnail).decode() if thumbnail else None}


def printable(value: object) -> object:
    """The value; in a string, characters that HTML does not allow are replaced."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.translate(CONTROLS).encode(errors="replace").decode()
    return value


def percent(share: float) -> str:
    """A share in whole percent, with a digit more near 0 and 1, so that only 0 reads 0 % and only 1 reads 100 %."""
    few, most = 0.01, 0.99
    if most < share < 1:
        return f"{math.floor(1000 * share) / 10:g} %"
    return f"{100 * share:.1g} %" if 0 < share < few else f"{100 * share:.0f} %"


def figure(value: float) -> str:
    """A number with at least three significant digits."""
    if value >= 100:  # noqa: PLR2004
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 1 or not value else f"{value:.3g}"
