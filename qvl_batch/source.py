"""The input: which files, which rows of them, and their images as bytes.

What enters: paths and globs of the settings. What leaves: a `Source` that lists every row group
to read, and, for each, tables with the columns of `READ_FIELDS`, the id and the kept columns.

A row is known by where it stands, the number of its file and its index in it, since ids need
not be unique. A file keeps its number when a job goes on, whatever files were added meanwhile.
Reading streams, so that a row group of any size takes the memory of one table.
"""

import glob
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ImageError, InputError, RecordError, RowError, stable_message
from qvl_batch.fetch import Fetcher
from qvl_batch.rowset import Row, RowSet, Span
from qvl_batch.schema import ID, Failure, InputColumns, input_columns

#: Columns of the pipeline's own, next to the user's, have this prefix.
OWN = "__qvl_"
FILE, ROW, IMAGE, PROMPT = (f"{OWN}{name}" for name in ("file", "row", "image", "prompt"))
FAILURE = tuple(f"{OWN}error_{name}" for name in ("stage", "type", "message"))


@dataclass(frozen=True, slots=True)
class InputFile:
    """A parquet file: absolute path, bytes, rows."""

    path: str
    size: int
    rows: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows to read: `spans` of a file's rows, all of them in one row group, which begins at row `first_row`."""

    file: str
    file_number: int
    row_group: int
    first_row: int
    spans: Sequence[Span]

    @property
    def rows(self) -> int:
        """How many rows that is."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True, slots=True)
class Source:
    """All of the input; a file's number is its place among the files."""

    files: tuple[InputFile, ...]
    columns: InputColumns
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        """Rows of the whole input, after `--limit`."""
        return sum(unit.rows for unit in self.units)

    def without(self, done: RowSet) -> "Source":
        """The source less those rows."""
        left = (
            replace(unit, spans=[left for span in unit.spans for left in done.missing(unit.file_number, *span)])
            for unit in self.units
        )
        return replace(self, units=tuple(unit for unit in left if unit.spans))

    def parts(self, rows: int) -> "Iterator[Source]":
        """The source in parts of at most so many rows, but of at least one unit."""
        units: list[Unit] = []
        taken = 0
        for unit in self.units:
            if units and taken + unit.rows > rows:
                yield replace(self, units=tuple(units))
                units, taken = [], 0
            units.append(unit)
            taken += unit.rows
        if units:
            yield replace(self, units=tuple(units))


def open_source(config: CaptionConfig, known: Sequence[InputFile] = ()) -> Source:
    """Find the input's files and check their columns, reading nothing but their metadata.

    Args:
        config: where to look, and for which columns.
        known: files that have their numbers already, in order; those found besides follow them.

    Raises:
        InputError: nothing is there, a file is no parquet, its columns cannot be used, or a known
            file is gone or has changed.
    """
    found = _find_files(config.input)
    numbered = dict.fromkeys([*(file.path for file in known), *found])
    files: list[InputFile] = []
    columns: InputColumns | None = None
    units: list[Unit] = []
    left = config.limit
    for number, path in enumerate(numbered):
        if path not in found:
            raise InputError(f"{path} was part of the input when this job began, and --input no longer names it")
        metadata, size = _metadata(path)
        files.append(InputFile(path, size, metadata.num_rows))
        if number < len(known) and files[number] != known[number]:
            raise InputError(
                f"{path} has changed since this job began: {_extent(files[number])} now, {_extent(known[number])} then"
            )
        of_file = input_columns(metadata.schema.to_arrow_schema(), path, config)
        if columns is None:
            columns = of_file
        elif (of_file.id.type, of_file.kept) != (columns.id.type, columns.kept):
            raise InputError(
                f"{path} and {files[0].path} differ in the type of the id or of a kept column: "
                f"{_types(of_file)} and {_types(columns)}"
            )
        first_row = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            take = rows if left is None else min(rows, left)
            if take:
                units.append(Unit(path, number, group, first_row, [(first_row, first_row + take)]))
            left = None if left is None else left - take
            first_row += rows
    assert columns is not None
    return Source(tuple(files), columns, tuple(units))


