"""How sure the model was of the answers of a run, in bounded memory for any number of answers.

What enters: tables of answers. What leaves: mean, quantiles and a histogram of the column `confidence`, and the rows
with the least of it.
"""

import math
import random
from typing import Any

import numpy as np
import pyarrow as pa

from qvl_batch.columns import places_of
from qvl_batch.report.sample import ROWS, sampled
from qvl_batch.rows import Row
from qvl_batch.schema import CONFIDENCE_FIELDS

COLUMN = CONFIDENCE_FIELDS[0].name
#: Bins of the histogram, of equal width from 0 to 1; the quantiles that are told, and of how many answers at most.
BINS, QUANTILES, KEPT = 20, (0.05, 0.25, 0.5, 0.75, 0.95), 10_000


class ConfidenceStats:
    """Collects the confidence of answers. Quantiles of more than `KEPT` answers are those of a random sample."""

    def __init__(self) -> None:
        self.answers = 0
        self._sum, self._bins = 0.0, [0] * BINS
        self._kept: list[float] = []
        self._random = random.Random(0)  # noqa: S311  (nothing secret)
        self._least: dict[Row, dict[str, Any]] = {}

    @property
    def least_sure(self) -> list[dict[str, Any]]:
        """The `ROWS` rows of the least confidence, the least sure first, as `sampled` gives them."""
        return list(self._least.values())

    def add(self, table: pa.Table) -> None:
        """Add a table of answers; without the column, nothing is added."""
        if COLUMN not in table.column_names:
            return
        values = {
            place: value
            for place, value in zip(places_of(table), table[COLUMN].to_pylist(), strict=True)
            if value is not None
        }
        for value in values.values():
            self._count(value)
        known = [(row[COLUMN], place) for place, row in self._least.items()]
        least = sorted([*known, *((value, place) for place, value in values.items())])[:ROWS]
        rows = self._least | sampled(table, frozenset(place for _, place in least if place in values))
        self._least = {place: rows[place] for _, place in least}

    def _count(self, value: float) -> None:
        self.answers += 1
        self._sum += value
        self._bins[min(int(value * BINS), BINS - 1)] += 1
        if len(self._kept) < KEPT:
            self._kept.append(value)
        elif (at := self._random.randrange(self.answers)) < KEPT:
            self._kept[at] = value

    def record(self) -> dict[str, Any]:
        """The entry in `_run.json`. There must be answers."""
        quantiles = np.quantile(self._kept, QUANTILES).tolist()
        return {
            "mean": _rounded(self._sum / self.answers),
            "quantiles": {f"{share:g}": _rounded(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
            "histogram": self._bins,
        }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def probability(value: float) -> str:
    """A probability in two decimal places, in more near 0 and 1, so that only 1 reads 1."""
    few, most = 0.01, 0.99
    if most < value < 1:
        return f"{math.floor(10_000 * value) / 10_000:g}"
    return f"{value:.1g}" if value < few or value >= 1 else f"{value:.2f}"
