"""The next tokens of answers that are drawn: which of the candidates, by a random number of each row's own.

What enters: scores of the most probable tokens of several rows, how each row is drawn, and its random number. What
leaves: the index of the token that is drawn in each row, or none where the candidates do not decide it.

Random numbers come from Philox (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405), a generator that computes
the n-th number of a key from key and n. The key is a hash of seed and row, n the number of the sample and of its
token. So an answer does not depend on which rows are answered beside it, before it, or by which worker.

This module knows nothing of graphs, slots or text.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvl_batch.sampling import Sampling

#: Index of a row whose candidates do not decide what is drawn.
UNDECIDED = -1
#: A number of 64 bits gives one of 53 bits in [0, 1), as many as a double holds.
_BITS = 53
#: Most probable tokens that are sorted before all are.
SORTED = 4096
#: Tokens whose weights are summed at a time.
_BLOCK = 1024


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
    is_whole = np.array([[each.leaves_all] for each in samplings])
    # Rounding can leave the sum of what is left just below the random number's share of it.
    found = np.where(ends_here, np.minimum(drawn, number - 1), np.where(is_whole & (drawn < count), drawn, UNDECIDED))
    return found[:, 0].astype(np.int64)


def draw_from_all(scores: NDArray[np.floating], sampling: Sampling, uniform: float, least: float = -math.inf) -> int:
    """Draw a token by the scores of all tokens of one row, (V,).

    As `draw`, but if `sampling` leaves all tokens, those with lower scores than `least` follow the others in the order
    of their ids. That changes no probability, and saves sorting the vocabulary.

    Args:
        scores: of all tokens.
        sampling: temperature above 0 and what leaves tokens.
        uniform: in [0, 1).
        least: the lowest score of the candidates that did not decide.
    """
    best = scores.max()
    # In place: fresh memory of this size costs more than the arithmetic.
    weights = scores - best
    weights /= sampling.temperature
    np.exp(weights, out=weights)
    if sampling.leaves_all:
        first = _descending(scores, least)
        of_first = weights[first]
        weights[first] = 0
        at = _at_share(np.concatenate([of_first, weights]), uniform)
        return int(first[at]) if at < len(first) else at - len(first)
    totals = np.array([float(best) / sampling.temperature + np.log(weights.sum(dtype=np.float64))])
    for most in (SORTED, len(scores)):
        is_all = most >= len(scores)
        first = _descending(scores, -math.inf if is_all else np.partition(scores, -most)[-most])
        (index,) = draw(scores[None, first], totals, [sampling], np.array([uniform]), of_all=is_all)
        if index != UNDECIDED:
            break
    return int(first[index])


def _descending(scores: NDArray[np.floating], least: float) -> NDArray[np.int64]:
    """Tokens by their scores in descending order, those of equal scores by id, without scores below `least`."""
    tokens = np.flatnonzero(scores >= least)
    return tokens[np.argsort(-scores[tokens], kind="stable")]


def _at_share(weights: NDArray[np.floating], share: float) -> int:
    """The first index at which the sum of weights exceeds the share, in [0, 1), of the sum of all."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64))
    target = share * sums[-1]
    block = int(np.searchsorted(sums, target, side="right"))
    start = block * _BLOCK
    inside = np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    at = start + int(np.searchsorted(inside, target - (sums[block] - inside[-1]), side="right"))
    # Rounding can leave the sum just below the target.
    return at if at < len(weights) and weights[at] > 0 else int(np.flatnonzero(weights)[-1])
