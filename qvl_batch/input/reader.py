"""Reads rows of the input's files as tables: id, kept columns, conversation, what its answer must be, and images as
bytes of files.

What enters: a `Unit` of rows. What leaves: tables with the columns that `qvl_batch.columns` defines for this stage, the
id and the kept columns. Every row is in one of them; a row that cannot be read has a failure. Reading streams, so that
a row group of any size takes the memory of one table.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_batch.columns import (
    CONSTRAINT,
    HOSTS,
    IMAGES,
    MESSAGES,
    SAMPLING,
    array,
    failure_columns,
    failures_of,
    place_columns,
)
from qvl_batch.constraints import Constraint, constraint_of
from qvl_batch.conversation import single_turn, to_json
from qvl_batch.errors import (
    ImageError,
    InputError,
    PromptError,
    RecordError,
    RowError,
    WorkerLostError,
    stable_message,
)
from qvl_batch.input.addresses import host_of
from qvl_batch.input.ahead import Begun, in_order
from qvl_batch.input.cells import one_by_one, values_of
from qvl_batch.input.common_types import exact
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.footers import parquet_file
from qvl_batch.input.image_cells import image_values, plain_image
from qvl_batch.input.input_columns import InputColumns, ids_of
from qvl_batch.input.messages import MARK, MOST_IMAGES, MOST_VALUES, Asked, read_messages
from qvl_batch.input.source import Source, Unit, footer_sha256
from qvl_batch.sampling import Sampling
from qvl_batch.schema import EXPECTED_FIELD, ID, Failure, first_failure

logger = logging.getLogger(__name__)
Read = TypeVar("Read")
#: Most bytes of all images of a row that has several: tables hold them, however often the row shows the same one.
MOST_BYTES = 1 << 29
#: Rows of the input that say whether a column of text has paths; and the option that allows them.
FIRST_ROWS, PLACES = 16, "--allow-images-from"
#: Whether this process has logged a note on marks in text.
_noted_marks = False


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
        rows_per_table: bounds the memory in use, beside that of `ahead.BYTES_AHEAD`. Of tables of one row, the next is
            begun only once the one before it was taken.
        fetcher: reads images that are not in the file itself.
        lost: if given, the rows are not read but fail.

    If the file is damaged inside, the rows from there on have a failure, id and kept columns where those can still be
    read, and nulls: every row of the input is answered.

    Raises:
        InputError: the file is gone, has changed, or has fewer rows than its footer says.
    """
    begun = _begun(unit, columns, prompt, rows_per_table, fetcher, lost)
    # A row that is read alone must be the only one that this process works on.
    yield from in_order(begun, fetcher.ahead if rows_per_table > 1 else 0)


def _begun(
    unit: Unit, columns: InputColumns, prompt: str | None, rows_per_table: int, fetcher: Fetcher, lost: Lost | None
) -> Iterator[Begun[pa.Table]]:
    """The tables of a unit, without the images that are fetched for them."""
    at, left = unit.first_row, deque(unit.spans)
    try:
        with pa.OSFile(unit.file) as opened, parquet_file(opened) as file:
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


def refuse_paths(source: Source, allowed: Sequence[str]) -> None:
    """Refuse a column of paths or addresses if no place is allowed for them, before all rows fail.

    It looks at the first rows: text can also be the image itself.

    Args:
        source: the input.
        allowed: places that images may be fetched from.

    Raises:
        InputError: the first rows have paths or addresses, and no image in their place.
    """
    unit = next(source.units(), None)
    if allowed or unit is None or not source.columns.has_text:
        return
    for rows in islice(read_unit(unit, source.columns, "?", FIRST_ROWS, Fetcher(())), 1):
        refused = [each.message for each in failures_of(rows) if each is not None and PLACES in each.message]
        if refused and rows[IMAGES].null_count == len(rows):
            raise InputError(
                f"{unit.file}: column {source.columns.image!r} has paths or addresses of images; allow folders or "
                f"addresses for them with {PLACES}: {refused[0]}"
            )


def _tables(
    file: pq.ParquetFile, unit: Unit, columns: InputColumns, rows_per_table: int, lost: Lost | None
) -> Iterator[tuple[pa.Table, Exception | None]]:
    """Read a row group in tables. From the first damage on, tables have only the readable columns, and the error."""
    done = 0
    if lost is None:
        try:
            for batch in file.iter_batches(rows_per_table, row_groups=[unit.row_group], columns=columns.names):
                yield pa.Table.from_batches([batch]), None
                done += len(batch)
        except (OSError, pa.ArrowException) as damage:
            lost = Lost(damage)
        else:
            return
    rest = _readable_columns(file, unit, columns, known=lost.known).slice(done)
    for start in range(0, rest.num_rows, rows_per_table):
        yield rest.slice(start, rows_per_table), lost.error


