"""Continuous batching: a thread that keeps the decoder's slots full.

What enters: requests, from any thread. What leaves: a future for each, with the tokens of its
answer, or a `NumericError` if its logits are not finite. Rows join as soon as a slot is free and
leave as soon as they end, so a long answer holds up nobody. Rows of one image that wait together
share what the cache holds of it.

The loop is a thread of its own and not a coroutine, since Ray blocks its actors' event loops
for seconds under back-pressure.

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
    """For the seconds of each kind of work that a decoder does."""
    return {"prefill": Clock(), "decode": Clock()}


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Token ids of a row up to its answer, float32 features (T_img, D), and the answer's limit.

    Requests of one `image` (any key, None for none) have the same features.
    """

    input_ids: Sequence[int]
    features: Features
    max_new_tokens: int
    image: bytes | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens of an answer, the end token left out, and why it ended."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


_Item = tuple[Request, "Future[Completion]"]


@dataclass(slots=True)
class _Live:
    """A row in a slot; it may take `budget` tokens, and the last of `tokens` is not in the cache yet."""

    budget: int
    future: "Future[Completion]"
    tokens: list[int] = field(default_factory=list)


class Stoppable(ABC):
    """A context manager that is closed at its end, and stopped where an exception ends it."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was asked, then stop."""

    @abstractmethod
    def stop(self) -> None:
        """Stop at once; what is left fails."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.stop()


class Engine(Stoppable):
    """Runs a decoder until it is closed or nobody holds it any more; use it as a context manager.

    Leaving that by an exception stops it. So does the end of the interpreter.

    Args:
        decoder: whose slots the engine fills. Nobody else may use it while there are requests.
        eos_token_ids: tokens that end an answer.
        clocks: as `decoder_clocks` makes them. They run while the decoder does, and have a row's last step
            before its future has a result.
    """

    def __init__(
        self, decoder: Decoder, eos_token_ids: Sequence[int], clocks: Mapping[str, Clock] | None = None
    ) -> None:
        self._loop = _Loop(decoder, frozenset(eos_token_ids), clocks or decoder_clocks())
        self._loop.start()
        # The thread holds the loop, and nothing in it holds the engine.
        weakref.finalize(self, self._loop.submitted.put, None).atexit = False

    def submit(self, request: Request) -> "Future[Completion]":
        """Queue a request. Its future fails if the row's logits are not finite, or if the engine fails or is stopped.
        One that is cancelled while it waits for a slot is dropped.

        Raises:
            RuntimeError: the engine was closed or has failed.
        """
        return self._loop.submit(request)

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._loop.refuse()
        self._loop.join()

    def stop(self) -> None:
        """Stop after the step that is being run; what is left fails."""
        self._loop.stop()
        self._loop.join()


class _Loop(threading.Thread):
    """The thread of an engine, and all that it works on."""

    def __init__(self, decoder: Decoder, eos: frozenset[int], clocks: Mapping[str, Clock]) -> None:
        super().__init__(name="qvl-engine", daemon=True)
        #: Requests; None if no more will come.
        self.submitted: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._decoder, self._eos, self._clocks = decoder, eos, clocks
        self._waiting: deque[_Item] = deque()
        self._prefixes: dict[bytes, int] = {}
        self._live: list[_Live] = []
        self._refusing = self._stopping = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def submit(self, request: Request) -> "Future[Completion]":
        """As `Engine.submit`."""
        future: Future[Completion] = Future()
        with self._lock:
            if self._refusing or self._failure:
                raise RuntimeError("the engine no longer runs") from self._failure
            self.submitted.put((request, future))
        return future

    def refuse(self) -> None:
        """End when all that was submitted is done."""
        with self._lock:
            self._refusing = True
            self.submitted.put(None)

    def stop(self) -> None:
        """End after the step that is being run."""
        self._stopping = True
        self.refuse()

    def run(self) -> None:
        """Admit rows and step them until there are no more."""
        try:
            while not self._stopping and self._admit():
                self._step()
            if self._stopping:
                self._fail(RuntimeError("the engine was stopped"))
        except BaseException as error:
            logger.exception("the decoder failed")
            self._fail(error)

    def _admit(self) -> bool:
        """Prefill waiting rows into free slots; wait for one if none is live. False when all is done."""
        if not self._receive():
            return False
        free = min(self._decoder.slots - len(self._live), self._decoder.prefill_rows)
        if not free:
            return True
        rest = [item for item in self._waiting if item[0].image in self._prefixes][:free]
        for item in rest:
            self._waiting.remove(item)
            if item[1].set_running_or_notify_cancel():
                self._prefill_after_prefix(item)
        if not rest and (whole := self._whole_rows(free)):
            self._prefill(whole)
        return True

    def _whole_rows(self, count: int) -> "list[_Item]":
        """Up to `count` waiting rows, no two of one image: the second can have the first one's beginning."""
        chosen: list[_Item] = []
        for item in self._waiting:
            image = item[0].image
            if len(chosen) < count and (image is None or all(image != request.image for request, _ in chosen)):
                chosen.append(item)
        for item in chosen:
            self._waiting.remove(item)
        return [item for item in chosen if item[1].set_running_or_notify_cancel()]

    def _receive(self) -> bool:
        """Take what was submitted, waiting for it if there is nothing else to do."""
        while True:
            idle = not self._live and not self._waiting
            try:
                item = self.submitted.get(block=idle)
            except queue.Empty:
                return True
            if item is not None:
                self._waiting.append(item)
            elif idle:
                # Nothing comes after it: `submit` refuses, or there is nobody who could call it.
                return False
            else:
                self.submitted.put(None)
                return True

    def _prefill(self, admitted: "list[_Item]") -> None:
        """Whole rows into the next slots; beginnings that other rows wait for are kept."""
        first = len(self._live)
        self._open(admitted)
        rows = [PrefillRow(request.input_ids, request.features) for request, _ in admitted]
        with self._clocks["prefill"].running():
            tokens = self._decoder.prefill(first, rows)
        wanted = {request.image for request, _ in self._waiting}
        for slot, (request, _) in enumerate(admitted, start=first):
            image = request.image
            if image is not None and image in wanted and image not in self._prefixes:
                self._decoder.store_prefix(slot, self._prefix_entry_for(image))
        self._extend(first, tokens.tolist())

    def _prefill_after_prefix(self, item: "_Item") -> None:
        """One row whose beginning is on a entry into the next slot."""
        request, slot = item[0], len(self._live)
        self._open([item])
        row = PrefillRow(request.input_ids, request.features)
        assert request.image is not None
        with self._clocks["prefill"].running():
            tokens = self._decoder.prefill_after_prefix(slot, self._prefixes[request.image], row)
        self._extend(slot, tokens.tolist())

    def _prefix_entry_for(self, image: bytes) -> int:
        """A free entry, or that of the image that came first."""
        entry = (
            len(self._prefixes)
            if len(self._prefixes) < PREFIX_ENTRIES
            else self._prefixes.pop(next(iter(self._prefixes)))
        )
        self._prefixes[image] = entry
        return entry

    def _open(self, admitted: "list[_Item]") -> None:
        for request, future in admitted:
            budget = min(request.max_new_tokens, self._decoder.layout.max_seq_len - len(request.input_ids))
            self._live.append(_Live(budget, future))

    def _step(self) -> None:
        if self._live:
            tokens = np.array([row.tokens[-1] for row in self._live], np.int64)
            with self._clocks["decode"].running():
                following = self._decoder.step(tokens)
            self._extend(0, following.tolist())

    def _extend(self, first: int, tokens: list[int]) -> None:
        """Give rows `first`, `first + 1`, ... their next tokens, and retire those that end."""
        # Backwards, so that the last slot, which moves into a gap, has been seen already.
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
        row, last = self._live[slot], self._live[-1]
        if last is not row:
            self._decoder.move(len(self._live) - 1, slot)
            self._live[slot] = last
        self._live.pop()
        if isinstance(outcome, Completion):
            row.future.set_result(outcome)
        else:
            row.future.set_exception(outcome)

    def _fail(self, error: BaseException) -> None:
        """Fail everything that waits, so that nobody waits for ever."""
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
    """A process that ends while a graph runs in another thread aborts, so engines that nobody closed are stopped."""
    loops = [thread for thread in threading.enumerate() if isinstance(thread, _Loop)]
    for loop in loops:
        loop.stop()
    for loop in loops:
        loop.join()
