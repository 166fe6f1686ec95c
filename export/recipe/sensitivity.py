"""How much each part's precision matters to the outputs.

What enters: for every dtype, the drift at each depth of a bundle whose products all have this dtype. What leaves: the
error that each part makes itself in each dtype, and what becomes of it: the mean square error of features and logits
that one unit of it leads to.

Squares of independent errors add up. So the mean square drift T at depth k, of which O is the part's own, is
T[k] = g[k] T[k - 1] + O[k]. Own and accumulated drift are both measured, so g[k] follows: what the layers between make
of an error. The product of the g after a part is what becomes of its error at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.comparison.layers import Drift
from export.comparison.traces import Array
from export.recipe.choice import Choice
from qvl_batch.bundle.manifest import Dtype

#: Square of an error that is not finite: no part with it is chosen, and sums stay finite.
LARGEST = 1e12


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Errors of parts, and what becomes of them.

    Args:
        own: error of a part in a dtype, root of the mean square over rows, relative to the hidden state.
        to_features: mean square error of features for each unit of a part's own; 0 for the decoder's parts.
        to_logits: mean square error of the first logits for each unit of a part's own.
    """

    own: Mapping[tuple[str, Dtype], float]
    to_features: Mapping[str, float]
    to_logits: Mapping[str, float]

    @classmethod
    def of(cls, names: Sequence[str], parts: Sequence[str], drifts: Mapping[Dtype, Sequence[Drift]]) -> "Sensitivity":
        """From the drift of rows.

        Args:
            names: of the depths.
            parts: those of the depths that have products.
            drifts: of each row, by the dtype of all parts.
        """
        own = {dtype: _mean_square([drift.own for drift in rows]) for dtype, rows in drifts.items()}
        total = {dtype: _mean_square([drift.total for drift in rows]) for dtype, rows in drifts.items()}
        gains = [1.0]
        for depth in range(1, len(names)):
            before = [total[dtype][depth - 1] for dtype in drifts]
            passed = [max(total[dtype][depth] - own[dtype][depth], 0.0) for dtype in drifts]
            gains.append(float(np.median([a / b if b else 1.0 for a, b in zip(passed, before, strict=True)])))
        merger = names.index("vision.merger")

        def becomes(part: str, end: int) -> float:
            at = names.index(part)
            return float(np.prod(gains[at + 1 : end + 1])) if at <= end else 0.0

        return cls(
            own={(part, dtype): float(own[dtype][names.index(part)]) ** 0.5 for part in parts for dtype in drifts},
            to_features={part: becomes(part, merger) for part in parts},
            to_logits={part: becomes(part, len(names) - 1) for part in parts},
        )

    def features(self, choice: Choice) -> float:
        """Mean square error of features to expect."""
        return sum(self.to_features[part] * self._own(part, dtype) for part, dtype in choice.items())

    def logits(self, choice: Choice) -> float:
        """Mean square error of logits to expect."""
        return sum(self.to_logits[part] * self._own(part, dtype) for part, dtype in choice.items())

    def _own(self, part: str, dtype: Dtype) -> float:
        return 0.0 if dtype == "fp32" else self.own[part, dtype] ** 2


def _mean_square(rows: Sequence[Sequence[float]]) -> Array:
    """Mean square over rows, at each depth; one that is not finite counts as `LARGEST`."""
    squares: Array = np.nan_to_num(np.square(np.array(rows, np.float64)).mean(0), nan=LARGEST, posinf=LARGEST)
    return squares
