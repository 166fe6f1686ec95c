"""The decoder graph over the KV cache: prefills rows into slots, and runs decode steps over all live slots.

What enters: token ids and image features of rows. What leaves: the next token of each row, by argmax after the
repetition penalty, or -1 if a logit or hidden state of the row is not finite. Arrays are allocated once, in the memory
of the device, and bound by address. A machine that computes the graph wrongly is refused.

This module knows nothing of prompts as text, of when an answer ends, or of waiting rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.known_answers import Figure, KnownAnswers, known_figures, refuse_wrong, repeated
from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, HALVES, MANIFEST, Manifest, Tolerance
from qvl_batch.config import Device
from qvl_batch.decoder.kv_cache import KvCache
from qvl_batch.errors import BundleError
from qvl_batch.runtime.devices import machine_of
from qvl_batch.runtime.memory import Buffer, HostMemory, Memory, on_this_machine
from qvl_batch.runtime.session import NO_GRAPH, Binding, Session

Tokens = NDArray[np.int64]
#: The next token of a row with a logit or hidden state that is not finite.
NO_TOKEN = -1
#: Number of prefix-cache entries.
PREFIX_ENTRIES = 2
#: Largest prefill batch, by device. A larger one delays live rows. On a CPU, batching saves no time for each row; a
#: single row does not fill a GPU.
PREFILL_ROWS: dict[Device, int] = {"cpu": 2, "cuda": 8}


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Token ids of a row up to its answer, and features of its image, float32 (T_img, D)."""

    input_ids: Sequence[int]
    features: Features


