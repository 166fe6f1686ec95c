"""Distances between computed and reference values, for the parity gate and for comparisons."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def relative_error(found: Array, expected: Array) -> float:
    """Largest absolute difference, divided by the largest magnitude of `expected`; NaN if any value is NaN."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def divergence(reference: Array, candidate: Array) -> Array:
    """Kullback-Leibler divergence (...) in nats, KL(reference || candidate), of two arrays of logits (..., V)."""
    with np.errstate(invalid="ignore"):  # NaN gives NaN
        p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in map(_float64, (reference, candidate)))
        return np.asarray(np.maximum(0.0, (np.exp(p) * (p - q)).sum(-1)))


def cosine(a: Array, b: Array) -> Array:
    """Cosine similarity (...) of the vectors in two arrays (..., D)."""
    a, b = _float64(a), _float64(b)
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def edit_similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance / characters of the longer text: 1 for equal texts."""
    if one == other:
        return 1.0
    b = np.array([ord(character) for character in other], np.int64)
    columns = np.arange(len(b) + 1)
    row = columns
    for at, character in enumerate(one, 1):
        # Deleting or replacing; then inserting, which is a running minimum once its cost is taken off.
        best = np.concatenate([[at], np.minimum(row[1:] + 1, row[:-1] + (b != ord(character)))])
        row = np.minimum.accumulate(best - columns) + columns
    return 1.0 - int(row[-1]) / max(len(one), len(other))


def _float64(values: Array) -> Array:
    return values.astype(np.float64)
