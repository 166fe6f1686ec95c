"""What a side leaves of a question: its answer, and everything the answer was made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from comparison.questions import Question
from qvl_batch.schema import Failure

Array = NDArray[Any]
#: Failures before the two sides part: of the input, or of a prompt that one of the contracts has no room for.
INPUT_STAGES = ("read", "image", "layout")


@dataclass(frozen=True, slots=True)
class Trace:
    """One side's answer to a question.

    Args:
        text: the answer, special tokens left out.
        token_ids: its tokens; the one that ends it is the last, unless a limit ended it.
        input_ids: tokens of the row up to the answer.
        features: float32 (T_img, D) of the image.
        logits: float32 (len(token_ids), V), from which each token was chosen; no penalty applied.
    """

    text: str
    token_ids: list[int]
    input_ids: list[int]
    features: Array
    logits: Array


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of one row: before the first layer, then after each, as in transformers.

    Args:
        vision: float32 (N, D_vision) each, patches in the order that the graph has them in.
        features: float32 (T_img, D).
        decoder: float32 (S, D) each, of the row up to its answer; the last (1, D), of its last token alone.
        logits: float32 (V,) of the first token.
    """

    vision: list[Array]
    features: Array
    decoder: list[Array]
    logits: Array


class Side(Protocol):
    """A checkpoint or a bundle that answers."""

    def answer(self, questions: Sequence[Question]) -> list[Trace | Failure]:
        """Answer questions that have pixels, in order."""

    def states(self, question: Question) -> States:
        """Hidden states of a question that this side can answer."""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, None if all are equal.

    Neither sequence is the beginning of the other, since both end with an end token or at one limit.
    """
    length = min(len(a), len(b))
    different = np.flatnonzero(np.array(a[:length]) != np.array(b[:length]))
    if different.size:
        return int(different[0])
    return None if len(a) == len(b) else length
