"""What every kind of input file can do: describe itself, and read the rows of a unit.

What enters: the place of a file, later a unit. What leaves: a `Described` with all that is known of the file without
its rows' images, later pieces of rows.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qvl_batch.errors import InputError
from qvl_batch.input.files import FilePath
from qvl_batch.input.lookup import whole_columns
from qvl_batch.input.units import Piece, Unit
from qvl_batch.rows import InputFile

Record = TypeVar("Record")
#: Is told how many bytes of a file have been looked through.
Progress = Callable[[int], None]
#: Bytes at the start and at the end of a file that a worker compares before it reads a unit.
END = 1 << 16
#: How files of other kinds begin, to name one that has a wrong name.
_BEGINNINGS = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"FEA1": "a Feather file of version 1",
    b"\x1f\x8b": "a file that gzip compressed",
    b"\x28\xb5\x2f\xfd": "a file that zstd compressed",
    b"PK\x03\x04": "a zip file",
    b"\xff\xfe": "text in UTF-16: write it in UTF-8",
    b"\xfe\xff": "text in UTF-16: write it in UTF-8",
}


@dataclass(frozen=True, slots=True)
class Fields:
    """What to read of a file.

    Args:
        schema: of the file.
        names: of columns, and of fields in structs of columns; the file can lack some.
        copied: those of them that are copied to the output.
    """

    schema: pa.Schema
    names: Sequence[str]
    copied: Sequence[str]

    @property
    def columns(self) -> list[pa.Field]:
        """The whole columns that the file has of these."""
        return whole_columns(self.schema, self.names)

    def nulls(self, rows: int) -> pa.Table:
        """The columns that are copied, with nulls."""
        columns = {field.name: pa.nulls(rows, field.type) for field in whole_columns(self.schema, self.copied)}
        return pa.table(columns or {"": pa.nulls(rows)})  # a table without columns has no rows

    def of_copied(self) -> "Fields":
        """What is copied, alone."""
        return Fields(self.schema, self.copied, self.copied)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The groups of a file.

    Args:
        rows: int64 (groups + 1,), the first row of each, and the number of rows.
        offsets: int64 (groups,), the byte of the file at which each begins, if they have one.
        lines: int64 (groups,), the number of the line there.
    """

    rows: NDArray[np.int64]
    offsets: NDArray[np.int64] | None = None
    lines: NDArray[np.int64] | None = None

    def begin(self, group: int) -> tuple[int, int]:
        """Byte and line at which a group begins."""
        offset = 0 if self.offsets is None else int(self.offsets[group])
        return offset, 1 if self.lines is None else int(self.lines[group])


class Grouping:
    """Divides the rows of a file into groups while they are counted.

    Args:
        most_rows: of a group.
        most_bytes: of a group that has several rows.
    """

    def __init__(self, most_rows: int, most_bytes: int) -> None:
        self._most_rows, self._most_bytes = most_rows, most_bytes
        self._groups: list[tuple[int, int, int]] = []
        #: Rows so far.
        self.rows = 0

    def row(self, offset: int, line: int = 1, *, may_begin: bool = True) -> None:
        """Count a row that begins at a byte and a line; a further group can only begin there if `may_begin`."""
        first, begin, _ = self._groups[-1] if self._groups else (0, 0, 0)
        is_full = self.rows - first >= self._most_rows or offset - begin >= self._most_bytes
        if not self._groups or (is_full and may_begin):
            self._groups.append((self.rows, offset, line))
        self.rows += 1

    def groups(self) -> Groups:
        """The groups, once all rows are counted."""
        table = np.array(self._groups, np.int64).reshape(-1, 3)
        return Groups(np.append(table[:, 0], self.rows), table[:, 1].copy(), table[:, 2].copy())


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """A file of the input.

    Args:
        file: its identity.
        schema: of its columns.
        groups: of its rows.
        inferred: the types are those that its values need, so that other files of its kind may need wider ones.
        listing: of a folder of images.
    """

    file: InputFile
    schema: pa.Schema
    groups: Groups
    inferred: bool = False
    listing: pa.Table | None = None


class Reader(Protocol):
    """Reads rows of one kind of files."""

    def read(self, unit: Unit, fields: Fields, rows_per_table: int) -> Iterator[Piece]:
        """Read the rows of a unit, in pieces as `Unit.cuts` has them.

        Raises:
            InputError: the file is gone, or has changed.
        """


class Container(Reader, Protocol):
    """A kind of file that holds rows."""

    def describe(self, place: FilePath, progress: Progress) -> Described:
        """Look through a file.

        Raises:
            InputError: it is no readable file of this kind.
        """


def check_beginning(kind: str, head: bytes) -> None:
    """Refuse a file whose first bytes are those of another kind.

    Raises:
        OSError: it is named like `kind` and begins like something else.
    """
    for beginning, other in _BEGINNINGS.items():
        if head.startswith(beginning):
            raise OSError(f"it is named like {kind}, and begins like {other}")


def ends(file: BinaryIO | pa.NativeFile) -> str:
    """A hash of a file's size, and of its first and last 64 KiB: 32 hexadecimal digits."""
    size = file.seek(0, 2)
    digest = hashlib.sha256(b"%d:" % size)
    for start in (0, max(END, size - END)):
        file.seek(min(start, size))
        digest.update(file.read(END))
    return digest.hexdigest()[:32]


def check_unchanged(unit: Unit, file: BinaryIO | pa.NativeFile) -> None:
    """Refuse a file that is not the one that was described, as far as its size and its ends show it.

    Raises:
        InputError: it has changed.
    """
    if ends(file) != unit.fingerprint[:32]:
        raise changed(unit)


def changed(unit: Unit) -> InputError:
    """The error of a file that changed under the job."""
    return InputError(f"{unit.file} has changed while this job ran: put it back, or give another --output")


def wanted(unit: Unit, records: Iterator[Record], rows_per_table: int) -> Iterator[tuple[int, list[Record]]]:
    """Of the records of a group, those of the unit: for each table, its first row and its records.

    Raises:
        InputError: there are fewer records than there were.
    """
    at = unit.first_row
    for start, stop in unit.cuts(rows_per_table):
        some = list(islice(records, start - at, stop - at))
        if len(some) < stop - start:
            raise changed(unit)
        yield start, some
        at = stop


def text_of(data: bytes) -> str:
    """The text of a small file, without the line break at its end.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
