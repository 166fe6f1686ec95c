"""Continuous batching: a thread that keeps the decoder's slots full.

What enters: requests, from any thread. What leaves: a future for each, with the tokens of its answer, or a `RowError`
if its logits are not finite, or its answer cannot become what it must be. Rows are admitted as soon as a slot is free
and retired as soon as they end, so a long answer does not delay others. A long row is prefilled in parts, with a decode
step of the live rows after each. Waiting rows that begin alike, whatever with, share a prefix-cache entry; several
answers to one row share its prefill.

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
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from qvl_batch.clock import Clock
from qvl_batch.decoder.decoder import NO_TOKEN, PREFIX_ENTRIES, Decoder, Tokens
from qvl_batch.decoder.draws import UNDECIDED, draw, draw_from_all
from qvl_batch.decoder.grammar import Grammars, Guide
from qvl_batch.decoder.guidance import ALL, Guidance
from qvl_batch.decoder.requests import Completion, Reason, Request
from qvl_batch.decoder.waiting import Group, Pending, Waiting
from qvl_batch.errors import ConstraintError, NumericError, RowError, TruncatedError

logger = logging.getLogger(__name__)


def decoder_clocks() -> dict[str, Clock]:
    """One clock for each kind of work of a decoder."""
    return {"prefill": Clock(), "decode": Clock()}


@dataclass(slots=True)
class _LiveRow:
    """A row in a slot, its answer so far, and its longest answer `budget`. The KV cache lacks the last of `tokens`.
    A row whose answer has a grammar has a guide, one whose answer is drawn a random number for each token.
    """

    request: Request
    future: "Future[Completion]"
    budget: int
    guide: Guide | None
    uniforms: NDArray[np.float64] | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    candidate_scores: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, future: "Future[Completion]", max_seq_len: int) -> Self:
        """A row that has no token yet."""
        budget = min(request.max_new_tokens, max_seq_len - len(request.row.input_ids))
        guide = request.grammar.guide() if request.grammar else None
        return cls(request, future, budget, guide, request.draws.uniforms(budget) if request.draws else None)

    @property
    def uniform(self) -> float:
        """The random number of the next token."""
        assert self.uniforms is not None
        return float(self.uniforms[len(self.tokens)])

    def ended(self, reason: Reason) -> Completion:
        """The row as it is answered."""
        return Completion(self.tokens, reason, self.logprobs, self.candidate_scores)


@dataclass(slots=True)
class _Partial:
    """A row that is being prefilled in parts: its slot, and how many tokens are done. They are in the prefix-cache
    entry `entry` if that is not None, else in the slot.
    """

    group: Group
    slot: int
    done: int = 0
    entry: int | None = None


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

    @property
    def load(self) -> "Load":
        """How busy it is."""
        return self._loop.load

    def close(self) -> None:
        """Finish submitted requests, then stop."""
        self._loop.drain()
        self._loop.join()

    def stop(self) -> None:
        """Stop after the current step; pending requests fail."""
        self._loop.stop()
        self._loop.join()


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is.

    Args:
        busy: slots with a row.
        slots: that there are.
        waiting: answers that wait for a slot.
    """

    busy: int
    slots: int
    waiting: int


