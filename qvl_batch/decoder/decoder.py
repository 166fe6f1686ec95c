"""The decoder graph over the KV cache: prefill rows into slots, step all live slots.

What enters: token ids and image features of rows. What leaves: the next token of each, by
argmax after the repetition penalty, or -1 where something is not finite. Arrays are allocated once
and bound by address, in whichever memory the graph runs. A machine that computes it wrongly is refused.

This module knows nothing of prompts as text, of when to stop, or of who is waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.known_answers import Figure, KnownAnswers, known_figures, refuse_wrong, repeated
from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, HALVES, Manifest, Tolerance
from qvl_batch.config import Device
from qvl_batch.decoder.kv_cache import KvCache
from qvl_batch.errors import BundleError
from qvl_batch.runtime.devices import machine_of
from qvl_batch.runtime.memory import Buffer, HostMemory, Memory, on_this_machine
from qvl_batch.runtime.session import NO_GRAPH, Binding, Session

Tokens = NDArray[np.int64]
#: In place of a next token where a logit or a hidden state is not finite.
NO_TOKEN = -1
#: Images whose beginnings of rows are kept for other rows of theirs.
PREFIX_ENTRIES = 2
#: Rows that are best prefilled together, by device. More keep live rows waiting. On a CPU they cost no less
#: time each; a GPU is not busy with one.
PREFILL_ROWS: dict[Device, int] = {"cpu": 2, "cuda": 8}


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
        memory: of the device that it runs on. On a GPU all arrays are there, and tokens alone cross the bus in a
            step. In half precision the step of each number of rows is captured as a CUDA graph when it first
            runs; in fp32 products of attention copy addresses to the GPU, which a captured step would repeat.
        graph: contents to load in place of the bundle's graph.
        prove: hold the graph to the bundle's known answers, which costs a prefill and a few steps of one row.

    Raises:
        BundleError: the graph cannot be loaded, or is in half precision throughout.
        DeviceError: the device has no room for weights or cache, or computes the graph wrongly.
    """

    def __init__(
        self,
        bundle: Bundle,
        slots: int,
        threads: int,
        *,
        keep_logits: bool = False,
        memory: Memory | None = None,
        graph: bytes | None = None,
        prove: bool = True,
    ) -> None:
        manifest, self._bundle = bundle.manifest, bundle
        self.logits = np.zeros((0, manifest.decoder.vocab_size), np.float32)
        self.layout, self.slots = manifest.layout, slots
        self.memory: Memory = memory or HostMemory()
        #: Rows that are best given to `prefill` at a time.
        self.prefill_rows = PREFILL_ROWS[self.memory.device]
        self._captures = self.memory.device == "cuda" and manifest.dtype in HALVES
        self._session = Session(bundle.file(DECODER), threads, graph, self.memory, captures=self._captures)
        kinds = self._session.inputs
        if kinds.get("image_embeds") != "float":
            raise BundleError(f"{bundle.path / DECODER} has no residual stream in fp32: export the checkpoint again")
        self._cache = KvCache(manifest, slots, PREFIX_ENTRIES, kinds["past_key.0"], self.memory)
        self._hidden_size, self._feature_shape = manifest.decoder.hidden_size, manifest.feature_shape
        self._seen = SeenTokens(manifest, slots, self.memory) if "past_seen" in kinds else None
        if (self._seen is None) != (manifest.generation.repetition_penalty == 1):
            raise BundleError(f"{bundle.path / DECODER} has another repetition penalty: export the checkpoint again")
        self._lengths = np.zeros(slots, np.int32)
        self._buffers = {
            "input_ids": self.memory.zeros((slots, 1), "int64"),
            "cache_position": self.memory.zeros((slots, 1), "int64"),
            "seqlens_k": self.memory.zeros((slots,), "int32"),
            # No image goes into a decode step.
            "image_embeds": self.memory.zeros((slots, 1, self._hidden_size), "float", on_host=False),
        }
        self._prefilled = self._room_for(self.prefill_rows)
        self._total = np.zeros((), np.int32)
        self._outputs = {"next_token": self.memory.zeros((slots,), "int64")}
        if keep_logits:
            self._outputs["logits"] = self.memory.zeros((slots, manifest.decoder.vocab_size), "float")
        if self.memory.device == "cuda":
            self._take_memory()
        if prove:
            refuse_wrong(self.figures(), "the decoder graph", self.machine, bundle.path)

    @property
    def machine(self) -> str:
        """What computes it."""
        return machine_of(self.memory)

    def figures(self) -> list[Figure]:
        """Figures of the graph on the bundle's known answers, computed in slot 0; empty if it has none."""
        return known_figures(self._bundle, self._figures)

    def _figures(self, known: KnownAnswers, tolerance: Tolerance) -> list[Figure]:
        row = PrefillRow(known.input_ids.tolist(), repeated(known.embeds, self.layout.image_tokens))
        logits = self.memory.zeros((1, len(known.logits)), "float")
        tokens = [self._fill(0, [row], 0, self._nothing_seen(1), logits)]
        # Not captured: a captured step belongs to the thread that captured it, and the engine has a thread of its own.
        step = self._bind_step(1)
        tokens += [self._run_step(step, token) for token in known.given[:, None]]
        return known.of_decoder(logits.values[0], [int(each[0]) for each in tokens], tolerance)

    def prefill(self, first: int, rows: Sequence[PrefillRow]) -> Tokens:
        """Fill slots `first`, `first + 1`, ... with `rows`; returns int64 (B,) of first tokens."""
        return self._fill(first, rows, 0, self._nothing_seen(len(rows)))

    @property
    def prefix_tokens(self) -> int:
        """Tokens at the beginning of a row that follow from its image alone."""
        return self.layout.image_start + self.layout.image_tokens

    def store_prefix(self, slot: int, entry: int) -> None:
        """Keep the prefix of the row in `slot` on a entry, 0 to `PREFIX_ENTRIES` - 1."""
        self._cache.move(slot, self.slots + entry, self.prefix_tokens)

    def prefill_after_prefix(self, slot: int, entry: int, row: PrefillRow) -> Tokens:
        """Fill a slot with a row whose prefix is on a entry; returns int64 (1,) of its first token.

        The same tokens go through the same products as in `prefill`, so that the cache is the same.
        """
        self._cache.move(self.slots + entry, slot, self.prefix_tokens)
        return self._fill(slot, [row], self.prefix_tokens, seen=self._seen.prefix if self._seen else None)

    def step(self, tokens: Tokens) -> Tokens:
        """Append `tokens` int64 (B,) to slots 0 to B - 1; returns the tokens that follow."""
        return self._run_step(self._steps[len(tokens) - 1], tokens)

    def _run_step(self, step: Binding, tokens: Tokens) -> Tokens:
        rows = len(tokens)
        lengths = self._lengths[:rows]
        self._buffers["input_ids"].values[:rows, 0] = tokens
        self._buffers["cache_position"].values[:rows, 0] = lengths
        self._buffers["seqlens_k"].values[:rows] = lengths
        lengths += 1
        # A captured step keeps the length that it was captured with; each row's own is in `seqlens_k`.
        self._total[...] = self.layout.max_seq_len if self._captures else lengths.max()
        step.run()
        return self._pick(rows)

    def move(self, source: int, target: int) -> None:
        """Let the row in slot `source` go on in slot `target`."""
        self._cache.move(source, target, int(self._lengths[source]))
        self._lengths[target] = self._lengths[source]
        if self._seen:
            self._seen.move(source, target)

    @cached_property
    def _steps(self) -> list[Binding]:
        """A decode step of each number of rows, bound once."""
        return [self._bind_step(rows, graph=rows) for rows in range(1, self.slots + 1)]

    def _bind_step(self, rows: int, graph: int = NO_GRAPH) -> Binding:
        inputs = {name: each.rows(0, rows) for name, each in self._buffers.items()}
        return self._bind(0, rows, inputs | {"total_sequence_length": on_this_machine(self._total)}, graph=graph)

    def prefill_inputs(self, rows: Sequence[PrefillRow], start: int = 0) -> dict[str, Buffer]:
        """What the graph takes for `rows` from token `start` on, the cache aside, right-padded to the longest row.
        The next call writes to the same buffers.
        """
        lengths = np.array([len(row.input_ids) for row in rows], np.int32)
        inputs = self._prefill_buffers(len(rows), int(lengths.max()) - start)
        ids, embeds = inputs["input_ids"].values, inputs["image_embeds"].values
        ids[...] = 0
        inputs["cache_position"].values[...] = np.arange(start, lengths.max())
        inputs["seqlens_k"].values[...] = lengths - 1
        image = slice(self.layout.image_start, self.layout.image_start + self.layout.image_tokens)
        for index, row in enumerate(rows):
            ids[index, : len(row.input_ids) - start] = row.input_ids[start:]
            if not start:  # elsewhere, what an embedding is does not matter
                embeds[index, image] = row.features
        return inputs | {"total_sequence_length": on_this_machine(np.array(lengths.max(), np.int32))}

    def _prefill_buffers(self, rows: int, length: int) -> dict[str, Buffer]:
        """Buffers of so many rows and tokens."""
        if rows > self._prefilled["seqlens_k"].shape[0]:
            self._prefilled = self._room_for(rows)
        return {
            name: each.shaped((rows, length, *each.shape[2:])[: len(each.shape)])
            for name, each in self._prefilled.items()
        }

    def _room_for(self, rows: int) -> dict[str, Buffer]:
        """Buffers for rows as long as they may be, so that none is made twice."""
        size = (rows, self.layout.max_seq_len)
        return {
            "input_ids": self.memory.zeros(size, "int64"),
            "cache_position": self.memory.zeros(size, "int64"),
            "image_embeds": self.memory.zeros((*size, self._hidden_size), "float"),
            "seqlens_k": self.memory.zeros((rows,), "int32"),
        }

    def _nothing_seen(self, rows: int) -> Buffer | None:
        return self._seen.nothing.rows(0, rows) if self._seen else None

    def _fill(
        self, first: int, rows: Sequence[PrefillRow], start: int, seen: Buffer | None, logits: Buffer | None = None
    ) -> Tokens:
        self._lengths[first : first + len(rows)] = [len(row.input_ids) for row in rows]
        self._bind(first, len(rows), self.prefill_inputs(rows, start), seen=seen, logits=logits).run()
        return self._pick(len(rows))

    def _bind(
        self,
        first: int,
        rows: int,
        inputs: dict[str, Buffer],
        *,
        seen: Buffer | None = None,
        logits: Buffer | None = None,
        graph: int = NO_GRAPH,
    ) -> Binding:
        """Bind a run of so many rows, from slot `first` on; `seen` are tokens before it, if not the slots' own, and
        `logits` is where its logits go, if not to those that are kept.
        """
        outputs = {name: each.rows(0, rows) for name, each in self._outputs.items()}
        outputs |= {"logits": logits} if logits else {}
        inputs = inputs | self._cache.past(first, rows)
        outputs |= self._cache.present(first, rows)
        if self._seen:
            inputs["past_seen"] = seen or self._seen.of_slots.rows(first, rows)
            outputs["present_seen"] = self._seen.of_slots.rows(first, rows)
        return self._session.bind(inputs, outputs, graph)

    def _take_memory(self) -> None:
        """Run the largest prefill, so that what it takes of a card is one piece that others use too, and is there."""
        nothing = np.zeros(self._feature_shape, np.float32)
        row = PrefillRow([self.layout.image_token_id] * self.layout.max_seq_len, nothing)
        self.prefill(0, [row] * min(self.prefill_rows, self.slots))

    def _pick(self, rows: int) -> Tokens:
        found = {name: each.values[:rows] for name, each in self._outputs.items()}
        self.logits = found.get("logits", self.logits)
        tokens: Tokens = found["next_token"].copy()
        return tokens


class SeenTokens:
    """Which tokens the row in each slot holds, for the repetition penalty; graphs read and write them.

    Args:
        manifest: of the bundle.
        slots: rows that can be alive at a time.
        memory: of the device that the graph runs on.
    """

    def __init__(self, manifest: Manifest, slots: int, memory: Memory) -> None:
        size, layout = manifest.decoder.vocab_size, manifest.layout
        self._memory = memory
        #: bool (N, V).
        self.of_slots = memory.zeros((slots, size), "bool", on_host=False)
        #: Before any token (N, V), and after those at the beginning of every row (1, V).
        self.nothing = memory.zeros((slots, size), "bool", on_host=False)
        self.prefix = memory.zeros((1, size), "bool")
        self.prefix.values[0, [*layout.head_ids, layout.image_token_id]] = True

    def move(self, source: int, target: int) -> None:
        """Copy one slot's tokens to another."""
        self._memory.move(self.of_slots, source, target)
