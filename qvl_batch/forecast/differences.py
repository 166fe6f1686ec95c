"""How the answers of other bundles or settings to a sample differ from the first ones.

What enters: answers to the same rows. What leaves: shares, and rows side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qvl_batch.distances import edit_similarity
from qvl_batch.forecast.intervals import Design, Estimate
from qvl_batch.forecast.rows import SampledRow


@dataclass(frozen=True, slots=True)
class Differences:
    """Answers against the first ones.

    Args:
        equal: share of all rows whose answers are equal; a row that fails in both is.
        similarity: mean of the rows' edit similarity, 1 for equal answers and 0 where one of two failed.
        differing: for each row of the sample, whether its answers differ.
    """

    equal: Estimate
    similarity: Estimate
    differing: Sequence[bool]

    @classmethod
    def of(cls, first: Sequence[SampledRow], other: Sequence[SampledRow], design: Design) -> "Differences":
        """Compare answers to the same rows, in the order of the design."""
        pairs = [(row.answer, one.answer) for row, one in zip(first, other, strict=True)]
        similar = [_similarity(*pair) for pair in pairs]
        differing = [one != another for one, another in pairs]
        return cls(design.share([not each for each in differing]), design.mean(similar), differing)


def _similarity(one: str | None, other: str | None) -> float:
    if one is None or other is None:
        return float(one == other)
    return edit_similarity(one, other)
