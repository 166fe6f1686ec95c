"""Features and prompts to answers: the engine, the tokenizer, and checks of the answers.

What enters: image features or failures, prompts, keys of images. What leaves: an `Answer` for each row, in order. A row
whose logits are not finite, or whose answer repeats a phrase until it is cut off, is run again in fp32, provided that
the bundle contains the checkpoint in fp32; if that does not help, it fails.

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

#: Slots of the engine that runs failed rows again in fp32.
FP32_SLOTS = 4
#: An answer that was cut off counts as repetitive if it ends in a phrase of at most `PHRASE_TOKENS` tokens, repeated at
#: least `PHRASE_TIMES` times and over at least `REPEATED_TOKENS` tokens.
PHRASE_TOKENS, PHRASE_TIMES, REPEATED_TOKENS = 16, 4, 32


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A prompt and the features of its image, float32 (T_img, D), or why there are none.

    Rows with the same key `image` must have the same features; rows with None share nothing.
    """

    features: Features | Failure
    prompt: str | None
    image: bytes | None = None


class Answerer:
    """Answers rows with an engine of its own, until it is closed. Thread-safe.

    Args:
        bundle: the bundle.
        slots: rows answered at a time.
        threads: threads for one operator.
        allow_repetition: accept answers that repeat a phrase until they are cut off.

    Raises:
        BundleError: graph or tokenizer cannot be loaded, or break the contract.
        DeviceError: the device cannot be used, is out of memory, or computes the graph wrongly.
    """

    def __init__(self, bundle: Bundle, slots: int, threads: int, *, allow_repetition: bool = False) -> None:
        self._layout = RowLayout(bundle)
        self._allow_repetition = allow_repetition
        #: Busy thread-seconds of the decoder, by kind of work.
        self.clocks = clocks = decoder_clocks()
        self._engine = _new_engine(bundle, slots, threads, clocks)
        self._fp32 = Fp32Fallback(bundle, lambda exact: _new_engine(exact, FP32_SLOTS, threads, clocks))

    def answer(self, questions: Sequence[EncodedRow], max_new_tokens: int) -> list[Answer]:
        """Answer rows, in order; all of them are submitted to the engine at once.

        Args:
            questions: the rows.
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
        """Finish pending rows, then stop."""
        for engine in self._engines():
            engine.close()

    def stop(self) -> None:
        """Stop at once; pending rows fail."""
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
        except NumericError as error:
            return error
        if completion.finish_reason == "length" and not self._allow_repetition:
            phrase, times = repeated_phrase(completion.token_ids)
            if phrase:
                return RepetitionError(
                    f"the answer was cut off at {len(completion.token_ids)} tokens and ends in {times} repetitions of "
                    f"{self._layout.text(phrase)!r} (--allow-repetition keeps such answers)"
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
    """The phrase that an answer repeats at its end, and how many times in full; ([], 0) if it repeats none."""
    for length in range(1, PHRASE_TOKENS + 1):
        matches = 0
        while matches < len(tokens) - length and tokens[-1 - matches] == tokens[-1 - matches - length]:
            matches += 1
        if matches + length >= max(REPEATED_TOKENS, PHRASE_TIMES * length):
            return tokens[-length:], (matches + length) // length
    return [], 0
