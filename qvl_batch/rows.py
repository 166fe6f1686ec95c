"""Rows of the input, identified by position: file number, and index in the file.

Ids need not be unique. A set of rows is a bitmap with one bit for each row of the input: a hundred million rows take
12.5 MB, whatever the length of their ids, and a lookup is as fast as an insertion.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: File number, and index of the row in that file.
Row = tuple[int, int]
#: `start` and `stop` of consecutive rows of a file, `stop` excluded.
Span = tuple[int, int]
#: Rows whose bits are unpacked to bytes at a time: a file can have a hundred million.
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input, or a folder of images.

    Args:
        path: absolute; that of a folder of images ends with a slash.
        size: in bytes.
        rows: number of rows.
        fingerprint: a hash that changes if the file does; each kind of file says of what.
    """

    path: str
    size: int
    rows: int
    fingerprint: str


class RowSet:
    """A set of rows.

    Args:
        rows: number of rows of each file, in order of file number.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self._first = np.cumsum([0, *rows])
        self._bits = np.zeros(-(-int(self._first[-1]) // 8), np.uint8)
        self.count = 0

    def add(self, file: int, start: int, stop: int) -> int:
        """Add consecutive rows.

        Returns:
            How many of them were already in the set.

        Raises:
            IndexError: there is no such file, or it has no such rows.
        """
        known = self._set(file, start, stop, present=True)
        self.count += stop - start - known
        return known

    def remove(self, file: int, row: int) -> None:
        """Remove a row that is in the set.

        Raises:
            IndexError: there is no such file, or it has no such row.
        """
        self.count -= self._set(file, row, row + 1, present=False)

    def held(self, file: int, start: int, stop: int) -> int:
        """How many of these consecutive rows are in the set."""
        pieces = (self._unpack(file, at, min(at + PIECE, stop)) for at in range(start, stop, PIECE))
        return sum(int(bits[span].sum()) for *_, bits, span in pieces)

    def missing(self, file: int, start: int, stop: int) -> list[Span]:
        """Those of these consecutive rows that are not in the set, as the fewest possible spans, in order."""
        *_, bits, span = self._unpack(file, start, stop)
        return spans(start + np.flatnonzero(~bits[span]))

    def _set(self, file: int, start: int, stop: int, *, present: bool) -> int:
        """Add or remove consecutive rows; returns how many of them were in the set before."""
        low, high, bits, span = self._unpack(file, start, stop)
        known = int(bits[span].sum())
        bits[span] = present
        self._bits[low:high] = np.packbits(bits, bitorder="little")
        return known

    def _unpack(self, file: int, start: int, stop: int) -> tuple[int, int, NDArray[np.bool_], slice]:
        """Unpack the bytes that hold the rows.

        Returns:
            First and last byte (excluded), their bits, and the slice of these bits that belongs to the rows.
        """
        if not (0 <= file < len(self._first) - 1 and 0 <= start <= stop <= self._first[file + 1] - self._first[file]):
            raise IndexError(f"rows {start} to {stop} of file {file}")
        begin, end = int(self._first[file]) + start, int(self._first[file]) + stop
        low, high = begin // 8, -(-end // 8)
        bits = np.unpackbits(self._bits[low:high], bitorder="little").view(np.bool_)
        return low, high, bits, slice(begin - 8 * low, end - 8 * low)


def spans(rows: Sequence[int] | NDArray[np.int64]) -> list[Span]:
    """Group ascending row indices into spans."""
    rows = np.asarray(rows, np.int64)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    first, last = rows[np.r_[:1, breaks][: len(rows)]], rows[np.r_[breaks, len(rows)][: len(rows)] - 1]
    return list(zip(first.tolist(), (last + 1).tolist(), strict=True))
