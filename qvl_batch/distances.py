"""Distances between what two sides compute, for the parity gate and for comparisons."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def relative_error(found: Array, expected: Array) -> float:
    """Largest absolute difference over the largest magnitude; NaN anywhere gives NaN."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def divergence(reference: Array, candidate: Array) -> Array:
    """Kullback-Leibler divergence (...) of two arrays of logits (..., V), reference first, in nats."""
    with np.errstate(invalid="ignore"):  # NaN gives NaN
        p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in map(_exact, (reference, candidate)))
        return np.asarray(np.maximum(0.0, (np.exp(p) * (p - q)).sum(-1)))


def cosine(a: Array, b: Array) -> Array:
    """Cosine (...) of the angle between vectors of two arrays (..., D)."""
    a, b = _exact(a), _exact(b)
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def _exact(values: Array) -> Array:
    return values.astype(np.float64)
