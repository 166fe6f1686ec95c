"""The forecast as one self-contained HTML page, in the style of the report of a run: no network, no script.

What enters: `_plan.json`, and the rows of the sample. What leaves: the page. Texts in it are untrusted, and escaped.
"""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_batch.forecast import text
from qvl_batch.forecast.differences import Differences
from qvl_batch.forecast.outlook import Outlook
from qvl_batch.forecast.rows import SampledRow
from qvl_batch.report.page import decimal_step, figure, percent, printable, template
from qvl_batch.report.progress import span
from qvl_batch.report.sample import short

TEMPLATE = "page.html.jinja"
#: Most rows with different answers that are shown, and most rows of the sample.
DIFFERING, SHOWN = 40, 24


def render(record: dict[str, Any], outlooks: Sequence[Outlook]) -> str:
    """Render the page.

    Args:
        record: contents of `_plan.json`.
        outlooks: of its trials.
    """
    filters: dict[str, Callable[..., Any]] = {
        "percent": percent,
        "span": span,
        "figure": figure,
        "hours": text.hours,
        "size": text.size,
        "number": text.number,
        "share": text.share,
        "money": text.money,
    }
    shows = {name: filters[name] for name in ("hours", "size", "number", "share", "money")}
    filters["ranged"] = lambda figures, show: text.ranged(figures, shows[show])
    filters["ends"] = lambda figures, show: text.ends(figures, shows[show]) or "too few rows for an interval"
    first, *others = outlooks
    step = max(1, len(first.rows) // SHOWN)
    return template(Path(__file__).parent / TEMPLATE, filters, finalize=printable).render(
        plan=record,
        first=record["trials"][0],
        others=record["trials"][1:],
        chart=Whiskers.of(record["trials"][0]["nodes"]),
        cards=[_card(row) for row in sorted(first.rows, key=lambda row: row.place)[::step][:SHOWN]],
        differing=_differing(first, others),
        most=DIFFERING,
    )


@dataclass(frozen=True, slots=True)
class Whiskers:
    """Hours of the job by number of nodes. Positions are in % of the box, from its left.

    Args:
        bars: nodes, value, and left end and width of the interval; the latter two None if there is none.
        ticks: position and label.
    """

    bars: list[tuple[int, float, float | None, float | None]]
    ticks: list[tuple[float, str]]

    @classmethod
    def of(cls, nodes: Sequence[dict[str, Any]]) -> "Whiskers":
        """The chart of the entries of `_plan.json`."""
        most = max(each["hours"]["high"] or each["hours"]["value"] for each in nodes)
        units = (("h", 1.0), ("min", 1 / 60), ("s", 1 / 3600))
        name, unit = next((each for each in units if most >= each[1]), units[-1])
        step = decimal_step(most / unit) * unit
        top = step * max(1, math.ceil(most / step))

        def across(value: float) -> float:
            return round(100 * value / float(top), 3)

        bars: list[tuple[int, float, float | None, float | None]] = []
        for each in nodes:
            value, low, high = (each["hours"][end] for end in ("value", "low", "high"))
            interval = (None, None) if low is None or high is None else (across(low), across(high - low))
            bars.append((each["nodes"], across(value), *interval))
        ticks = [(across(step * at), f"{step * at / unit:,.10g} {name}") for at in range(round(top / step) + 1)]
        return cls(bars, ticks)


def _card(row: SampledRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "prompt": row.prompt,
        "answer": short(row.answer),
        "finish_reason": row.finish_reason,
        "error": row.error,
        "prompt_tokens": row.prompt_tokens,
        "answer_tokens": row.answer_tokens,
        "thumbnail": base64.b64encode(row.thumbnail).decode() if row.thumbnail else None,
    }


def _differing(first: Outlook, others: Sequence[Outlook]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Rows whose answers are not the same in all trials: those of the first, and of each of the others."""
    differ = [Differences.of(first.rows, other.rows, first.design).differing for other in others]
    rows = [at for at in range(len(first.rows)) if any(each[at] for each in differ)]
    rows.sort(key=lambda at: first.rows[at].place)
    return [(_card(first.rows[at]), [_card(other.rows[at]) for other in others]) for at in rows[:DIFFERING]]
