"""The input: its files, and which of their rows to read.

What enters: paths and globs of the settings. What leaves: a `Source`, which iterates over units to read.

A row is identified by its place, the number of its file and its index in that file, since ids need not be unique. A
file keeps its number when a job is resumed, whatever files were added meanwhile.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from threading import Lock
from typing import Self

import pyarrow as pa

from qvl_batch.columns import OWN
from qvl_batch.config import JobConfig
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.input.containers.by_name import describe
from qvl_batch.input.containers.container import Described, Groups
from qvl_batch.input.containers.images import of_folder, of_listing
from qvl_batch.input.containers.values import joined_schema
from qvl_batch.input.discovery import find_files
from qvl_batch.input.endings import kind_of
from qvl_batch.input.files import FilePath, place_of
from qvl_batch.input.input_columns import InputColumns, input_columns
from qvl_batch.input.units import Unit
from qvl_batch.rows import PIECE, InputFile, RowSet, Span

#: Gives the listing of a folder of images, by its place in the input.
ListingOf = Callable[[InputFile], pa.Table]
#: Files that are looked through at a time: on a network file system, each read is a round trip.
READERS = 16
#: Seconds between two lines about how far that is.
SECONDS = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """The whole input, less the rows that are done.

    Args:
        files: of the input; a file's number is its index here.
        columns: to read.
        groups: of the rows of each file.
        wanted: for each file, how many of its first rows `--limit` includes.
        done: rows that are not read.
        listings: those of the files that are folders of images, by number.
        passed_over: how many other files the folders of the input have, and one of them.
    """

    files: tuple[InputFile, ...]
    columns: InputColumns
    groups: tuple[Groups, ...]
    wanted: tuple[int, ...]
    done: RowSet
    listings: Mapping[int, pa.Table] = field(default_factory=dict)
    passed_over: tuple[int, str | None] = (0, None)

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
        for number, (file, groups, wanted) in enumerate(zip(self.files, self.groups, self.wanted, strict=True)):
            for group, (start, end) in enumerate(pairwise(groups.rows.tolist())):
                if left := self.done.missing(number, start, max(start, min(end, wanted))):
                    names = self.listings[number]["path"][start:end].to_pylist() if number in self.listings else ()
                    yield Unit(file.path, file.fingerprint, number, group, start, left, *groups.begin(group), names)

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


def open_source(
    config: JobConfig,
    known: Sequence[InputFile] = (),
    listing_of: ListingOf | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Source:
    """Find the input's files and check their columns. Reads only what says which rows they have.

    Args:
        config: paths of the input, and names of columns.
        known: on resume, the files of the job in order of their numbers; files that were added follow them.
        listing_of: on resume, the listing of a known folder of images.
        say: receives a line now and then if it takes long.

    Raises:
        InputError: the input has no files, or only files of the output folder; a folder cannot be listed or is a
            table; a file cannot be read or its columns cannot be used; a known file is gone or has changed.
        ConfigError: a kept column has the name of a column of the output or the pipeline, or the output is not a valid
            path.
    """
    reserved = next((name for name in config.copied_columns if name.startswith(OWN)), None)
    if reserved is not None:
        raise ConfigError(f"--keep-columns {reserved}: names that begin with {OWN} are reserved for the pipeline")
    found = find_files(config)
    described = _described(found.paths, config, known, listing_of, say)
    files = [each.file for each in described]
    schemas = _schemas(described, len(known))
    wanted = _first_rows(files, config.limit)
    return Source(
        tuple(files),
        _columns(files, schemas, config, len(known)),
        tuple(each.groups for each in described),
        wanted,
        RowSet(file.rows for file in files),
        {number: each.listing for number, each in enumerate(described) if each.listing is not None},
        (found.passed_over, found.example),
    )


def _described(
    found: Mapping[str, FilePath],
    config: JobConfig,
    known: Sequence[InputFile],
    listing_of: ListingOf | None,
    say: Callable[[str], None],
) -> list[Described]:
    """Look through the input, several files at a time: what is known, then what was added.

    Raises:
        InputError: a file cannot be read, or is known and is gone or has changed.
    """
    numbered = _in_order_of_number(found, known)
    paths = [path for path in numbered if not path.endswith("/")]
    places = [place_of(path, found[path]) for path in paths]
    with ThreadPoolExecutor(READERS, "qvl-describe") as pool, _Progress(say) as progress:
        files = dict(zip(paths, pool.map(partial(describe, progress=progress), places), strict=True))
    described: list[Described] = []
    listings: dict[str, list[pa.Table]] = {}
    for file in known:
        if file.path.endswith("/"):
            assert listing_of is not None
            listings.setdefault(file.path, []).append(listing_of(file))
            described.append(of_listing(file.path, listings[file.path][-1], config))
        else:
            described.append(files.pop(file.path))
        if described[-1].file != file:
            raise InputError(
                f"{file.path} has changed since this job began: {_extent(described[-1].file)} now, {_extent(file)} then"
            )
    for path in numbered:
        if path.endswith("/"):
            described += of_folder(path, found[path], config, listings.get(path, []))
        elif path in files:
            described.append(files[path])
    return described


class _Progress:
    """Says how many bytes have been looked through, every ten seconds. Once its context is left, as by Ctrl-C, threads
    that still look through files end.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._lock = say, Lock()
        self._bytes, self._next = 0, time.monotonic() + SECONDS
        self._is_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True

    def __call__(self, size: int) -> None:
        if self._is_over:
            raise CancelledError
        with self._lock:
            self._bytes += size
            if time.monotonic() >= self._next:
                self._next = time.monotonic() + SECONDS
                self._say(f"input     counting rows: {self._bytes / 1e9:,.1f} GB looked through")


