"""The input: its files, and which of their rows to read.

What enters: paths and globs of the settings. What leaves: a `Source`, which iterates over units to read.

A row is identified by its place, the number of its file and its index in that file, since ids need not be unique. A
file keeps its number when a job is resumed, whatever files were added meanwhile.
"""

import hashlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qvl_batch.columns import OWN
from qvl_batch.config import JobConfig
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.input.discovery import find_files
from qvl_batch.input.footers import footer, parquet_file
from qvl_batch.input.input_columns import InputColumns, input_columns
from qvl_batch.rows import PIECE, InputFile, RowSet, Span


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows to read, all of one row group.

    Args:
        file: path.
        footer: its SHA-256, to notice if the file changes.
        file_number: number of the file.
        row_group: index of the row group.
        first_row: index in the file of the row group's first row.
        spans: the rows, as indices in the file; at least one.
    """

    file: str
    footer: str
    file_number: int
    row_group: int
    first_row: int
    spans: Sequence[Span]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The whole input, less the rows that are done.

    Args:
        files: of the input; a file's number is its index here.
        columns: to read.
        groups: for each file int64 (row groups + 1,): the first row of each row group, and the number of rows.
        wanted: for each file, how many of its first rows `--limit` includes.
        done: rows that are not read.
    """

    files: tuple[InputFile, ...]
    columns: InputColumns
    groups: tuple[NDArray[np.int64], ...]
    wanted: tuple[int, ...]
    done: RowSet

    @property
    def rows(self) -> int:
        """Number of rows to read."""
        return sum(self.wanted) - sum(self.done.held(file, 0, rows) for file, rows in enumerate(self.wanted))

    def without(self, done: RowSet) -> "Source":
        """The source with `done` as the rows that are not read. It refers to `done` and does not copy it."""
        return replace(self, done=done)

    def spans(self) -> Iterator[tuple[int, Span]]:
        """Rows to read, in order: number of a file, and a span of its rows."""
        for file, rows in enumerate(self.wanted):
            for at in range(0, rows, PIECE):
                yield from ((file, span) for span in self.done.missing(file, at, min(at + PIECE, rows)))

    def units(self) -> Iterator[Unit]:
        """Units to read, in order. There is no list of them: a hundred million rows can have a million row groups."""
        for number, (file, starts, wanted) in enumerate(zip(self.files, self.groups, self.wanted, strict=True)):
            for group, (start, end) in enumerate(pairwise(starts.tolist())):
                if left := self.done.missing(number, start, max(start, min(end, wanted))):
                    yield Unit(file.path, file.footer, number, group, start, left)

    def parts(self, rows: int) -> Iterator[list[Unit]]:
        """Split the units into lists of at most `rows` rows; a unit of more rows is a list of its own."""
        units: list[Unit] = []
        taken = 0
        for unit in self.units():
            if units and taken + unit.rows > rows:
                yield units
                units, taken = [], 0
            units.append(unit)
            taken += unit.rows
        if units:
            yield units


def open_source(config: JobConfig, known: Sequence[InputFile] = ()) -> Source:
    """Find the input's files and check their columns. Reads only their metadata.

    Args:
        config: paths of the input, and names of columns.
        known: on resume, the files of the job in order of their numbers; files that were added follow them.

    Raises:
        InputError: the input has no files, or only files of the output folder; a folder cannot be listed or is a
            table; a file is not parquet or its columns cannot be used; a known file is gone or has changed.
        ConfigError: a kept column has the name of a column of the output or the pipeline, or the output is not a valid
            path.
    """
    reserved = next((name for name in config.copied_columns if name.startswith(OWN)), None)
    if reserved is not None:
        raise ConfigError(f"--keep-columns {reserved}: names that begin with {OWN} are reserved for the pipeline")
    paths = _in_order_of_number(find_files(config), known)
    files: list[InputFile] = []
    groups: list[NDArray[np.int64]] = []
    columns: InputColumns | None = None
    for number, path in enumerate(paths):
        file, schema, starts = _metadata(path)
        if number < len(known) and file != known[number]:
            raise InputError(
                f"{path} has changed since this job began: {_extent(file)} now, {_extent(known[number])} then"
            )
        files.append(file)
        groups.append(starts)
        of_file = input_columns(schema, path, config)
        # Answers of earlier runs already have the types that the known files have in common.
        can_widen = not known or number < len(known)
        columns = of_file if columns is None else _joined(columns, of_file, files, can_widen=can_widen)
    assert columns is not None
    if lost := next((kept.name for kept in columns.kept if kept.missing == len(files)), None):
        present = ", ".join(schema.names) or "none"
        raise InputError(f"no file has a column {lost!r} (--keep-columns); {files[-1].path} has {present}")
    wanted = _first_rows(files, config.limit)
    return Source(tuple(files), columns, tuple(groups), wanted, RowSet(file.rows for file in files))


