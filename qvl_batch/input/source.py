"""The input: which files, and which rows of them are to be read.

What enters: paths and globs of the settings. What leaves: a `Source`, which gives units to read.

A row is known by where it stands, the number of its file and its index in it, since ids need
not be unique. A file keeps its number when a job goes on, whatever files were added meanwhile.
"""

import hashlib
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qvl_batch.columns import OWN
from qvl_batch.config import JobConfig
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.input.discovery import find_files
from qvl_batch.input.input_columns import InputColumns, input_columns
from qvl_batch.rows import PIECE, InputFile, RowSet, Span


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows to read: `spans` of the rows of a file, known by its footer, all of them in one row group, which begins at
    row `first_row`.
    """

    file: str
    footer: str
    file_number: int
    row_group: int
    first_row: int
    spans: Sequence[Span]

    @property
    def rows(self) -> int:
        """How many rows that is."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """All of the input; a file's number is its place among the files.

    Args:
        files: of the input.
        columns: that are read.
        groups: int64 (row groups + 1,) of each file, the first row of each row group, and the file's end.
        wanted: of each file, how many rows, from its first on.
        done: rows that are left out.
    """

    files: tuple[InputFile, ...]
    columns: InputColumns
    groups: tuple[NDArray[np.int64], ...]
    wanted: tuple[int, ...]
    done: RowSet

    @property
    def rows(self) -> int:
        """Rows to read."""
        return sum(self.wanted) - sum(self.done.held(file, 0, rows) for file, rows in enumerate(self.wanted))

    def without(self, done: RowSet) -> "Source":
        """The source less those rows, of which it keeps no copy."""
        return replace(self, done=done)

    def spans(self) -> Iterator[tuple[int, Span]]:
        """Rows to read, in order: number of a file, and rows of it that follow each other."""
        for file, rows in enumerate(self.wanted):
            for at in range(0, rows, PIECE):
                yield from ((file, span) for span in self.done.missing(file, at, min(at + PIECE, rows)))

    def units(self) -> Iterator[Unit]:
        """What there is to read, in order. A hundred million rows may be a million row groups, so no list of them
        is kept.
        """
        for number, (file, starts, wanted) in enumerate(zip(self.files, self.groups, self.wanted, strict=True)):
            for group, (start, end) in enumerate(pairwise(starts.tolist())):
                if left := self.done.missing(number, start, max(start, min(end, wanted))):
                    yield Unit(file.path, file.footer, number, group, start, left)

    def parts(self, rows: int) -> Iterator[list[Unit]]:
        """The units in parts of at most so many rows, but of at least one unit."""
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
    """Find the input's files and check their columns, reading nothing but their metadata.

    Args:
        config: where to look, and for which columns.
        known: files that have their numbers already, in order; those found besides follow them.

    Raises:
        InputError: nothing is there, or nothing but the output, a folder cannot be listed or is a table's, a file
            is no parquet, its columns cannot be used, or a known file is gone or has changed.
        ConfigError: a kept column has the name of another, or the output is no place.
    """
    own = next((name for name in config.copied_columns if name.startswith(OWN)), None)
    if own is not None:
        raise ConfigError(f"--keep-columns {own}: the pipeline has columns of its own that begin with {OWN}")
    found = find_files(config)
    numbered: dict[Path, str] = {}
    for path in [*(file.path for file in known), *found]:
        if path not in found:
            raise InputError(f"{path} was part of the input when this job began, and --input no longer names it")
        numbered.setdefault(found[path], path)
    files: list[InputFile] = []
    columns: InputColumns | None = None
    groups: list[NDArray[np.int64]] = []
    for number, path in enumerate(numbered.values()):
        file, schema, starts = _metadata(path)
        files.append(file)
        if number < len(known) and file != known[number]:
            raise InputError(
                f"{path} has changed since this job began: {_extent(file)} now, {_extent(known[number])} then"
            )
        of_file = input_columns(schema, path, config)
        if columns is None:
            columns = of_file
        both = columns.joined(of_file)
        # Answers that are there already have the types of their files.
        if both is None or (0 < len(known) <= number and both != columns):
            raise InputError(
                f"{path} and {files[0].path} differ in the type of the id or of a kept column: "
                f"{_types(of_file)} and {_types(columns)}"
            )
        columns = both
        groups.append(starts)
    assert columns is not None
    wanted = _first_rows(files, config.limit)
    return Source(tuple(files), columns, tuple(groups), wanted, RowSet(file.rows for file in files))


def footer_sha256(file: pa.NativeFile) -> str:
    """Of a parquet file that is open."""
    end = file.size() - 8  # behind it the footer's length, and `PAR1`
    start = max(0, end - int.from_bytes(file.read_at(4, end), "little"))
    return hashlib.sha256(file.read_at(end - start, start)).hexdigest()


def _first_rows(files: Sequence[InputFile], limit: int | None) -> tuple[int, ...]:
    """Rows of each file that are among the first so many of all."""
    if limit is None:
        return tuple(file.rows for file in files)
    before = accumulate((file.rows for file in files), initial=0)
    return tuple(min(file.rows, max(0, limit - start)) for file, start in zip(files, before, strict=False))


def _metadata(path: str) -> tuple[InputFile, pa.Schema, NDArray[np.int64]]:
    """A file, its schema, and the first row of each row group and the end."""
    try:
        # `to_arrow_schema` of bare metadata leaves half a megabyte behind for each thousand row groups.
        with _open(path) as opened, pq.ParquetFile(opened) as file:
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            starts = np.cumsum([0, *rows], dtype=np.int64)
            found = InputFile(path, opened.size(), int(starts[-1]), footer_sha256(opened))
            schema = file.schema_arrow
    except (OSError, ValueError, pa.ArrowException) as error:  # a name that is no UTF-8 is a ValueError
        raise InputError(f"{path} is no readable parquet file: {error}") from error
    if (np.diff(starts) < 0).any():
        raise InputError(f"{path} is no readable parquet file: a row group has less than no rows")
    return found, schema, starts


def _open(path: str) -> pa.NativeFile:
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError("it is neither a file nor a folder")  # to open a pipe is to wait for its other end
    return pa.OSFile(path)


def _extent(file: InputFile) -> str:
    return f"{file.size:,} bytes, footer {file.footer[:8]}, {file.rows:,} rows"


def _types(columns: InputColumns) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in (columns.id, *columns.kept))
