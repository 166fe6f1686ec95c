"""Folders of images: a row is an image file, its id the path in the folder.

What enters: a folder. What leaves: its listing, which is a file of the input as a parquet file is one; later, rows.

A listing is a table of the images that the folder had at one moment, with their sizes and times of change, sorted by
path. Rows are places in it, so the output folder keeps it: on resume, the images that it names must be as they were,
and those that came since make a listing of their own, whose rows follow. Where prompts come from files beside the
images (`a.txt` beside `a.jpg`), these are listed too. A prompt that came since is no change: its row had failed.

The fingerprint is a hash of the listing. A file that changes and keeps its size and its time is not noticed.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.config import JobConfig
from qvl_batch.errors import ImageError, InputError, RecordError, RowError
from qvl_batch.input.containers.container import Described, Fields, Groups, text_of
from qvl_batch.input.discovery import output_folder, walk
from qvl_batch.input.endings import is_image
from qvl_batch.input.files import FilePath, is_inside, place_at, size_and_time, size_of
from qvl_batch.input.request import MAX_BYTES
from qvl_batch.input.units import Piece, Unit, Unread
from qvl_batch.rows import InputFile

Value = TypeVar("Value")
#: Of a listing: paths in the folder, sizes, times of change in nanoseconds, and the same of prompts, if there are any.
LISTING = pa.schema(
    [
        pa.field("path", pa.binary()),
        pa.field("size", pa.int64()),
        pa.field("time", pa.int64()),
        pa.field("prompt_size", pa.int64()),
        pa.field("prompt_time", pa.int64()),
    ]
)
#: Rows of a group: their paths travel to the task that reads some of them.
GROUP_ROWS = 500
#: Rows that are Python objects at a time.
_PIECE = 10_000
#: Files that a task reads at a time, and bytes of the longest prompt.
AT_ONCE, MOST_PROMPT = 8, 1 << 20


def of_folder(path: str, folder: FilePath, config: JobConfig, known: Sequence[pa.Table]) -> list[Described]:
    """The images of a folder that are in no listing yet, as a file of the input; none if there are none.

    Args:
        path: of the folder, with a slash at its end.
        folder: the folder.
        config: whether files beside the images have their prompts, and which folder is that of the output.
        known: listings of the folder.

    Raises:
        InputError: it cannot be listed; known images are gone or have changed; there are to be prompts, and there are
            none.
    """
    now = list_images(path, folder, with_prompts=_with_prompts(config), output=output_folder(config))
    for listing in known:
        check_listed(path, listing, now)
    if known:
        paths = pa.concat_tables(known)["path"].combine_chunks()
        now = now.filter(pc.invert(pc.is_in(now["path"], paths)))
    elif _with_prompts(config) and now.num_rows == now["prompt_size"].null_count:
        raise InputError(f"{path} has images without prompts: give --prompt, or a file a.txt beside each a.jpg")
    return [of_listing(path, now, config)] if now.num_rows or not known else []


def _with_prompts(config: JobConfig) -> bool:
    return config.prompt is None and config.messages_column is None


def list_images(path: str, top: FilePath, *, with_prompts: bool, output: FilePath | None) -> pa.Table:
    """List the images of a folder and of all folders below it.

    Args:
        path: of the folder, with a slash at its end.
        top: the folder.
        with_prompts: whether files beside the images have their prompts.
        output: a folder whose files are left out.

    Raises:
        InputError: a folder cannot be listed.
    """
    pieces = [LISTING.empty_table()]
    try:
        for folder, names in walk(top):
            if output is not None and is_inside(folder.resolve(), output):
                continue
            beside = {name for name in names if with_prompts and name.endswith(".txt")}
            shown = [name for name in names if is_image(name)]
            for start in range(0, len(shown), _PIECE):
                rows = [_listed(path, folder / name, beside) for name in shown[start : start + _PIECE]]
                columns = zip(zip(*rows, strict=True), LISTING.types, strict=True)
                pieces.append(pa.Table.from_arrays([pa.array(each, kind) for each, kind in columns], schema=LISTING))
    except OSError as error:
        raise InputError(f"{path} cannot be listed: {error}") from error
    return pa.concat_tables(pieces).sort_by("path").combine_chunks()


def _listed(path: str, image: FilePath, beside: set[str]) -> tuple[bytes, int, int, int | None, int | None]:
    prompt = f"{image.stem}.txt"
    of_prompt = _size_and_time(image.with_name(prompt)) if prompt in beside else (None, None)
    return (os.fsencode(str(image)[len(path) :]), *_size_and_time(image), *of_prompt)


def _size_and_time(path: FilePath) -> tuple[int, int]:
    try:
        return size_and_time(path)
    except OSError:  # a link that leads nowhere: its row will say so
        return -1, 0


def of_listing(path: str, listing: pa.Table, config: JobConfig) -> Described:
    """A listing as a file of the input."""
    names = ["id", "image", *(["prompt"] if _with_prompts(config) else [])]
    schema = pa.schema([(name, pa.binary() if name == "image" else pa.string()) for name in names])
    rows = listing.num_rows
    size = pc.sum(pc.max_element_wise(listing["size"], 0)).as_py() or 0
    starts = np.append(np.arange(0, rows, GROUP_ROWS), rows).astype(np.int64)
    return Described(InputFile(path, size, rows, fingerprint(listing)), schema, Groups(starts), listing=listing)


def fingerprint(listing: pa.Table) -> str:
    """A hash of the listing of images."""
    digest = hashlib.sha256()
    for some in listing.select(["path"]).to_batches(_PIECE):
        digest.update(b"\0".join([*some["path"].to_pylist(), b""]))
    for name in LISTING.names[1:]:
        digest.update(pc.fill_null(listing[name], -2).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def check_listed(path: str, known: pa.Table, now: pa.Table) -> None:
    """Check that images are as they were.

    Raises:
        InputError: some are gone or have changed; it names the first.
    """
    found = pc.index_in(known["path"], now["path"].combine_chunks())
    gone = found.is_null() if isinstance(found, pa.Array) else pc.is_null(found)
    differs = gone
    for name in LISTING.names[1:]:
        was, is_now = known[name], now[name].take(pc.fill_null(found, 0))
        is_other = pc.not_equal(was, is_now) if name in ("size", "time") else _has_changed(was, is_now)
        differs = pc.or_(differs, pc.fill_null(is_other, fill_value=False))
    if count := pc.sum(differs).as_py():
        first = int(pc.index(differs, True).as_py())
        name = as_text(known["path"][first].as_py())
        what = "gone" if gone[first].as_py() else "changed"
        raise InputError(
            f"{path} has {count:,} of {known.num_rows:,} images that are gone or have changed since this job began, "
            f"such as {name} ({what}): put them back, with the times that they had, or give another --output"
        )


def _has_changed(was: pa.ChunkedArray, is_now: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether a prompt that was there is another one now."""
    return pc.and_(pc.is_valid(was), pc.fill_null(pc.not_equal(was, is_now), fill_value=True))


