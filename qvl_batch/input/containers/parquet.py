"""Parquet files: a group is a row group, the fingerprint the SHA-256 of the footer.

The footer holds sizes and min/max statistics of all columns; a file is described without reading more of it.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qvl_batch.errors import InputError
from qvl_batch.input.containers.container import Described, Fields, Groups, Progress, changed
from qvl_batch.input.files import FilePath, open_arrow, place_at, streaming
from qvl_batch.input.footers import footer, parquet_file
from qvl_batch.input.lookup import find_column, find_field
from qvl_batch.input.units import Piece, Unit, Unread
from qvl_batch.rows import InputFile


def footer_sha256(file: pa.NativeFile) -> str:
    """SHA-256 of the footer of an open parquet file."""
    return hashlib.sha256(footer(file)).hexdigest()


class Parquet:
    """Parquet files."""

    def describe(self, place: FilePath, progress: Progress) -> Described:  # noqa: ARG002  (a footer is read at once)
        """As `Container.describe`."""
        try:
            # `to_arrow_schema` of metadata without a file leaks half a megabyte for each thousand row groups.
            with open_arrow(place) as opened, parquet_file(opened) as file:
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                starts = np.cumsum([0, *rows], dtype=np.int64)
                described = InputFile(str(place), opened.size(), int(starts[-1]), footer_sha256(opened))
                schema = file.schema_arrow
        except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: the name is not UTF-8
            raise InputError(f"{place} is not a readable parquet file: {error}") from error
        if (np.diff(starts) < 0).any():
            raise InputError(f"{place} is not a readable parquet file: a row group has a negative number of rows")
        return Described(described, schema, Groups(starts))

    def read(self, unit: Unit, fields: Fields, rows_per_table: int) -> Iterator[Piece]:
        """As `Container.read`; if the row group is damaged inside, the rows from there on are unread, with the copied
        columns that can be read.
        """
        left, at = deque(unit.cuts(rows_per_table)), unit.first_row
        try:
            place = place_at(unit.file)
            with open_arrow(place) as opened, parquet_file(opened, **streaming(place)) as file:
                if footer_sha256(opened) != unit.fingerprint:
                    raise changed(unit)
                for table, unread in _tables(file, unit, fields, rows_per_table):
                    end = at + table.num_rows
                    while left and left[0][0] < end:
                        start, stop = left.popleft()
                        if stop > end:
                            left.appendleft((end, stop))
                        rows = min(stop, end) - start
                        failed = dict.fromkeys(range(rows), unread) if unread else {}
                        yield Piece(start, table.slice(start - at, rows), failed)
                    if not left:
                        return
                    at = end
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{unit.file}: row group {unit.group} cannot be read: {error}") from error
        rows, expected = at - unit.first_row, unit.spans[-1][1] - unit.first_row
        raise InputError(f"{unit.file}: row group {unit.group} has {rows} rows, not {expected}: the file is damaged")


def _tables(
    file: pq.ParquetFile, unit: Unit, fields: Fields, rows_per_table: int
) -> Iterator[tuple[pa.Table, Unread | None]]:
    """Read a row group in tables. From the first damage on, tables have only the readable columns, and the error."""
    done = 0
    try:
        for batch in file.iter_batches(rows_per_table, row_groups=[unit.group], columns=list(fields.names)):
            yield pa.Table.from_batches([batch]), None
            done += len(batch)
    except (OSError, pa.ArrowException) as damage:
        unread = Unread(f"row group {unit.group}", damage)
    else:
        return
    rest = _copied_columns(file, unit.group, fields).slice(done)
    for start in range(0, rest.num_rows, rows_per_table):
        yield rest.slice(start, rows_per_table), unread


def _copied_columns(file: pq.ParquetFile, row_group: int, fields: Fields) -> pa.Table:
    """The columns of a row group that are copied. Those that are damaged are nulls."""
    values: dict[str, pa.ChunkedArray | pa.Array] = {}
    rows = file.metadata.row_group(row_group).num_rows
    for name in fields.copied:
        if (field := find_field(fields.schema, name)) is None:
            continue
        values[name] = pa.nulls(rows, field.type)
        with suppress(OSError, pa.ArrowException):
            values[name] = find_column(file.read_row_group(row_group, columns=[name]), name)
    # A table without columns has no rows.
    return pa.table(values or {"": pa.nulls(rows)})
