"""Continuous batching: a thread that keeps the decoder's slots full.

What enters: requests, from any thread. What leaves: a future for each, with the tokens of its answer, or a
`NumericError` if its logits are not finite. Rows are admitted as soon as a slot is free and retired as soon as they
end, so a long answer does not delay others. Waiting rows of one image share a prefix-cache entry.

The loop runs in a thread and not as a coroutine, since Ray blocks its actors' event loops for seconds under
back-pressure.

This module knows nothing of text, images or Ray.
"""

import atexit
import logging
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np

from qvl_batch.bundle.layout import Features
from qvl_batch.clock import Clock
from qvl_batch.decoder.decoder import NO_TOKEN, PREFIX_ENTRIES, Decoder, PrefillRow
from qvl_batch.errors import NumericError

logger = logging.getLogger(__name__)


def decoder_clocks() -> dict[str, Clock]:
    """One clock for each kind of work of a decoder."""
    return {"prefill": Clock(), "decode": Clock()}


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Token ids of a row up to its answer, features of its image, float32 (T_img, D), and the longest answer in tokens.

    Requests with the same key `image` must have the same features; requests with None share no prefix.
    """

    input_ids: Sequence[int]
    features: Features
    max_new_tokens: int
    image: bytes | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens of an answer, without the end token, and why it ended."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


_Pending = tuple[Request, "Future[Completion]"]


@dataclass(slots=True)
class _LiveRow:
    """A row in a slot, its answer so far, and its longest answer `budget`. The KV cache lacks the last of `tokens`."""

    budget: int
    future: "Future[Completion]"
    tokens: list[int] = field(default_factory=list)


class Stoppable(ABC):
    """A context manager: closed at its end, stopped if an exception leaves it."""

    @abstractmethod
    def close(self) -> None:
        """Finish pending work, then stop."""

    @abstractmethod
    def stop(self) -> None:
        """Stop at once; pending work fails."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.stop()


class Engine(Stoppable):
    """Runs a decoder until it is closed or garbage-collected; use it as a context manager.

    An exception that leaves the context stops it, and so does the exit of the interpreter.

    Args:
        decoder: the decoder; not to be used by others while there are requests.
        eos_token_ids: tokens that end an answer.
        clocks: from `decoder_clocks`, for busy time. A row's last step is counted before its future has a result.
    """

    def __init__(
        self, decoder: Decoder, eos_token_ids: Sequence[int], clocks: Mapping[str, Clock] | None = None
    ) -> None:
        self._loop = _Loop(decoder, frozenset(eos_token_ids), clocks or decoder_clocks())
        self._loop.start()
        # The thread references the loop but not the engine, so an engine that is dropped is collected.
        weakref.finalize(self, self._loop.submitted.put, None).atexit = False

    def submit(self, request: Request) -> "Future[Completion]":
        """Queue a request.

        Its future fails if the row's logits are not finite, or if the engine fails or is stopped. A request whose
        future is cancelled while it waits for a slot is dropped.

        Raises:
            RuntimeError: the engine was closed or has failed.
        """
        return self._loop.submit(request)

    def close(self) -> None:
        """Finish submitted requests, then stop."""
        self._loop.drain()
        self._loop.join()

    def stop(self) -> None:
        """Stop after the current step; pending requests fail."""
        self._loop.stop()
        self._loop.join()


