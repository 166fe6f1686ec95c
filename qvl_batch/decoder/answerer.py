"""Conversations and features to answers: the engine, the tokenizer, and checks of the answers.

What enters: conversations, features and keys of their images, or failures. What leaves: an `Answer` for each row, in
order. A row whose logits are not finite, or whose answer repeats a phrase until it is cut off, is run again in fp32,
provided that the bundle contains the checkpoint in fp32; if that does not help, it fails.

This module knows nothing of where rows come from.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from qvl_batch.bundle.fp32 import Fp32Fallback
from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.loading import Bundle
from qvl_batch.clock import Clock
from qvl_batch.conversation import Conversation
from qvl_batch.decoder.decoder import Decoder, PrefillRow
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
    """A conversation and its images."""

    conversation: Conversation
    images: tuple[EncodedImage, ...]


class Answerer:
    """Answers rows with an engine of its own, until it is closed. Thread-safe.

    Args:
        bundle: the bundle.
        slots: rows answered at a time.
        threads: threads for one operator.
        system_prompt: text of the system message of conversations that have none; by default the template's own.
        allow_repetition: accept answers that repeat a phrase until they are cut off.

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
    ) -> None:
        self._layout = RowLayout(bundle, system_prompt)
        self._allow_repetition = allow_repetition
        #: Busy thread-seconds of the decoder, by kind of work.
        self.clocks = clocks = decoder_clocks()
        self._engine = _new_engine(bundle, slots, threads, clocks)
        self._fp32 = Fp32Fallback(bundle, lambda exact: _new_engine(exact, FP32_SLOTS, threads, clocks))

    def answer(self, rows: Sequence[EncodedRow | Failure], max_new_tokens: int) -> list[Answer]:
        """Answer rows, in order; all of them are submitted to the engine at once. Failures are passed through.

        Args:
            rows: the rows.
            max_new_tokens: longest answer in tokens.
        """
        requests = [self._request(row, max_new_tokens) for row in rows]
        outcomes = iter(self._complete([request for request in requests if isinstance(request, Request)]))
        return [
            Answer.failed(request)
            if isinstance(request, Failure)
            else self._answer(len(request.row.input_ids), next(outcomes))
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

    def _request(self, row: EncodedRow | Failure, max_new_tokens: int) -> Request | Failure:
        if isinstance(row, Failure):
            return row
        try:
            tokens = self._layout.row(row.conversation, [(image.rows, image.columns) for image in row.images])
        except RowError as error:
            return Failure.of(error)
        images = [row.images[placed.index] for placed in tokens.images]
        features, keys = [image.features for image in images], [image.key for image in images]
        return Request(PrefillRow(tokens.input_ids, tokens.images, features), max_new_tokens, keys)

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
