"""The next tokens of answers that are drawn: which of the candidates, by a random number of each row's own.

What enters: scores of the most probable tokens of several rows, how each row is drawn, and its random number. What
leaves: the index of the token that is drawn in each row, or none where the candidates do not decide it.

Random numbers come from Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), a generator that computes
the n-th number of a key from key and n. The key is a hash of seed and row, n the number of the sample and of its
token. So an answer does not depend on which rows are answered beside it, before it, or by which worker.

This module knows nothing of graphs, slots or text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvl_batch.sampling import Sampling

#: Index of a row whose candidates do not decide what is drawn.
UNDECIDED = -1
#: A number of 64 bits gives one of 53 bits in [0, 1), as many as a double holds.
_BITS = 53


@dataclass(frozen=True, slots=True)
class Draws:
    """How the tokens of one answer are drawn.

    Args:
        sampling: temperature, and which tokens are left.
        row: identifies the row: rows with the same bytes have the same random numbers.
        sample: number of the answer among those of its row, from 0 on.
    """

    sampling: Sampling
    row: bytes
    sample: int = 0

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Random numbers for the first tokens of the answer, uniform in [0, 1)."""
        seed = self.sampling.seed.to_bytes(8)
        key = int.from_bytes(hashlib.blake2b(self.row, digest_size=16, key=seed).digest())
        # The counter has 256 bits: the sample in the upper half, so that samples share no numbers.
        generator = np.random.Philox(key=key, counter=self.sample << 128)
        whole = generator.random_raw(count) >> np.uint64(64 - _BITS)
        return whole.astype(np.float64) * 2.0**-_BITS


def draw(
    scores: NDArray[np.floating],
    totals: NDArray[np.floating],
    samplings: Sequence[Sampling],
    uniforms: NDArray[np.float64],
    *,
    of_all: bool = False,
) -> NDArray[np.int64]:
    """Draw a token in each row.

    The tokens that are left by `top_k`, `top_p` and `min_p` are always the most probable ones, so their number says
    which. Among them, the token is drawn at which the sum of probabilities, from the most probable on, exceeds the
    random number times the sum of all.

    Args:
        scores: of the K most probable tokens, (B, K), in descending order.
        totals: log-sum-exp of scores / temperature over the whole vocabulary, (B,).
        samplings: temperature above 0 and what leaves tokens, of each row.
        uniforms: in [0, 1), (B,).
        of_all: `scores` has the whole vocabulary.

    Returns:
        Indices among the K, int64 (B,); `UNDECIDED` where more tokens than K are left and the random number is beyond
        them, or where it depends on further tokens how many are left.
    """
    count = scores.shape[1]

    def column(values: Sequence[float]) -> NDArray[np.float64]:
        return np.array(values, np.float64)[:, None]

    temperature = column([each.temperature for each in samplings])
    top_k = column([each.top_k or np.inf for each in samplings])
    top_p, min_p = column([each.top_p for each in samplings]), column([each.min_p for each in samplings])
    probability = np.exp(scores / temperature - totals[:, None].astype(np.float64))
    ends_here = (top_k <= count) | of_all
    is_left = (np.arange(count) < top_k) & (probability > 0)
    # `top_p` and the draw are shares of what is left by then; of the whole vocabulary, that is 1.
    mass = np.where(ends_here, (probability * is_left).sum(1, keepdims=True), 1.0)
    before = np.cumsum(probability, 1) - probability
    is_left &= (before < top_p * mass) | (top_p == 1)
    is_left &= probability >= min_p * probability[:, :1]
    number = is_left.sum(1, keepdims=True)
    # If one of the candidates is not left, none behind them is; but of how much `top_p` is a share must be known.
    ends_here |= (number < count) & ((top_k == np.inf) | (top_p == 1))
    mass = np.where(ends_here, (probability * is_left).sum(1, keepdims=True), 1.0)
    drawn = (np.cumsum(probability * is_left, 1) <= uniforms[:, None] * mass).sum(1, keepdims=True)
    # Beyond the candidates, `top_k` cuts, and what `top_p` and `min_p` leave has a sum that is not known here.
    is_whole = (top_k == np.inf) & (top_p == 1) & (min_p == 0)
    # Rounding can leave the sum of what is left just below the random number's share of it.
    found = np.where(ends_here, np.minimum(drawn, number - 1), np.where(is_whole & (drawn < count), drawn, UNDECIDED))
    return found[:, 0].astype(np.int64)


def draw_from_all(scores: NDArray[np.floating], sampling: Sampling, uniform: float) -> int:
    """Draw a token by the scores of all tokens of one row, (V,)."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    scaled = ordered / sampling.temperature
    total = scaled[0] + np.log(np.exp(scaled - scaled[0]).sum())
    (index,) = draw(ordered[None], np.array([total]), [sampling], np.array([uniform]), of_all=True)
    return int(order[index])
