"""How well confidence says what is right: reliability, calibration error, risk against coverage.

What enters: confidence, (N,) float64, and whether an answer is right, (N,) bool, of N >= 1 answers in any order. What
leaves: figures for JSON. Nothing here promises anything about other answers: see `threshold`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from calibration.threshold import prefix_ends

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Places = NDArray[np.intp]
#: Most points of the curve, and bins of the histogram.
POINTS, COLUMNS = 400, 25
#: Times that a perfectly calibrated model is simulated, and the share of them that chance may reach.
SIMULATIONS, CHANCE = 200, 0.95


def share(count: int, of: int) -> dict[str, Any]:
    """A share with its exact 95 % interval (Clopper and Pearson 1934)."""
    if not of:
        return {"count": 0, "of": 0, "share": None, "interval": None}
    interval = binomtest(count, of).proportion_ci(method="exact")
    return {"count": count, "of": of, "share": count / of, "interval": [float(interval.low), float(interval.high)]}


def reliability(confidence: Floats, right: Bools, bins: int) -> dict[str, Any]:
    """The reliability diagram, and the expected calibration error of its bins.

    Bins have equally many answers, as far as answers of equal confidence, which stay together, allow. The error is the
    mean over answers of |share of right ones - mean confidence| of their bin. `error_by_chance` is what it would stay
    below in 95 % of such samples if confidence were exactly right: with few answers, an error is to be expected.
    """
    order = np.argsort(confidence, kind="stable")
    ranked, right = confidence[order], right[order]
    ends = prefix_ends(ranked)
    wanted = np.ceil(np.arange(1, bins + 1) * len(ranked) / bins)
    stops = np.unique(ends[np.searchsorted(ends, wanted)])
    starts = np.append(0, stops[:-1])
    rng = np.random.default_rng(0)
    by_chance = [_error(ranked, rng.random(len(ranked)) < ranked, starts) for _ in range(SIMULATIONS)]
    return {
        "bins": [
            {
                "low": float(ranked[start]),
                "high": float(ranked[stop - 1]),
                "confidence": float(ranked[start:stop].mean()),
                **share(int(right[start:stop].sum()), int(stop - start)),
            }
            for start, stop in zip(starts, stops, strict=True)
        ],
        "error": _error(ranked, right, starts),
        "error_by_chance": float(np.quantile(by_chance, CHANCE)),
    }


def _error(ranked: Floats, right: Bools, starts: Places) -> float:
    """Expected calibration error of bins of sorted answers."""
    return float(np.abs(np.add.reduceat(right - ranked, starts)).sum() / len(ranked))


def risk(confidence: Floats, right: Bools) -> dict[str, Any]:
    """Risk (share of wrong answers) against coverage (share of answers that are kept, the most confident first).

    Answers of equal confidence are kept or left together. `area` is the area under the curve (AURC): the mean risk when
    a threshold is each answer's confidence in turn. Confidence that says nothing has, on average, `of_all`.
    """
    order = np.argsort(-confidence, kind="stable")
    ranked, wrong = confidence[order], np.cumsum(~right[order])
    ends = prefix_ends(ranked)
    risks = wrong[ends - 1] / ends
    total = len(ranked)
    shown = np.unique(np.linspace(0, len(ends) - 1, min(POINTS, len(ends))).round().astype(int))
    return {
        "area": float((risks * np.diff(ends, prepend=0)).sum() / total),
        "of_all": float(risks[-1]),
        "curve": [
            {"confidence": float(ranked[ends[at] - 1]), "coverage": ends[at] / total, "risk": float(risks[at])}
            for at in shown
        ],
    }


def histogram(confidence: Floats, right: Bools, low: float) -> list[dict[str, Any]]:
    """Numbers of right and wrong answers by confidence, from `low` to 1."""
    edges = np.linspace(low, 1, COLUMNS + 1)
    # A probability can be above 1 by rounding.
    counts = [np.histogram(np.minimum(confidence[which], 1), edges)[0] for which in (right, ~right)]
    return [
        {"low": float(start), "high": float(stop), "right": int(good), "wrong": int(bad)}
        for start, stop, good, bad in zip(edges[:-1], edges[1:], *counts, strict=True)
    ]
