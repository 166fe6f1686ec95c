"""What guides the next tokens of a decoder, and the scores to draw them by.

What enters: for each slot, which tokens may come next, and its temperature; for rows of a prefill, tokens whose scores
are asked for. What leaves, after each call: log-probabilities and scores. See `export.guided` for the graph's part.

Scores are logits after the repetition penalty, -inf where a token is not allowed. N slots, B rows, V vocabulary.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.manifest import mask_bytes
from qvl_batch.runtime.memory import Buffer, Memory

#: A word of a mask that allows every token.
ALL = np.int32(-1)


class Guidance:
    """Arrays of a guided decoder graph, allocated once.

    Args:
        vocab_size: V.
        slots: N.
        memory: memory of the device that the graph runs on.
        logprobs: keep each call's `logprobs`.
        top: number of `top_tokens` that the graph gives, K, if tokens can be drawn: by `top_scores`, `top_tokens`,
            `scaled_totals` and `scores` of each call.
    """

    def __init__(
        self, vocab_size: int, slots: int, memory: Memory, *, logprobs: bool = False, top: int | None = None
    ) -> None:
        self._memory = memory
        self._allowed = memory.zeros((slots, mask_bytes(vocab_size)), "uint8")
        #: Which token may be the next of the row in each slot, int32 (N, ⌈V / 32⌉): token t is bit t % 32 of word
        #: t // 32. Read by each prefill and step, and never written here.
        self.allowed = self._allowed.values.view(np.int32)
        self.allowed[...] = ALL
        self._cold = memory.zeros((slots, 1), "float")
        #: What the scores of the row in each slot are multiplied by for `scaled_totals`, float32 (N, 1). As `allowed`.
        self.inverse_temperature = self._cold.values
        self.inverse_temperature[...] = 1
        # Every run has candidates: one whose score nobody takes, if none are asked for.
        self._no_candidates = memory.zeros((slots, 1), "int64", on_host=False)
        self._candidates = self._allocate_candidates(slots)
        self._outputs: dict[str, Buffer] = {}
        self._scores: Buffer | None = None
        if logprobs:
            self._outputs["token_logprob"] = memory.zeros((slots,), "float")
        if top is not None:
            self._outputs["top_scores"] = memory.zeros((slots, top), "float")
            self._outputs["top_tokens"] = memory.zeros((slots, top), "int64")
            self._outputs["scaled_total"] = memory.zeros((slots,), "float")
            self._scores = memory.zeros((slots, vocab_size), "float")
        #: Log-probability of the next token of each row, float32 (B,), if it is kept.
        self.logprobs: NDArray[np.float32] | None = None
        #: Scores of the candidates of each row of the last prefill, float32 (B, K).
        self.candidate_scores = np.zeros((0, 0), np.float32)
        #: The largest scores of each row in descending order, float32 (B, K); their tokens, int64 (B, K); and the
        #: log-sum-exp of all its scores times `inverse_temperature`, float32 (B,).
        self.top_scores, self.top_tokens = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int64)
        self.scaled_totals = np.zeros(0, np.float32)

    def bind(
        self, first: int, rows: int, candidates: Sequence[Sequence[int]] = ()
    ) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        """Inputs and outputs of a run.

        Args:
            first: first slot.
            rows: number of rows, B.
            candidates: of each row, in a prefill.
        """
        inputs = {"allowed": self._allowed.rows(first, rows)}
        outputs = {name: each.rows(0, rows) for name, each in self._outputs.items()}
        if self._scores is not None:
            inputs["inverse_temperature"] = self._cold.rows(first, rows)
            outputs["scores"] = self._scores.rows(0, rows).without_mirror()
        inputs["candidates"] = self._no_candidates.rows(first, rows)
        self.candidate_scores = np.zeros((rows, 0), np.float32)
        if most := max(map(len, candidates), default=0):
            inputs["candidates"], scores = self._ask(candidates, (rows, most))
            outputs["candidate_scores"], self.candidate_scores = scores, scores.values
        return inputs, outputs

    def _ask(self, candidates: Sequence[Sequence[int]], shape: tuple[int, int]) -> tuple[Buffer, Buffer]:
        """Arrays of candidates, written, and of their scores."""
        if math.prod(shape) > self._candidates[0].shape[0]:
            self._candidates = self._allocate_candidates(math.prod(shape))
        asked, scores = (each.shaped(shape) for each in self._candidates)
        asked.values[...] = 0
        for values, row in zip(asked.values, candidates, strict=True):
            values[: len(row)] = row
        return asked, scores

    def publish(self, rows: int) -> None:
        """Show what the last run computed of its rows."""
        found = {name: each.values[:rows] for name, each in self._outputs.items()}
        self.logprobs = found.get("token_logprob")
        self.top_scores = found.get("top_scores", self.top_scores)
        self.top_tokens = found.get("top_tokens", self.top_tokens)
        self.scaled_totals = found.get("scaled_total", self.scaled_totals)

    def scores(self, row: int) -> NDArray[np.float32]:
        """Scores of all tokens for row `row` of the last call, float32 (V,)."""
        assert self._scores is not None
        scores = self._scores.rows(row, 1)
        self._memory.download(scores)
        self._memory.synchronize()
        found: NDArray[np.float32] = scores.values[0]
        return found

    def _allocate_candidates(self, count: int) -> tuple[Buffer, Buffer]:
        """Arrays for so many candidates and their scores."""
        return self._memory.zeros((count,), "int64"), self._memory.zeros((count,), "float")
