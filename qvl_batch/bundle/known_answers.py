"""Known answers: one image and one prompt, PyTorch's results for them, and the check of a machine against these.

The export puts them into the bundle. Every session of its graphs must reproduce them before it accepts a row: a graph
that is right on the exporting machine can be wrong on another, whose kernels saturate, round, or fall back.

    pixels       uint8 (H, W, 3)       the image
    features     float32 (n, D)        PyTorch's features of image tokens 0, SPACING, 2 SPACING, ...
    input_ids    int64 (S,)            the row up to its answer
    embeds       float32 (n, D)        input of the decoder: repeated over the image tokens in place of their features
    logits       float32 (V,)          PyTorch's logits of the first answer token
    answer       int64 (steps,)        tokens after the row, fed to the decoder whatever it predicts
    following    int64 (steps,)        PyTorch's greedy tokens: after the row, and after each of `answer` but the last
    is_decided   bool (steps,)         which of `following` no error within the tolerance could change

The decoder gets a sample of features, repeated, so that the file is only a megabyte or two, and so that the check of
the decoder does not depend on the vision graph.

This module runs no graph: the owner of a session runs it and passes the results in.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import KNOWN_ANSWERS, Tolerance
from qvl_batch.distances import cosine, relative_error
from qvl_batch.errors import BundleError, DeviceError

#: Distance between sampled image tokens. Odd, so that every column of the image is sampled.
SPACING = 17
#: Decode steps of the known answer.
STEPS = 8

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value and its bound: an upper bound, or a lower one if `at_least`."""

    name: str
    found: float
    bound: float
    at_least: bool = False

    @property
    def is_within(self) -> bool:
        """Whether the value is within its bound; NaN never is."""
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def __str__(self) -> str:
        return f"{self.name} {digits(self.found)} ({'at least' if self.at_least else 'allowed'}: {digits(self.bound)})"


@dataclass(frozen=True, slots=True, eq=False)
class KnownAnswers:
    """The arrays described above."""

    pixels: NDArray[np.uint8]
    features: NDArray[np.float32]
    input_ids: NDArray[np.int64]
    embeds: NDArray[np.float32]
    logits: NDArray[np.float32]
    answer: NDArray[np.int64]
    following: NDArray[np.int64]
    is_decided: NDArray[np.bool_]

    @classmethod
    def of(cls, bundle: Bundle) -> Self | None:
        """Read those of a bundle; None if it was exported without the parity gate.

        Raises:
            BundleError: the file cannot be read.
        """
        if bundle.manifest.tolerance is None:
            return None
        try:
            with np.load(bundle.file(KNOWN_ANSWERS)) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise BundleError(f"{bundle.path / KNOWN_ANSWERS} cannot be read ({error}): export again") from error

    def write(self, directory: Path) -> None:
        """Write the file."""
        np.savez_compressed(directory / KNOWN_ANSWERS, **{f.name: getattr(self, f.name) for f in fields(self)})

    @property
    def given(self) -> NDArray[np.int64]:
        """Tokens to feed in decode steps: all but the last of `answer`, as what follows that one is not known."""
        return self.answer[:-1]

    def of_vision(self, features: Array, tolerance: Tolerance) -> list[Figure]:
        """Compare the vision graph's features of the image, float32 (T_img, D)."""
        found = sample(features)
        return [
            Figure("error of features", relative_error(found, self.features), tolerance.features),
            Figure(
                "least cosine of features",
                float(cosine(found, self.features).min()),
                tolerance.feature_cosine,
                at_least=True,
            ),
        ]

    def of_decoder(self, logits: Array, tokens: Sequence[int] | Array, tolerance: Tolerance) -> list[Figure]:
        """Compare the decoder's results for the row: its first logits (V,), and its token at each step."""
        equal = self.is_decided & (np.asarray(tokens) == self.following)
        return [
            Figure("error of logits", relative_error(logits, self.logits), tolerance.logits),
            Figure("equal tokens", int(equal.sum()), int(self.is_decided.sum()), at_least=True),
        ]


def known_figures(bundle: Bundle, measure: Callable[[KnownAnswers, Tolerance], list[Figure]]) -> list[Figure]:
    """Figures of a graph on the bundle's known answers.

    Args:
        bundle: the bundle of the graph.
        measure: runs the graph on the known answers and compares.

    Returns:
        What `measure` returns; empty if the bundle has no known answers.

    Raises:
        BundleError: the known answers cannot be read.
    """
    known, tolerance = KnownAnswers.of(bundle), bundle.manifest.tolerance
    return [] if known is None or tolerance is None else measure(known, tolerance)


def sample(features: Array) -> Array:
    """The sampled rows (n, D) of features (T_img, D)."""
    return features[::SPACING]


def repeated(embeds: Array, tokens: int) -> Array:
    """Repeat a sample (n, D) until it fills all image tokens: (tokens, D)."""
    return np.resize(embeds, (tokens, embeds.shape[1]))


def refuse_wrong(figures: Sequence[Figure], graph: str, machine: str, bundle: Path) -> None:
    """Refuse a machine that does not reproduce PyTorch's results.

    Args:
        figures: measured on this machine.
        graph: name of the graph, for the error.
        machine: processor or card, and version of ONNX Runtime, for the error.
        bundle: folder of the bundle.

    Raises:
        DeviceError: a figure is out of bounds. Names the figure, its bound and the machine, and says what to do.
    """
    wrong = next((figure for figure in figures if not figure.is_within), None)
    if wrong is not None:
        raise DeviceError(
            f"this machine computes {graph} wrongly: {wrong} on the bundle's known answers, with {machine}; no row was "
            f"answered. Run `python jobs/check.py {bundle}` for details, then use another kind of machine, another "
            "version of onnxruntime, or export with another --dtype"
        )


def digits(value: float) -> str:
    """Format a figure: a count in full, a cosine near 1 as its distance from 1."""
    if np.isfinite(value) and value == int(value):
        return f"{value:.0f}"
    return f"1 - {1 - value:.1e}" if 0.99 < value < 1 else f"{value:.1e}"  # noqa: PLR2004