def _readable_columns(file: pq.ParquetFile, unit: Unit, columns: InputColumns, *, known: bool) -> pa.Table:
    """Id and kept columns of a row group if `known`. Columns that are damaged or not read are nulls."""
    rows = file.metadata.row_group(unit.row_group).num_rows
    values = {name: pa.nulls(rows) for name in columns.names}
    for name in columns.copied:
        with suppress(OSError, pa.ArrowException):
            if known:
                values[name] = columns.of(file.read_row_group(unit.row_group, columns=[name]), unit.file)[name]
    return pa.table(values)


def _records(
    table: pa.Table,
    unit: Unit,
    first_row: int,
    columns: InputColumns,
    prompt: str | None,
    fetcher: Fetcher,
    error: Exception | None,
) -> Begun[pa.Table]:
    """The next stage's table: places, id, kept columns, conversations, images, failures. `error` fails all rows."""
    rows = range(first_row, first_row + table.num_rows)
    table = columns.of(table, unit.file)
    nothing: list[None] = [None] * len(rows)
    asked: Sequence[Asked | RowError]
    constraints: Sequence[Constraint | RowError | None] = nothing
    samplings: Sequence[Sampling | RowError | None] = nothing
    kept = {each.field.name: exact(table[each.name], each.name, each.field.type) for each in columns.kept}
    if error is None:
        if columns.constraint is not None:
            name, kind = columns.constraint
            constraints = _by_row(table[name], partial(constraint_of, kind))
        if columns.sampling is not None:
            name, usual = columns.sampling
            samplings = _by_row(table[name], usual.with_values)
        wrong = (errors for _, errors in kept.values())
        own = zip(*wrong, constraints, samplings, _asked(table, columns, prompt), strict=True)
        asked = [next((value for value in each if isinstance(value, RowError)), each[-1]) for each in own]
        _note_marks(asked)
    else:
        asked = [_row_error(f"row {row} of {unit.file} (row group {unit.row_group})", error) for row in rows]
    images = [[_bytes_or_location(value) for value in each.images] if isinstance(each, Asked) else [] for each in asked]
    record = {
        **place_columns([(unit.file_number, row) for row in rows]),
        ID: _ids(table, columns, unit, rows),
        **{name: values for name, (values, _) in kept.items()},
        MESSAGES: array(MESSAGES, [to_json(each.conversation) if isinstance(each, Asked) else None for each in asked]),
        CONSTRAINT: array(CONSTRAINT, [_json(each) for each in constraints]),
        SAMPLING: array(SAMPLING, [_json(each) for each in samplings]),
        HOSTS: array(HOSTS, [[host_of(each) if isinstance(each, str) else None for each in row] for row in images]),
    }
    if columns.answer_last_turn_again:
        expected = [each.expected if isinstance(each, Asked) else None for each in asked]
        record[EXPECTED_FIELD.name] = pa.array(expected, EXPECTED_FIELD.type)
    # Rows often ask about the same image: each location is fetched once.
    locations = list(dict.fromkeys(image for row in images for image in row if isinstance(image, str)))

    def with_images(fetched: Sequence[bytes | ImageError]) -> pa.Table:
        shown, failures = _fetched(asked, images, dict(zip(locations, fetched, strict=True)))
        return pa.table(record | {IMAGES: array(IMAGES, shown), **failure_columns(failures)})

    held = sum(len(image) for row in images for image in row if isinstance(image, bytes))
    return Begun(fetcher.fetch_all(locations, Path(unit.file).parent), held, with_images)


def _ids(table: pa.Table, columns: InputColumns, unit: Unit, rows: range) -> pa.ChunkedArray | pa.Array:
    """Ids of rows: values of their column, or file and row."""
    if columns.id is None:
        return pa.array([f"{unit.file}:{row}" for row in rows], columns.id_type)
    return ids_of(table[columns.id.name], columns.id.type)


def _asked(table: pa.Table, columns: InputColumns, prompt: str | None) -> list[Asked | RowError]:
    """What each row asks, with the values of its images; or why it cannot be asked."""
    images: list[object] = [()] * len(table)
    if columns.image in table.column_names:  # without, there are messages
        images = image_values(table[columns.image], table.schema.field(columns.image))
    if columns.messages is not None:
        again = columns.answer_last_turn_again
        messages = zip(one_by_one(table[columns.messages], MOST_VALUES), images, strict=True)
        return [_result(partial(_conversation, value, shown, again=again)) for value, shown in messages]
    prompts: list[object] = [prompt] * len(table) if columns.prompt is None else values_of(table[columns.prompt])
    return [_result(partial(_turn, each, shown)) for each, shown in zip(prompts, images, strict=True)]


