"""Text files line by line, as they are or compressed, and what kinds of text files have in common.

What enters: files of bytes. What leaves: lines with their places; the groups of rows of a file; its fingerprint, which
is a hash of its size and its ends, as `container.ends` has it, and one of all its bytes.

A compressed file is one group, since it can only be read from its start. If it is damaged or cut off, its last line is
one that cannot be read and says so: how many more there were is not known. A line is at most `MOST_BYTES` long.
"""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa

from qvl_batch.errors import InputError, RecordError
from qvl_batch.input.containers.container import (
    Described,
    Grouping,
    Progress,
    check_beginning,
    check_unchanged,
    ends,
)
from qvl_batch.input.files import FilePath, open_file, place_at
from qvl_batch.input.units import Unit
from qvl_batch.rows import InputFile

#: Longest line.
MOST_BYTES = 1 << 28
#: Most rows of a group, and bytes of one that has several rows: what a task reads that begins in it.
GROUP_ROWS, GROUP_BYTES = 2_000, 1 << 24
#: Bytes of one read from a file, and from a stream of zstd, which keeps nothing of a read in which it finds damage.
_BUFFER, _ZSTD_BUFFER = 1 << 20, 1 << 13
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line: the byte at which it begins in the text, its number, and its bytes with the line break, or why they
    cannot be read.
    """

    offset: int
    number: int
    data: bytes
    error: RecordError | None = None

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it."""
        return self.error is None and not self.data.strip()


def is_packed(path: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.lower().endswith((".gz", ".zst"))


def _unpacked(path: str, file: BinaryIO) -> BinaryIO | io.BufferedIOBase:
    """The text of an open file."""
    lower = path.lower()
    if lower.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if lower.endswith(".zst"):
        stream = pa.CompressedInputStream(pa.PythonFile(file), "zstd")
        return io.BufferedReader(stream, _ZSTD_BUFFER)
    return file


def lines(
    text: BinaryIO | io.BufferedIOBase, offset: int = 0, number: int = 1, *, packed: bool = False
) -> Iterator[Line]:
    """Lines from the present place on.

    Args:
        text: an open file.
        offset: the byte that is read next.
        number: of the line there.
        packed: whether errors of reading are damage of the file, and not of the disk.
    """
    while True:
        try:
            data = text.readline(MOST_BYTES + 1)
            size = len(data)
            if is_long := size > MOST_BYTES:
                data, size = b"", size + _skipped(text, data)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            if not packed:
                raise
            what = f"the compressed file is damaged or cut off here, and its further lines are lost: {error}"
            yield Line(offset, number, b"", RecordError(what))
            return
        if not size:
            return
        if is_long:
            yield Line(offset, number, b"", RecordError(f"the line has {size:,} bytes; the limit is {MOST_BYTES:,}"))
        else:
            yield Line(offset, number, data.removeprefix(_BOM) if offset == 0 else data)
        offset, number = offset + size, number + 1


def _skipped(text: BinaryIO | io.BufferedIOBase, data: bytes) -> int:
    """Read the rest of a line that began with `data`; its bytes."""
    size = 0
    while data and not data.endswith(b"\n"):
        data = text.readline(_BUFFER)
        size += len(data)
    return size


class _Hashed(io.RawIOBase):
    """Bytes of a file, which are hashed as they are read."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        super().__init__()
        self._file, self._progress = file, progress
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As `io.RawIOBase.readinto`."""
        count: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._digest.update(memoryview(buffer)[:count])
        self._progress(count)
        return count

    def of_all(self) -> str:
        """The hash of the whole file, 32 hexadecimal digits, once what is left of it is read too."""
        piece = memoryview(bytearray(_BUFFER))
        while self.readinto(piece):
            pass
        return self._digest.hexdigest()[:32]


class Scan:
    """Looks through a whole file.

    Args:
        path: of the file.
        file: the open file.
        progress: is told how many bytes have been read.
    """

    def __init__(self, path: str, file: BinaryIO, progress: Progress) -> None:
        self._path, self._size, self._ends = path, file.seek(0, 2), ends(file)
        file.seek(0)
        self._hashed = _Hashed(file, progress)
        self._grouping = Grouping(GROUP_ROWS, GROUP_BYTES)

    def lines(self) -> Iterator[Line]:
        """All lines."""
        text = _unpacked(self._path, io.BufferedReader(self._hashed, _BUFFER))
        return lines(text, packed=is_packed(self._path))

    def row(self, offset: int, line: int, *, may_begin: bool = True) -> None:
        """Count a row that begins at a byte and a line; a group can only begin there if `may_begin`."""
        self._grouping.row(offset, line, may_begin=may_begin and not is_packed(self._path))

    def described(self, schema: pa.Schema, *, inferred: bool = False) -> Described:
        """The file, once all lines were looked at."""
        file = InputFile(self._path, self._size, self._grouping.rows, self._ends + self._hashed.of_all())
        return Described(file, schema, self._grouping.groups(), inferred)


@contextmanager
def scanning(place: FilePath, kind: str, progress: Progress) -> Iterator[Scan]:
    """Look through a file.

    Raises:
        InputError: the file cannot be read.
    """
    path = str(place)
    try:
        with open_file(place) as file:
            check_beginning(kind, b"" if is_packed(path) else file.read(8))
            yield Scan(path, file, progress)
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: the name is not UTF-8
        raise InputError(f"{path} is not a readable {kind} file: {error}") from error


@contextmanager
def reading(unit: Unit) -> Iterator[Iterator[Line]]:
    """Lines of the file of a unit, from its group on.

    Raises:
        InputError: the file is gone, has changed, or cannot be read.
    """
    try:
        with open_file(place_at(unit.file)) as file:
            check_unchanged(unit, file)
            packed = is_packed(unit.file)
            file.seek(0 if packed else unit.offset)
            begin = (0, 1) if packed else (unit.offset, unit.line)
            yield lines(_unpacked(unit.file, file), *begin, packed=packed)
    except OSError as error:
        raise InputError(f"{unit.file} cannot be read: {error}") from error


def header(unit: Unit) -> Iterator[Line]:
    """Lines from the start of the file of a unit on."""
    with open_file(place_at(unit.file)) as file:
        yield from lines(_unpacked(unit.file, file), packed=is_packed(unit.file))
