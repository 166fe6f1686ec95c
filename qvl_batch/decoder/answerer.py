"""Conversations and features to answers: the engine, the tokenizer, and checks of the answers.

What enters: conversations, features and keys of their images, what answers must be, or failures. What leaves: an
`Answer` for each row, in order. A row whose logits are not finite, or whose answer repeats a phrase for ever or is cut
off before it is what it must be, is run again in fp32, provided that the bundle contains the checkpoint in fp32; if
that does not help, it fails.

This module knows nothing of where rows come from.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache

import pyarrow as pa

from qvl_batch.bundle.fp32 import Fp32Fallback
from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import TOKENIZER
from qvl_batch.constraints import Constraint
from qvl_batch.conversation import Conversation
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.decoder.draws import Draws
from qvl_batch.decoder.endings import RUNAWAY, Endings
from qvl_batch.decoder.engine import Engine, Load, decoder_clocks
from qvl_batch.decoder.grammar import MOST_GRAMMARS, ChoiceTree, Grammar, Grammars
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.decoder.requests import Completion, Request
from qvl_batch.errors import ConstraintError, RepetitionError, RowError
from qvl_batch.runtime.devices import memory_on
from qvl_batch.sampling import GREEDY, Sampling
from qvl_batch.schema import Answer, Failure, FinishReason
from qvl_batch.value_confidence import value_confidence

#: Slots of the engine that runs failed rows again in fp32.
FP32_SLOTS = 4


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """Features of an image, float32 (T_img, D), in rows and columns, and its key.

    Images with the same key must have the same features; those with None share nothing.
    """

    features: Features
    rows: int
    columns: int
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A conversation, its images, what its answer must be, if that is anything, how its tokens are drawn, and what
    identifies the row: two with the same conversation and images are drawn alike if they have that in common too.
    """

    conversation: Conversation
    images: tuple[EncodedImage, ...]
    constraint: Constraint | None = None
    sampling: Sampling = GREEDY
    id: str = ""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the engine is asked for a row: its answers; or, to know the probability of each choice, what may follow at
    every place where choices part. `draws` has one for each answer, None for the most probable one. `confidence_type`
    is that of the values, if it is asked how sure the model is of each.
    """

    prompt_tokens: int
    requests: list[Request]
    draws: list[Draws | None]
    choices: ChoiceTree | None = None
    confidence_type: pa.DataType | None = None


class Answerer:
    """Answers rows with an engine of its own, until it is closed. Thread-safe.

    Args:
        bundle: the bundle.
        slots: rows answered at a time.
        threads: threads for one operator.
        system_prompt: text of the system message of conversations that have none; by default the template's own.
        allow_repetition: accept answers that repeat a phrase until they are cut off.
        stop: texts before which an answer ends, whichever comes first.
        include_stop: the text that ended an answer is a part of it.
        min_new_tokens: shortest answer in tokens.
        guided: rows can have constraints.
        logprobs: answers say how sure the model is.
        drawn: answers can be drawn.

    Raises:
        BundleError: graph or tokenizer cannot be loaded, or break the contract.
        DeviceError: the device cannot be used, is out of memory, or computes the graph wrongly.
    """

    def __init__(
        self,
        bundle: Bundle,
        slots: int,
        threads: int,
        *,
        system_prompt: str | None = None,
        allow_repetition: bool = False,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_new_tokens: int = 0,
        guided: bool = False,
        logprobs: bool = False,
        drawn: bool = False,
    ) -> None:
        self._layout = RowLayout(bundle, system_prompt)
        self._endings = Endings(self._layout.text, stop, include_stop=include_stop, allow_repetition=allow_repetition)
        self._min_new_tokens, self._logprobs = min_new_tokens, logprobs
        #: Busy thread-seconds of the decoder, by kind of work.
        self.clocks = clocks = decoder_clocks()
        self._grammars = grammars = grammars_of(bundle, self._layout, threads) if guided else None

        def new_engine(bundle: Bundle, slots: int) -> Engine:
            memory = memory_on(bundle.manifest.device)
            is_guided = guided or logprobs or drawn or min_new_tokens > 0
            decoder = Decoder(bundle, slots, threads, memory=memory, guided=is_guided, logprobs=logprobs, drawn=drawn)
            return Engine(decoder, bundle.manifest.generation.eos_token_ids, clocks, grammars)

        self._engine = new_engine(bundle, slots)
        self._fp32 = Fp32Fallback(bundle, lambda exact: new_engine(exact, FP32_SLOTS))

    def answer(self, rows: Sequence[EncodedRow | Failure], max_new_tokens: int) -> list[Answer]:
        """Answer rows, in order; all of them are submitted to the engine at once. Failures are passed through.

        Args:
            rows: the rows.
            max_new_tokens: longest answer in tokens.
        """
        asked = [self._asked(row, max_new_tokens) for row in rows]
        requests = [request for each in asked if isinstance(each, _Asked) for request in each.requests]
        outcomes = iter(self._complete(requests))
        return [
            Answer.failed(each)
            if isinstance(each, Failure)
            else self._answer(each, [next(outcomes) for _ in each.requests])
            for each in asked
        ]

    @property
    def load(self) -> Load:
        """How busy the bundle's own engine is."""
        return self._engine.load

    def close(self) -> None:
        """Finish pending rows, then stop."""
        for engine in self._engines():
            engine.close()

    def stop(self) -> None:
        """Stop at once; pending rows fail."""
        for engine in self._engines():
            engine.stop()

    def _engines(self) -> list[Engine]:
        return [self._engine, self._fp32.loaded] if self._fp32.loaded else [self._engine]

    def _asked(self, row: EncodedRow | Failure, max_new_tokens: int) -> "_Asked | Failure":
        if isinstance(row, Failure):
            return row
        try:
            grammar = self._grammar(row.constraint)
            tokens = self._layout.row(row.conversation, [(image.rows, image.columns) for image in row.images])
            if grammar is not None:
                grammar.check_room(min(max_new_tokens, self._layout.layout.max_seq_len - len(tokens.input_ids)))
        except RowError as error:
            return Failure.of(error)
        images = [row.images[placed.index] for placed in tokens.images]
        features, keys = [image.features for image in images], [image.key for image in images]

        def request(answer: Sequence[int] = (), candidates: Sequence[int] = ()) -> Request:
            ids = [*tokens.input_ids, *answer]
            return Request(PrefillRow(ids, tokens.images, features, candidates), max_new_tokens, keys, grammar)

        whole = replace(request(), min_new_tokens=self._min_new_tokens, is_over=self._endings.is_over)
        draws = _draws(row, whole)
        if not (self._logprobs and isinstance(grammar, ChoiceTree)):
            kind = _confidence_type(row.constraint) if self._logprobs and row.constraint else None
            requests = [replace(whole, draws=each) for each in draws]
            return _Asked(len(tokens.input_ids), requests, draws, confidence_type=kind)
        places = [request(each.tokens, each.following) for each in grammar.branches()]
        # Only what may follow is asked for, not what follows.
        places = [replace(place, max_new_tokens=1, grammar=None) for place in places]
        return _Asked(len(tokens.input_ids), places, draws, grammar)

    def _grammar(self, constraint: Constraint | None) -> Grammar | None:
        if constraint is None:
            return None
        assert self._grammars is not None
        return self._grammars.compile(constraint)

    def _complete(self, requests: Sequence[Request]) -> list[Completion | RowError]:
        outcomes = self._run(self._engine, requests)
        failed = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, RowError)]
        fallback = self._fp32.get() if failed else None
        if fallback:
            retried = self._run(fallback, [requests[index] for index in failed])
            for index, outcome in zip(failed, retried, strict=True):
                outcomes[index] = outcome
        return outcomes

    def _run(self, engine: Engine, requests: Sequence[Request]) -> list[Completion | RowError]:
        futures: list[Future[Completion]] = []
        try:
            futures.extend(engine.submit(request) for request in requests)
            return [self._outcome(future) for future in futures]
        finally:  # after an interrupt, cancel the rest; finished futures are not affected
            for future in futures:
                future.cancel()

    def _outcome(self, future: "Future[Completion]") -> Completion | RowError:
        try:
            completion = future.result()
        except RowError as error:
            return error
        is_cut = completion.finish_reason == "length"
        if completion.finish_reason == "stop" or self._endings.cut(self._layout.text(completion.token_ids))[1]:
            return completion
        if found := self._endings.repetition(completion.token_ids, 1 if is_cut else RUNAWAY):
            phrase, times = found
            return RepetitionError(
                f"the answer was {'cut off' if is_cut else 'ended'} at {len(completion.token_ids)} tokens and ends in "
                f"{times} repetitions of {self._layout.text(phrase)!r} (--allow-repetition keeps such answers)"
            )
        return completion

    def _answer(self, asked: "_Asked", outcomes: Sequence[Completion | RowError]) -> Answer:
        if asked.choices is not None:
            answers = self._chosen(asked, asked.choices, outcomes)
        else:
            answers = [self._written(asked, outcome) for outcome in outcomes]
        first = next((answer for answer in answers if answer.failure is None), answers[0])
        return replace(first, samples=tuple(answers)) if asked.draws[0] else first

    def _written(self, asked: "_Asked", outcome: Completion | RowError) -> Answer:
        """The answer of a row."""
        if isinstance(outcome, RowError):
            return Answer.failed(Failure.of(outcome))
        text, is_ended = self._endings.cut(self._layout.text(outcome.token_ids))
        reason: FinishReason = "length" if outcome.finish_reason == "length" and not is_ended else "stop"
        tokens, logprobs = len(outcome.token_ids), tuple(outcome.logprobs)
        sure = None
        if asked.confidence_type is not None:
            lengths = self._layout.byte_lengths(outcome.token_ids)
            sure = value_confidence(text, asked.confidence_type, lengths, logprobs)
        return Answer(text, reason, asked.prompt_tokens, tokens, logprobs=logprobs, parsed_confidence=sure)

    def _chosen(self, asked: "_Asked", tree: ChoiceTree, outcomes: Sequence[Completion | RowError]) -> list[Answer]:
        """The choices of a row, by what may follow at every place where choices part."""
        completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
        if len(completions) < len(outcomes):
            error = next(outcome for outcome in outcomes if isinstance(outcome, RowError))
            return [Answer.failed(Failure.of(error))]
        scores = [each.candidate_scores for each in completions]
        return [
            Answer(
                chosen.choice,
                "stop",
                asked.prompt_tokens,
                len(chosen.token_ids),
                logprobs=tuple(chosen.logprobs),
                choice_probabilities=chosen.probabilities,
            )
            for chosen in tree.chosen(scores, asked.draws)
        ]


def _draws(row: EncodedRow, request: Request) -> "list[Draws | None]":
    """How each answer of a row is drawn: one that is not, if nothing is."""
    sampling = row.sampling
    if not sampling.is_random:
        return [None]
    identity = request.content.tobytes() + row.id.encode()
    return [Draws(sampling, identity, sample) for sample in range(sampling.samples)]


@lru_cache(MOST_GRAMMARS)
def _confidence_type(constraint: Constraint) -> pa.DataType | None:
    """Type of how sure the model is of each value; None also for a schema from which no type follows."""
    try:
        return constraint.confidence_type
    except ConstraintError:
        return None


def grammars_of(bundle: Bundle, layout: RowLayout, threads: int) -> Grammars:
    """Grammars over the vocabulary of a bundle, whose masks are made by so many threads."""
    vocab_size, eos = bundle.manifest.decoder.vocab_size, bundle.manifest.generation.eos_token_ids
    return Grammars(bundle.file(TOKENIZER), vocab_size, eos, threads, (layout.encode, layout.text))
