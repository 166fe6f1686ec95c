"""Reads rows of the input's files as tables: id, kept columns, prompt, and the image as a file's bytes.

What enters: a `Unit` of rows. What leaves: tables with the columns that `qvl_batch.columns` defines for this stage, the
id and the kept columns. Every row is in one of them; a row that cannot be read has a failure. Reading streams, so that
a row group of any size takes the memory of one table.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.columns import IMAGE, PROMPT, array, failure_columns, place_columns
from qvl_batch.errors import ImageError, InputError, RecordError, RowError, WorkerLostError, stable_message
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.input_columns import InputColumns
from qvl_batch.input.source import Unit, footer_sha256
from qvl_batch.schema import ID, Failure


@dataclass(frozen=True, slots=True)
class Lost:
    """Rows that are not read but fail.

    Args:
        error: why.
        known: whether to read their ids and kept columns all the same, as far as possible.
    """

    error: Exception
    known: bool = True


def read_unit(
    unit: Unit,
    columns: InputColumns,
    prompt: str | None,
    rows_per_table: int,
    fetcher: Fetcher,
    lost: Lost | None = None,
) -> Iterator[pa.Table]:
    """Read a unit in tables of at most `rows_per_table` rows.

    Args:
        unit: rows to read.
        columns: which columns, and as which types.
        prompt: asked of every row, if there is no prompt column.
        rows_per_table: bounds the memory in use.
        fetcher: reads images that are not in the file itself.
        lost: if given, the rows are not read but fail.

    If the file is damaged inside, the rows from there on have a failure, id and kept columns where those can still be
    read, and nulls: every row of the input is answered.

    Raises:
        InputError: the file is gone, has changed, or has fewer rows than its footer says.
    """
    at, left = unit.first_row, deque(unit.spans)
    try:
        with pa.OSFile(unit.file) as opened, pq.ParquetFile(opened) as file:
            if footer_sha256(opened) != unit.footer:
                raise InputError(f"{unit.file} has changed while this job ran: put it back, or give another --output")
            for table, error in _tables(file, unit, columns, rows_per_table, lost):
                end = at + table.num_rows
                while left and left[0][0] < end:
                    start, stop = left.popleft()
                    if stop > end:
                        left.appendleft((end, stop))
                    wanted = table.slice(start - at, min(stop, end) - start)
                    yield _records(wanted, unit, start, columns, prompt, fetcher, error)
                if not left:
                    return
                at = end
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{unit.file}: row group {unit.row_group} cannot be read: {error}") from error
    rows, expected = at - unit.first_row, unit.spans[-1][1] - unit.first_row
    raise InputError(f"{unit.file}: row group {unit.row_group} has {rows} rows, not {expected}: the file is damaged")


def _tables(
    file: pq.ParquetFile, unit: Unit, columns: InputColumns, rows_per_table: int, lost: Lost | None
) -> Iterator[tuple[pa.Table, Exception | None]]:
    """Read a row group in tables. From the first damage on, tables have only the readable columns, and the error."""
    done = 0
    if lost is None:
        try:
            for batch in file.iter_batches(rows_per_table, row_groups=[unit.row_group], columns=columns.names):
                yield pa.table(batch), None
                done += len(batch)
        except (OSError, pa.ArrowException) as damage:
            lost = Lost(damage)
        else:
            return
    rest = _readable_columns(file, unit.row_group, columns, known=lost.known).slice(done)
    for start in range(0, rest.num_rows, rows_per_table):
        yield rest.slice(start, rows_per_table), lost.error


def _readable_columns(file: pq.ParquetFile, row_group: int, columns: InputColumns, *, known: bool) -> pa.Table:
    """Id and kept columns of a row group if `known`. Columns that are damaged or not read are nulls."""
    rows = file.metadata.row_group(row_group).num_rows
    values = {name: pa.nulls(rows) for name in columns.names}
    for field in (*columns.kept, columns.id):
        values[field.name] = pa.nulls(rows, field.type)
        with suppress(OSError, pa.ArrowException):
            if known:
                values[field.name] = file.read_row_group(row_group, columns=[field.name])[field.name]
    return pa.table(values)


def _records(
    table: pa.Table,
    unit: Unit,
    first_row: int,
    columns: InputColumns,
    prompt: str | None,
    fetcher: Fetcher,
    error: Exception | None,
) -> pa.Table:
    """The next stage's table: places, id, kept columns, prompt, image bytes, failures. `error` fails all rows."""
    rows = range(first_row, first_row + table.num_rows)
    prompts: list[object] = [prompt] * len(rows) if columns.prompt is None else _values(table[columns.prompt])
    images: list[bytes | None] = [None] * len(rows)
    failures: list[Failure | None]
    if error is None:
        images, failures = _images(_image_values(table[columns.image]), Path(unit.file).parent, fetcher)
        failures = [failure or _prompt_failure(each) for failure, each in zip(failures, prompts, strict=True)]
    else:
        failures = [
            Failure.of(_row_error(f"row {row} of {unit.file} (row group {unit.row_group})", error)) for row in rows
        ]
    record = {
        **place_columns([(unit.file_number, row) for row in rows]),
        ID: table[columns.id.name].cast(columns.id.type),
        **{field.name: table[field.name].cast(field.type) for field in columns.kept},
        PROMPT: array(PROMPT, [each if isinstance(each, str) else None for each in prompts]),
        IMAGE: array(IMAGE, images),
        **failure_columns(failures),
    }
    return pa.table(record)


