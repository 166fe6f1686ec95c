"""The decoder graph over the KV cache: prefills rows into slots, and runs decode steps over all live slots.

What enters: token ids of rows, places and features of their images, and, if answers are guided, their `Guidance`. What
leaves: the next token of each row, by argmax after the repetition penalty, or -1 if a logit or hidden state of the row
is not finite. Arrays are allocated once, in the memory of the device, and bound by address. A machine that computes the
graph wrongly is refused.

This module knows nothing of prompts as text, of when an answer ends, or of waiting rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qvl_batch.bundle.known_answers import Figure, KnownAnswers, known_figures, refuse_wrong, repeated
from qvl_batch.bundle.layout import Features, PlacedImage, mrope_positions
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_DRAWN, DECODER_GUIDED, HALVES, MANIFEST, Manifest, Tolerance
from qvl_batch.config import Device
from qvl_batch.decoder.guidance import Guidance
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
#: Most tokens of a prefill, padding included, by device; a longer row is prefilled in parts of so many. More would
#: delay live rows. On a CPU, batching saves no time for each row, unless rows are short; a single row does not fill a
#: GPU.
PREFILL_TOKENS: dict[Device, int] = {"cpu": 1024, "cuda": 8192}
#: Most rows of a prefill.
PREFILL_ROWS = 32


@dataclass(frozen=True, eq=False)
class PrefillRow:
    """Token ids of a row up to its answer, places of its images in order, features of each, float32 (T_img, D), and
    tokens whose scores as the first of the answer are asked for, if the decoder is guided.
    """

    input_ids: Sequence[int]
    images: Sequence[PlacedImage] = ()
    features: Sequence[Features] = ()
    candidates: Sequence[int] = ()

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """M-RoPE positions, int64 (3, S)."""
        return mrope_positions(len(self.input_ids), self.images)


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
        guided: let callers guide the next tokens by `guidance`.
        logprobs: as for `Guidance`.
        drawn: with `guided`, tokens can be drawn by what `guidance` has.
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
        guided: bool = False,
        logprobs: bool = False,
        drawn: bool = False,
        prove: bool = True,
    ) -> None:
        manifest, self._bundle = bundle.manifest, bundle
        self.logits = np.zeros((0, manifest.decoder.vocab_size), np.float32)
        self.layout, self.slots = manifest.layout, slots
        self.memory: Memory = memory or HostMemory()
        #: Most tokens, padding included, and most rows that a caller should give to a prefill.
        self.prefill_tokens = prefill_tokens(manifest, self.memory.device)
        self.prefill_rows = min(PREFILL_ROWS, slots)
        self._captures = self.memory.device == "cuda" and manifest.dtype in HALVES
        path = bundle.file(DECODER_DRAWN if drawn else DECODER_GUIDED if guided else DECODER)
        self._session = Session(path, threads, graph, self.memory, captures=self._captures)
        kinds = self._session.inputs
        if kinds.get("image_embeds") != "float":
            raise BundleError(f"{bundle.path / DECODER} has no residual stream in fp32: export the checkpoint again")
        self._cache = KvCache(manifest, slots, PREFIX_ENTRIES, kinds["past_key.0"], self.memory)
        self._hidden_size = manifest.decoder.hidden_size
        self._seen = SeenTokens(manifest, slots, self.memory) if "past_seen" in kinds else None
        if (self._seen is None) != (manifest.generation.repetition_penalty == 1):
            raise BundleError(
                f"{bundle.path / DECODER} and {MANIFEST} disagree on a repetition penalty: export the checkpoint again"
            )
        #: Tokens of the row in each slot, and how far the position of its next token is from their number.
        self._lengths, self._deltas = np.zeros(slots, np.int32), np.zeros(slots, np.int64)
        # A decode step has no image tokens: the mask stays zero, and the graph ignores the embeddings.
        storage = self._allocate_inputs(slots, slots, on_host=False)
        self._step_inputs = [_shaped(storage, rows, 1) for rows in range(1, slots + 1)]
        self._prefill_storage = self._allocate_inputs(self.prefill_rows, self.prefill_tokens, on_host=True)
        self._total_length = np.zeros((), np.int32)
        self._outputs = {"next_token": self.memory.zeros((slots,), "int64")}
        #: The next token of each row of the last call, int64 (B,).
        self.next_tokens: Tokens = np.zeros(0, np.int64)
        if keep_logits:
            self._outputs["logits"] = self.memory.zeros((slots, manifest.decoder.vocab_size), "float")
        #: What guides the next tokens, if anything does.
        self.guidance: Guidance | None = None
        if guided:
            top = int(self._session.outputs["top_scores"][1]) if drawn else None
            self.guidance = Guidance(manifest.decoder.vocab_size, slots, self.memory, logprobs=logprobs, top=top)
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
        image = PlacedImage(self.layout.image_start, *self.layout.resolution.grid(*known.pixels.shape[:2]))
        row = PrefillRow(known.input_ids.tolist(), [image], [repeated(known.embeds, image.tokens)])
        logits = self.memory.zeros((1, len(known.logits)), "float")
        tokens = [self._run_prefill(0, [row], logits=logits)]
        # Not captured: a captured step belongs to the thread that captured it, and the engine has a thread of its own.
        step = self._bind_step(1)
        tokens += [self._run_step(step, token) for token in known.given[:, None]]
        return known.of_decoder(logits.values[0], [int(each[0]) for each in tokens], tolerance)

    def prefill(self, first: int, rows: Sequence[PrefillRow]) -> Tokens:
        """Prefill `rows` into slots `first`, `first + 1`, ...; returns the first token of each answer, int64 (B,)."""
        return self._run_prefill(first, rows)

    def prefill_part(self, slot: int, row: PrefillRow, start: int, stop: int, entry: int | None = None) -> Tokens:
        """Prefill tokens `start` to `stop` - 1 of a row whose tokens before are in `slot`.

        Every token goes through the same products as in `prefill`, so the resulting cache is the same.

        Args:
            slot: the row's slot.
            row: the row.
            start: first token.
            stop: token after the last.
            entry: prefix-cache entry to copy the tokens before `start` from, if they are not in the slot yet.

        Returns:
            The token after the last, int64 (1,): the first token of the answer if `stop` is the end of the row.
        """
        seen = None
        if entry is not None:
            self._cache.copy(self.slots + entry, slot, start)
            seen = self._seen.only(row.input_ids[:start]) if self._seen else None
        return self._run_prefill(slot, [row], start, stop, seen)

    def store_prefix(self, slot: int, entry: int, length: int) -> None:
        """Copy the first `length` tokens of the row in `slot` to a prefix-cache entry, 0 to `PREFIX_ENTRIES` - 1."""
        self._cache.copy(slot, self.slots + entry, length)

    def step(self, tokens: Tokens) -> Tokens:
        """Append `tokens`, int64 (B,), to the rows in slots 0 to B - 1; returns the next tokens, int64 (B,)."""
        return self._run_step(self._steps[len(tokens) - 1], tokens)

    def _run_step(self, step: Binding, tokens: Tokens) -> Tokens:
        rows = len(tokens)
        lengths = self._lengths[:rows]
        inputs = self._step_inputs[rows - 1]
        inputs["input_ids"].values[:, 0] = tokens
        inputs["position_ids"].values[:, :, 0] = lengths + self._deltas[:rows]
        inputs["cache_position"].values[:, 0] = lengths
        inputs["seqlens_k"].values[:] = lengths
        lengths += 1
        # A captured step replays the total length of its capture; the length of each row is in `seqlens_k`.
        self._total_length[...] = self.layout.max_seq_len if self._captures else lengths.max()
        step.run()
        return self._next_tokens(rows)

    def copy(self, source: int, target: int) -> None:
        """Copy the row in slot `source` to slot `target`."""
        self._cache.copy(source, target, int(self._lengths[source]))
        self._lengths[target], self._deltas[target] = self._lengths[source], self._deltas[source]
        if self._seen:
            self._seen.copy(source, target)

    @cached_property
    def _steps(self) -> list[Binding]:
        """Decode steps of 1 to `slots` rows, bound once."""
        return [self._bind_step(rows, graph=rows) for rows in range(1, self.slots + 1)]

    def _bind_step(self, rows: int, graph: int = NO_GRAPH) -> Binding:
        inputs = self._step_inputs[rows - 1] | {"total_sequence_length": on_this_machine(self._total_length)}
        return self._bind(0, rows, inputs, graph=graph)

    def prefill_inputs(self, rows: Sequence[PrefillRow], start: int = 0, stop: int | None = None) -> dict[str, Buffer]:
        """Inputs of the graph, without the cache, for tokens `start` to `stop` - 1 of `rows`, by default to their end,
        right-padded to the longest.

        The next call overwrites the same buffers.
        """
        ends = np.array([len(row.input_ids) if stop is None else stop for row in rows], np.int32)
        length = int(ends.max()) - start
        most_rows, most_tokens = (self._prefill_storage[name].shape[-1] for name in ("seqlens_k", "input_ids"))
        if len(rows) > most_rows or len(rows) * length > most_tokens:
            self._prefill_storage = self._allocate_inputs(len(rows), len(rows) * length, on_host=True)
        inputs = _shaped(self._prefill_storage, len(rows), length)
        ids, positions = inputs["input_ids"].values, inputs["position_ids"].values
        embeds, image_mask = inputs["image_embeds"].values, inputs["image_mask"].values
        ids[...], positions[...], image_mask[...] = 0, 0, False
        inputs["cache_position"].values[...] = np.arange(start, ends.max())
        inputs["seqlens_k"].values[...] = ends - 1
        for index, (row, end) in enumerate(zip(rows, ends.tolist(), strict=True)):
            ids[index, : end - start] = row.input_ids[start:end]
            positions[:, index, : end - start] = row.positions[:, start:end]
            for image, features in zip(row.images, row.features, strict=True):
                first, last = max(image.start, start), min(image.stop, end)
                if first < last:
                    embeds[index, first - start : last - start] = features[first - image.start : last - image.start]
                    image_mask[index, first - start : last - start] = True
        return inputs | {"total_sequence_length": on_this_machine(np.array(ends.max(), np.int32))}

    def _allocate_inputs(self, rows: int, tokens: int, *, on_host: bool) -> dict[str, Buffer]:
        """Inputs of the graph for up to so many rows and tokens in all, allocated once.

        Args:
            rows: most rows.
            tokens: most tokens of all rows together, padding included.
            on_host: whether the host writes image embeddings and their mask.
        """
        return {
            "input_ids": self.memory.zeros((1, tokens), "int64"),
            "position_ids": self.memory.zeros((3, 1, tokens), "int64"),
            "cache_position": self.memory.zeros((1, tokens), "int64"),
            "image_embeds": self.memory.zeros((1, tokens, self._hidden_size), "float", on_host=on_host),
            "image_mask": self.memory.zeros((1, tokens), "bool", on_host=on_host),
            "seqlens_k": self.memory.zeros((rows,), "int32"),
        }

    def _run_prefill(
        self,
        first: int,
        rows: Sequence[PrefillRow],
        start: int = 0,
        stop: int | None = None,
        seen: Buffer | None = None,
        logits: Buffer | None = None,
    ) -> Tokens:
        """Prefill tokens `start` to `stop` - 1 of `rows`; `seen` and `logits` are as in `_bind`."""
        if not start and self._seen:
            seen = self._seen.nothing.rows(0, len(rows))
        for slot, row in enumerate(rows, start=first):
            end = len(row.input_ids) if stop is None else stop
            self._lengths[slot] = end
            self._deltas[slot] = row.positions[:, :end].max() + 1 - end
        candidates = [row.candidates for row in rows]
        inputs = self.prefill_inputs(rows, start, stop)
        self._bind(first, len(rows), inputs, seen=seen, logits=logits, candidates=candidates).run()
        return self._next_tokens(len(rows))

    def _bind(
        self,
        first: int,
        rows: int,
        inputs: dict[str, Buffer],
        *,
        seen: Buffer | None = None,
        logits: Buffer | None = None,
        candidates: Sequence[Sequence[int]] = (),
        graph: int = NO_GRAPH,
    ) -> Binding:
        """Bind a run of `rows` rows, from slot `first` on.

        Args:
            first: first slot.
            rows: number of rows.
            inputs: inputs of the graph, without the cache.
            seen: tokens that the rows contain before the run; by default those of the slots.
            logits: receives the logits; by default those of `keep_logits` do, if requested.
            candidates: of each row, in a prefill, if the decoder is guided.
            graph: number of the CUDA graph, see `Session.bind`.
        """
        outputs = {name: each.rows(0, rows) for name, each in self._outputs.items()}
        outputs |= {"logits": logits} if logits else {}
        inputs = inputs | self._cache.past(first, rows)
        outputs |= self._cache.present(first, rows)
        if self.guidance:
            guides, scores = self.guidance.bind(first, rows, candidates)
            inputs |= guides
            outputs |= scores
        if self._seen:
            inputs["past_seen"] = seen or self._seen.of_slots.rows(first, rows)
            outputs["present_seen"] = self._seen.of_slots.rows(first, rows)
        return self._session.bind(inputs, outputs, graph)

    def _reserve_memory(self) -> None:
        """Run the largest prefills, of many rows and of one, so that ONNX Runtime allocates its memory on the card now,
        in one piece that smaller runs reuse.
        """
        token = self.layout.image_token_id
        for rows in {1, self.prefill_rows}:
            length = min(self.layout.max_seq_len, self.prefill_tokens // rows)
            self.prefill(0, [PrefillRow([token] * length)] * rows)

    def _next_tokens(self, rows: int) -> Tokens:
        """Copy the next tokens out of the outputs, and publish the logits if they are kept."""
        found = {name: each.values[:rows] for name, each in self._outputs.items()}
        self.logits = found.get("logits", self.logits)
        if self.guidance:
            self.guidance.publish(rows)
        self.next_tokens = found["next_token"].copy()
        return self.next_tokens


class SeenTokens:
    """Which tokens the row in each slot contains, for the repetition penalty. The graph reads and writes them.

    Args:
        manifest: manifest of the bundle.
        slots: number of slots.
        memory: memory of the device that the graph runs on.
    """

    def __init__(self, manifest: Manifest, slots: int, memory: Memory) -> None:
        size = manifest.decoder.vocab_size
        self._memory = memory
        #: Tokens of the row in each slot, bool (N, V).
        self.of_slots = memory.zeros((slots, size), "bool", on_host=False)
        #: No tokens, bool (N, V).
        self.nothing = memory.zeros((slots, size), "bool", on_host=False)
        self._prefix = memory.zeros((1, size), "bool")

    def only(self, tokens: Sequence[int]) -> Buffer:
        """These tokens, bool (1, V); the next call overwrites the same buffer."""
        self._prefix.values[...] = False
        self._prefix.values[0, tokens] = True
        return self._prefix

    def copy(self, source: int, target: int) -> None:
        """Copy the tokens of one slot to another."""
        self._memory.copy(self.of_slots, source, target)


def prefill_tokens(manifest: Manifest, device: Device) -> int:
    """Most tokens of a prefill, padding included: no more than all slots of a prefill hold."""
    return min(PREFILL_TOKENS[device], PREFILL_ROWS * manifest.layout.max_seq_len)


def _shaped(inputs: dict[str, Buffer], rows: int, length: int) -> dict[str, Buffer]:
    """Views of inputs of the graph for `rows` rows of `length` tokens."""
    shapes = {
        "position_ids": (3, rows, length),
        "seqlens_k": (rows,),
        "image_embeds": (rows, length, inputs["image_embeds"].shape[-1]),
    }
    return {name: each.shaped(shapes.get(name, (rows, length))) for name, each in inputs.items()}
