"""What the engine is asked, and what it answers.

This module knows nothing of how rows are answered, of text, images or Ray.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qvl_batch.decoder.decoder import PrefillRow
from qvl_batch.decoder.draws import Draws
from qvl_batch.decoder.grammar import Grammar

#: A prefix is shared if it has at least so many tokens, and is at least this share of the row that takes it over: rows
#: after a prefix are prefilled one by one.
PREFIX_TOKENS, PREFIX_SHARE = 64, 0.25
Reason = Literal["stop", "length", "over"]


@dataclass(frozen=True, eq=False)
class Request:
    """A row up to its answer, and how it is answered.

    Requests with the same `row` object are answers to one row: they differ in nothing but their draws.

    Args:
        row: the row.
        max_new_tokens: longest answer in tokens.
        images: keys of its images, if any. Images with the same key must have the same features; those with None share
            nothing. Without keys, no image does.
        grammar: what the answer must be.
        draws: how tokens are drawn; None for the most probable ones.
        min_new_tokens: tokens before the answer may end.
        is_over: called after each token with all tokens of the answer; if true, the answer ends with this one.
    """

    row: PrefillRow
    max_new_tokens: int
    images: Sequence[bytes | None] = ()
    grammar: Grammar | None = None
    draws: Draws | None = None
    min_new_tokens: int = 0
    is_over: Callable[[Sequence[int]], bool] | None = None

    @property
    def inverse_temperature(self) -> float:
        """What scores are multiplied by before tokens are drawn; 1 if none are."""
        return 1 / self.draws.sampling.temperature if self.draws else 1.0

    @cached_property
    def content(self) -> NDArray[np.int64]:
        """What each token stands for, int64 (S,): its id, or a negative number that identifies its image."""
        content = np.array(self.row.input_ids, np.int64)
        keys = self.images or [None] * len(self.row.images)
        for image, key in zip(self.row.images, keys, strict=True):
            identity = os.urandom(7) if key is None else hashlib.blake2b(key, digest_size=7).digest()
            content[image.start : image.stop] = -1 - int.from_bytes(identity)
        return content

    def shared_with(self, content: NDArray[np.int64]) -> int:
        """Length of the prefix that can be taken over from a row of that content; 0 if it is not worth it."""
        if not np.array_equal(self.content[:PREFIX_TOKENS], content[:PREFIX_TOKENS]):
            return 0
        # At least one token is left, whose logits give the first token of the answer.
        length = min(len(self.content) - 1, len(content))
        differs = self.content[:length] != content[:length]
        shared = int(differs.argmax()) if differs.any() else length
        return shared if shared >= max(PREFIX_TOKENS, PREFIX_SHARE * len(self.content)) else 0


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens of an answer, without the end token, and why it ended: by itself, at its longest, or since its request's
    `is_over` said so. If the decoder gives them, the log-probability of each token, and of the end token if one came;
    and scores of the row's candidates.
    """

    token_ids: list[int]
    finish_reason: Reason
    logprobs: list[float] = field(default_factory=list)
    candidate_scores: list[float] = field(default_factory=list)