class _Loop(threading.Thread):
    """The thread of an engine, and its state."""

    def __init__(
        self, decoder: Decoder, eos: frozenset[int], clocks: Mapping[str, Clock], grammars: Grammars | None
    ) -> None:
        super().__init__(name="qvl-engine", daemon=True)
        #: Submitted requests, in order; None after the last one.
        self.submitted: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._decoder, self._eos, self._clocks, self._grammars = decoder, eos, clocks, grammars
        self._waiting = Waiting(decoder.slots, PREFIX_ENTRIES)
        #: The mask of a row that may not end yet.
        words = decoder.guidance.allowed.shape[1] if decoder.guidance else 0
        self._not_the_end = all_but(eos, words)
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

    @property
    def load(self) -> "Load":
        """As `Engine.load`. Read without a lock: a moment's numbers, which need not belong together."""
        busy = len(self._live) + (self._partial is not None)
        return Load(busy, self._decoder.slots, len(self._waiting) + self.submitted.qsize())

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
        group, shared, entry = self._waiting.after_prefix()
        if len(group) > free:
            return 0  # until there are slots for all answers to the row
        most, rest = self._decoder.prefill_tokens, len(group[0][0].row.input_ids) - shared
        if not shared and rest <= most:
            return self._prefill(self._waiting.take_alike(self._decoder.prefill_rows, free, most))
        if not (group := self._waiting.take(group)):
            return 0
        # A row in parts must not be in the way of live rows, which are always in the first slots.
        slot = len(self._live) if rest <= most else self._decoder.slots - 1
        self._partial = _Partial(group, slot, shared, entry)
        return self._prefill_part(self._partial)

    def _receive(self) -> bool:
        """Receive submitted requests; block if there is nothing else to do. False when all requests are done."""
        while True:
            idle = not (self._live or self._waiting or self._partial)
            try:
                item = self.submitted.get(block=idle)
            except queue.Empty:
                return True
            if item is not None:
                self._waiting.add(item)
            elif idle:
                # Nothing follows None: `submit` refuses, or the engine was collected.
                return False
            else:
                self.submitted.put(None)
                return True

    def _prefill(self, groups: list[Group]) -> int:
        """Prefill whole rows into the next slots."""
        if not groups:
            return 0
        first, requests = len(self._live), [group[0][0] for group in groups]
        self._prepare_first(first, requests)
        with self._clocks["prefill"].running():
            self._decoder.prefill(first, [request.row for request in requests])
        self._admit_groups(groups)
        return len(groups) * max(len(request.row.input_ids) for request in requests)

    def _prefill_part(self, partial: _Partial) -> int:
        """Prefill the next part of a row; after the last, it is live."""
        request = partial.group[0][0]
        start, end = partial.done, len(request.row.input_ids)
        stop = min(end, start + self._decoder.prefill_tokens)
        self._prepare_first(partial.slot, [request])
        with self._clocks["prefill"].running():
            self._decoder.prefill_part(partial.slot, request.row, start, stop, partial.entry)
        partial.done, partial.entry = stop, None
        if stop == end:
            self._partial, slot = None, len(self._live)
            if partial.slot != slot:
                self._decoder.copy(partial.slot, slot)
            self._admit_groups([partial.group])
        return stop - start

    def _admit_groups(self, groups: list[Group]) -> None:
        """Make rows live whose prefill is done, in the next slots in order: the first answer to each of them, then the
        others, in copies of its slot. Append the first token of each answer.
        """
        first, guidance = len(self._live), self._decoder.guidance
        items = [(row, *group[0]) for row, group in enumerate(groups)]
        items += [(row, *item) for row, group in enumerate(groups) for item in group[1:]]
        for row, request, future in items:
            live = _LiveRow.of(request, future, self._decoder.layout.max_seq_len)
            if guidance:
                live.candidate_scores = guidance.candidate_scores[row, : len(request.row.candidates)].tolist()
            self._live.append(live)
        for slot, (row, request, _) in enumerate(items, start=first):
            if slot < first + len(groups):
                self._store_prefix(slot, request)
            else:
                self._decoder.copy(first + row, slot)
        self._append_tokens(first, [row for row, _, _ in items])

    def _store_prefix(self, slot: int, request: Request) -> None:
        """Cache the prefix that the row in `slot` shares with a waiting row, if it is worth it."""
        if found := self._waiting.prefix_to_store(request):
            length, entry = found
            self._decoder.store_prefix(slot, entry, length)

    def _prepare_first(self, first: int, requests: Sequence[Request]) -> None:
        """Say which tokens answers in slots from `first` on may begin with, and their temperatures."""
        if guidance := self._decoder.guidance:
            for slot, request in enumerate(requests, start=first):
                guidance.allowed[slot] = request.grammar.first_mask if request.grammar else ALL
                if request.min_new_tokens:
                    guidance.allowed[slot] &= self._not_the_end
                guidance.inverse_temperature[slot] = request.inverse_temperature

    def _prepare_next(self) -> None:
        """Say which tokens may be next in each live row, and its temperature."""
        if not (guidance := self._decoder.guidance):
            return
        guidance.allowed[[slot for slot, row in enumerate(self._live) if not row.guide]] = ALL
        if guides := [(row.guide, slot) for slot, row in enumerate(self._live) if row.guide]:
            assert self._grammars is not None
            self._grammars.fill(guides, guidance.allowed)
        if early := [slot for slot, row in enumerate(self._live) if len(row.tokens) < row.request.min_new_tokens]:
            guidance.allowed[early] &= self._not_the_end
        guidance.inverse_temperature[: len(self._live), 0] = [row.request.inverse_temperature for row in self._live]

    def _step(self) -> None:
        if self._live:
            self._prepare_next()
            tokens = np.array([row.tokens[-1] for row in self._live], np.int64)
            with self._clocks["decode"].running():
                self._decoder.step(tokens)
            self._append_tokens(0, list(range(len(tokens))))

    def _append_tokens(self, first: int, rows: list[int]) -> None:
        """Append the next tokens to the rows in slots `first`, `first + 1`, ..., and retire rows that end.

        Args:
            first: first slot.
            rows: for each of the slots, its row in the decoder's last call.
        """
        tokens, guidance = self._decoder.next_tokens[rows], self._decoder.guidance
        if guidance:
            drawn = self._draw(guidance, first, rows, tokens)
            if guidance.logprobs is not None:
                logprobs = guidance.logprobs[rows] + drawn
                for row, logprob in zip(self._live[first:], logprobs.tolist(), strict=True):
                    row.logprobs.append(logprob)
        # From the last slot down: the row that `_retire` moves into a gap then has its token already.
        for slot, token in reversed(list(enumerate(tokens.tolist(), start=first))):
            row = self._live[slot]
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

    def _draw(self, guidance: Guidance, first: int, rows: list[int], tokens: Tokens) -> NDArray[np.float32]:
        """Draw the next tokens of rows that have draws, in place of the most probable ones.

        Args:
            guidance: of the decoder.
            first: as for `_append_tokens`.
            rows: as for `_append_tokens`.
            tokens: next tokens, int64 (B,); changed in place.

        Returns:
            How much less the log-probability of the drawn token is than that of the most probable one, float32 (B,).
        """
        less = np.zeros(len(rows), np.float32)
        live = list(enumerate(self._live[first:]))
        chosen = [(at, row, row.request.draws) for at, row in live if row.request.draws and tokens[at] != NO_TOKEN]
        if not chosen:
            return less
        at = [each for each, _, _ in chosen]
        of = np.array(rows)[at]
        uniforms = np.array([row.uniform for _, row, _ in chosen])
        samplings = [draws.sampling for _, _, draws in chosen]
        scores = guidance.top_scores[of]
        drawn = draw(scores, guidance.scaled_totals[of], samplings, uniforms)
        tokens[at] = guidance.top_tokens[of, drawn]
        less[at] = np.take_along_axis(scores, drawn[:, None], 1)[:, 0] - scores[:, 0]
        for index in np.flatnonzero(drawn == UNDECIDED):
            everything = guidance.scores(of[index])
            token = draw_from_all(everything, samplings[index], uniforms[index], scores[index, -1])
            tokens[at[index]], less[at[index]] = token, everything[token] - scores[index, 0]
        return less

    def _retire(self, slot: int, outcome: Completion | RowError) -> None:
        """Move the last live row into the slot of a row that ended, and set the result of that row's future."""
        row, last = self._live[slot], self._live[-1]
        if last is not row:
            self._decoder.copy(len(self._live) - 1, slot)
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
        running = [row.future for row in self._live]
        running += [future for _, future in self._partial.group] if self._partial else []
        while not self.submitted.empty():
            item = self.submitted.get()
            if item is not None:
                self._waiting.add(item)
        for future in [*running, *self._waiting.clear()]:
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
    if row.request.is_over and row.request.is_over(row.tokens):
        return row.ended("over")
    return row.ended("length") if is_cut else None


def all_but(tokens: Iterable[int], words: int) -> NDArray[np.int32]:
    """The mask that allows all tokens but these, int32 (words,)."""
    bits = np.ones(32 * words, np.uint8)
    bits[[token for token in tokens if token < len(bits)]] = 0
    return np.packbits(bits, bitorder="little").view(np.int32)


@atexit.register
def _stop_all() -> None:
    """Stop engines that were not closed: a process that exits while a graph runs in another thread aborts."""
    loops = [thread for thread in threading.enumerate() if isinstance(thread, _Loop)]
    for loop in loops:
        loop.stop()
    for loop in loops:
        loop.join()
