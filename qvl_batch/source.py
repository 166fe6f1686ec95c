"""The input: which files, which rows of them, and their images as bytes.

What enters: paths and globs of the settings. What leaves: a `Source` that lists every row group
to read, and, for each, tables with the columns of `READ_FIELDS`, the id and the kept columns.

A row is known by where it stands, the number of its file and its index in it, since ids need
not be unique. Reading streams, so that a row group of any size takes the memory of one table.
"""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ImageError, InputError, RecordError, stable_message
from qvl_batch.schema import ID, Failure, InputColumns, input_columns

#: Columns of the pipeline's own, next to the user's, have this prefix.
OWN = "__qvl_"
FILE, ROW, IMAGE, PROMPT = (f"{OWN}{name}" for name in ("file", "row", "image", "prompt"))
FAILURE = tuple(f"{OWN}error_{name}" for name in ("stage", "type", "message"))


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows to read: the first `rows` of one row group, which begins at row `first_row` of its file."""

    file: str
    file_number: int
    row_group: int
    first_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Source:
    """All of the input."""

    files: tuple[str, ...]
    columns: InputColumns
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        """Rows of the whole input, after `--limit`."""
        return sum(unit.rows for unit in self.units)


def open_source(config: CaptionConfig) -> Source:
    """Find the input's files and check their columns, reading nothing but their metadata.

    Raises:
        InputError: nothing is there, a file is no parquet, or its columns cannot be used.
    """
    files = _find_files(config.input)
    columns: InputColumns | None = None
    units: list[Unit] = []
    left = config.limit
    for number, file in enumerate(files):
        metadata = _metadata(file)
        found = input_columns(metadata.schema.to_arrow_schema(), file, config)
        if columns is None:
            columns = found
        elif (found.id.type, found.kept) != (columns.id.type, columns.kept):
            raise InputError(
                f"{file} and {files[0]} differ in the type of the id or of a kept column: "
                f"{_types(found)} and {_types(columns)}"
            )
        first_row = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            take = rows if left is None else min(rows, left)
            if take:
                units.append(Unit(file, number, group, first_row, take))
            left = None if left is None else left - take
            first_row += rows
    assert columns is not None
    return Source(tuple(files), columns, tuple(units))


def read_unit(unit: Unit, columns: InputColumns, prompt: str | None, rows_per_table: int) -> Iterator[pa.Table]:
    """Read a unit in tables of at most `rows_per_table` rows.

    Args:
        unit: what to read.
        columns: which columns, and as what.
        prompt: asked of every row in place of its prompt column.
        rows_per_table: bound on the memory in use.

    Raises:
        InputError: the file cannot be read (any more).
    """
    done = 0
    try:
        with pq.ParquetFile(unit.file) as file:
            batches = file.iter_batches(rows_per_table, row_groups=[unit.row_group], columns=columns.names)
            for batch in batches:
                table = pa.table(batch).slice(0, unit.rows - done)
                if table.num_rows:
                    yield _own_table(table, unit, unit.first_row + done, columns, prompt)
                done += table.num_rows
                if done == unit.rows:
                    return
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{unit.file}: row group {unit.row_group} cannot be read: {error}") from error
    raise InputError(f"{unit.file}: row group {unit.row_group} has {done} rows, not {unit.rows}: was it replaced?")


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


def _own_table(table: pa.Table, unit: Unit, first_row: int, columns: InputColumns, prompt: str | None) -> pa.Table:
    images, failures = _images(table[columns.image].to_pylist(), Path(unit.file).parent)
    prompts = [prompt] * table.num_rows if columns.prompt is None else table[columns.prompt].to_pylist()
    own = {
        FILE: pa.array([unit.file_number] * table.num_rows, pa.int32()),
        ROW: pa.array(range(first_row, first_row + table.num_rows), pa.int64()),
        ID: table[columns.id.name].cast(columns.id.type),
        **{field.name: table[field.name] for field in columns.kept},
        PROMPT: pa.array(prompts, pa.large_string()),
        IMAGE: pa.array(images, pa.large_binary()),
        **failure_columns(failures),
    }
    return pa.table(own)


def _images(values: list[object], folder: Path) -> tuple[list[bytes | None], list[Failure | None]]:
    images: list[bytes | None] = []
    failures: list[Failure | None] = []
    for value in values:
        try:
            images.append(_image_bytes(value, folder))
            failures.append(None)
        except (ImageError, RecordError) as error:
            images.append(None)
            failures.append(Failure.of(error))
    return images, failures


def _image_bytes(value: object, folder: Path) -> bytes:
    """Bytes of an image column's value: a struct's bytes, or else what its path leads to."""
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise ImageError("the image is null")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise RecordError(f"the image is a {type(value).__name__}, not bytes or a path")
    return _fetch(value, folder)


def _fetch(location: str, folder: Path) -> bytes:
    """Read a path, relative to the parquet file's folder, or a URI that fsspec knows."""
    try:
        if not urlsplit(location).scheme:
            return (folder / location).read_bytes()
        with fsspec.open(location, "rb") as stream:
            data: bytes = stream.read()
            return data
    except Exception as error:  # fsspec's file systems raise whatever their client does
        raise ImageError(f"{location} cannot be read: {type(error).__name__}: {stable_message(error)}") from error


def _find_files(inputs: tuple[str, ...]) -> list[str]:
    """Every parquet file once, those of a folder or glob in order of name."""
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
    return list(files)


def _hidden(path: Path) -> bool:
    """Names that begin with a dot or an underscore are not data, as in Hive and Spark."""
    return any(part.startswith((".", "_")) for part in path.parts)


def _metadata(file: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file} is no readable parquet file: {error}") from error


def _types(columns: InputColumns) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in (columns.id, *columns.kept))