def _row_error(row: str, error: Exception) -> RowError:
    if isinstance(error, WorkerLostError):
        return WorkerLostError(f"{row} {error}", stage=error.stage)
    return RecordError(f"{row} cannot be read: {stable_message(error)}")


def _image_values(column: pa.ChunkedArray) -> list[object]:
    """Values of the image column; of a struct its `bytes`, or if that is null its `path`. It ignores other fields."""
    if not pa.types.is_struct(column.type):
        return _values(column)
    values: list[object] = [None] * len(column)
    for name in ("path", "bytes"):
        if (index := column.type.get_field_index(name)) >= 0:
            parts = _values(pc.struct_field(column, index))
            values = [value if part is None else part for part, value in zip(parts, values, strict=True)]
    return values


def _values(column: pa.ChunkedArray) -> list[object]:
    """Values as Python objects, with a `RecordError` in place of one that has none."""
    try:
        values: list[object] = column.to_pylist()
    except (ValueError, OverflowError):  # a string that is not UTF-8, or a date outside Python's range
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RecordError(f"a string is not valid Unicode text: {error}")
    except (ValueError, OverflowError) as error:
        return RecordError(f"a {scalar.type} cannot be read: {error}")


def _prompt_failure(prompt: object) -> Failure | None:
    return Failure.of(prompt) if isinstance(prompt, RowError) else None


def _images(values: list[object], folder: Path, fetcher: Fetcher) -> tuple[list[bytes | None], list[Failure | None]]:
    """For each row, the bytes of its image, or None and its failure; images given by path or address are fetched."""
    images: list[bytes | str | RowError] = [_bytes_or_location(value) for value in values]
    locations = [image for image in images if isinstance(image, str)]
    fetched = iter(fetcher.fetch_all(locations, folder))
    images = [next(fetched) if isinstance(image, str) else image for image in images]
    return (
        [image if isinstance(image, bytes) else None for image in images],
        [Failure.of(image) if isinstance(image, RowError) else None for image in images],
    )


def _bytes_or_location(value: object) -> bytes | str | RowError:
    if value is None:
        return ImageError("the image is null")
    if isinstance(value, bytes | str | RowError):
        return value
    return RecordError(f"the image is a {type(value).__name__}, not bytes or a path")
