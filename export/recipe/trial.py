"""A bundle on the user's rows: how far it drifts from the checkpoint, which answers it changes, and what it costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from export.comparison.bundle_side import BundleSide
from export.comparison.measures import Measures
from export.comparison.summary import share
from export.comparison.traces import Trace
from export.recipe.choice import Choice
from export.recipe.reference import Reference, answered
from qvl_batch.bundle.manifest import Prefer


@dataclass(frozen=True, slots=True)
class Goal:
    """What a recipe must keep, and what it shall have least of.

    Args:
        max_drift: largest error of features and logits of any row, relative to their largest magnitude.
        min_agreement: share of answers that must be equal, token for token.
        prefer: `speed` for least seconds, `size` for least bytes.
    """

    max_drift: float
    min_agreement: float
    prefer: Prefer

    @property
    def least(self) -> Literal["seconds", "bytes"]:
        """The figure that shall be least, by its name in `Trial` and `Costs`."""
        return "seconds" if self.prefer == "speed" else "bytes"


@dataclass(frozen=True, slots=True)
class Trial:
    """A choice that was measured.

    Args:
        name: of the trial.
        choice: dtype of each part.
        vision: largest error of features; 0 without images. Infinite if a row failed.
        prefill: of the logits of the first token.
        decode: of the logits of tokens after the first.
        equal: number of answers that are equal, token for token.
        rows: number of answers.
        bytes: size of the graphs' weights.
        seconds: of the operators, for one row.
    """

    name: str
    choice: Choice
    vision: float
    prefill: float
    decode: float
    equal: int
    rows: int
    bytes: float
    seconds: float

    @property
    def logits(self) -> float:
        """Largest error of logits."""
        return max(self.prefill, self.decode)

    @property
    def drift(self) -> float:
        """Largest error of features and logits."""
        return max(self.vision, self.logits)

    def meets(self, goal: Goal) -> bool:
        """Whether it keeps what the goal says."""
        return self.drift <= goal.max_drift and self.equal >= goal.min_agreement * self.rows

    def cost(self, goal: Goal) -> float:
        """What the goal wants least of."""
        return float(getattr(self, goal.least))

    @property
    def lost(self) -> dict[str, Any]:
        """Number and share of answers that differ, with the share's 95 % interval (Wilson 1927)."""
        return share(self.rows - self.equal, self.rows)


def measure(name: str, choice: Choice, side: BundleSide, reference: Reference, cost: tuple[float, float]) -> Trial:
    """Ask a bundle the rows of the sample.

    Args:
        name: of the trial.
        choice: dtype of each part.
        side: the bundle.
        reference: what to compare with.
        cost: bytes and seconds.
    """
    errors, equal = [0.0, 0.0, 0.0], 0
    for expected, found in zip(reference.traces, answered(side, reference.rows), strict=True):
        if not isinstance(found, Trace):
            errors = [math.inf] * 3
            continue
        measures = Measures.of(expected, found, reference.penalty)
        equal += measures.equal
        of_row = (measures.vision_error, measures.prefill_error, measures.decode_error)
        errors = [_larger(error, 0.0 if new is None else new) for error, new in zip(errors, of_row, strict=True)]
    vision, prefill, decode = errors
    return Trial(name, choice, vision, prefill, decode, equal, len(reference.rows), *cost)


def cheapest(trials: Sequence[Trial], goal: Goal) -> Trial:
    """The cheapest of the trials that meet a goal; of equals, the one that drifts least."""
    return min((trial for trial in trials if trial.meets(goal)), key=lambda trial: (trial.cost(goal), trial.drift))


def _larger(a: float, b: float) -> float:
    """The larger one; what is not a number counts as infinite."""
    return max(a, math.inf if math.isnan(b) else b)
