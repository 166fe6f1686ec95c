"""Computes a comparison's figures and verdict from its rows. Nothing here reads files or runs a model."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, fisher_exact

Record = dict[str, Any]
Kind = Literal["equal", "tie", "real", "failed", "not compared"]
#: Stages of a row with their columns, in the order of the work.
STAGES = {"vision": "vision_error", "prefill": "prefill_error", "decode": "decode_error"}
#: A group is systematic if chance explains its share of differences with less than this probability, divided by the
#: number of groups that are tested (Bonferroni).
SIGNIFICANCE = 0.01
#: A property with more values than this, such as the prompt, does not form groups.
MOST_GROUPS = 50


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds within which a comparison passes; see `CompareConfig` for each."""

    min_agreement: float
    max_drift: float
    tie_margin: float


def difference(row: Record, tie_margin: float) -> Kind:
    """Kind of a row: equal, a tie within noise, a real difference, failed, or not compared.

    A tie needs both sides' margins: if one side is sure of its token, the other is wrong or drifted.
    """
    if row["error_side"] == "input":
        return "not compared"
    if row["error_side"]:
        return "failed"
    if row["equal"]:
        return "equal"
    margins = (row["reference_margin"], row["answer_margin"])
    return "tie" if all(margin is not None and margin <= tie_margin for margin in margins) else "real"


def summarize(rows: Sequence[Record], depths: Sequence[str], bounds: Bounds) -> dict[str, Any]:
    """Figures of a whole comparison, for JSON: floats that are not finite become text.

    Args:
        rows: of `comparison.parquet`, each with its `difference`.
        depths: names of the depths of `layer_error`.
        bounds: bounds of the verdict.
    """
    compared = [row for row in rows if row["difference"] != "not compared"]
    measured = [row for row in compared if row["difference"] != "failed"]
    kinds = Counter(row["difference"] for row in rows)
    summary: dict[str, Any] = {
        "rows": len(rows),
        "compared": len(compared),
        "not_compared": _errors(row for row in rows if row["difference"] == "not compared"),
        "agreement": {
            **share(kinds["equal"], len(compared)),
            "ties": kinds["tie"],
            "real_differences": kinds["real"],
            "failed": kinds["failed"],
            "failures": _errors(row for row in rows if row["difference"] == "failed"),
        },
        "inputs_differ": sum(not row["input_equal"] for row in measured),
        "token_agreement": _weighted(measured),
        "edit_similarity": _mean([row["edit_similarity"] for row in measured]),
        "expected": _expected([row for row in compared if row["expected"] is not None]),
        "drift": {
            **{name: _spread([row[column] for row in measured]) for name, column in STAGES.items()},
            "first_token_kl": _spread([row["first_token_kl"] for row in measured]),
            "vision_cosine": _spread([row["vision_cosine"] for row in measured]),
        },
        "layers": _layers(measured, depths, bounds.max_drift),
        "groups": _groups(compared),
    }
    summary["verdict"] = _verdict(summary, bounds)
    return summary


