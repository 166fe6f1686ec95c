"""Means, totals, shares and rates of a population from a sample, with their 95 % intervals.

What enters: values of sampled rows, and how they were drawn. What leaves: estimates. This module knows nothing of rows.

Rows are drawn in two phases: `candidates` of the population, then from each of several strata of these candidates a
few at random. The mean is that of the strata, weighted by their candidates, which is without bias. Its variance has a
part of each phase (double sampling for stratification; W. G. Cochran, Sampling Techniques, 3rd edition, 1977, sections
12.2 and 5A.9):

    v = s² (1/m - 1/N) + sum of w² s² (1/n - 1/m) over strata

with N rows, m candidates, and n rows of a stratum of m candidates and weight w. Both parts are 0 when all rows are
drawn. The candidates are drawn one from each of equal intervals of the rows, which the first part does not count in:
where files differ, the interval is a little too wide. Intervals of means use Student's distribution. Those of shares
are Clopper's and Pearson's for a finite population (hypergeometric; Cochran, section 3.6), as if rows were drawn in one
phase: they hold the truth at least as often as they say, also where no row of the sample has a property.

A steady rate is a ratio of the sums of consecutive batches, whose variance is between batches (batch means; A. M. Law,
Simulation Modeling and Analysis, 5th edition, 2015, section 9.5.3; ratio: Cochran, section 6.3).
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
#: Fewest degrees of freedom that an interval is told with: below, Student's quantile is several times the normal one.
LEAST_FREEDOM = 3
#: Standard normal quantile of a two-sided interval.
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval, None if the sample is too small to tell."""

    value: float
    low: float | None = None
    high: float | None = None

    def scaled(self, factor: float, plus: float = 0.0) -> "Estimate":
        """The estimate of `factor` times the quantity, which is not negative, and something constant."""
        low, high = (None if end is None else factor * end + plus for end in (self.low, self.high))
        return Estimate(factor * self.value + plus, low, high)

    def record(self, digits: int = 6) -> dict[str, float | None]:
        """The entry in `_plan.json`, in significant digits."""
        rounded = (None if each is None else float(f"{each:.{digits}g}") for each in (self.value, self.low, self.high))
        return dict(zip(("value", "low", "high"), rounded, strict=True))


@dataclass(frozen=True)
class Design:
    """How a sample was drawn.

    Args:
        population: rows that it stands for.
        candidates: of the first phase.
        strata: for each stratum of the candidates, how many they are.
        stratum: for each row of the sample, the number of its stratum; every stratum has a row.
    """

    population: int
    candidates: int
    strata: Sequence[int]
    stratum: Sequence[int]

    @classmethod
    def of_all(cls, rows: int) -> "Design":
        """The design of a sample that is the whole population."""
        return cls(rows, rows, (rows,), (0,) * rows)

    @property
    def rows(self) -> int:
        """Rows of the sample."""
        return len(self.stratum)

    @property
    def is_all(self) -> bool:
        """Whether the sample is the whole population."""
        return self.rows == self.population

    @property
    def freedom(self) -> int:
        """Degrees of freedom of a variance within strata."""
        return self.rows - len(self.strata)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """Share of the population that each row of the sample stands for."""
        stratum, strata = np.asarray(self.stratum), np.asarray(self.strata, np.float64)
        return np.asarray(strata[stratum] / self.candidates / np.bincount(stratum)[stratum], np.float64)

    def variance(self, values: NDArray[np.float64]) -> float:
        """Variance of the weighted mean of values."""
        if self.is_all:
            return 0.0
        stratum, weights = np.asarray(self.stratum), self.weights
        count = np.bincount(stratum).astype(np.float64)
        means = np.bincount(stratum, values) / count
        squares = np.bincount(stratum, (values - means[stratum]) ** 2)
        with np.errstate(invalid="ignore"):
            within = np.where(count > 1, squares / (count - 1), 0.0)
        size = np.asarray(self.strata, np.float64)
        second = float(((size / self.candidates) ** 2 * within * (1 / count - 1 / size)).sum())
        mean = float(weights @ values)
        spread = float(weights @ (values - mean) ** 2) * self.rows / (self.rows - 1)
        return spread * (1 / self.candidates - 1 / self.population) + second

    def mean(self, values: Sequence[float]) -> Estimate:
        """Mean over the population of values that are not negative."""
        array = np.asarray(values, np.float64)
        mean = float(self.weights @ array)
        if self.is_all:
            return Estimate(mean, mean, mean)
        if self.freedom < LEAST_FREEDOM:
            return Estimate(mean)
        reach = student(self.freedom) * math.sqrt(self.variance(array))
        # What the sample has is there, and no value of the others is below 0.
        return Estimate(mean, max(mean - reach, float(array.sum()) / self.population), mean + reach)

    def total(self, values: Sequence[float]) -> Estimate:
        """Sum over the population of values that are not negative."""
        return self.mean(values).scaled(self.population)

    def share(self, flags: Sequence[bool]) -> Estimate:
        """Share of the population's rows that have a property."""
        share, found = min(float(self.weights @ np.asarray(flags, np.float64)), 1.0), sum(flags)
        least, most = self._least(found), self.population - self._least(self.rows - found)
        return Estimate(share, least / self.population, most / self.population)

    def _least(self, found: int) -> int:
        """The least number of rows with a property of which `found` or more are in the sample by a fair chance."""
        return (
            bisect_left(
                range(found, self.population - self.rows + found),
                (1 - LEVEL) / 2,
                key=lambda having: self._at_least(found, having),
            )
            + found
        )

    def _at_least(self, found: int, having: int) -> float:
        """Probability that at least `found` of `having` rows of the population are in the sample."""
        rows, others = self.rows, self.population - having
        counts = range(max(0, rows - others), found)
        below = (_log_ways(having, count) + _log_ways(others, rows - count) for count in counts)
        ways = _log_ways(self.population, rows)
        return 1.0 - math.fsum(math.exp(each - ways) for each in below)


def _log_ways(rows: int, chosen: int) -> float:
    """Logarithm of the number of ways to choose so many of the rows."""
    return math.lgamma(rows + 1) - math.lgamma(chosen + 1) - math.lgamma(rows - chosen + 1)


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Ratio of the sums over batches, and its relative standard error.

    Args:
        above: for each batch, of at least two.
        below: the same; not 0 in all.
    """
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    value = float(top.sum() / bottom.sum())
    residuals = top - value * bottom
    error = math.sqrt(float((residuals**2).sum()) / (len(top) * (len(top) - 1))) / float(bottom.mean())
    return value, error / value


def student(freedom: float) -> float:
    """Quantile of Student's distribution for a two-sided interval, from `LEAST_FREEDOM` on to three digits.

    By the expansion of M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z, v = Z, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92_160 * v**4)
    )
