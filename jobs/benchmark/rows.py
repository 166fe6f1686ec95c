"""Input of contenders, and base class of peers. Can be imported in the environment of every contender."""

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

#: Batch sizes that a peer is tried with, and least number of rows to try each on.
BATCHES, LEAST_TRIED = (1, 4, 8, 16, 32), 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rows:
    """Image files and prompts to answer."""

    files: list[bytes]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def part(self, start: int, stop: int) -> "Rows":
        """Rows `start` to `stop` - 1."""
        return Rows(self.files[start:stop], self.prompts[start:stop])


class Peer(ABC):
    """A peer that answers rows with a fixed number of tokens each, a batch at a time.

    Args:
        new_tokens: tokens of each answer; end tokens are ignored.
        batches: sizes of a batch to try; the fastest counts.
    """

    def __init__(self, new_tokens: int, batches: Sequence[int] = BATCHES) -> None:
        self.new_tokens, self.batch, self.batches = new_tokens, 1, batches

    @abstractmethod
    def prompt_tokens(self, rows: Rows) -> list[int]:
        """Tokens up to the answer, those of the image included, of each row."""

    @abstractmethod
    def _images(self, rows: Rows) -> Any:
        """Images, decoded and fitted, in the format of the peer."""

    @abstractmethod
    def _vision(self, rows: Rows, images: Any) -> float:
        """Milliseconds per image of the vision tower."""

    @abstractmethod
    def _answer(self, rows: Rows, images: Any, new_tokens: int) -> list[list[int]]:
        """Answer a batch."""

    def choose_batch(self, rows: Rows) -> dict[int, float]:
        """Try batch sizes on a few rows and keep the fastest; returns images/s of each."""
        speeds: dict[int, float] = {}
        for size in (size for size in self.batches if size <= len(rows)):
            self.batch = size
            some = rows.part(0, max(size, LEAST_TRIED))
            try:
                self.answer(some.part(0, size))
                speeds[size] = len(some) / seconds(partial(self.answer, some))
            except RuntimeError as error:
                if not speeds or "out of memory" not in str(error):
                    raise
                break  # larger ones will not fit either
        self.batch = max(speeds, key=lambda size: speeds[size])
        return speeds

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        parts = (rows.part(at, at + self.batch) for at in range(0, len(rows), self.batch))
        return [tokens for part in parts for tokens in self._answer(part, self._images(part), self.new_tokens)]

    def stages(self, rows: Rows) -> dict[str, float]:
        """Milliseconds per image of each stage; the prefill is an answer of one token minus the vision tower."""
        rows = rows.part(0, self.batch)
        count, took = len(rows), dict[str, float]()
        images = timed(took, "decode+fit", count, lambda: self._images(rows))
        took["vision"] = self._vision(rows, images)
        whole = dict[str, float]()
        timed(whole, "first token", count, lambda: self._answer(rows, images, 1))
        timed(whole, "answer", count, lambda: self._answer(rows, images, self.new_tokens))
        took["prefill"] = whole["first token"] - took["vision"]
        took["decode"] = whole["answer"] - whole["first token"]
        return took


def timed(took: dict[str, float], stage: str, count: int, work: Callable[[], T]) -> T:
    """Run `work`, and add its milliseconds per image to `took`."""
    began = time.perf_counter()
    result = work()
    took[stage] = (time.perf_counter() - began) * 1000 / count
    return result


def seconds(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median_seconds(work: Callable[[], object], times: int) -> float:
    """Median seconds of `times` runs of `work`, after one to warm up."""
    work()
    return statistics.median(seconds(work) for _ in range(times))
