"""From features and prompts to answers: an engine, the tokenizer, and a watch on what comes out.

What enters: image features or failures, prompts, keys of images. What leaves: an `Answer` for
each, in order. A row whose logits are not finite, or whose answer repeats itself until it is cut,
is run again in fp32 where the bundle holds the checkpoint in fp32 too; if that does not help, it
fails.

This module knows nothing of where rows come from.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from qvl_batch.bundle.fp32 import Fp32Fallback
from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.loading import Bundle
from qvl_batch.clock import Clock
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.engine import Completion, Engine, Request, decoder_clocks
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import NumericError, RepetitionError, RowError
from qvl_batch.runtime.devices import memory_on
from qvl_batch.schema import Answer, Failure

#: Slots of the engine that runs rows again.
FP32_SLOTS = 4
#: An answer that was cut repeats itself if it ends in a phrase of at most so many tokens, at least
#: so many times, and over at least so many tokens.
PHRASE_TOKENS, PHRASE_TIMES, REPEATED_TOKENS = 16, 4, 32


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row with its image's features, float32 (T_img, D), or why it has none.

    Questions of one `image` (any key, None for none) have the same features.
    """

    features: Features | Failure
    prompt: str | None
    image: bytes | None = None


class Answerer:
    """Answers rows by an engine of its own until it is closed; threads may share it.

    Args:
        bundle: the bundle.
        slots: rows that are answered at a time.
        threads: threads that one operator may use.
        allow_repetition: an answer that repeats itself until it is cut is an answer.
    """

    def __init__(self, bundle: Bundle, slots: int, threads: int, *, allow_repetition: bool = False) -> None:
        self._layout = RowLayout(bundle)
        self._allow_repetition = allow_repetition
        #: Seconds of the decoder's work, by kind.
        self.clocks = clocks = decoder_clocks()
        self._engine = _new_engine(bundle, slots, threads, clocks)
        self._fp32 = Fp32Fallback(bundle, lambda exact: _new_engine(exact, FP32_SLOTS, threads, clocks))

    def answer(self, questions: Sequence[EncodedRow], max_new_tokens: int) -> list[Answer]:
        """Answer questions, in order; all of them are in the engine at once.

        Args:
            questions: rows.
            max_new_tokens: longest answer in tokens.
        """
        requests = [self._request(question, max_new_tokens) for question in questions]
        outcomes = iter(self._complete([request for request in requests if isinstance(request, Request)]))
        return [
            Answer.failed(request)
            if isinstance(request, Failure)
            else self._answer(len(request.input_ids), next(outcomes))
            for request in requests
        ]

    def close(self) -> None:
        """Stop when what was asked is answered."""
        for engine in self._engines():
            engine.close()

    def stop(self) -> None:
        """Stop at once; what is left fails."""
        for engine in self._engines():
            engine.stop()

    def _engines(self) -> list[Engine]:
        return [self._engine, self._fp32.loaded] if self._fp32.loaded else [self._engine]

    def _request(self, question: EncodedRow, max_new_tokens: int) -> Request | Failure:
        if isinstance(question.features, Failure):
            return question.features
        try:
            ids = self._layout.row_ids(question.prompt)
        except RowError as error:
            return Failure.of(error)
        return Request(ids, question.features, max_new_tokens, question.image)

    def _complete(self, requests: Sequence[Request]) -> list[Completion | RowError]:
        outcomes = self._run(self._engine, requests)
        failed = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, RowError)]
        engine = self._fp32.get() if failed else None
        if engine:
            again = self._run(engine, [requests[index] for index in failed])
            for index, outcome in zip(failed, again, strict=True):
                outcomes[index] = outcome
        return outcomes

    def _run(self, engine: Engine, requests: Sequence[Request]) -> list[Completion | RowError]:
        futures = [engine.submit(request) for request in requests]
        try:
            return [self._outcome(future) for future in futures]
        finally:  # after an interrupt, nobody waits for the others
            for future in futures:
                future.cancel()

    def _outcome(self, future: "Future[Completion]") -> Completion | RowError:
        try:
            completion = future.result()
        except NumericError as error:
            return error
        if completion.finish_reason == "length" and not self._allow_repetition:
            phrase, times = repeated_phrase(completion.token_ids)
            if phrase:
                return RepetitionError(
                    f"the answer was cut at {len(completion.token_ids)} tokens, the last of which say "
                    f"{self._layout.text(phrase)!r} {times} times (--allow-repetition keeps such answers)"
                )
        return completion

    def _answer(self, prompt_tokens: int, outcome: Completion | RowError) -> Answer:
        if isinstance(outcome, RowError):
            return Answer.failed(Failure.of(outcome))
        text = self._layout.text(outcome.token_ids)
        return Answer(text, outcome.finish_reason, prompt_tokens, len(outcome.token_ids))


def _new_engine(bundle: Bundle, slots: int, threads: int, clocks: dict[str, Clock]) -> Engine:
    decoder = Decoder(bundle, slots, threads, memory=memory_on(bundle.manifest.device))
    return Engine(decoder, bundle.manifest.generation.eos_token_ids, clocks)


def repeated_phrase(tokens: list[int]) -> tuple[list[int], int]:
    """The phrase that an answer ends in again and again, and how many times in full; nothing and 0 if it does not."""
    for length in range(1, PHRASE_TOKENS + 1):
        same = 0
        while same < len(tokens) - length and tokens[-1 - same] == tokens[-1 - same - length]:
            same += 1
        if same + length >= max(REPEATED_TOKENS, PHRASE_TIMES * length):
            return tokens[-length:], (same + length) // length
    return [], 0
