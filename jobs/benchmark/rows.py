"""What a contender gets and gives. Every environment that a contender runs in can import this."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

#: Rows of a batch that a peer is tried with; the fastest counts.
BATCHES = (1, 4, 8, 16, 32)

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


class Contender(Protocol):
    """Someone who answers rows with a fixed number of tokens each."""

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""

    def prompt_tokens(self, rows: Rows) -> list[int]:
        """Tokens up to the answer, those of the image included, of each row."""

    def stages(self, rows: Rows) -> dict[str, float]:
        """Milliseconds an image of `decode+fit`, `vision`, `prefill` and `decode`, the last of a whole answer."""


class Batched(Contender, Protocol):
    """A peer that must be told how many rows to answer at a time."""

    batch: int


def fastest_batch(peer: Batched, rows: Rows) -> dict[int, float]:
    """Try batch sizes on a few rows and leave the fastest set; images/s of each."""
    speeds: dict[int, float] = {}
    for size in (size for size in BATCHES if size <= len(rows)):
        peer.batch = size
        some = rows.part(0, max(size, BATCHES[-2]))
        peer.answer(some.part(0, size))
        speeds[size] = len(some) / seconds(partial(peer.answer, some))
    peer.batch = max(speeds, key=lambda size: speeds[size])
    return speeds


def timed(took: dict[str, float], stage: str, count: int, work: Callable[[], T]) -> T:
    """Do the work, and note milliseconds an image of its stage."""
    began = time.perf_counter()
    result = work()
    took[stage] = (time.perf_counter() - began) * 1000 / count
    return result


def seconds(work: Callable[[], object]) -> float:
    """Time that the work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
