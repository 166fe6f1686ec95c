"""Rows of the input, known by where they stand: the number of their file, and their index in it.

Ids need not be unique. A set of rows is a bit for each: a hundred million rows take 12.5 MB, with ids of any length,
and a row can be asked for as fast as it is added.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Number of a row's file, and the row's index in it.
Row = tuple[int, int]
#: Rows `start` to `stop` - 1 of a file.
Span = tuple[int, int]
#: Rows whose bits are spread out at a time: a file may have a hundred million.
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input: absolute path, bytes, rows, and SHA-256 of its footer, where sizes and bounds of columns
    are.
    """

    path: str
    size: int
    rows: int
    footer: str


class RowSet:
    """A set of rows.

    Args:
        rows: of each file, by its number.
    """

    def __init__(self, rows: Iterable[int]) -> None:
        self._first = np.cumsum([0, *rows])
        self._bits = np.zeros(-(-int(self._first[-1]) // 8), np.uint8)
        self.count = 0

    def add(self, file: int, start: int, stop: int) -> int:
        """Add rows that follow each other.

        Returns:
            How many of them were in the set already.

        Raises:
            IndexError: there is no such file, or it has no such rows.
        """
        known = self._set(file, start, stop, present=True)
        self.count += stop - start - known
        return known

    def remove(self, file: int, row: int) -> None:
        """Take out a row that is in the set.

        Raises:
            IndexError: there is no such file, or it has no such row.
        """
        self.count -= self._set(file, row, row + 1, present=False)

    def held(self, file: int, start: int, stop: int) -> int:
        """How many of some rows that follow each other are in the set."""
        pieces = (self._around(file, at, min(at + PIECE, stop)) for at in range(start, stop, PIECE))
        return sum(int(bits[span].sum()) for *_, bits, span in pieces)

    def missing(self, file: int, start: int, stop: int) -> list[Span]:
        """Those of some rows that follow each other that are not in the set, as few spans in order."""
        *_, bits, span = self._around(file, start, stop)
        return spans(start + np.flatnonzero(~bits[span]))

    def _set(self, file: int, start: int, stop: int, *, present: bool) -> int:
        """How many of the rows were in the set, before."""
        low, high, bits, span = self._around(file, start, stop)
        known = int(bits[span].sum())
        bits[span] = present
        self._bits[low:high] = np.packbits(bits, bitorder="little")
        return known

    def _around(self, file: int, start: int, stop: int) -> tuple[int, int, NDArray[np.bool_], slice]:
        """Bytes `low` to `high` - 1 that hold the rows, their bits, and which of those are the rows'."""
        if not (0 <= file < len(self._first) - 1 and 0 <= start <= stop <= self._first[file + 1] - self._first[file]):
            raise IndexError(f"rows {start} to {stop} of file {file}")
        begin, end = int(self._first[file]) + start, int(self._first[file]) + stop
        low, high = begin // 8, -(-end // 8)
        bits = np.unpackbits(self._bits[low:high], bitorder="little").view(np.bool_)
        return low, high, bits, slice(begin - 8 * low, end - 8 * low)


def spans(rows: Sequence[int] | NDArray[np.int64]) -> list[Span]:
    """Rows in rising order as spans."""
    rows = np.asarray(rows, np.int64)
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    first, last = rows[np.r_[:1, breaks][: len(rows)]], rows[np.r_[breaks, len(rows)][: len(rows)] - 1]
    return list(zip(first.tolist(), (last + 1).tolist(), strict=True))