def read_unit(
    unit: Unit, columns: InputColumns, prompt: str | None, rows_per_table: int, fetcher: Fetcher
) -> Iterator[pa.Table]:
    """Read a unit in tables of at most `rows_per_table` rows.

    Args:
        unit: what to read.
        columns: which columns, and as what.
        prompt: asked of every row in place of its prompt column.
        rows_per_table: bound on the memory in use.
        fetcher: reads images that are not in the file itself.

    Rows that cannot be read, since the file is damaged inside, have a failure and nulls, and what else can be
    read of them: every row of the input is answered.

    Raises:
        InputError: the file is gone, or another.
    """
    at, left = unit.first_row, deque(unit.spans)
    try:
        with pq.ParquetFile(unit.file) as file:
            for table, error in _tables(file, unit, columns, rows_per_table):
                end = at + table.num_rows
                while left and left[0][0] < end:
                    start, stop = left.popleft()
                    if stop > end:
                        left.appendleft((end, stop))
                    wanted = table.slice(start - at, min(stop, end) - start)
                    yield _own_table(wanted, unit, start, columns, prompt, fetcher, error)
                if not left:
                    return
                at = end
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{unit.file}: row group {unit.row_group} cannot be read: {error}") from error
    rows, expected = at - unit.first_row, unit.spans[-1][1] - unit.first_row
    raise InputError(f"{unit.file}: row group {unit.row_group} has {rows} rows, not {expected}: was it replaced?")


def _tables(
    file: pq.ParquetFile, unit: Unit, columns: InputColumns, rows_per_table: int
) -> Iterator[tuple[pa.Table, Exception | None]]:
    """A row group in tables; from where it cannot be read on, what can be, and the error."""
    if unit.row_group >= file.num_row_groups or not set(columns.names) <= set(file.schema_arrow.names):
        return
    done = 0
    try:
        for batch in file.iter_batches(rows_per_table, row_groups=[unit.row_group], columns=columns.names):
            yield pa.table(batch), None
            done += len(batch)
    except (OSError, pa.ArrowException) as error:
        rest = _what_is_readable(file, unit.row_group, columns).slice(done)
        for start in range(0, rest.num_rows, rows_per_table):
            yield rest.slice(start, rows_per_table), error


def _what_is_readable(file: pq.ParquetFile, row_group: int, columns: InputColumns) -> pa.Table:
    """Ids and kept columns of a damaged row group, each as nulls if the damage is in it."""
    rows = file.metadata.row_group(row_group).num_rows
    found = {name: pa.nulls(rows) for name in columns.names}
    for field in (*columns.kept, columns.id):
        try:
            found[field.name] = file.read_row_group(row_group, columns=[field.name])[field.name]
        except (OSError, pa.ArrowException):
            found[field.name] = pa.nulls(rows, field.type)
    return pa.table(found)


