"""Known answers: one image and one prompt, what PyTorch makes of them, and how near a machine must come.

The export puts them into the bundle. Every session of its graphs is held to them before it takes a row, since
what is right on the exporting machine may be wrong on another: kernels saturate, round, or fall back.

    pixels       uint8 (H, W, 3)       of the image
    features     float32 (n, D)        PyTorch's of image tokens 0, SPACING, 2 SPACING, ...
    input_ids    int64 (S,)            of the row up to its answer
    embeds       float32 (n, D)        repeated over the image's tokens, what the decoder is given for features
    logits       float32 (V,)          PyTorch's first
    answer       int64 (steps,)        tokens that follow the row, whatever the decoder would say
    following    int64 (steps,)        greedy tokens of PyTorch: the first, and that after each but the last of `answer`
    is_decided   bool (steps,)         which of them no error within the bounds could change

The decoder is given a sample of features, again and again, so that the file stays at a megabyte or two, and so that
it answers for itself alone.

This module runs no graph: who has one gives it pixels or tokens, and gives back here what comes out.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import KNOWN_ANSWERS, Tolerance
from qvl_batch.distances import cosine, relative_error
from qvl_batch.errors import BundleError, DeviceError

#: Image tokens from one of the sample to the next. Odd, so that all columns of an image come up.
SPACING = 17
STEPS = 8

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """What was found of a graph, and what it must come to: at most `bound`, or `at_least` so much."""

    name: str
    found: float
    bound: float
    at_least: bool = False

    @property
    def is_within(self) -> bool:
        """Whether it does; NaN does not."""
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def __str__(self) -> str:
        return f"{self.name} {digits(self.found)} ({'at least' if self.at_least else 'allowed'}: {digits(self.bound)})"


@dataclass(frozen=True, slots=True, eq=False)
class KnownAnswers:
    """What stands above; arrays by those names."""

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
        """Those of a bundle, None if it was exported without the parity gate.

        Raises:
            BundleError: the file is no such one.
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
        """Tokens to append one after the other; the last of the answer is followed by nothing that is known."""
        return self.answer[:-1]

    def of_vision(self, features: Array, tolerance: Tolerance) -> list[Figure]:
        """Figures of what a vision graph makes of the image, float32 (T_img, D)."""
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
        """Figures of what a decoder makes of the row: its first logits (V,), and a token for each step."""
        equal = self.is_decided & (np.asarray(tokens) == self.following)
        return [
            Figure("error of logits", relative_error(logits, self.logits), tolerance.logits),
            Figure("equal tokens", int(equal.sum()), int(self.is_decided.sum()), at_least=True),
        ]


def sample(features: Array) -> Array:
    """Of features (T_img, D), those that are known."""
    return features[::SPACING]


def repeated(embeds: Array, tokens: int) -> Array:
    """A sample (n, D) again and again, up to so many image tokens (tokens, D)."""
    return np.resize(embeds, (tokens, embeds.shape[1]))


def refuse_wrong(figures: Sequence[Figure], graph: str, machine: str, bundle: Path) -> None:
    """Refuse a machine that does not compute a graph as PyTorch does.

    Args:
        figures: that were found.
        graph: whose they are.
        machine: processor or card, and version of what computes.
        bundle: folder of the bundle.

    Raises:
        DeviceError: names the figure, its bound and the machine, and says what to do.
    """
    wrong = next((figure for figure in figures if not figure.is_within), None)
    if wrong is not None:
        raise DeviceError(
            f"this machine computes {graph} wrongly: {wrong} of the bundle's known answers, on {machine}; nothing was "
            f"answered. See `python jobs/check.py {bundle}`, then run on another kind of machine, take another version "
            "of onnxruntime, or export with another --dtype"
        )


def digits(value: float) -> str:
    """A figure for people: a count as it is, and of a cosine what it lacks of 1."""
    if np.isfinite(value) and value == int(value):
        return f"{value:.0f}"
    return f"1 - {1 - value:.1e}" if 0.99 < value < 1 else f"{value:.1e}"  # noqa: PLR2004