def _verdict(summary: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    """Whether the comparison passes, and a sentence for each reason why it does not."""
    reasons: list[str] = []
    agreement = summary["agreement"]
    if agreement["share"] < bounds.min_agreement:
        under = (bounds.min_agreement - agreement["share"]) * 100
        reasons.append(
            f"{agreement['count']:,} of {summary['compared']:,} answers are equal ({agreement['share']:.2%}), "
            f"{under:.2f} points under --min-agreement {bounds.min_agreement:g}{_explained(agreement)}"
        )
    if summary["inputs_differ"]:
        reasons.append(f"{summary['inputs_differ']:,} rows have different token ids: template or tokenizer differ")
    for stage in STAGES:
        worst = summary["drift"][stage]["max"]
        # Values that are not finite are text here.
        if worst is not None and not (isinstance(worst, float) and worst <= bounds.max_drift):
            shown = worst if isinstance(worst, str) else f"{worst:.1e}"
            reasons.append(f"{stage} drifts by {shown}, over --max-drift {bounds.max_drift:g}")
    return {"passed": not reasons, "reasons": reasons}


def _explained(agreement: dict[str, Any]) -> str:
    parts = [
        f"{agreement[name]:,} {noun}"
        for name, noun in (("ties", "tied within noise"), ("real_differences", "really differ"), ("failed", "failed"))
        if agreement[name]
    ]
    return f"; {', '.join(parts)}" if parts else ""


def _expected(rows: list[Record]) -> dict[str, Any] | None:
    """How often each side gave the expected answer, with McNemar's exact test of the difference."""
    if not rows:
        return None
    right = [(row["reference"] == row["expected"], row["answer"] == row["expected"]) for row in rows]
    only = [sum(reference and not bundle for reference, bundle in right)]
    only.append(sum(bundle and not reference for reference, bundle in right))
    return {
        "reference": share(sum(reference for reference, _ in right), len(right)),
        "bundle": share(sum(bundle for _, bundle in right), len(right)),
        "only_reference_right": only[0],
        "only_bundle_right": only[1],
        # McNemar 1947, exact. Null hypothesis: where only one side is right, each is equally likely to be.
        "mcnemar_p": float(binomtest(only[0], sum(only)).pvalue) if sum(only) else None,
    }


def _layers(rows: list[Record], depths: Sequence[str], max_drift: float) -> dict[str, Any] | None:
    """Error at each depth; where drift begins, and the depth with the largest own error."""
    rows = [row for row in rows if row["layer_error"] is not None]
    if not rows:
        return None
    total = np.array([row["layer_error"] for row in rows], np.float64)
    own = np.array([row["layer_own_error"] for row in rows], np.float64)
    medians, own_medians = _median(total), _median(own)
    over, worst = medians > max_drift, int(own_medians.argmax())
    return {
        "depths": [
            {"name": name, "total": _spread(total[:, k].tolist()), "own": _spread(own[:, k].tolist())}
            for k, name in enumerate(depths)
        ],
        "begins_at": depths[int(np.argmax(over))] if over.any() else None,
        "largest_own_error": depths[worst] if own_medians[worst] > max_drift else None,
    }


def _groups(rows: list[Record]) -> dict[str, list[dict[str, Any]]]:
    """Share of differences by prompt, image size, fit and answer length, worst first."""
    keys: dict[str, Callable[[Record], str | None]] = {
        "prompt": lambda row: row["prompt"],
        "image_size": _size_group,
        "fit": lambda row: row["fit"],
        "answer_length": _length_group,
    }
    groups = {name: _grouped(rows, key) for name, key in keys.items()}
    tested = sum(map(len, groups.values()))
    for group in (group for kind in groups.values() for group in kind):
        group["systematic"] = bool(group["p"] < SIGNIFICANCE / tested)
    return groups


def _grouped(rows: list[Record], key: Callable[[Record], str | None]) -> list[dict[str, Any]]:
    asked = Counter(key(row) for row in rows)
    different = Counter(key(row) for row in rows if row["difference"] != "equal")
    if len(asked) > MOST_GROUPS:
        return []
    groups = []
    for group, count in asked.items():
        inside, outside = different[group], different.total() - different[group]
        table = np.array([[inside, count - inside], [outside, len(rows) - count - outside]])
        p = float(fisher_exact(table, alternative="greater").pvalue)
        groups.append({"group": group, "rows": count, "different": inside, "share": inside / count, "p": p})
    return sorted(groups, key=lambda group: (-group["share"], -group["rows"]))


def _size_group(row: Record) -> str | None:
    """Shape of the image, and its longer side as a range between powers of two; or the number of images."""
    if not row["image_width"]:
        return None
    if len(row["image_width"]) > 1:
        return f"{len(row['image_width'])} images"
    (width,), (height,) = row["image_width"], row["image_height"]
    shape = "square" if width == height else "wide" if width > height else "tall"
    return f"{shape}, {_up_to(max(width, height))} px"


def _length_group(row: Record) -> str | None:
    tokens = row["reference_tokens"]
    return None if tokens is None else f"{_up_to(tokens)} tokens"


def _up_to(number: int) -> str:
    power = 1 << max(0, number - 1).bit_length()
    return f"{power // 2 + 1} to {power}" if power > 2 else f"up to {power}"  # noqa: PLR2004


def _errors(rows: Iterable[Record]) -> dict[str, int]:
    return dict(Counter(f"{row['error_side']} {row['error_stage']}: {row['error_type']}" for row in rows).most_common())


def share(count: int, of: int) -> dict[str, Any]:
    """A share with its 95 % interval (Wilson 1927)."""
    if not of:
        return {"count": 0, "of": 0, "share": 0.0, "interval": None}
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return {"count": count, "of": of, "share": count / of, "interval": [float(interval.low), float(interval.high)]}


def _weighted(rows: list[Record]) -> float | None:
    """Share of tokens before the first difference; a row has as many tokens as its longer answer."""
    tokens = [max(row["reference_tokens"], row["answer_tokens"]) for row in rows]
    agreed = sum(row["token_agreement"] * count for row, count in zip(rows, tokens, strict=True))
    return agreed / sum(tokens) if tokens else None


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median of each column; NaN counts as larger than any number."""
    return np.asarray(np.median(np.where(np.isnan(values), np.inf, values), axis=0))


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Smallest, median and largest."""
    known = sorted((v for v in values if v is not None), key=lambda v: math.inf if math.isnan(v) else v)
    if not known:
        return {"rows": 0, "min": None, "median": None, "max": None}
    picked = {"min": known[0], "median": float(_median(np.array(known, np.float64))), "max": known[-1]}
    return {"rows": len(known), **{name: v if math.isfinite(v) else str(v) for name, v in picked.items()}}
