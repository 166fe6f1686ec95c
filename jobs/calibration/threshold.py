"""From which confidence on answers are right as often as they must be: a threshold with a promise.

What enters: confidence and correctness of answers that are a random sample. What leaves: the smallest threshold T for
which it is shown that, of all answers with confidence >= T, at least the target share (the precision) is right. The
promise: whatever the model and its confidence are like, a sample gives a T that breaks this with a probability of at
most 1 - certainty. Nothing is assumed but that rows are independent, and those of the sample drawn as all others are.

How (Learn then Test, Angelopoulos et al. 2021, arXiv:2110.01052; fixed sequences: Bauer 1991). Sort by confidence, the
most confident first. The k-th hypothesis says that some cut between the k-th answer and the next one keeps answers of a
precision below the target; its p-value is the exact binomial P(Bin(k, 1 - target) <= wrong ones of the first k). They
are tested for ever larger k, each at the whole 1 - certainty, until one is not rejected. The first k is a quarter of
the answers, or as many as a rejection takes at all (target^k <= 1 - certainty): a larger k stands an early error, a
smaller one finds smaller coverages. So the sequence depends on the number of answers alone, and never on labels.

Why cuts may be taken from the sample itself. Let q(t) be the precision of all answers with confidence > t; it is
continuous in t if no single confidence has a probability of its own. The axis falls into stretches where q is below the
target and stretches where it is not. At each border q is the target, so it is the precision within each whole stretch
too. Given how many answers of the sample are in each stretch, it is fixed which hypotheses are true: those of cuts in a
bad stretch. Of the first k answers, those in whole stretches are then wrong with a probability of 1 - target, and those
in a last, begun stretch with a larger one, since q sinks below the target there. So their number of wrong ones is at
least that of Bin(k, 1 - target), in distribution, and the p-value valid. A broken promise takes the rejection of the
first true hypothesis of the sequence, which has a probability of at most 1 - certainty.

Answers of equal confidence cannot be separated, so a prefix ends only between groups of them. The argument then holds
but for one odd case: the first tested prefix ends with a group that is better than the target, while precision at that
confidence is below it because all above is worse. The tests simulate this too.
"""

import math
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

#: The first tested prefix has at least one of so many answers.
START = 4
#: Most digits after the point that a float64 below 1 needs.
DIGITS = 20
#: Relative error of p-values.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Threshold:
    """The result.

    Args:
        confidence: T, None if no threshold holds.
        rows: answers of the sample with at least this confidence.
        right: how many of these are right.
        reason: why no threshold holds, or None.
    """

    confidence: float | None
    rows: int = 0
    right: int = 0
    reason: str | None = None


def least_rows(target: float, certainty: float) -> int:
    """Fewest answers, all right, that show a precision of `target`."""
    rows = max(1, math.floor(math.log1p(-certainty) / math.log(target)))
    while not _rejects(target**rows, certainty):
        rows += 1
    return rows


def threshold_of(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], target: float, certainty: float
) -> Threshold:
    """The smallest threshold that is shown to hold.

    Args:
        confidence: of answers, (N,), in any order.
        right: whether each is right, (N,).
        target: precision that is needed, between 0 and 1.
        certainty: of the promise, between 0 and 1.
    """
    total, least = len(confidence), least_rows(target, certainty)
    if total < least:
        return Threshold(None, reason=f"{least:,} labelled answers are needed at least, all right; there are {total:,}")
    order = np.argsort(-confidence, kind="stable")
    ends, wrong = prefix_ends(confidence[order]), np.cumsum(~right[order])
    tested = ends[ends >= max(least, total // START)]
    p = binom.cdf(wrong[tested - 1], tested, 1 - target)
    rejected = _rejects(p, certainty)
    passed = len(tested) if rejected.all() else int(rejected.argmin())
    if not passed:
        return Threshold(None, reason=_too_many_wrong(int(tested[0]), int(wrong[tested[0] - 1]), target, certainty))
    rows = int(tested[passed - 1])
    ranked = confidence[order]
    below = ranked[rows] if rows < total else -math.inf
    return Threshold(shortest_between(below, ranked[rows - 1]), rows, rows - int(wrong[rows - 1]))


def prefix_ends(ranked: NDArray[np.float64]) -> NDArray[np.intp]:
    """Sizes of the prefixes of sorted confidences (N,) that end between different ones, the last N."""
    return np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1) + 1


def shortest_between(low: float, high: float) -> float:
    """The number with the fewest decimals that is above `low` and at most `high`; 0 if that is one."""
    if low < 0 <= high:
        return 0.0
    for digits in range(DIGITS):
        # Exact, and no float between it and `high` is above `high`.
        value = float(Decimal(float(high)).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR))
        if low < value:
            return value
    return float(high)


def _too_many_wrong(rows: int, wrong: int, target: float, certainty: float) -> str:
    allowed = int(binom.ppf(1 - certainty, rows, 1 - target))
    while not _rejects(binom.cdf(allowed, rows, 1 - target), certainty):
        allowed -= 1
    return f"the {rows:,} most confident labelled answers have {wrong:,} wrong, and may have {allowed:,} at most"


def _rejects(p: ArrayLike, certainty: float) -> NDArray[np.bool_]:
    """Whether each p-value rejects its hypothesis."""
    return np.less_equal(p, (1 - certainty) * (1 + ROUNDING))
