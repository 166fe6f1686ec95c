"""Where an answer ends before the model ends it: at a stop text, or when it repeats a phrase for ever.

What enters: tokens of answers. What leaves: whether an answer is over, its text up to the stop text, and what it
repeats.

This module knows nothing of slots or graphs.
"""

from collections.abc import Callable, Sequence

#: An answer that was cut off counts as repetitive if it ends in a phrase of at most `PHRASE_TOKENS` tokens, repeated at
#: least `PHRASE_TIMES` times and over at least `REPEATED_TOKENS` tokens.
PHRASE_TOKENS, PHRASE_TIMES, REPEATED_TOKENS = 16, 4, 32
#: One that goes on is ended if it has repeated a phrase this many times as much: it could still leave the loop.
RUNAWAY = 2
#: Tokens between two looks at what an answer repeats.
LOOK_EVERY = 16


class Endings:
    """Ends answers. Thread-safe.

    Args:
        text_of: text of the tokens of an answer.
        stop: stop texts; the first of them that comes ends an answer.
        include_stop: the stop text is a part of the answer.
        allow_repetition: answers may repeat a phrase for ever.
    """

    def __init__(
        self,
        text_of: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        allow_repetition: bool = False,
    ) -> None:
        self._text_of, self._stop, self._include_stop = text_of, tuple(stop), include_stop
        self._allow_repetition = allow_repetition
        # Each token has a byte at least, but for special ones, which are not in the text.
        self._window = max((2 * len(text.encode()) for text in stop), default=0)

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether an answer of these tokens is over. To be called after each token."""
        if self._stop:
            text = self._text_of(list(tokens[-self._window :]))
            if any(stop in text for stop in self._stop):
                return True
        return len(tokens) % LOOK_EVERY == 0 and self.repetition(tokens, RUNAWAY) is not None

    def cut(self, text: str) -> tuple[str, bool]:
        """The text up to the first stop text in it, and whether there is one."""
        found = [(at, len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return text, False
        at, length = min(found)
        return text[: at + length if self._include_stop else at], True

    def repetition(self, tokens: Sequence[int], least: int = 1) -> tuple[list[int], int] | None:
        """The phrase that an answer repeats at its end, and how many times in full; None if it repeats none, or may.

        Args:
            tokens: of the answer.
            least: how many times as much as an answer that was cut off may repeat.
        """
        if self._allow_repetition or len(tokens) < least * REPEATED_TOKENS:
            return None
        for length in range(1, PHRASE_TOKENS + 1):
            matches = 0
            while matches < len(tokens) - length and tokens[-1 - matches] == tokens[-1 - matches - length]:
                matches += 1
            if matches + length >= least * max(REPEATED_TOKENS, PHRASE_TIMES * length):
                return list(tokens[-length:]), (matches + length) // length
        return None
