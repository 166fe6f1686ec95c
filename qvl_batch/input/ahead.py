"""Images that are on their way, and what is made of them in order while others are fetched.

What enters: futures of images, and what to make of them. What leaves: what was made, in the order in which it was
begun. A slow host so holds up what is behind it only once there is no room for what is fetched meanwhile.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from qvl_batch.errors import ImageError

#: Most bytes of images that are there, and wait for others to be used.
BYTES_AHEAD = 1 << 28
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fetching:
    """Images that are being fetched."""

    images: "Sequence[Future[bytes | ImageError]]"

    @property
    def is_done(self) -> bool:
        """Whether all are there, or have failed."""
        return all(image.done() for image in self.images)

    @property
    def bytes_there(self) -> int:
        """Bytes of those that are there."""
        found = (image.result() for image in self.images if image.done() and not image.cancelled())
        return sum(len(image) for image in found if isinstance(image, bytes))

    def results(self) -> list[bytes | ImageError]:
        """Wait for them: for each location the image's bytes, or the error of its row."""
        return [image.result() for image in self.images]

    def cancel(self) -> None:
        """Begin no further ones."""
        for image in self.images:
            image.cancel()


@dataclass(frozen=True, slots=True)
class Begun(Generic[T]):
    """Something that is made of images that are being fetched.

    Args:
        images: that it waits for.
        held: bytes that it holds besides.
        made: makes it of the fetched images.
    """

    images: Fetching
    held: int
    made: Callable[[list[bytes | ImageError]], T]


def in_order(begun: Iterable[Begun[T]], ahead: int) -> Iterator[T]:
    """Make things in their order, and begin others while the images of the next one are waited for.

    Args:
        begun: things; taking the next one begins it.
        ahead: images that are begun ahead; 0 begins nothing before the one before it was handed on.

    Raises:
        Exception: what `begun` raises, after all before it was handed on.
    """
    waiting: deque[Begun[T]] = deque()
    coming, failed = iter(begun), None
    try:
        while True:
            while waiting and (waiting[0].images.is_done or failed or not _has_room(waiting, ahead)):
                first = waiting.popleft()
                yield first.made(first.images.results())
            if failed:
                raise failed
            try:
                waiting.append(next(coming))
            except StopIteration:
                break
            except Exception as error:
                failed = error
        while waiting:
            first = waiting.popleft()
            yield first.made(first.images.results())
    finally:
        for each in waiting:
            each.images.cancel()


def _has_room(waiting: Sequence[Begun[T]], ahead: int) -> bool:
    """Whether more may be begun. A thing without images counts too, since it takes some memory."""
    if sum(max(1, len(each.images.images)) for each in waiting) >= ahead:
        return False
    return sum(each.held + each.images.bytes_there for each in waiting) < BYTES_AHEAD