def _schemas(described: Sequence[Described], known: int) -> tuple[pa.Schema, ...]:
    """Schemas of files. Where types are inferred from values, they hold the values of all files of the kind; those of
    the `known` first files, whose answers are there, do not depend on files that came later.
    """
    schemas = [each.schema for each in described]
    for kind in {kind_of(each.file.path) for each in described if each.inferred}:
        numbers = [at for at, each in enumerate(described) if kind_of(each.file.path) == kind]
        of_all = joined_schema([schemas[at] for at in numbers])
        first = [schemas[at] for at in numbers if at < known]
        of_first = joined_schema(first) if first else of_all
        for at in numbers:
            schemas[at] = of_first if at < known else of_all
    same: dict[pa.Schema, pa.Schema] = {}  # of ten thousand files, a few objects
    return tuple(same.setdefault(schema, schema) for schema in schemas)


def _columns(files: Sequence[InputFile], schemas: Sequence[pa.Schema], config: JobConfig, known: int) -> InputColumns:
    """Columns to read, of types that hold the values of all files.

    Raises:
        InputError: a file lacks a column, or there are no such types.
    """
    columns: InputColumns | None = None
    with_columns = 0
    for number, (file, schema) in enumerate(zip(files, schemas, strict=True)):
        if not schema.names and not file.rows:
            continue  # an empty file of text has neither rows nor columns
        with_columns += 1
        of_file = input_columns(schema, file.path, config)
        # Answers of earlier runs already have the types that the known files have in common.
        can_widen = not known or number < known
        columns = of_file if columns is None else _joined(columns, of_file, files[: number + 1], can_widen=can_widen)
    if columns is None:
        raise InputError(f"{files[0].path} is empty, and so is all other input: there are no columns")
    if lost := next((kept.name for kept in columns.kept if kept.missing == with_columns), None):
        present = ", ".join(schemas[-1].names) or "none"
        raise InputError(f"no file has a column {lost!r} (--keep-columns); {files[-1].path} has {present}")
    return replace(columns, schemas=tuple(schemas))


def _in_order_of_number(found: Mapping[str, FilePath], known: Sequence[InputFile]) -> list[str]:
    """Paths of files in order of their numbers: the known ones, then the others as found, each file once.

    Args:
        found: for each path, the same with links resolved.
        known: files that have numbers already.

    Raises:
        InputError: a known file is not among those that were found.
    """
    numbered: dict[FilePath, str] = {}
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


def _first_rows(files: Sequence[InputFile], limit: int | None) -> tuple[int, ...]:
    """For each file, how many of its rows are among the first `limit` rows of the input."""
    if limit is None:
        return tuple(file.rows for file in files)
    before = accumulate((file.rows for file in files), initial=0)
    return tuple(min(file.rows, max(0, limit - start)) for file, start in zip(files, before, strict=False))


def _extent(file: InputFile) -> str:
    return f"{file.size:,} bytes, fingerprint {file.fingerprint[:8]}, {file.rows:,} rows"


def _types(columns: InputColumns) -> str:
    own = ["no id"] if columns.id is None else [f"{columns.id.name}: {columns.id.type}"]
    return ", ".join([*own, *(f"{kept.name}: {kept.field.type}" for kept in columns.kept)])
