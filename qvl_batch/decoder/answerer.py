"""Conversations and features to answers: the engine, the tokenizer, and checks of the answers.

What enters: conversations, features and keys of their images, what answers must be, or failures. What leaves: an
`Answer` for each row, in order. A row whose logits are not finite, or whose answer is cut off while it repeats a phrase
or before it is what it must be, is run again in fp32, provided that the bundle contains the checkpoint in fp32; if that
does not help, it fails.

This module knows nothing of where rows come from.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from qvl_batch.bundle.fp32 import Fp32Fallback
from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import TOKENIZER
from qvl_batch.constraints import Constraint
from qvl_batch.conversation import Conversation
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.decoder.engine import Completion, Engine, Request, decoder_clocks
from qvl_batch.decoder.grammar import ChoiceTree, Grammar, Grammars
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import RepetitionError, RowError
from qvl_batch.runtime.devices import memory_on
from qvl_batch.schema import Answer, Failure

#: Slots of the engine that runs failed rows again in fp32.
FP32_SLOTS = 4
#: An answer that was cut off counts as repetitive if it ends in a phrase of at most `PHRASE_TOKENS` tokens, repeated at
#: least `PHRASE_TIMES` times and over at least `REPEATED_TOKENS` tokens.
PHRASE_TOKENS, PHRASE_TIMES, REPEATED_TOKENS = 16, 4, 32


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
    """A conversation, its images, and what its answer must be, if that is anything."""

    conversation: Conversation
    images: tuple[EncodedImage, ...]
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the engine is asked for a row: its answer; or, to know the probability of each choice, what may follow at
    every place where choices part.
    """

    prompt_tokens: int
    requests: list[Request]
    choices: ChoiceTree | None = None


class Answerer:
    """Answers rows with an engine of its own, until it is closed. Thread-safe.

    Args:
        bundle: the bundle.
        slots: rows answered at a time.
        threads: threads for one operator.
        system_prompt: text of the system message of conversations that have none; by default the template's own.
        allow_repetition: accept answers that repeat a phrase until they are cut off.
        guided: rows can have constraints.
        logprobs: answers say how sure the model is.

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
        guided: bool = False,
        logprobs: bool = False,
    ) -> None:
        self._layout = RowLayout(bundle, system_prompt)
        self._allow_repetition, self._logprobs = allow_repetition, logprobs
        #: Busy thread-seconds of the decoder, by kind of work.
        self.clocks = clocks = decoder_clocks()
        self._grammars = grammars = grammars_of(bundle, self._layout, threads) if guided else None

        def new_engine(bundle: Bundle, slots: int) -> Engine:
            memory = memory_on(bundle.manifest.device)
            decoder = Decoder(bundle, slots, threads, memory=memory, guided=guided or logprobs, logprobs=logprobs)
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

        prompt_tokens = len(tokens.input_ids)
        if not (self._logprobs and isinstance(grammar, ChoiceTree)):
            return _Asked(prompt_tokens, [request()])
        places = [request(each.tokens, each.following) for each in grammar.branches()]
        # Only what may follow is asked for, not what follows.
        places = [replace(place, max_new_tokens=1, grammar=None) for place in places]
        return _Asked(prompt_tokens, places, grammar)

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
        if completion.finish_reason == "length" and not self._allow_repetition:
            phrase, times = repeated_phrase(completion.token_ids)
            if phrase:
                return RepetitionError(
                    f"the answer was cut off at {len(completion.token_ids)} tokens and ends in {times} repetitions of "
                    f"{self._layout.text(phrase)!r} (--allow-repetition keeps such answers)"
                )
        return completion

    def _answer(self, asked: "_Asked", outcomes: Sequence[Completion | RowError]) -> Answer:
        for outcome in outcomes:
            if isinstance(outcome, RowError):
                return Answer.failed(Failure.of(outcome))
        completions = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
        if asked.choices is not None:
            chosen = asked.choices.chosen([each.candidate_scores for each in completions])
            tokens, logprobs = len(chosen.token_ids), tuple(chosen.logprobs)
            return Answer(
                chosen.choice,
                "stop",
                asked.prompt_tokens,
                tokens,
                logprobs=logprobs,
                choice_probabilities=chosen.probabilities,
            )
        (outcome,) = completions
        text = self._layout.text(outcome.token_ids)
        tokens = len(outcome.token_ids)
        return Answer(text, outcome.finish_reason, asked.prompt_tokens, tokens, logprobs=tuple(outcome.logprobs))


def grammars_of(bundle: Bundle, layout: RowLayout, threads: int) -> Grammars:
    """Grammars over the vocabulary of a bundle, whose masks are made by so many threads."""
    vocab_size, eos = bundle.manifest.decoder.vocab_size, bundle.manifest.generation.eos_token_ids
    return Grammars(bundle.file(TOKENIZER), vocab_size, eos, threads, (layout.encode, layout.text))


def repeated_phrase(tokens: list[int]) -> tuple[list[int], int]:
    """The phrase that an answer repeats at its end, and how many times in full; ([], 0) if it repeats none."""
    for length in range(1, PHRASE_TOKENS + 1):
        matches = 0
        while matches < len(tokens) - length and tokens[-1 - matches] == tokens[-1 - matches - length]:
            matches += 1
        if matches + length >= max(REPEATED_TOKENS, PHRASE_TIMES * length):
            return tokens[-length:], (matches + length) // length
    return [], 0