def _in_order_of_number(found: dict[str, Path], known: Sequence[InputFile]) -> list[str]:
    """Paths of files in order of their numbers: the known ones, then the others as found, each file once.

    Args:
        found: for each path, the same with links resolved.
        known: files that have numbers already.

    Raises:
        InputError: a known file is not among those that were found.
    """
    numbered: dict[Path, str] = {}
    for path in [*(file.path for file in known), *found]:
        if path not in found:
            raise InputError(f"{path} was part of the input when this job began, and --input no longer names it")
        numbered.setdefault(found[path], path)
    return list(numbered.values())


def _joined(
    columns: InputColumns, of_file: InputColumns, files: Sequence[InputFile], *, can_widen: bool
) -> InputColumns:
    """Columns whose types hold the values of the last of `files` too.

    Raises:
        InputError: there are no such types, or they are wider although they cannot change any more.
    """
    joined = columns.joined(of_file)
    if joined is not None and joined.has_lists != columns.has_lists and not can_widen:
        raise InputError(
            f"{files[-1].path} has lists of images, and the files that this job began with have single ones, as the "
            "sizes in its answers do: give it another --output"
        )
    if joined is None or (joined != columns and not can_widen):
        raise InputError(
            f"{files[-1].path} and {files[0].path} differ in the type of the id or of a kept column: "
            f"{_types(of_file)} and {_types(columns)}"
        )
    return joined


def footer_sha256(file: pa.NativeFile) -> str:
    """SHA-256 of the footer of an open parquet file."""
    return hashlib.sha256(footer(file)).hexdigest()


def _first_rows(files: Sequence[InputFile], limit: int | None) -> tuple[int, ...]:
    """For each file, how many of its rows are among the first `limit` rows of the input."""
    if limit is None:
        return tuple(file.rows for file in files)
    before = accumulate((file.rows for file in files), initial=0)
    return tuple(min(file.rows, max(0, limit - start)) for file, start in zip(files, before, strict=False))


def _metadata(path: str) -> tuple[InputFile, pa.Schema, NDArray[np.int64]]:
    """Read a file's footer: the file, its schema, and the first row of each row group and the number of rows.

    Raises:
        InputError: it is not a readable parquet file.
    """
    try:
        # `to_arrow_schema` of metadata without a file leaks half a megabyte for each thousand row groups.
        with _open(path) as opened, parquet_file(opened) as file:
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            starts = np.cumsum([0, *rows], dtype=np.int64)
            described = InputFile(path, opened.size(), int(starts[-1]), footer_sha256(opened))
            schema = file.schema_arrow
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: the name is not UTF-8
        raise InputError(f"{path} is not a readable parquet file: {error}") from error
    if (np.diff(starts) < 0).any():
        raise InputError(f"{path} is not a readable parquet file: a row group has a negative number of rows")
    return described, schema, starts


def _open(path: str) -> pa.NativeFile:
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError("it is not a regular file")  # opening a named pipe would block until it has a writer
    return pa.OSFile(path)


def _extent(file: InputFile) -> str:
    return f"{file.size:,} bytes, footer {file.footer[:8]}, {file.rows:,} rows"


def _types(columns: InputColumns) -> str:
    own = ["no id"] if columns.id is None else [f"{columns.id.name}: {columns.id.type}"]
    return ", ".join([*own, *(f"{kept.name}: {kept.field.type}" for kept in columns.kept)])
