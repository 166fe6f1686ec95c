"""Continuous batching: a thread that keeps the decoder's slots full.

What enters: requests, from any thread. What leaves: a future for each, with the tokens of its answer, or a `RowError`
if its logits are not finite, or its answer cannot become what it must be. Rows are admitted as soon as a slot is free
and retired as soon as they end, so a long answer does not delay others. A long row is prefilled in parts, with a decode
step of the live rows after each. Waiting rows that begin alike, whatever with, share a prefix-cache entry.

The loop runs in a thread and not as a coroutine, since Ray blocks its actors' event loops for seconds under
back-pressure.

This module knows nothing of text, images or Ray.
"""

import atexit
import hashlib
import logging
import os
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from qvl_batch.clock import Clock
from qvl_batch.decoder.decoder import ALL, NO_TOKEN, PREFIX_ENTRIES, Decoder, PrefillRow
from qvl_batch.decoder.grammar import Grammar, Grammars, Guide
from qvl_batch.errors import ConstraintError, NumericError, RowError, TruncatedError

logger = logging.getLogger(__name__)

#: A prefix is shared if it has at least so many tokens, and is at least this share of the row that takes it over: rows
#: after a prefix are prefilled one by one.
PREFIX_TOKENS, PREFIX_SHARE = 64, 0.25
#: Largest share of padding in a prefill of several rows.
PADDING = 0.1


def decoder_clocks() -> dict[str, Clock]:
    """One clock for each kind of work of a decoder."""
    return {"prefill": Clock(), "decode": Clock()}


@dataclass(frozen=True, eq=False)
class Request:
    """A row up to its answer, the longest answer in tokens, keys of its images, and the grammar of its answer if any.

    Images with the same key must have the same features; those with None share nothing. Without keys, no image does.
    """

    row: PrefillRow
    max_new_tokens: int
    images: Sequence[bytes | None] = ()
    grammar: Grammar | None = None

    @cached_property
    def content(self) -> NDArray[np.int64]:
        """What each token stands for, int64 (S,): its id, or a negative number that identifies its image."""
        content = np.array(self.row.input_ids, np.int64)
        keys = self.images or [None] * len(self.row.images)
        for image, key in zip(self.row.images, keys, strict=True):
            identity = os.urandom(7) if key is None else hashlib.blake2b(key, digest_size=7).digest()
            content[image.start : image.stop] = -1 - int.from_bytes(identity)
        return content

    def shared_with(self, content: NDArray[np.int64]) -> int:
        """Length of the prefix that can be taken over from a row of that content; 0 if it is not worth it."""
        if not np.array_equal(self.content[:PREFIX_TOKENS], content[:PREFIX_TOKENS]):
            return 0
        # At least one token is left, whose logits give the first token of the answer.
        length = min(len(self.content) - 1, len(content))
        differs = self.content[:length] != content[:length]
        shared = int(differs.argmax()) if differs.any() else length
        return shared if shared >= max(PREFIX_TOKENS, PREFIX_SHARE * len(self.content)) else 0


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens of an answer, without the end token, and why it ended. If the decoder gives them, the log-probability of
    each token, and of the end token if one came; and scores of the row's candidates.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] = field(default_factory=list)
    candidate_scores: list[float] = field(default_factory=list)


_Pending = tuple[Request, "Future[Completion]"]


@dataclass(slots=True)
class _LiveRow:
    """A row in a slot, its answer so far, and its longest answer `budget`. The KV cache lacks the last of `tokens`.
    A row whose answer has a grammar has a guide.
    """

    budget: int
    future: "Future[Completion]"
    guide: Guide | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    candidate_scores: list[float] = field(default_factory=list)

    def ended(self, reason: Literal["stop", "length"]) -> Completion:
        """The row as it is answered."""
        return Completion(self.tokens, reason, self.logprobs, self.candidate_scores)


@dataclass(slots=True)
class _Partial:
    """A row that is being prefilled in parts: its slot, and how many tokens are done. They are in the prefix-cache
    entry `entry` if that is not None, else in the slot.
    """

    item: _Pending
    slot: int
    done: int = 0
    entry: int | None = None


