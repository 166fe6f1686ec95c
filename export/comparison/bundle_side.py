"""A bundle's side of a comparison: the worker's own vision encoder, layout and engine.

Answers go through the engine with several rows in its slots, as in a job, but with a decoder that
also records the logits of each token. Graphs that are made for a GPU run there if there is one, and
else on the CPU, where half precision is emulated. Plain graphs that a tool has quantized can take the
place of the bundle's.
"""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from export.comparison.layers import LayerProbe, Tower, plain_feeds, worker_feeds
from export.comparison.plain_graphs import PlainDecoder, PlainVision
from export.comparison.questions import Question
from export.comparison.traces import Array, Decoded, States, Trace
from export.half import emulated_graph
from export.sample import SampleRow
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, HALVES, VISION
from qvl_batch.config import Device, DeviceOption
from qvl_batch.decoder.decoder import Decoder, PrefillRow, Tokens
from qvl_batch.decoder.engine import Engine
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.decoder.requests import Completion, Request
from qvl_batch.errors import NumericError, RowError
from qvl_batch.runtime.devices import has_cuda, memory_on, usable_cpus
from qvl_batch.runtime.memory import Memory
from qvl_batch.schema import Failure
from qvl_batch.vision.encoder import VisionEncoder

SLOTS = 8


@dataclass(slots=True)
class _Record:
    tokens: list[int] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)


class RecordingDecoder(Decoder):
    """A decoder that records the tokens of each row and their logits.

    `records` has those of each row that was prefilled; rows are told apart by identity.
    """

    def __init__(
        self, bundle: Bundle, slots: int, threads: int, memory: Memory | None = None, graph: bytes | None = None
    ) -> None:
        super().__init__(bundle, slots, threads, keep_logits=True, memory=memory, graph=graph, prove=False)
        self.records: dict[int, _Record] = {}
        self._in_slot = [_Record() for _ in range(slots)]

    def prefill(self, first: int, rows: Sequence[PrefillRow]) -> Tokens:
        """As `Decoder.prefill`."""
        tokens = super().prefill(first, rows)
        for slot, row in enumerate(rows, start=first):
            self._in_slot[slot] = self.records[id(row)] = _Record()
        self._record(first, tokens)
        return tokens

    def prefill_part(self, slot: int, row: PrefillRow, start: int, stop: int, entry: int | None = None) -> Tokens:
        """As `Decoder.prefill_part`."""
        tokens = super().prefill_part(slot, row, start, stop, entry)
        if stop == len(row.input_ids):
            self._in_slot[slot] = self.records[id(row)] = _Record()
            self._record(slot, tokens)
        return tokens

    def step(self, tokens: Tokens) -> Tokens:
        """As `Decoder.step`."""
        following = super().step(tokens)
        self._record(0, following)
        return following

    def copy(self, source: int, target: int) -> None:
        """As `Decoder.copy`."""
        super().copy(source, target)
        self._in_slot[target] = self._in_slot[source]

    def _record(self, first: int, tokens: Tokens) -> None:
        for slot, (token, logits) in enumerate(zip(tokens.tolist(), self.logits, strict=True), start=first):
            self._in_slot[slot].tokens.append(token)
            self._in_slot[slot].logits.append(logits.copy())


class EngineDecoder:
    """The engine over a bundle's decoder, which records."""

    def __init__(self, bundle: Bundle, threads: int, memory: Memory, graph: bytes | None) -> None:
        self.decoder = RecordingDecoder(bundle, SLOTS, threads, memory, graph)
        # One engine for all questions: on a GPU, steps are captured once for each thread.
        self._engine = Engine(self.decoder, bundle.manifest.generation.eos_token_ids)

    def complete(self, requests: Sequence[Request]) -> list[Decoded | Failure]:
        """Answer rows, in order."""
        self.decoder.records = {}
        futures = [self._engine.submit(request) for request in requests]
        wait(futures)
        return [self._decoded(request, future) for request, future in zip(requests, futures, strict=True)]

    def _decoded(self, request: Request, future: "Future[Completion]") -> Decoded | Failure:
        try:
            count = len(future.result().token_ids) + 1
        except NumericError as error:
            return Failure.of(error)
        record = self.decoder.records[id(request.row)]
        return Decoded(record.tokens[:count], record.logits[:count])


@dataclass(frozen=True, slots=True)
class Graphs:
    """Plain graphs that take the place of a bundle's."""

    decoder: Path | None = None
    vision: Path | None = None


