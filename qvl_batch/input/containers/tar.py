"""Tar files as WebDataset has them: a row is a sample, members in succession whose names are the same up to the first
dot of the last part; the rest is the member's extension.

    id, __key__    the name up to that dot
    image          the only image of the sample
    jpg, png, …    an image by its extension, which can have several parts: `left.jpg`
    txt            the text of `.txt`
    json           the text of `.json`, and each of its fields as a column, unless it is named like one of the others
    prompt         that field of `.json`, or else the text of `.txt`

Types of fields are those that `values` infers. Other members are not read.

The fingerprint is a hash of size and ends of the file, as `container.ends` has it, and one of names, sizes and times of
all members and the bytes of each `.json`: images that change and keep all that are not noticed.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

import pyarrow as pa

from qvl_batch.errors import ImageError, InputError, RecordError, RowError
from qvl_batch.input.containers.container import (
    Described,
    Fields,
    Grouping,
    Progress,
    check_beginning,
    check_unchanged,
    ends,
    text_of,
    wanted,
)
from qvl_batch.input.containers.samples import Sample, samples, shows
from qvl_batch.input.containers.values import Types, column, parse_object
from qvl_batch.input.files import FilePath, open_file, place_at
from qvl_batch.input.request import MAX_BYTES
from qvl_batch.input.units import Piece, Unit, Unread
from qvl_batch.rows import InputFile

#: Most rows of a group, and bytes of one that has several rows.
GROUP_ROWS, GROUP_BYTES = 500, 1 << 26
#: Bytes of the largest text.
MOST_TEXT = 1 << 24
#: Most extensions of images.
MOST_EXTENSIONS = 1_000
_KEYS, _IMAGE, _TXT, _JSON, _PROMPT = ("id", "__key__"), "image", "txt", "json", "prompt"


class WebDataset:
    """Tar files of samples."""

    def describe(self, place: FilePath, progress: Progress) -> Described:
        """As `Container.describe`."""
        columns, grouping = _Columns(), Grouping(GROUP_ROWS, GROUP_BYTES)
        digest = hashlib.sha256()
        try:
            with open_file(place) as file:
                check_beginning("tar", file.read(8))
                size, fingerprint, seen = file.seek(0, 2), ends(file), 0
                for sample in samples(file, 0, digest.update):
                    grouping.row(sample.offset)
                    columns.add(sample, file, digest)
                    progress(sample.offset - seen)
                    seen = sample.offset
        except (OSError, ValueError, tarfile.TarError) as error:  # ValueError: the name is not UTF-8
            raise InputError(f"{place} is not a readable tar file: {error}") from error
        found = InputFile(str(place), size, grouping.rows, fingerprint + digest.hexdigest()[:32])
        return Described(found, columns.schema(), grouping.groups(), inferred=True)

    def read(self, unit: Unit, fields: Fields, rows_per_table: int) -> Iterator[Piece]:
        """As `Container.read`."""
        try:
            with open_file(place_at(unit.file)) as file:
                check_unchanged(unit, file)
                for first_row, some in wanted(unit, samples(file, unit.offset), rows_per_table):
                    rows = [_Row(sample, file) for sample in some]
                    unread: dict[int, Unread] = {}
                    table = {field.name: _column(field, rows, unread) for field in fields.columns}
                    yield Piece(first_row, pa.table(table), unread)
        except OSError as error:
            raise InputError(f"{unit.file} cannot be read: {error}") from error


class _Columns:
    """Collects the columns of samples."""

    def __init__(self) -> None:
        self._types = Types()
        self._extensions: dict[str, None] = {}

    def add(self, sample: Sample, file: BinaryIO, digest: "hashlib._Hash") -> None:
        """Take in a sample, and the bytes of its `.json` into a hash.

        Raises:
            ValueError: there are too many columns.
        """
        self._extensions |= dict.fromkeys(each for each in sample.members if each in (_TXT, _JSON) or shows(each))
        if len(self._extensions) > MOST_EXTENSIONS:
            raise ValueError(f"its images have more than {MOST_EXTENSIONS:,} different extensions")
        if _TXT in sample.members:
            self._types.add({_PROMPT: ""})
        if _JSON in sample.members:
            row = _Row(sample, file)
            with suppress(RowError):  # its row will say so
                digest.update(row.data(_JSON, MOST_TEXT))
                self._types.add(row.record)

    def schema(self) -> pa.Schema:
        """The columns of all samples."""
        images = [each for each in self._extensions if shows(each)]
        fixed = dict.fromkeys(_KEYS, pa.string())
        fixed |= dict.fromkeys([_IMAGE, *images] if images else [], pa.binary())
        fixed |= dict.fromkeys((each for each in self._extensions if not shows(each)), pa.string())
        fields = (each for each in self._types.schema() if not (each.name in fixed or shows(each.name)))
        return pa.schema([*fixed.items(), *((each.name, each.type) for each in fields)])


class _Row:
    """Values of a sample."""

    def __init__(self, sample: Sample, file: BinaryIO) -> None:
        self.sample, self._file = sample, file
        self._record: dict[str, Any] | None = None

    def value(self, name: str) -> Any:
        """The value of a column, None if there is none.

        Raises:
            RowError: it cannot be read.
        """
        sample = self.sample
        if name in _KEYS:
            return sample.key
        if sample.error is not None:
            raise sample.error
        if name == _IMAGE:
            images = sample.images
            if len(images) > 1:
                several = ", ".join(f".{each}" for each in images)
                raise ImageError(f"it has several images ({several}): name one of them with --image-column")
            return self.data(images[0], MAX_BYTES) if images else None
        if shows(name):
            return self.data(name, MAX_BYTES) if name in sample.members else None
        if name in (_TXT, _JSON):
            return self.text(name) if name in sample.members else None
        value = self.record.get(name)
        return self.text(_TXT) if value is None and name == _PROMPT and _TXT in sample.members else value

    @property
    def record(self) -> dict[str, Any]:
        """The object of `.json`, an empty one if there is none.

        Raises:
            RecordError: it cannot be read.
        """
        if self._record is None:
            try:
                self._record = parse_object(self.data(_JSON, MOST_TEXT)) if _JSON in self.sample.members else {}
            except RowError as error:
                raise RecordError(f".{_JSON}: {error}") from error
        return self._record

    def text(self, extension: str) -> str:
        """The text of a member, without the line break at its end.

        Raises:
            RecordError: it cannot be read.
        """
        try:
            return text_of(self.data(extension, MOST_TEXT))
        except (RowError, UnicodeDecodeError) as error:
            raise RecordError(f".{extension}: {error}") from error

    def data(self, extension: str, most: int) -> bytes:
        """The bytes of a member.

        Raises:
            ImageError: it cannot be read.
        """
        member = self.sample.members[extension]
        if member.problem is not None:
            raise ImageError(f".{extension} {member.problem}")
        if member.size > most:
            raise ImageError(f".{extension} has {member.size:,} bytes; the limit is {most:,}")
        self._file.seek(member.offset)
        data = self._file.read(member.size)
        if len(data) < member.size:
            raise ImageError(f".{extension} is cut off: the tar ends after {len(data):,} of its {member.size:,} bytes")
        return data


def _column(field: pa.Field, rows: list[_Row], unread: dict[int, Unread]) -> pa.Array:
    """A column of samples; those that have no readable value in it are put into `unread`."""
    values: list[Any] = []
    for at, row in enumerate(rows):
        try:
            values.append(row.value(field.name))
        except RowError as error:
            values.append(None)
            unread.setdefault(at, Unread(f"sample {row.sample.key!r}", error))
    return pa.array(values, field.type) if pa.types.is_binary(field.type) else column(values, field.type)
