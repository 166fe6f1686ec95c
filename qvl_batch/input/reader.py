"""Reads rows of the input's files as tables: id, kept columns, conversation, what its answer must be, and images as
bytes of files.

What enters: a `Unit` of rows. What leaves: tables with the columns that `qvl_batch.columns` defines for this stage, the
id and the kept columns. Every row is in one of them; a row that cannot be read has a failure. Reading streams, so that
a row group of any size takes the memory of one table.

This module does not know what kind of file the rows are in: its container reads them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from qvl_batch.columns import (
    CONSTRAINT,
    IMAGES,
    LOCATIONS,
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
from qvl_batch.input.addresses import is_relative, public_text, short
from qvl_batch.input.ahead import Begun, in_order
from qvl_batch.input.cells import one_by_one, values_of
from qvl_batch.input.common_types import exact
from qvl_batch.input.containers.by_name import read
from qvl_batch.input.containers.images import as_text
from qvl_batch.input.fetch import LONGEST_PATH, Fetcher
from qvl_batch.input.files import FilePath, place_at
from qvl_batch.input.image_cells import image_values, plain_image
from qvl_batch.input.input_columns import InputColumns, ids_of
from qvl_batch.input.messages import MARK, MOST_IMAGES, MOST_VALUES, Asked, read_messages
from qvl_batch.input.source import Source
from qvl_batch.input.store_files import StorePath
from qvl_batch.input.units import Lost, Piece, Unit
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

    Rows that cannot be read have a failure, id and kept columns where those can still be read, and nulls: every row of
    the input is answered.

    Raises:
        InputError: the file is gone, has changed, or has fewer rows than it says.
    """
    begun = (_records(piece, unit, columns, prompt, fetcher) for piece in read(unit, columns, rows_per_table, lost))
    # A row that is read alone must be the only one that this process works on.
    yield from in_order(begun, fetcher.ahead if rows_per_table > 1 else 0)


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


def _records(piece: Piece, unit: Unit, columns: InputColumns, prompt: str | None, fetcher: Fetcher) -> Begun[pa.Table]:
    """The next stage's table: places, id, kept columns, conversations, images, failures."""
    table = columns.of(piece.table, unit.file)
    rows = range(piece.first_row, piece.first_row + piece.table.num_rows)
    nothing: list[None] = [None] * len(rows)
    asked: Sequence[Asked | RowError] = [RecordError("it is not read")] * len(rows)
    constraints: Sequence[Constraint | RowError | None] = nothing
    samplings: Sequence[Sampling | RowError | None] = nothing
    kept = {each.field.name: exact(table[each.name], each.name, each.field.type) for each in columns.kept}
    if len(piece.unread) < len(rows):
        if columns.constraint is not None:
            name, kind = columns.constraint
            constraints = _by_row(table[name], partial(constraint_of, kind))
        if columns.sampling is not None:
            name, usual = columns.sampling
            samplings = _by_row(table[name], usual.with_values)
        wrong = (errors for _, errors in kept.values())
        own = zip(*wrong, constraints, samplings, _asked(table, columns, prompt), strict=True)
        asked = [next((value for value in each if isinstance(value, RowError)), each[-1]) for each in own]
    unread = {
        at: _row_error(f"row {rows[at]} of {unit.file}" + (f" ({each.where})" if each.where else ""), each.error)
        for at, each in piece.unread.items()
    }
    asked = [unread.get(at, each) for at, each in enumerate(asked)]
    _note_marks(asked)
    folder = place_at(unit.file).parent
    images = [
        [_bytes_or_location(value, folder) for value in each.images] if isinstance(each, Asked) else []
        for each in asked
    ]
    record = {
        **place_columns([(unit.file_number, row) for row in rows]),
        ID: _ids(table, columns, unit, rows),
        **{name: values for name, (values, _) in kept.items()},
        MESSAGES: array(MESSAGES, [to_json(each.conversation) if isinstance(each, Asked) else None for each in asked]),
        CONSTRAINT: array(CONSTRAINT, [_json(each) for each in constraints]),
        SAMPLING: array(SAMPLING, [_json(each) for each in samplings]),
        LOCATIONS: array(LOCATIONS, _locations(unit, rows, images)),
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
    return Begun(fetcher.fetch_all(locations, Path(str(folder))), held, with_images)


def _locations(
    unit: Unit, rows: range, images: Sequence[Sequence[bytes | str | RowError]]
) -> Iterator[Sequence[str | None]]:
    """For each row where its images come from, as columns have it: in a folder of images, it is the row's file."""
    for row, each in zip(rows, images, strict=True):
        if unit.names:
            yield [_location(unit.file + as_text(unit.names[row - unit.first_row]))]
        else:
            yield [_location(image) if isinstance(image, str) else None for image in each]


def _location(path: str) -> str:
    """A path or an address for people, as text, whatever it holds."""
    return public_text(path if len(path) <= LONGEST_PATH else short(path))


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
    if isinstance(error, ImageError):
        return ImageError(f"{row} cannot be read: {error}")
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


def _bytes_or_location(value: object, folder: FilePath) -> bytes | str | RowError:
    """What the value of an image is; a relative path in a file of a store is an address there."""
    try:
        value = plain_image(value)
    except ImageError as error:
        return error
    if value is None:
        return ImageError("the image is null")
    if isinstance(value, str) and isinstance(folder, StorePath) and is_relative(value):
        return folder.joined(value)
    if isinstance(value, bytes | str | RowError):
        return value
    return RecordError(f"the image is a {type(value).__name__}, not bytes or a path")
