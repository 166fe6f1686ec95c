"""The decoder graph over the KV cache: prefill rows into slots, step all live slots.

What enters: token ids and image features of rows. What leaves: the next token of each, by
argmax after the repetition penalty, or -1 where something is not finite. Arrays are allocated once
and bound by address.

This module knows nothing of prompts as text, of when to stop, or of who is waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle import DECODER, Bundle
from qvl_batch.kv_cache import KvCache
from qvl_batch.layout import mrope_positions
from qvl_batch.runtime import Binding, Session
from qvl_batch.vision import Features

Tokens = NDArray[np.int64]
#: In place of a next token where a logit or a hidden state is not finite.
NO_TOKEN = -1
#: Images whose beginnings of rows are kept for other rows of theirs.
SHELVES = 2


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Token ids of a row up to its answer, and float32 features (T_img, D) of its image."""

    input_ids: Sequence[int]
    features: Features


class Decoder:
    """A decoder session and its arena of `slots` slots; rows live in slots 0 to B - 1.

    Args:
        bundle: where the graph is.
        slots: rows that can be alive at a time.
        threads: threads that one operator may use.
        keep_logits: leave each call's logits in `logits`, float32 (B, V), until the next call.
    """

    def __init__(self, bundle: Bundle, slots: int, threads: int, *, keep_logits: bool = False) -> None:
        manifest = bundle.manifest
        self.logits = np.zeros((0, manifest.decoder.vocab_size), np.float32)
        self.layout, self.slots = manifest.layout, slots
        self._session = Session(bundle.file(DECODER), threads)
        self._cache = KvCache(manifest, slots, SHELVES)
        self._positions = mrope_positions(manifest.layout)
        self._hidden_size, self._vocab_size = manifest.decoder.hidden_size, manifest.decoder.vocab_size
        self._penalty = RepetitionPenalty.of(manifest.generation.repetition_penalty, slots, manifest.decoder.vocab_size)
        self._reads_logits = keep_logits or self._penalty is not None
        self._lengths = np.zeros(slots, np.int32)

    def prefill(self, first: int, rows: Sequence[PrefillRow]) -> Tokens:
        """Fill slots `first`, `first + 1`, ... with `rows`; returns int64 (B,) of first tokens."""
        return self._fill(first, rows, self.prefill_inputs(rows))

    @property
    def prefix_tokens(self) -> int:
        """Tokens at the beginning of a row that follow from its image alone."""
        return self.layout.image_start + self.layout.image_tokens

    def shelve(self, slot: int, shelf: int) -> None:
        """Keep the prefix of the row in `slot` on a shelf, 0 to `SHELVES` - 1."""
        self._cache.move(slot, self.slots + shelf, self.prefix_tokens)

    def prefill_rest(self, slot: int, shelf: int, row: PrefillRow) -> Tokens:
        """Fill a slot with a row whose prefix is on a shelf; returns int64 (1,) of its first token.

        The same tokens go through the same products as in `prefill`, so that the cache is the same.
        """
        self._cache.move(self.slots + shelf, slot, self.prefix_tokens)
        inputs = self.prefill_inputs([row])
        for name, axis in (("input_ids", 1), ("position_ids", 2), ("image_embeds", 1)):
            inputs[name] = np.ascontiguousarray(np.split(inputs[name], [self.prefix_tokens], axis)[1])
        return self._fill(slot, [row], inputs)

    def step(self, tokens: Tokens) -> Tokens:
        """Append `tokens` int64 (B,) to slots 0 to B - 1; returns the tokens that follow."""
        rows = len(tokens)
        buffers = self._steps[rows - 1]
        lengths = self._lengths[:rows]
        buffers.inputs["input_ids"][:, 0] = tokens
        buffers.inputs["position_ids"][...] = (lengths + self.layout.position_delta)[:, None]
        buffers.inputs["seqlens_k"][...] = lengths
        lengths += 1
        buffers.inputs["total_sequence_length"][...] = lengths.max()
        if self._penalty:
            self._penalty.add(tokens)
        buffers.binding.run()
        return self._pick(0, buffers.outputs)

    def move(self, source: int, target: int) -> None:
        """Let the row in slot `source` go on in slot `target`."""
        self._cache.move(source, target, int(self._lengths[source]))
        self._lengths[target] = self._lengths[source]
        if self._penalty:
            self._penalty.move(source, target)

    @cached_property
    def _steps(self) -> "list[_StepBuffers]":
        return [self._step_buffers(rows) for rows in range(1, self.slots + 1)]

    def _step_buffers(self, rows: int) -> "_StepBuffers":
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.zeros((rows, 1), np.int64),
            "position_ids": np.zeros((3, rows, 1), np.int64),
            "image_embeds": np.zeros((rows, 1, self._hidden_size), np.float32),
            "seqlens_k": np.zeros((rows,), np.int32),
            "total_sequence_length": np.zeros((), np.int32),
        }
        outputs = self._outputs(rows)
        return _StepBuffers(inputs, outputs, self._bind(0, inputs, outputs))

    def prefill_inputs(self, rows: Sequence[PrefillRow]) -> dict[str, NDArray[Any]]:
        """What the graph takes for `rows`, the cache aside, right-padded to the longest row."""
        lengths = np.array([len(row.input_ids) for row in rows], np.int32)
        shape = (len(rows), int(lengths.max()))
        start, stop = self.layout.image_start, self.layout.image_start + self.layout.image_tokens
        ids = np.zeros(shape, np.int64)
        embeds = np.zeros((*shape, self._hidden_size), np.float32)
        for index, row in enumerate(rows):
            ids[index, : len(row.input_ids)] = row.input_ids
            embeds[index, start:stop] = row.features
        positions = np.repeat(self._positions[:, None, : shape[1]], len(rows), axis=1)
        return {
            "input_ids": ids,
            "position_ids": positions,
            "image_embeds": embeds,
            "seqlens_k": lengths - 1,
            "total_sequence_length": np.array(shape[1], np.int32),
        }

    def _fill(self, first: int, rows: Sequence[PrefillRow], inputs: dict[str, NDArray[Any]]) -> Tokens:
        self._lengths[first : first + len(rows)] = [len(row.input_ids) for row in rows]
        if self._penalty:
            self._penalty.reset(first, [row.input_ids for row in rows])
        outputs = self._outputs(len(rows))
        self._bind(first, inputs, outputs).run()
        return self._pick(first, outputs)

    def _outputs(self, rows: int) -> dict[str, NDArray[Any]]:
        """Where a run leaves next tokens int64 (B,), and logits (B, V) where something reads them."""
        logits = {"logits": np.zeros((rows, self._vocab_size), np.float32)} if self._reads_logits else {}
        return {"next_token": np.zeros((rows,), np.int64)} | logits

    def _bind(self, first: int, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> Binding:
        rows = len(outputs["next_token"])
        return self._session.bind(inputs | self._cache.past(first, rows), outputs | self._cache.present(first, rows))

    def _pick(self, first: int, outputs: dict[str, NDArray[Any]]) -> Tokens:
        tokens: Tokens = outputs["next_token"].copy()
        if self._reads_logits:
            self.logits = outputs["logits"]
        if self._penalty:
            chosen = self._penalty.scores(first, self.logits).argmax(-1)
            return np.where(tokens == NO_TOKEN, NO_TOKEN, chosen)
        return tokens


class RepetitionPenalty:
    """Makes tokens that a row already holds, prompt included, less likely.

    A logit becomes `logit / penalty` if positive, else `logit * penalty`: Keskar et al. 2019,
    arXiv 1909.05858, section 4.1, as transformers' `RepetitionPenaltyLogitsProcessor` has it.
    """

    def __init__(self, penalty: float, slots: int, vocab_size: int) -> None:
        self.penalty = penalty
        self._seen = np.zeros((slots, vocab_size), np.bool_)

    @classmethod
    def of(cls, penalty: float, slots: int, vocab_size: int) -> "RepetitionPenalty | None":
        """None where a penalty of 1 would change nothing."""
        return None if penalty == 1.0 else cls(penalty, slots, vocab_size)

    def reset(self, first: int, rows: Sequence[Sequence[int]]) -> None:
        """Begin slots `first`, `first + 1`, ... with the tokens of `rows`."""
        self._seen[first : first + len(rows)] = False
        for slot, ids in enumerate(rows, start=first):
            self._seen[slot, ids] = True

    def add(self, tokens: Tokens) -> None:
        """Add a token (B,) to each of the first B slots."""
        self._seen[np.arange(len(tokens)), tokens] = True

    def move(self, source: int, target: int) -> None:
        """Copy one slot's tokens to another."""
        self._seen[target] = self._seen[source]

    def scores(self, first: int, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Penalised logits (B, V) of slots `first`, `first + 1`, ..."""
        seen = self._seen[first : first + len(logits)]
        penalised = np.where(logits < 0, logits * np.float32(self.penalty), logits / np.float32(self.penalty))
        return np.where(seen, penalised, logits)


@dataclass(frozen=True, slots=True)
class _StepBuffers:
    """Arrays of a decode step of one batch size, bound once."""

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]
    binding: Binding