class _Loop(threading.Thread):
    """The thread of an engine, and its state."""

    def __init__(self, decoder: Decoder, eos: frozenset[int], clocks: Mapping[str, Clock]) -> None:
        super().__init__(name="qvl-engine", daemon=True)
        #: Submitted requests, in order; None after the last one.
        self.submitted: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._decoder, self._eos, self._clocks = decoder, eos, clocks
        self._waiting: deque[_Pending] = deque()
        #: Prefix-cache entry of each cached image, the oldest first.
        self._prefixes: dict[bytes, int] = {}
        #: Rows by slot.
        self._live: list[_LiveRow] = []
        self._draining = self._stopping = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def submit(self, request: Request) -> "Future[Completion]":
        """As `Engine.submit`."""
        future: Future[Completion] = Future()
        with self._lock:
            if self._draining or self._failure:
                raise RuntimeError("the engine no longer runs") from self._failure
            self.submitted.put((request, future))
        return future

    def drain(self) -> None:
        """Accept no more requests, and end when those submitted are done."""
        with self._lock:
            self._draining = True
            self.submitted.put(None)

    def stop(self) -> None:
        """End after the current step."""
        self._stopping = True
        self.drain()

    def run(self) -> None:
        """Admit rows and run decode steps until all requests are done."""
        try:
            while not self._stopping and self._admit():
                self._step()
            if self._stopping:
                self._fail_all(RuntimeError("the engine was stopped"))
        except BaseException as error:
            logger.exception("the decoder failed")
            self._fail_all(error)

    def _admit(self) -> bool:
        """Prefill waiting rows into free slots; if no row is live, wait for one. False when all requests are done."""
        if not self._receive():
            return False
        free = min(self._decoder.slots - len(self._live), self._decoder.prefill_rows)
        if not free:
            return True
        cached = [item for item in self._waiting if item[0].image in self._prefixes][:free]
        for item in cached:
            self._waiting.remove(item)
            if item[1].set_running_or_notify_cancel():
                self._prefill_after_prefix(item)
        if not cached and (uncached := self._take_uncached(free)):
            self._prefill(uncached)
        return True

    def _take_uncached(self, count: int) -> "list[_Pending]":
        """Take up to `count` waiting rows, no two of one image: the second can reuse the prefix of the first."""
        chosen: list[_Pending] = []
        for item in self._waiting:
            image = item[0].image
            if len(chosen) < count and (image is None or all(image != request.image for request, _ in chosen)):
                chosen.append(item)
        for item in chosen:
            self._waiting.remove(item)
        return [item for item in chosen if item[1].set_running_or_notify_cancel()]

    def _receive(self) -> bool:
        """Receive submitted requests; block if there is nothing else to do. False when all requests are done."""
        while True:
            idle = not self._live and not self._waiting
            try:
                item = self.submitted.get(block=idle)
            except queue.Empty:
                return True
            if item is not None:
                self._waiting.append(item)
            elif idle:
                # Nothing follows None: `submit` refuses, or the engine was collected.
                return False
            else:
                self.submitted.put(None)
                return True

    def _prefill(self, admitted: "list[_Pending]") -> None:
        """Prefill whole rows into the next slots, and cache the prefixes that waiting rows share with them."""
        first = len(self._live)
        self._occupy_slots(admitted)
        rows = [PrefillRow(request.input_ids, request.features) for request, _ in admitted]
        with self._clocks["prefill"].running():
            tokens = self._decoder.prefill(first, rows)
        awaited = {request.image for request, _ in self._waiting}
        for slot, (request, _) in enumerate(admitted, start=first):
            image = request.image
            if image is not None and image in awaited and image not in self._prefixes:
                self._decoder.store_prefix(slot, self._prefix_entry_for(image))
        self._append_tokens(first, tokens.tolist())

    def _prefill_after_prefix(self, item: "_Pending") -> None:
        """Prefill a row whose prefix is cached into the next slot."""
        request, slot = item[0], len(self._live)
        self._occupy_slots([item])
        row = PrefillRow(request.input_ids, request.features)
        assert request.image is not None
        with self._clocks["prefill"].running():
            tokens = self._decoder.prefill_after_prefix(slot, self._prefixes[request.image], row)
        self._append_tokens(slot, tokens.tolist())

    def _prefix_entry_for(self, image: bytes) -> int:
        """Assign a prefix-cache entry to an image: a free one, or that of the image cached first, which is evicted."""
        entry = (
            len(self._prefixes)
            if len(self._prefixes) < PREFIX_ENTRIES
            else self._prefixes.pop(next(iter(self._prefixes)))
        )
        self._prefixes[image] = entry
        return entry

    def _occupy_slots(self, admitted: "list[_Pending]") -> None:
        for request, future in admitted:
            budget = min(request.max_new_tokens, self._decoder.layout.max_seq_len - len(request.input_ids))
            self._live.append(_LiveRow(budget, future))

    def _step(self) -> None:
        if self._live:
            tokens = np.array([row.tokens[-1] for row in self._live], np.int64)
            with self._clocks["decode"].running():
                following = self._decoder.step(tokens)
            self._append_tokens(0, following.tolist())

    def _append_tokens(self, first: int, tokens: list[int]) -> None:
        """Append the next tokens to the rows in slots `first`, `first + 1`, ..., and retire rows that end."""
        # From the last slot down: the row that `_retire` moves into a gap then has its token already.
        for slot in reversed(range(first, first + len(tokens))):
            row, token = self._live[slot], tokens[slot - first]
            if token == NO_TOKEN:
                self._retire(
                    slot, NumericError(f"logits or hidden states are not finite at answer token {len(row.tokens) + 1}")
                )
            elif token in self._eos:
                self._retire(slot, Completion(row.tokens, "stop"))
            else:
                row.tokens.append(token)
                if len(row.tokens) >= row.budget:
                    self._retire(slot, Completion(row.tokens, "length"))

    def _retire(self, slot: int, outcome: Completion | NumericError) -> None:
        """Move the last live row into the slot of a row that ended, and set the result of that row's future."""
        row, last = self._live[slot], self._live[-1]
        if last is not row:
            self._decoder.move(len(self._live) - 1, slot)
            self._live[slot] = last
        self._live.pop()
        if isinstance(outcome, Completion):
            row.future.set_result(outcome)
        else:
            row.future.set_exception(outcome)

    def _fail_all(self, error: BaseException) -> None:
        """Fail all live, waiting and submitted requests, so that no caller waits for ever."""
        with self._lock:
            self._failure = error
        waiting = [future for _, future in self._waiting]
        while not self.submitted.empty():
            item = self.submitted.get()
            if item is not None:
                waiting.append(item[1])
        for future in [*(row.future for row in self._live), *filter(Future.set_running_or_notify_cancel, waiting)]:
            future.set_exception(error)


@atexit.register
def _stop_all() -> None:
    """Stop engines that were not closed: a process that exits while a graph runs in another thread aborts."""
    loops = [thread for thread in threading.enumerate() if isinstance(thread, _Loop)]
    for loop in loops:
        loop.stop()
    for loop in loops:
        loop.join()
