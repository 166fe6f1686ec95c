"""A bundle's side of a comparison: the worker's own vision encoder, layout and engine.

Answers go through the engine with several rows in its slots, as in a job, but with a decoder that
also records the logits of each token. Graphs that are made for a GPU run there if there is one, and
else on the CPU, where half precision is emulated.
"""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import numpy as np

from comparison.layers import LayerProbe
from comparison.questions import Question
from comparison.traces import Array, States, Trace
from export.half import emulated_graph
from qvl_batch.bundle.layout import Pixels
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, HALVES, VISION
from qvl_batch.config import Device, DeviceOption
from qvl_batch.decoder.decoder import Decoder, PrefillRow, Tokens
from qvl_batch.decoder.engine import Engine
from qvl_batch.decoder.prompts import RowLayout, TokenRow
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


class BundleSide:
    """A bundle as a side. It skips the check of known answers: a comparison measures errors instead of refusing them.

    Args:
        bundle: the bundle.
        max_new_tokens: longest answer in tokens.
        max_seq_len: longest row in tokens, at most the contract's.
        layers: also load what `states` and `probe` need.
        system_prompt: as the job's.
        device: where graphs that are made for a GPU run.

    Raises:
        DeviceError: CUDA was asked for and cannot be used.
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
    ) -> None:
        threads = usable_cpus()
        self.layout = RowLayout(bundle, system_prompt)
        self._max_new_tokens, self._max_seq_len = max_new_tokens, max_seq_len
        self._hidden_size = bundle.manifest.decoder.hidden_size
        types = {VISION: bundle.manifest.vision_dtype, DECODER: bundle.manifest.dtype}
        on_gpu = device == "cuda" or (device == "auto" and has_cuda())
        graphs = {
            name: emulated_graph(bundle.file(name)) if dtype in HALVES and not on_gpu else None
            for name, dtype in types.items()
        }
        where: Device = "cuda" if types[VISION] in HALVES and on_gpu else "cpu"
        memory = memory_on("cuda" if bundle.manifest.device == "cuda" and on_gpu else "cpu")
        self._vision = VisionEncoder(bundle, threads, where, graph=graphs[VISION], prove=False)
        self._decoder = RecordingDecoder(bundle, SLOTS, threads, memory, graphs[DECODER])
        # One engine for all questions: on a GPU, steps are captured once for each thread.
        self._engine = Engine(self._decoder, bundle.manifest.generation.eos_token_ids)
        self._probe = LayerProbe(bundle, self._decoder, threads) if layers else None

    @property
    def probe(self) -> LayerProbe:
        """The probe of this bundle's layers."""
        assert self._probe is not None
        return self._probe

    def answer(self, questions: Sequence[Question]) -> list[Trace | Failure]:
        """Answer questions that have no failure, in order."""
        requests = [self._request(question) for question in questions]
        traces = iter(self._run([request for request in requests if isinstance(request, Request)]))
        return [request if isinstance(request, Failure) else next(traces) for request in requests]

    def states(self, question: Question) -> States:
        """Hidden states of a question that this side can answer."""
        return self.probe.states(*self.shown(question))

    def _request(self, question: Question) -> Request | Failure:
        try:
            images, tokens = self.shown(question)
            features = list(map(self._vision.encode, images))
        except RowError as error:
            return Failure.of(error)
        limit = min(self._max_new_tokens, self._max_seq_len - len(tokens.input_ids))
        return Request(PrefillRow(tokens.input_ids, tokens.images, features), limit)

    def shown(self, question: Question) -> tuple[list[Pixels], TokenRow]:
        """Pixels of a question's images in the order of the row, and its tokens."""
        tokens = self._tokens(question)
        return [question.images[image.index].pixels for image in tokens.images], tokens

    def _tokens(self, question: Question) -> TokenRow:
        resolution = self.layout.layout.resolution
        return self.layout.row(
            question.conversation, [resolution.grid(*image.pixels.shape[:2]) for image in question.images]
        )

    def _run(self, requests: Sequence[Request]) -> list[Trace | Failure]:
        self._decoder.records = {}
        futures = [self._engine.submit(request) for request in requests]
        wait(futures)
        records = [self._decoder.records[id(request.row)] for request in requests]
        return list(map(self._trace, requests, futures, records))

    def _trace(self, request: Request, future: "Future[Completion]", record: _Record) -> Trace | Failure:
        try:
            completion = future.result()
        except NumericError as error:
            return Failure.of(error)
        return Trace(
            text=self.layout.text(completion.token_ids),
            token_ids=record.tokens[: len(completion.token_ids) + 1],
            input_ids=list(request.row.input_ids),
            features=np.concatenate([np.zeros((0, self._hidden_size), np.float32), *request.row.features]),
            logits=np.stack(record.logits[: len(completion.token_ids) + 1]),
        )
