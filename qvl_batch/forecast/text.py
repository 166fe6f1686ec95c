"""The forecast as text: figures with their intervals, and the few lines that are printed.

What enters: `_plan.json`, or estimates in it. What leaves: text.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qvl_batch.report.progress import span
from qvl_batch.report.summary import HOUR

#: Of an estimate in `_plan.json`.
Figures = Mapping[str, float | None]
_PREFIXES = ("", "k", "M", "G", "T", "P")
_THOUSAND = 1000


def ranged(figures: Figures, show: Callable[[float], str]) -> str:
    """A value with its interval: `2.1 h (1.9 h to 2.4 h)`; an exact one alone."""
    value, interval = figures["value"], ends(figures, show)
    assert value is not None
    if interval is None:
        return f"about {show(value)}"
    return f"{show(value)} ({interval})" if " to " in interval else show(value)


def ends(figures: Figures, show: Callable[[float], str]) -> str | None:
    """The interval of a value: `1.9 h to 2.4 h`, or that it has no width; None if there is none."""
    low, high = figures["low"], figures["high"]
    if low is None or high is None:
        return None
    return "no spread" if show(low) == show(high) else f"{show(low)} to {show(high)}"


def hours(value: float) -> str:
    """Hours in the two largest units."""
    return span(value * HOUR).replace("\u00a0", " ")


def size(value: float) -> str:
    """Bytes with a decimal prefix."""
    power = 0
    while value >= _THOUSAND and power < len(_PREFIXES) - 1:
        value, power = value / _THOUSAND, power + 1
    return f"{value:.3g} {_PREFIXES[power]}B"


def number(value: float) -> str:
    """A count, or a mean."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"  # noqa: PLR2004


def share(value: float) -> str:
    """A share in percent, with two digits at least."""
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.3g} %"  # noqa: PLR2004


def money(value: float) -> str:
    """A cost."""
    return f"{value:,.2f}"


def summary(record: Mapping[str, Any]) -> str:
    """The forecast in some ten lines: that of the first trial, and a line for each of the others."""
    first, *others = record["trials"]
    sample = record["sample"]
    answered = f" ({record['rows_answered']:,} are answered)" if record["rows_answered"] else ""
    drawn = "all of them" if sample["is_all"] else f"a random {sample['rows']:,} of them"
    lines = [
        f"rows      {record['rows_left']:,} to answer{answered}; {drawn} were, for these figures",
        f"time      {_time(first)}",
        *([f"          {first['no_interval']}"] if first["no_interval"] else []),
        f"nodes     {', '.join(_nodes(each) for each in first['nodes'][1:])}",
        *([f"cost      {ranged(first['cost'], money)}"] if first["cost"] else []),
        *_ends(record),
        f"tokens    {', '.join(_tokens(name, each) for name, each in first['tokens'].items())}",
        f"output    {ranged(first['output_bytes'], size)}",
        f"memory    {_memory(first)}",
        "busy      " + ", ".join(f"{name} {stage['busy']:.0%}" for name, stage in first["stages"].items()),
        *(f"with      {each['name']}: {_time(each)}, {_compared(each['compared'])}" for each in others),
        *(["kept      the answers to the sample are in the output"] if record["kept"] else []),
        f"plan      {record['output'].rstrip('/')}/_plan.html",
    ]
    return "\n".join(lines)


def _ends(record: Mapping[str, Any]) -> list[str]:
    """Lines about rows that have no whole answer."""
    first, limit = record["trials"][0], record["max_error_rate"]
    words = {"error": "errors", "length": "cut", "abstain": "abstain"}
    reasons = first["finish_reasons"]
    lines = [
        f"{words[reason]:10}{ranged(reasons[reason]['share'], share)} of rows" for reason in words if reason in reasons
    ]
    kinds = [f"          {ranged(each['share'], share)} {kind}" for kind, each in first["errors"].items()]
    if limit is not None and reasons["error"]["share"]["value"] > limit:
        kinds.append(f"          the job would stop: more than --max-error-rate {limit:g}")
    return [lines[0], *kinds, *lines[1:]]


def _time(trial: Mapping[str, Any]) -> str:
    return f"{ranged(trial['hours'], hours)} at {ranged(trial['rows_per_second'], number)} rows/s"


def _nodes(entry: Mapping[str, Any]) -> str:
    return f"{hours(entry['hours']['value'])} on {entry['nodes']}"


def _tokens(name: str, entry: Mapping[str, Any]) -> str:
    return f"{ranged(entry['total'], number)} {name.removesuffix('_tokens')}"


def _memory(trial: Mapping[str, Any]) -> str:
    roles = {name: held for name, held in trial["memory_bytes"].items() if name != "all"}
    if not roles:
        return "not known here"
    together = trial["memory_bytes"].get("all")
    parts = ", ".join(f"{name} {size(held)}" for name, held in roles.items())
    return f"{parts} at most" if together is None else f"{size(together)} at most: {parts}"


def _compared(entry: Mapping[str, Any]) -> str:
    return f"{ranged(entry['equal'], share)} of answers equal, edit similarity {entry['edit_similarity']['value']:.3g}"