def with_columns(table: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    """Append columns to a table."""
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def rows_of(table: pa.Table) -> list[Row]:
    """The columns `FILE` and `ROW`, in pairs."""
    return list(zip(table[FILE].to_pylist(), table[ROW].to_pylist(), strict=True))


def failure_columns(failures: list[Failure | None]) -> dict[str, pa.Array]:
    """Failures of rows, None where there is none, as the columns `FAILURE`."""
    return {
        name: pa.array([getattr(failure, field) if failure else None for failure in failures], pa.string())
        for name, field in zip(FAILURE, ("stage", "type", "message"), strict=True)
    }


def failures_of(table: pa.Table) -> list[Failure | None]:
    """The columns `FAILURE` as failures again."""
    rows = zip(*(table[name].to_pylist() for name in FAILURE), strict=True)
    return [Failure(*row) if row[0] is not None else None for row in rows]


def _own_table(
    table: pa.Table,
    unit: Unit,
    first_row: int,
    columns: InputColumns,
    prompt: str | None,
    fetcher: Fetcher,
    error: Exception | None,
) -> pa.Table:
    rows = range(first_row, first_row + table.num_rows)
    prompts: list[object] = [prompt] * len(rows) if columns.prompt is None else _values(table[columns.prompt])
    images: list[bytes | None] = [None] * len(rows)
    failures: list[Failure | None]
    if error is None:
        images, failures = _images(_values(table[columns.image]), Path(unit.file).parent, fetcher)
        failures = [failure or _prompt_failure(each) for failure, each in zip(failures, prompts, strict=True)]
    else:
        where = f"of {unit.file} (row group {unit.row_group}) cannot be read: {stable_message(error)}"
        failures = [Failure.of(RecordError(f"row {row} {where}")) for row in rows]
    own = {
        FILE: pa.array([unit.file_number] * len(rows), pa.int32()),
        ROW: pa.array(rows, pa.int64()),
        ID: table[columns.id.name].cast(columns.id.type),
        **{field.name: table[field.name] for field in columns.kept},
        PROMPT: pa.array([each if isinstance(each, str) else None for each in prompts], pa.large_string()),
        IMAGE: pa.array(images, pa.large_binary()),
        **failure_columns(failures),
    }
    return pa.table(own)


def _values(column: pa.ChunkedArray) -> list[object]:
    """Values as Python has them, an error in place of a string that is none."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:  # nothing checks strings before
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: pa.Scalar) -> object:
    if isinstance(scalar, pa.StructScalar) and scalar.is_valid:
        return {name: _value(part) for name, part in scalar.items()}
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RecordError(f"a string is not valid Unicode text: {error}")


def _prompt_failure(prompt: object) -> Failure | None:
    return Failure.of(prompt) if isinstance(prompt, RowError) else None


def _images(values: list[object], folder: Path, fetcher: Fetcher) -> tuple[list[bytes | None], list[Failure | None]]:
    """Images as files, and why there is none."""
    images: list[bytes | str | RowError] = [_bytes_or_location(value) for value in values]
    locations = [image for image in images if isinstance(image, str)]
    fetched = iter(fetcher.fetch_all(locations, folder))
    images = [next(fetched) if isinstance(image, str) else image for image in images]
    return (
        [image if isinstance(image, bytes) else None for image in images],
        [Failure.of(image) if isinstance(image, RowError) else None for image in images],
    )


def _bytes_or_location(value: object) -> bytes | str | RowError:
    """An image column's value: a struct's bytes, or else its path."""
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None:
        return ImageError("the image is null")
    if isinstance(value, bytes | str | RowError):
        return value
    return RecordError(f"the image is a {type(value).__name__}, not bytes or a path")


def _find_files(inputs: tuple[str, ...]) -> dict[str, None]:
    """Every parquet file once, those of a folder or glob in order of name, as the keys."""
    files: dict[str, None] = {}
    for item in inputs:
        if "://" in item:
            raise InputError(f"--input {item}: only files that are mounted can be read; give their path")
        path = Path(item)
        if path.is_dir():
            found = sorted(str(p) for p in path.rglob("*.parquet") if not _hidden(p.relative_to(path)))
        elif path.is_file():
            found = [item]
        else:
            found = sorted(p for p in glob.glob(item, recursive=True) if Path(p).is_file())  # noqa: PTH207  (absolute too)
        if not found:
            raise InputError(f"--input {item}: no parquet file is there")
        files.update((str(Path(p).resolve()), None) for p in found)
    return files


def _hidden(path: Path) -> bool:
    """Names that begin with a dot or an underscore are not data, as in Hive and Spark."""
    return any(part.startswith((".", "_")) for part in path.parts)


def _metadata(file: str) -> tuple[pq.FileMetaData, int]:
    """Metadata and size."""
    try:
        return pq.read_metadata(file), Path(file).stat().st_size
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file} is no readable parquet file: {error}") from error


def _extent(file: InputFile) -> str:
    return f"{file.size:,} bytes and {file.rows:,} rows"


def _types(columns: InputColumns) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in (columns.id, *columns.kept))
