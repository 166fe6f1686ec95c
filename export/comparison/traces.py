"""What a side returns for a question: its answer, and the features and logits behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from export.comparison.questions import Question
from qvl_batch.schema import Failure

Array = NDArray[Any]
#: Stages whose failures are due to the input: it cannot be read, or its prompt is too long for one of the contracts.
INPUT_STAGES = ("read", "image", "layout")


@dataclass(frozen=True, slots=True)
class Trace:
    """One side's answer to a question.

    Args:
        text: the answer, special tokens left out.
        token_ids: its tokens; the last is the end token, unless a limit ended the answer.
        input_ids: tokens of the row up to the answer.
        features: float32 (T, D) of all image tokens, in the order of the row.
        logits: float32 (len(token_ids), V), from which each token was chosen; before the repetition penalty.
    """

    text: str
    token_ids: list[int]
    input_ids: list[int]
    features: Array
    logits: Array


@dataclass(frozen=True, slots=True)
class Decoded:
    """Tokens of an answer, as those of `Trace`, and the logits that each was chosen from."""

    token_ids: list[int]
    logits: list[Array]


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of one row: before the first layer, then after each, as in transformers.

    Args:
        vision: float32 (N, D_vision) each, patches of one image after the other, in the order of the exported graph.
        features: float32 (T, D) of all image tokens, in the order of the row.
        decoder: float32 (S, D) each, of the row up to its answer; the last (1, D), of its last token alone.
        logits: float32 (V,) of the first token.
    """

    vision: list[Array]
    features: Array
    decoder: list[Array]
    logits: Array


class Side(Protocol):
    """One side of a comparison: a checkpoint or a bundle."""

    def answer(self, questions: Sequence[Question]) -> list[Trace | Failure]:
        """Answer questions that have no failure, in order."""

    def states(self, question: Question) -> States:
        """Hidden states of a question that this side can answer."""


def penalised(logits: Array, penalty: float) -> Array:
    """Scores of tokens that are in the row already: see `export.decoder`."""
    return np.where(logits < 0, logits * penalty, logits / penalty)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, None if all are equal.

    Neither sequence is a prefix of the other, since both end with an end token or at the same limit.
    """
    length = min(len(a), len(b))
    different = np.flatnonzero(np.array(a[:length]) != np.array(b[:length]))
    if different.size:
        return int(different[0])
    return None if len(a) == len(b) else length