def _by_row(column: pa.ChunkedArray, read: Callable[[Any], Read]) -> "list[Read | RowError | None]":
    """What the values of a column say of the answer of each row: None where it is null, or what is wrong with it."""

    def of(value: object) -> Read | None:
        if isinstance(value, RowError):
            raise value
        return None if value is None else read(value)

    return [_result(partial(of, value)) for value in values_of(column)]


def _json(value: Constraint | Sampling | RowError | None) -> str | None:
    return None if value is None or isinstance(value, RowError) else value.to_json()


def _result(read: Callable[[], Read]) -> "Read | RowError":
    try:
        return read()
    except RowError as error:
        return error


def _turn(prompt: object, images: object) -> Asked:
    """One user turn of a row's images and its prompt."""
    shown = _list_of_images(images)
    if not shown:
        raise ImageError("the list of images is empty")
    if len(shown) > MOST_IMAGES:
        raise ImageError(f"the list of images has {len(shown):,}; the limit is {MOST_IMAGES:,}")
    if isinstance(prompt, RowError):
        raise prompt
    if not isinstance(prompt, str):
        raise PromptError("the prompt is null")
    return Asked(single_turn(prompt, len(shown)), tuple(shown))


def _conversation(messages: object, images: object, *, again: bool) -> Asked:
    if isinstance(messages, RowError):
        raise messages
    # A null in the column is no image here, so that conversations without one can stand beside others.
    shown = [] if images is None else _list_of_images(images)
    return read_messages(messages, shown, answer_last_turn_again=again)


def _list_of_images(images: object) -> list[object]:
    """Values of a row's images."""
    if isinstance(images, RowError):
        raise images
    return list(images) if isinstance(images, list | tuple) else [images]


def _note_marks(asked: Sequence[Asked | RowError]) -> None:
    """Log, once in a process, that text of a user has marks for images, which nothing takes out."""
    global _noted_marks  # noqa: PLW0603
    turns = (turn for each in asked if isinstance(each, Asked) for turn in each.conversation if turn.role == "user")
    if not _noted_marks and any(MARK in part for turn in turns for part in turn.parts if isinstance(part, str)):
        _noted_marks = True
        logger.warning(
            "prompts or text parts of messages contain %s, which the model reads as text and often answers worse for. "
            "Take it out: images go in front of a prompt by themselves, and are parts of their own beside text parts. "
            "Only in a message whose content is text (--messages-column) does it stand for an image",
            MARK,
        )


def _row_error(row: str, error: Exception) -> RowError:
    if isinstance(error, WorkerLostError):
        return WorkerLostError(f"{row} {error}", stage=error.stage)
    return RecordError(f"{row} cannot be read: {stable_message(error)}")


def _fetched(
    asked: Sequence[Asked | RowError],
    rows: Sequence[Sequence[bytes | str | RowError]],
    fetched: Mapping[str, bytes | ImageError],
) -> tuple[list[list[bytes] | None], list[Failure | None]]:
    """For each row, the bytes of its images, or None and its failure.

    Args:
        asked: the rows.
        rows: their images, by location or as they are.
        fetched: images of locations.
    """
    images: list[list[bytes] | None] = []
    failures: list[Failure | None] = []
    for each, row in zip(asked, rows, strict=True):
        found = [fetched[image] if isinstance(image, str) else image for image in row]
        failure = Failure.of(each) if isinstance(each, RowError) else _failure(found)
        failures.append(failure)
        images.append(None if failure else [image for image in found if isinstance(image, bytes)])
    return images, failures


def _failure(images: Sequence[bytes | RowError]) -> Failure | None:
    """Why the images of a row cannot be shown; None if they can."""
    size = sum(len(image) for image in images if isinstance(image, bytes))
    if len(images) > 1 and size > MOST_BYTES:
        return Failure.of(ImageError(f"the {len(images):,} images have {size:,} bytes; the limit is {MOST_BYTES:,}"))
    return first_failure([Failure.of(image) if isinstance(image, RowError) else image for image in images])


def _bytes_or_location(value: object) -> bytes | str | RowError:
    try:
        value = plain_image(value)
    except ImageError as error:
        return error
    if value is None:
        return ImageError("the image is null")
    if isinstance(value, bytes | str | RowError):
        return value
    return RecordError(f"the image is a {type(value).__name__}, not bytes or a path")