class Decoder:
    """A decoder session and its KV cache. Live rows occupy slots 0 to B - 1. Not thread-safe.

    Args:
        bundle: contains the graph.
        slots: number of slots: rows that can be live at a time.
        threads: threads for one operator.
        keep_logits: keep each call's logits in `logits`, float32 (B, V), until the next call.
        memory: memory of the device that the graph runs on; by default of the host. On a GPU it holds all arrays, and
            only tokens, positions and lengths are copied to and from the host in a step. In half precision, the step
            of each number of rows is captured as a CUDA graph when it first runs. In fp32 it is not: attention copies
            addresses from the host to the GPU, and a captured step would copy the same ones again.
        graph: ONNX file contents to load in place of the bundle's graph.
        prove: check the graph against the bundle's known answers, which takes a prefill and a few steps of one row.

    Raises:
        BundleError: the graph cannot be loaded, is in half precision throughout, or differs from the manifest in its
            repetition penalty.
        DeviceError: the device is out of memory for weights or cache, or computes the graph wrongly.
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
        #: Largest number of rows that a caller should give to `prefill`.
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
            raise BundleError(
                f"{bundle.path / DECODER} and {MANIFEST} disagree on a repetition penalty: export the checkpoint again"
            )
        self._lengths = np.zeros(slots, np.int32)
        self._step_inputs = {
            "input_ids": self.memory.zeros((slots, 1), "int64"),
            "cache_position": self.memory.zeros((slots, 1), "int64"),
            "seqlens_k": self.memory.zeros((slots,), "int32"),
            # A decode step has no image tokens: the graph ignores these values.
            "image_embeds": self.memory.zeros((slots, 1, self._hidden_size), "float", on_host=False),
        }
        self._prefill_storage = self._allocate_prefill(self.prefill_rows)
        self._total_length = np.zeros((), np.int32)
        self._outputs = {"next_token": self.memory.zeros((slots,), "int64")}
        if keep_logits:
            self._outputs["logits"] = self.memory.zeros((slots, manifest.decoder.vocab_size), "float")
        if self.memory.device == "cuda":
            self._reserve_memory()
        if prove:
            refuse_wrong(self.figures(), "the decoder graph", self.machine, bundle.path)

    @property
    def machine(self) -> str:
        """Processor or card, and version of ONNX Runtime."""
        return machine_of(self.memory)

    def figures(self) -> list[Figure]:
        """Figures of the graph on the bundle's known answers, computed in slot 0; empty if it has none."""
        return known_figures(self._bundle, self._figures)

    def _figures(self, known: KnownAnswers, tolerance: Tolerance) -> list[Figure]:
        row = PrefillRow(known.input_ids.tolist(), repeated(known.embeds, self.layout.image_tokens))
        logits = self.memory.zeros((1, len(known.logits)), "float")
        tokens = [self._run_prefill(0, [row], 0, self._nothing_seen(1), logits)]
        # Not captured: a captured step belongs to the thread that captured it, and the engine has a thread of its own.
        step = self._bind_step(1)
        tokens += [self._run_step(step, token) for token in known.given[:, None]]
        return known.of_decoder(logits.values[0], [int(each[0]) for each in tokens], tolerance)

    def prefill(self, first: int, rows: Sequence[PrefillRow]) -> Tokens:
        """Prefill `rows` into slots `first`, `first + 1`, ...; returns the first token of each answer, int64 (B,)."""
        return self._run_prefill(first, rows, 0, self._nothing_seen(len(rows)))

    @property
    def prefix_tokens(self) -> int:
        """Length of the prefix that all rows of an image share: head tokens (system text) and image."""
        return self.layout.image_start + self.layout.image_tokens

    def store_prefix(self, slot: int, entry: int) -> None:
        """Copy the prefix of the row in `slot` to a prefix-cache entry, 0 to `PREFIX_ENTRIES` - 1."""
        self._cache.move(slot, self.slots + entry, self.prefix_tokens)

    def prefill_after_prefix(self, slot: int, entry: int, row: PrefillRow) -> Tokens:
        """Prefill a row whose prefix is in a prefix-cache entry; returns the first token of its answer, int64 (1,).

        Every token goes through the same products as in `prefill`, so the resulting cache is the same.
        """
        self._cache.move(self.slots + entry, slot, self.prefix_tokens)
        return self._run_prefill(slot, [row], self.prefix_tokens, seen=self._seen.prefix if self._seen else None)

    def step(self, tokens: Tokens) -> Tokens:
        """Append `tokens`, int64 (B,), to the rows in slots 0 to B - 1; returns the next tokens, int64 (B,)."""
        return self._run_step(self._steps[len(tokens) - 1], tokens)

    def _run_step(self, step: Binding, tokens: Tokens) -> Tokens:
        rows = len(tokens)
        lengths = self._lengths[:rows]
        self._step_inputs["input_ids"].values[:rows, 0] = tokens
        self._step_inputs["cache_position"].values[:rows, 0] = lengths
        self._step_inputs["seqlens_k"].values[:rows] = lengths
        lengths += 1
        # A captured step replays the total length of its capture; the length of each row is in `seqlens_k`.
        self._total_length[...] = self.layout.max_seq_len if self._captures else lengths.max()
        step.run()
        return self._next_tokens(rows)

    def move(self, source: int, target: int) -> None:
        """Move the row in slot `source` to slot `target`."""
        self._cache.move(source, target, int(self._lengths[source]))
        self._lengths[target] = self._lengths[source]
        if self._seen:
            self._seen.move(source, target)

    @cached_property
    def _steps(self) -> list[Binding]:
        """Decode steps of 1 to `slots` rows, bound once."""
        return [self._bind_step(rows, graph=rows) for rows in range(1, self.slots + 1)]

    def _bind_step(self, rows: int, graph: int = NO_GRAPH) -> Binding:
        inputs = {name: each.rows(0, rows) for name, each in self._step_inputs.items()}
        return self._bind(0, rows, inputs | {"total_sequence_length": on_this_machine(self._total_length)}, graph=graph)

    def prefill_inputs(self, rows: Sequence[PrefillRow], start: int = 0) -> dict[str, Buffer]:
        """Inputs of the graph, without the cache, for `rows` from token `start` on, right-padded to the longest row.

        The next call overwrites the same buffers.
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
            if not start:  # the graph uses embeddings at image tokens only, and these are in the prefix
                embeds[index, image] = row.features
        return inputs | {"total_sequence_length": on_this_machine(np.array(lengths.max(), np.int32))}

    def _prefill_buffers(self, rows: int, length: int) -> dict[str, Buffer]:
        """Views of the prefill buffers for `rows` rows of `length` tokens."""
        if rows > self._prefill_storage["seqlens_k"].shape[0]:
            self._prefill_storage = self._allocate_prefill(rows)
        return {
            name: each.shaped((rows, length, *each.shape[2:])[: len(each.shape)])
            for name, each in self._prefill_storage.items()
        }

    def _allocate_prefill(self, rows: int) -> dict[str, Buffer]:
        """Prefill buffers for `rows` rows of the maximum length, so that they are allocated once."""
        size = (rows, self.layout.max_seq_len)
        return {
            "input_ids": self.memory.zeros(size, "int64"),
            "cache_position": self.memory.zeros(size, "int64"),
            "image_embeds": self.memory.zeros((*size, self._hidden_size), "float"),
            "seqlens_k": self.memory.zeros((rows,), "int32"),
        }

    def _nothing_seen(self, rows: int) -> Buffer | None:
        return self._seen.nothing.rows(0, rows) if self._seen else None

    def _run_prefill(
        self, first: int, rows: Sequence[PrefillRow], start: int, seen: Buffer | None, logits: Buffer | None = None
    ) -> Tokens:
        """Prefill `rows` from token `start` on; `seen` and `logits` are as in `_bind`."""
        self._lengths[first : first + len(rows)] = [len(row.input_ids) for row in rows]
        self._bind(first, len(rows), self.prefill_inputs(rows, start), seen=seen, logits=logits).run()
        return self._next_tokens(len(rows))

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
        """Bind a run of `rows` rows, from slot `first` on.

        Args:
            first: first slot.
            rows: number of rows.
            inputs: inputs of the graph, without the cache.
            seen: tokens that the rows contain before the run; by default those of the slots.
            logits: receives the logits; by default those of `keep_logits` do, if requested.
            graph: number of the CUDA graph, see `Session.bind`.
        """
        outputs = {name: each.rows(0, rows) for name, each in self._outputs.items()}
        outputs |= {"logits": logits} if logits else {}
        inputs = inputs | self._cache.past(first, rows)
        outputs |= self._cache.present(first, rows)
        if self._seen:
            inputs["past_seen"] = seen or self._seen.of_slots.rows(first, rows)
            outputs["present_seen"] = self._seen.of_slots.rows(first, rows)
        return self._session.bind(inputs, outputs, graph)

    def _reserve_memory(self) -> None:
        """Run the largest prefill, so that ONNX Runtime allocates its memory on the card now, in one piece that smaller
        runs reuse.
        """
        nothing = np.zeros(self._feature_shape, np.float32)
        row = PrefillRow([self.layout.image_token_id] * self.layout.max_seq_len, nothing)
        self.prefill(0, [row] * min(self.prefill_rows, self.slots))

    def _next_tokens(self, rows: int) -> Tokens:
        """Copy the next tokens out of the outputs, and publish the logits if they are kept."""
        found = {name: each.values[:rows] for name, each in self._outputs.items()}
        self.logits = found.get("logits", self.logits)
        tokens: Tokens = found["next_token"].copy()
        return tokens


class SeenTokens:
    """Which tokens the row in each slot contains, for the repetition penalty. The graph reads and writes them.

    Args:
        manifest: manifest of the bundle.
        slots: number of slots.
        memory: memory of the device that the graph runs on.
    """

    def __init__(self, manifest: Manifest, slots: int, memory: Memory) -> None:
        size, layout = manifest.decoder.vocab_size, manifest.layout
        self._memory = memory
        #: Tokens of the row in each slot, bool (N, V).
        self.of_slots = memory.zeros((slots, size), "bool", on_host=False)
        #: No tokens, bool (N, V); and those of the prefix that all rows of an image share, bool (1, V).
        self.nothing = memory.zeros((slots, size), "bool", on_host=False)
        self.prefix = memory.zeros((1, size), "bool")
        self.prefix.values[0, [*layout.head_ids, layout.image_token_id]] = True

    def move(self, source: int, target: int) -> None:
        """Copy the tokens of one slot to another."""
        self._memory.move(self.of_slots, source, target)
