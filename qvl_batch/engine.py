"""Continuous batching: a thread that keeps the decoder's slots full.

What enters: requests, from any thread. What leaves: a future for each, with the tokens of its
answer. Rows join as soon as a slot is free and leave as soon as they end, so a long answer
holds up nobody.

The loop is a thread of its own and not a coroutine, since Ray blocks its actors' event loops
for seconds under back-pressure.

This module knows nothing of text, images or Ray.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np

from qvl_batch.decoder import Decoder, PrefillRow
from qvl_batch.vision import Features

logger = logging.getLogger(__name__)

#: Rows prefilled between two decode steps. More at a time keep live rows waiting and, on a CPU,
#: cost no less time each.
PREFILL_ROWS = 2


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids of a row up to its answer, float32 features (T_img, D), and the answer's limit."""

    input_ids: Sequence[int]
    features: Features
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens of an answer, the end token left out, and why it ended."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


@dataclass(slots=True)
class _Live:
    """A row in a slot; it may take `budget` tokens, and the last of `tokens` is not in the cache yet."""

    budget: int
    future: "Future[Completion]"
    tokens: list[int] = field(default_factory=list)


class Engine:
    """Runs a decoder until it is closed; use it as a context manager.

    Args:
        decoder: whose slots the engine fills. Nobody else may use it meanwhile.
        eos_token_ids: tokens that end an answer.
    """

    def __init__(self, decoder: Decoder, eos_token_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._eos = frozenset(eos_token_ids)
        self._waiting: queue.SimpleQueue[tuple[Request, Future[Completion]] | None] = queue.SimpleQueue()
        self._live: list[_Live] = []
        self._closing = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="qvl-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> "Future[Completion]":
        """Queue a request. Its future fails only if the engine does.

        Raises:
            RuntimeError: the engine was closed or has failed.
        """
        future: Future[Completion] = Future()
        with self._lock:
            if self._closing or self._failure:
                raise RuntimeError("the engine no longer runs") from self._failure
            self._waiting.put((request, future))
        return future

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._waiting.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loop(self) -> None:
        try:
            while self._admit():
                self._step()
        except BaseException as error:
            logger.exception("the decoder failed")
            self._fail(error)

    def _admit(self) -> bool:
        """Prefill waiting rows into free slots; wait for one if none is live. False when all is done."""
        admitted: list[tuple[Request, Future[Completion]]] = []
        free = min(self._decoder.slots - len(self._live), PREFILL_ROWS)
        while len(admitted) < free:
            idle = not self._live and not admitted
            try:
                item = self._waiting.get(block=idle)
            except queue.Empty:
                break
            if item is None:
                # Nothing is queued behind it: `submit` refuses once closing has begun.
                if idle:
                    return False
                self._waiting.put(None)
                break
            admitted.append(item)
        if admitted:
            self._prefill(admitted)
        return True

    def _prefill(self, admitted: "list[tuple[Request, Future[Completion]]]") -> None:
        first = len(self._live)
        capacity = self._decoder.layout.max_seq_len
        for request, future in admitted:
            budget = min(request.max_new_tokens, capacity - len(request.input_ids))
            self._live.append(_Live(budget, future))
        rows = [PrefillRow(request.input_ids, request.features) for request, _ in admitted]
        self._extend(first, self._decoder.prefill(first, rows).tolist())

    def _step(self) -> None:
        if self._live:
            tokens = np.array([row.tokens[-1] for row in self._live], np.int64)
            self._extend(0, self._decoder.step(tokens).tolist())

    def _extend(self, first: int, tokens: list[int]) -> None:
        """Give rows `first`, `first + 1`, ... their next tokens, and retire those that end."""
        # Backwards, so that the last slot, which moves into a gap, has been seen already.
        for slot in reversed(range(first, first + len(tokens))):
            row, token = self._live[slot], tokens[slot - first]
            if token in self._eos:
                self._retire(slot, "stop")
                continue
            row.tokens.append(token)
            if len(row.tokens) >= row.budget:
                self._retire(slot, "length")

    def _retire(self, slot: int, reason: Literal["stop", "length"]) -> None:
        row = self._live[slot]
        last = self._live.pop()
        if last is not row:
            self._decoder.move(len(self._live), slot)
            self._live[slot] = last
        row.future.set_result(Completion(row.tokens, reason))

    def _fail(self, error: BaseException) -> None:
        """Fail everything that waits, so that nobody waits for ever."""
        with self._lock:
            self._failure = error
        futures = [row.future for row in self._live]
        while not self._waiting.empty():
            item = self._waiting.get()
            if item is not None:
                futures.append(item[1])
        for future in futures:
            if not future.done():
                future.set_exception(error)
