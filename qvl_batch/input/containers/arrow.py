"""Arrow: files and streams of IPC, which Feather's second version is too. A group is a record batch.

Files are mapped into memory, so that of a batch only the rows that are read take memory, unless its columns are
compressed or the file is in a store: then those that are read are in memory whole. A stream with dictionaries is one
group, since they are spread over it. The fingerprint is a hash of the size and of the first and last 64 KiB, where the
footer of a file is: a change in between that keeps the size is not noticed.

What is in the batches is not trusted: rows whose offsets lead out of their columns cannot be read.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from qvl_batch.errors import InputError
from qvl_batch.input.containers.container import (
    Described,
    Fields,
    Groups,
    Progress,
    changed,
    check_beginning,
    check_unchanged,
    ends,
)
from qvl_batch.input.files import FilePath, open_arrow, place_at, size_of
from qvl_batch.input.units import Piece, Unit, Unread
from qvl_batch.rows import InputFile, Span

#: How a file begins; a stream begins with the length of its schema.
_FILE = b"ARROW1"
#: Bytes before the messages of a file; what a message begins with, a mark and the length of its header; and fields of
#: the tables `Message` and `RecordBatch`, by Arrow's Message.fbs.
_PADDED, _CONTINUATION, _PREFIX = 8, -1, struct.Struct("<iI")
_HEADER, _BODY, _LENGTH = 2, 3, 0


class Arrow:
    """Arrow files and streams."""

    def describe(self, place: FilePath, progress: Progress) -> Described:
        """As `Container.describe`."""
        try:
            if not (size := size_of(place)):
                raise OSError("it has 0 bytes" if size == 0 else "it is not a regular file")  # noqa: TRY301
            with open_arrow(place, mapped=True) as file:
                if not (head := file.read(8)).startswith(_FILE):
                    check_beginning("Arrow", head)
                fingerprint = ends(file)
                schema = _schema(file)
                found = list(_lengths(file, schema))
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: the name is not UTF-8
            raise InputError(f"{place} is not a readable Arrow file: {error}") from error
        progress(size)
        starts = np.cumsum([0, *(rows for rows, _ in found)], dtype=np.int64)
        groups = Groups(starts, np.array([offset for _, offset in found], np.int64))
        return Described(InputFile(str(place), size, int(starts[-1]), fingerprint), schema, groups)

    def read(self, unit: Unit, fields: Fields, rows_per_table: int) -> Iterator[Piece]:
        """As `Container.read`. From the first damage on, rows are unread, with the copied columns that can be read."""
        try:
            with open_arrow(place_at(unit.file), mapped=True) as file:
                check_unchanged(unit, file)
                cuts = unit.cuts(rows_per_table)
                rows = _Rows(file, unit, [field.name for field in fields.columns])
                for start, stop in cuts:
                    try:
                        table = rows.take(start, stop)
                    except (OSError, pa.ArrowException) as damage:
                        yield from _damaged(file, unit, fields, [(start, stop), *cuts], damage)
                        return
                    yield Piece(start, *_checked(table, f"record batch {unit.group}"))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{unit.file}: record batch {unit.group} cannot be read: {error}") from error


def _reader(file: pa.NativeFile, names: Sequence[str], schema: pa.Schema | None = None) -> Any:
    """Reads batches of a mapped file, of them only these columns, or the first if there are none."""
    file.seek(0)
    is_file = file.read(len(_FILE)) == _FILE
    file.seek(0)
    indices = [schema.get_field_index(name) for name in names if name in schema.names] if schema else []
    options = pa.ipc.IpcReadOptions(included_fields=indices or [0])
    return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file, options=options)


def _schema(file: pa.NativeFile) -> pa.Schema:
    file.seek(0)
    is_file = file.read(len(_FILE)) == _FILE
    file.seek(0)
    with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file) as reader:
        return reader.schema


def _lengths(file: pa.NativeFile, schema: pa.Schema) -> Iterator[tuple[int, int]]:
    """For each group, its rows, and the byte at which it begins in a stream. Of the batches, headers alone are read.

    Raises:
        ValueError, ArrowException: a header is damaged.
    """
    file.seek(0)
    start = _PADDED if file.read(len(_FILE)) == _FILE else 0
    try:
        found = list(_batches(file, start))
    except struct.error as error:
        raise ValueError(f"the header of a message is damaged: {error}") from error
    if not start and _has_dictionaries(schema):
        found = [(sum(rows for rows, _ in found), 0)]
    yield from found


def _batches(file: pa.NativeFile, offset: int) -> Iterator[tuple[int, int]]:
    """For each record batch from a byte on, its rows, and where it begins.

    Raises:
        ValueError, ArrowException, struct.error: a header is damaged.
    """
    size = file.size()
    while offset + _PREFIX.size <= size:
        file.seek(offset)
        mark, length = _PREFIX.unpack(file.read(_PREFIX.size))
        begin = offset + _PREFIX.size
        if mark != _CONTINUATION:  # Arrow before 0.15 has none
            begin, length = offset + 4, mark
        if not length:
            return
        if not 0 < length <= size - begin:
            raise ValueError("the header of a message is cut off")
        file.seek(begin)
        metadata = bytearray(file.read(length))
        at = _field(metadata, struct.unpack_from("<I", metadata)[0], _BODY)
        (body,) = struct.unpack_from("<q", metadata, at) if at else (0,)
        if at:  # Arrow verifies the header, as that of a message without a body
            struct.pack_into("<q", metadata, at, 0)
        message = pa.ipc.read_message(pa.py_buffer(_PREFIX.pack(_CONTINUATION, length) + metadata))
        if message.type == "record batch":
            yield _length(metadata), offset
        if not 0 <= body <= size - begin - length:
            raise ValueError("a message is cut off")
        offset = begin + length + body


def _length(metadata: bytearray) -> int:
    """The number of rows in the header of a record batch, a flatbuffer that Arrow has verified.

    Raises:
        ValueError: it is negative.
    """
    (message,) = struct.unpack_from("<I", metadata)
    header = _field(metadata, message, _HEADER)
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    length = _field(metadata, batch, _LENGTH)
    rows: int = struct.unpack_from("<q", metadata, length)[0] if length else 0
    if rows < 0:
        raise ValueError("a record batch has a negative number of rows")
    return rows


def _field(metadata: bytearray, table: int, number: int) -> int:
    """Where a field of a table is, 0 if it is left out."""
    (back,) = struct.unpack_from("<i", metadata, table)
    size, *_ = struct.unpack_from("<H", metadata, table - back)
    place = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", metadata, table - back + place) if place < size else (0,)
    return table + offset if offset else 0


def _has_dictionaries(schema: pa.Schema) -> bool:
    return any("dictionary<" in str(field.type) for field in schema)


class _Rows:
    """The rows of a group, from front to back.

    Args:
        file: the mapped file.
        unit: of the group.
        names: of the columns to read.
    """

    def __init__(self, file: pa.NativeFile, unit: Unit, names: Sequence[str]) -> None:
        self._unit, schema = unit, _schema(file)
        reader = _reader(file, names, schema)
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            self._batches: Iterator[pa.RecordBatch] = (reader.get_batch(unit.group) for _ in range(1))
        else:
            if unit.offset:
                file.seek(unit.offset)
            self._batches = iter(reader) if _has_dictionaries(schema) else (reader.read_next_batch() for _ in range(1))
        self._names = [name for name in names if name in schema.names]
        self._at, self._left = unit.first_row, pa.table({})

    def take(self, start: int, stop: int) -> pa.Table:
        """The rows from `start` on, up to but without `stop`.

        Raises:
            OSError, ArrowException: the batch is damaged.
            InputError: there are fewer rows than there were.
        """
        while self._at + len(self._left) < stop:
            batch = next(self._batches, None)
            if batch is None:
                raise changed(self._unit)
            kept = self._left.slice(start - self._at)
            self._at += len(self._left) - len(kept)
            read = pa.table(batch).select(self._names)
            self._left = pa.concat_tables([kept, read]) if len(kept) else read
        return self._left.slice(start - self._at, stop - start)


def _damaged(
    file: pa.NativeFile, unit: Unit, fields: Fields, cuts: Sequence[Span], damage: Exception
) -> Iterator[Piece]:
    """Rows of a damaged batch, with the copied columns if these can be read."""
    rows: _Rows | None = None
    with suppress(OSError, pa.ArrowException):
        rows = _Rows(file, unit, [field.name for field in fields.of_copied().columns])
    for start, stop in cuts:
        table = fields.nulls(stop - start)
        try:
            if rows is not None:
                found = rows.take(start, stop)
                found.validate(full=True)
                table = found
        except (OSError, pa.ArrowException):
            rows = None
        table = table if len(table) else pa.table({"": pa.nulls(stop - start)})
        yield Piece(start, table, dict.fromkeys(range(stop - start), Unread(f"record batch {unit.group}", damage)))


def _checked(table: pa.Table, where: str) -> tuple[pa.Table, dict[int, Unread]]:
    """A table whose values can be read without leading out of it, and the rows that are not among them."""
    try:
        table.validate(full=True)
    except pa.ArrowException:
        pass
    else:
        return table, {}
    unread: dict[int, Unread] = {}
    rows: list[pa.Table] = []
    for at in range(len(table)):
        row = table.slice(at, 1)
        for index, field in enumerate(table.schema):
            try:
                row[field.name].validate(full=True)
            except pa.ArrowException as error:
                unread[at] = Unread(where, error)
                row = row.set_column(index, field, pa.nulls(1, field.type))
        rows.append(row)
    return pa.concat_tables(rows), unread
