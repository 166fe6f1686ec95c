"""What a reading task gets, and what it makes of it: rows of one group of a file, and the same rows as tables.

A group is what is read by itself: a row group of a parquet file, a range of the lines of a text file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from qvl_batch.rows import Span


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows to read, all of one group.

    Args:
        file: path; that of a folder of images ends with a slash.
        fingerprint: of the file, to notice if it changes.
        file_number: number of the file.
        group: index of the group.
        first_row: index in the file of the group's first row.
        spans: the rows, as indices in the file; at least one.
        offset: byte of the file at which the group begins, if such groups have one.
        line: number of the line there.
        names: in a folder of images, the paths of the group's images in it, in the order of their rows.
    """

    file: str
    fingerprint: str
    file_number: int
    group: int
    first_row: int
    spans: Sequence[Span]
    offset: int = 0
    line: int = 1
    names: Sequence[bytes] = ()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.spans)

    def cuts(self, rows_per_table: int) -> Iterator[Span]:
        """The rows of each table: consecutive ones, cut where tables of the whole group are. Every attempt at a unit
        cuts its rows in the same way.
        """
        for start, stop in self.spans:
            at = start
            while at < stop:
                end = min(stop, at + rows_per_table - (at - self.first_row) % rows_per_table)
                yield at, end
                at = end


@dataclass(frozen=True, slots=True)
class Unread:
    """Why a row cannot be read, and where in the file it is: `line 7`."""

    where: str
    error: Exception


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows.

    Args:
        first_row: index in the file of the first one.
        table: their columns.
        unread: rows that cannot be read, by their index in the table. What can be read of them is in the table.
    """

    first_row: int
    table: pa.Table
    unread: Mapping[int, Unread] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lost:
    """Rows that are not read but fail.

    Args:
        error: why.
        known: whether to read their ids and kept columns all the same, as far as possible.
    """

    error: Exception
    known: bool = True