def as_text(name: bytes) -> str:
    """A path as text, whatever its bytes."""
    return name.decode(errors="backslashreplace")


class Images:
    """Folders of images."""

    def read(self, unit: Unit, fields: Fields, rows_per_table: int) -> Iterator[Piece]:
        """As `Container.read`."""
        folder = place_at(unit.file)
        with ThreadPoolExecutor(AT_ONCE, "qvl-images") as pool:
            for start, stop in unit.cuts(rows_per_table):
                names = unit.names[start - unit.first_row : stop - unit.first_row]
                paths = [folder / os.fsdecode(name) for name in names]
                values: dict[str, list[str | bytes | RowError]] = {"id": [as_text(name) for name in names]}
                values |= {
                    name: list(pool.map(_result(read), paths))
                    for name, read in (("image", read_image), ("prompt", read_prompt))
                    if name in [field.name for field in fields.columns]
                }
                unread = {
                    at: Unread(as_text(names[at]), error)
                    for column in reversed(values.values())
                    for at, error in enumerate(column)
                    if isinstance(error, RowError)
                }
                arrays = {
                    field.name: pa.array(
                        [None if isinstance(value, RowError) else value for value in values[field.name]], field.type
                    )
                    for field in fields.columns
                }
                yield Piece(start, pa.table(arrays), unread)


def _result(read: Callable[[FilePath], Value]) -> "Callable[[FilePath], Value | RowError]":
    def result(path: FilePath) -> Value | RowError:
        try:
            return read(path)
        except RowError as error:
            return error

    return result


def read_image(path: FilePath) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: it is no regular file, is too large, or cannot be read.
    """
    try:
        size = size_of(path)
        if size is None:
            raise ImageError("it is not a regular file")
        if size > MAX_BYTES:
            raise ImageError(f"it has {size:,} bytes; the limit is {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


def read_prompt(path: FilePath) -> str:
    """The prompt in the file beside an image.

    Raises:
        RecordError: there is none, or it cannot be read.
    """
    beside = path.with_name(f"{path.stem}.txt")
    name = as_text(os.fsencode(beside.name))
    try:
        size = size_of(beside)
        if size is None or size > MOST_PROMPT:
            raise RecordError(f"{name} is no file of at most {MOST_PROMPT:,} bytes")
        return text_of(beside.read_bytes())
    except FileNotFoundError as error:
        raise RecordError(f"there is no {name} with its prompt beside it") from error
    except OSError as error:
        raise RecordError(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecordError(f"{name} is not UTF-8: {error}") from error