class BundleSide:
    """A bundle as a side. It skips the check of known answers: a comparison measures errors instead of refusing them.

    Args:
        bundle: the bundle.
        max_new_tokens: longest answer in tokens.
        max_seq_len: longest row in tokens, at most the contract's.
        layers: also load what `states` and `probe` need.
        system_prompt: as the job's.
        device: where graphs that are made for a GPU run.
        graphs: run these in place of the bundle's.

    Raises:
        DeviceError: CUDA was asked for and cannot be used.
        ConfigError: one of the graphs cannot take the place of the bundle's.
    """

    def __init__(
        self,
        bundle: Bundle,
        max_new_tokens: int,
        max_seq_len: int,
        *,
        layers: bool,
        system_prompt: str | None = None,
        device: DeviceOption = "auto",
        graphs: Graphs = Graphs(),
    ) -> None:
        threads, manifest = usable_cpus(), bundle.manifest
        self.layout = RowLayout(bundle, system_prompt)
        self._max_new_tokens, self._max_seq_len = max_new_tokens, max_seq_len
        self._hidden_size, self._eos = manifest.decoder.hidden_size, manifest.generation.eos_token_ids
        on_gpu = device == "cuda" or (device == "auto" and has_cuda())
        emulated = {
            name: emulated_graph(bundle.file(name)) if dtype in HALVES and not on_gpu else None
            for name, dtype in ((VISION, manifest.vision_dtype), (DECODER, manifest.dtype))
        }
        self._vision: VisionEncoder | PlainVision
        self._decoder: EngineDecoder | PlainDecoder
        if graphs.vision:
            self._vision = PlainVision(graphs.vision, bundle, threads)
        else:
            where: Device = "cuda" if manifest.vision_dtype in HALVES and on_gpu else "cpu"
            self._vision = VisionEncoder(bundle, threads, where, graph=emulated[VISION], prove=False)
        if graphs.decoder:
            self._decoder = PlainDecoder(graphs.decoder, bundle, threads)
        else:
            memory = memory_on("cuda" if manifest.device == "cuda" and on_gpu else "cpu")
            self._decoder = EngineDecoder(bundle, threads, memory, emulated[DECODER])
        self._probe = self._layer_probe(bundle, threads, graphs) if layers else None

    def _layer_probe(self, bundle: Bundle, threads: int, graphs: Graphs) -> LayerProbe:
        manifest = bundle.manifest
        if graphs.vision:
            vision = Tower.plain(graphs.vision, threads, "vision", _vision_depth(bundle))
        else:
            vision = Tower.of_bundle(bundle.file(VISION), threads, "vision", manifest.vision_dtype)
        if graphs.decoder:
            language = Tower.plain(graphs.decoder, threads, "decoder", manifest.decoder.layers)
        else:
            language = Tower.of_bundle(bundle.file(DECODER), threads, "decoder", manifest.dtype)
        engine = self._decoder
        feeds = worker_feeds(bundle, engine.decoder) if isinstance(engine, EngineDecoder) else plain_feeds(bundle)
        return LayerProbe(bundle, vision, language, feeds)

    @property
    def probe(self) -> LayerProbe:
        """The probe of this bundle's layers."""
        assert self._probe is not None
        return self._probe

    def answer(self, questions: Sequence[Question]) -> list[Trace | Failure]:
        """Answer questions that have no failure, in order."""
        return self.answer_rows([self._shown_or_failure(question) for question in questions])

    def answer_rows(self, rows: Sequence[SampleRow | Failure]) -> list[Trace | Failure]:
        """Answer rows, in order; a failure stays what it is."""
        requests = [row if isinstance(row, Failure) else self._request(row) for row in rows]
        decoded = iter(self._decoder.complete([request for request in requests if isinstance(request, Request)]))
        return [
            request if isinstance(request, Failure) else self._trace(request, next(decoded)) for request in requests
        ]

    def states(self, question: Question) -> States:
        """Hidden states of a question that this side can answer."""
        return self.probe.states(self.shown(question))

    def shown(self, question: Question) -> SampleRow:
        """A question as a row, with its pixels in the order of the row.

        Raises:
            RowError: it cannot be laid out.
        """
        resolution = self.layout.layout.resolution
        grids = [resolution.grid(*image.pixels.shape[:2]) for image in question.images]
        tokens = self.layout.row(question.conversation, grids)
        return SampleRow(
            tokens.input_ids, tokens.images, [question.images[image.index].pixels for image in tokens.images]
        )

    def _shown_or_failure(self, question: Question) -> SampleRow | Failure:
        try:
            return self.shown(question)
        except RowError as error:
            return Failure.of(error)

    def _request(self, row: SampleRow) -> Request | Failure:
        try:
            features = list(map(self._vision.encode, row.pixels))
        except RowError as error:
            return Failure.of(error)
        limit = min(self._max_new_tokens, self._max_seq_len - len(row.input_ids))
        return Request(PrefillRow(row.input_ids, row.images, features), limit)

    def _trace(self, request: Request, decoded: Decoded | Failure) -> Trace | Failure:
        if isinstance(decoded, Failure):
            return decoded
        *tokens, last = decoded.token_ids
        return Trace(
            text=self.layout.text(tokens if last in self._eos else decoded.token_ids),
            token_ids=decoded.token_ids,
            input_ids=list(request.row.input_ids),
            features=np.concatenate([np.zeros((0, self._hidden_size), np.float32), *request.row.features]),
            logits=np.stack(decoded.logits),
        )


def _vision_depth(bundle: Bundle) -> int:
    """Number of vision blocks."""
    graph = onnx.load(bundle.file(VISION), load_external_data=False).graph
    modules = (node.name.split("/")[0].split(".") for node in graph.node if node.name.startswith("vision.blocks."))
    return len({module[2] for module in modules})