def fit_one_prefill(lengths: Sequence[int], most_tokens: int) -> bool:
    """Whether rows of these lengths can be one prefill: of at most so many tokens, and with little padding."""
    padded = len(lengths) * max(lengths)
    return padded <= most_tokens and sum(lengths) >= (1 - PADDING) * padded


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
        grammars: of which requests can have one, if the decoder is guided.
    """

    def __init__(
        self,
        decoder: Decoder,
        eos_token_ids: Sequence[int],
        clocks: Mapping[str, Clock] | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._loop = _Loop(decoder, frozenset(eos_token_ids), clocks or decoder_clocks(), grammars)
        self._loop.start()
        # The thread references the loop but not the engine, so an engine that is dropped is collected.
        weakref.finalize(self, self._loop.submitted.put, None).atexit = False

    def submit(self, request: Request) -> "Future[Completion]":
        """Queue a request.

        Its future fails if the row's logits are not finite, its answer is cut off before its grammar allows an end, or
        the engine fails or is stopped. A request whose future is cancelled while it waits for a slot is dropped.

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

    def __init__(
        self, decoder: Decoder, eos: frozenset[int], clocks: Mapping[str, Clock], grammars: Grammars | None
    ) -> None:
        super().__init__(name="qvl-engine", daemon=True)
        #: Submitted requests, in order; None after the last one.
        self.submitted: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._decoder, self._eos, self._clocks, self._grammars = decoder, eos, clocks, grammars
        self._waiting: deque[_Pending] = deque()
        #: Contents of the prefix-cache entries, by entry, the least recently used first.
        self._prefixes: dict[int, NDArray[np.int64]] = {}
        #: Rows by slot. A row that is prefilled in parts is not among them, and has the last slot.
        self._live: list[_LiveRow] = []
        self._partial: _Partial | None = None
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
        """Prefill waiting rows into free slots, about `prefill_tokens` tokens of them; if no row is live, wait for one.
        False when all requests are done.
        """
        if not self._receive():
            return False
        left = self._decoder.prefill_tokens
        while left > 0 and (tokens := self._prefill_next()):
            left -= tokens
        return True

    def _prefill_next(self) -> int:
        """Run one prefill; returns its number of tokens, 0 if there is none to run."""
        if self._partial:
            return self._prefill_part(self._partial)
        free = self._decoder.slots - len(self._live)
        if not free or not self._waiting:
            return 0
        item, shared, entry = self._after_prefix()
        rest = len(item[0].row.input_ids) - shared
        if not shared and rest <= self._decoder.prefill_tokens:
            return self._prefill(self._take_alike(min(free, self._decoder.prefill_rows)))
        self._waiting.remove(item)
        if not item[1].set_running_or_notify_cancel():
            return 0
        # A row in parts must not be in the way of live rows, which are always in the first slots.
        slot = len(self._live) if rest <= self._decoder.prefill_tokens else self._decoder.slots - 1
        self._partial = _Partial(item, slot, shared, entry)
        return self._prefill_part(self._partial)

    def _after_prefix(self) -> "tuple[_Pending, int, int | None]":
        """The first waiting row whose prefix is cached, with the length of the prefix and its entry; else the first
        waiting row, 0 and None.
        """
        for item in self._waiting:
            shared, entry = max(
                ((item[0].shared_with(content), entry) for entry, content in self._prefixes.items()), default=(0, None)
            )
            if entry is not None and shared:
                self._prefixes[entry] = self._prefixes.pop(entry)  # most recently used
                return item, shared, entry
        return self._waiting[0], 0, None

    def _take_alike(self, count: int) -> "list[_Pending]":
        """Take up to `count` waiting rows for one prefill: the first, and rows of about its length, so that there is
        little padding; no two that share a prefix, since the second can take over that of the first.
        """
        length = [len(request.row.input_ids) for request, _ in self._waiting]
        chosen = [0]
        for index in sorted(range(1, len(length)), key=lambda index: abs(length[index] - length[0])):
            if len(chosen) == count:
                break
            request = self._waiting[index][0]
            if fit_one_prefill([length[at] for at in (*chosen, index)], self._decoder.prefill_tokens) and not any(
                request.shared_with(self._waiting[other][0].content) for other in chosen
            ):
                chosen.append(index)
        items = [self._waiting[index] for index in sorted(chosen)]
        for item in items:
            self._waiting.remove(item)
        return [item for item in items if item[1].set_running_or_notify_cancel()]

    def _receive(self) -> bool:
        """Receive submitted requests; block if there is nothing else to do. False when all requests are done."""
        while True:
            idle = not (self._live or self._waiting or self._partial)
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

    def _prefill(self, admitted: "list[_Pending]") -> int:
        """Prefill whole rows into the next slots."""
        if not admitted:
            return 0
        first = len(self._live)
        self._occupy_slots(admitted)
        for slot, (request, _) in enumerate(admitted, start=first):
            self._allow_first(slot, request)
        with self._clocks["prefill"].running():
            tokens = self._decoder.prefill(first, [request.row for request, _ in admitted])
        for slot, (request, _) in enumerate(admitted, start=first):
            self._store_prefix(slot, request)
            self._take_scores(slot, request, slot - first)
        self._append_tokens(first, tokens.tolist())
        return len(admitted) * max(len(request.row.input_ids) for request, _ in admitted)

    def _prefill_part(self, partial: _Partial) -> int:
        """Prefill the next part of a row; after the last, it is live."""
        request = partial.item[0]
        start, end = partial.done, len(request.row.input_ids)
        stop = min(end, start + self._decoder.prefill_tokens)
        self._allow_first(partial.slot, request)
        with self._clocks["prefill"].running():
            tokens = self._decoder.prefill_part(partial.slot, request.row, start, stop, partial.entry)
        partial.done, partial.entry = stop, None
        if stop == end:
            self._partial, slot = None, len(self._live)
            if partial.slot != slot:
                self._decoder.move(partial.slot, slot)
            self._occupy_slots([partial.item])
            self._store_prefix(slot, request)
            self._take_scores(slot, request, 0)
            self._append_tokens(slot, tokens.tolist())
        return stop - start

    def _store_prefix(self, slot: int, request: Request) -> None:
        """Cache the longest prefix that a waiting row shares with the row in `slot`, unless an entry has as much."""
        lengths = [(waiting.shared_with(request.content), waiting) for waiting, _ in self._waiting]
        length, waiting = max(lengths, key=lambda pair: pair[0], default=(0, request))
        if length > max((waiting.shared_with(content) for content in self._prefixes.values()), default=0):
            # A free entry, or that of the least recently used prefix.
            entry = len(self._prefixes) if len(self._prefixes) < PREFIX_ENTRIES else next(iter(self._prefixes))
            self._prefixes.pop(entry, None)
            self._prefixes[entry] = request.content[:length]
            self._decoder.store_prefix(slot, entry, length)

    def _occupy_slots(self, admitted: "list[_Pending]") -> None:
        for request, future in admitted:
            budget = min(request.max_new_tokens, self._decoder.layout.max_seq_len - len(request.row.input_ids))
            guide = request.grammar.guide() if request.grammar else None
            self._live.append(_LiveRow(budget, future, guide))

    def _take_scores(self, slot: int, request: Request, row: int) -> None:
        """Keep the scores of a request's candidates, row `row` of the last prefill."""
        count = len(request.row.candidates)
        self._live[slot].candidate_scores = self._decoder.candidate_scores[row, :count].tolist() if count else []

    def _allow_first(self, slot: int, request: Request) -> None:
        """Say which tokens the answer of the row in a slot may begin with."""
        self._decoder.allowed[slot] = request.grammar.first_mask if request.grammar else ALL

    def _allow_next(self) -> None:
        """Say which tokens may be next in each live row."""
        if self._grammars:
            self._decoder.allowed[[slot for slot, row in enumerate(self._live) if not row.guide]] = ALL
            guides = [(row.guide, slot) for slot, row in enumerate(self._live) if row.guide]
            self._grammars.fill(guides, self._decoder.allowed)

    def _step(self) -> None:
        if self._live:
            self._allow_next()
            tokens = np.array([row.tokens[-1] for row in self._live], np.int64)
            with self._clocks["decode"].running():
                following = self._decoder.step(tokens)
            self._append_tokens(0, following.tolist())

    def _append_tokens(self, first: int, tokens: list[int]) -> None:
        """Append the next tokens to the rows in slots `first`, `first + 1`, ..., and retire rows that end."""
        for row, logprob in zip(self._live[first:], self._decoder.logprobs.tolist(), strict=False):
            row.logprobs.append(logprob)
        # From the last slot down: the row that `_retire` moves into a gap then has its token already.
        for slot in reversed(range(first, first + len(tokens))):
            row, token = self._live[slot], tokens[slot - first]
            if token == NO_TOKEN:
                self._retire(
                    slot, NumericError(f"logits or hidden states are not finite at answer token {len(row.tokens) + 1}")
                )
            elif token in self._eos:
                self._retire(slot, row.ended("stop"))
            else:
                row.tokens.append(token)
                if outcome := _outcome(row):
                    self._retire(slot, outcome)

    def _retire(self, slot: int, outcome: Completion | RowError) -> None:
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
        running = [row.future for row in self._live] + ([self._partial.item[1]] if self._partial else [])
        while not self.submitted.empty():
            item = self.submitted.get()
            if item is not None:
                waiting.append(item[1])
        for future in [*running, *filter(Future.set_running_or_notify_cancel, waiting)]:
            future.set_exception(error)


def _outcome(row: _LiveRow) -> Completion | RowError | None:
    """What ends a row after its last token; None if it goes on."""
    is_cut = len(row.tokens) >= row.budget
    if row.guide:
        try:
            row.guide.accept(row.tokens[-1])
        except ConstraintError as error:
            return error
        if row.guide.is_complete:
            return row.ended("stop")
        if is_cut and not row.guide.may_end:
            return TruncatedError(
                f"the answer was cut off at {len(row.tokens)} tokens before it was what it must be: raise "
                "--max-new-tokens"
            )
    return row.ended("length") if is_cut else None


@atexit.register
def _stop_all() -> None:
    """Stop engines that were not closed: a process that exits while a graph runs in another thread aborts."""
    loops = [thread for thread in threading.enumerate() if isinstance(thread, _Loop)]
    for loop in loops:
        loop.stop()
    for loop in loops:
        loop.join()
