"""The questions of a comparison: rows of the input, their images decoded and seen once for both sides."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from export.comparison.config import CompareConfig
from qvl_batch.bundle.layout import Resolution
from qvl_batch.columns import FILE, IMAGES, MESSAGES, ROW, failures_of
from qvl_batch.config import ImageRules
from qvl_batch.conversation import Conversation, from_json
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.images.pixels import Seen, seen_or_failure
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.input_columns import Kept
from qvl_batch.input.reader import read_unit, refuse_paths
from qvl_batch.input.source import Source, open_source
from qvl_batch.report.sample import side_by_side
from qvl_batch.rows import Row, RowSet
from qvl_batch.schema import ID, Failure, first_failure, is_textual, readable, texts

EXPECTED = "expected"
#: Side in pixels of the images on the page.
SIDE = 336


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the input, with its images seen in one way.

    `images` are what both sides see; there are none where there is a `failure`.
    """

    file: int
    row: int
    id: str | int | None
    conversation: Conversation
    expected: str | None
    view: View
    images: tuple[Seen, ...]
    failure: Failure | None

    @property
    def prompt(self) -> str | None:
        """Text of the last user message; None if the row could not be read."""
        asked = [message.text for message in self.conversation if message.role == "user"]
        return asked[-1] if asked else None

    @property
    def fit(self) -> str:
        """How its images are fitted; `native` if they keep their own size."""
        return self.view.fit or "native"

    def thumbnail(self) -> bytes | None:
        """The images as they are seen, side by side, as a small JPEG."""
        return side_by_side([image.pixels for image in self.images], SIDE, quality=85) if self.images else None


@dataclass(frozen=True, slots=True)
class Questions:
    """All questions of a comparison."""

    source: Source
    fetcher: Fetcher
    views: tuple[View, ...]
    rules: ImageRules
    prompt: str | None
    expected: str | None

    def __len__(self) -> int:
        return self.source.rows * len(self.views)

    def without(self, rows: Iterable[Row]) -> "Questions":
        """The questions except those about `rows` of the input."""
        done = RowSet(file.rows for file in self.source.files)
        for file, row in rows:
            done.add(file, row, row + 1)
        return replace(self, source=self.source.without(done))

    def chunks(self, rows: int) -> "Iterator[list[Question]]":
        """Questions about at most `rows` rows of the input at a time."""
        waiting: list[dict[str, Any]] = []
        for unit in self.source.units():
            for table in read_unit(unit, self.source.columns, self.prompt, rows, self.fetcher):
                waiting += _records(table, self.expected)
                while len(waiting) >= rows:
                    yield self._ask(waiting[:rows])
                    waiting = waiting[rows:]
        if waiting:
            yield self._ask(waiting)

    def _ask(self, records: Sequence[dict[str, Any]]) -> list[Question]:
        return [question for record in records for question in self._seen(record)]

    def _seen(self, record: dict[str, Any]) -> Iterator[Question]:
        """A row once for each view."""
        files: list[bytes] = record.pop(IMAGES) or []
        failure: Failure | None = record.pop("failure")
        for view in self.views:
            seen = [] if failure else [seen_or_failure(file, view, self.rules) for file in files]
            wrong = failure or first_failure(seen)
            images = tuple(image for image in seen if isinstance(image, Seen)) if wrong is None else ()
            yield Question(**record, view=view, images=images, failure=wrong)


def open_questions(config: CompareConfig, resolution: Resolution, say: Callable[[str], None]) -> Questions:
    """Find the input and check its columns.

    Args:
        config: what to ask.
        resolution: sizes of images that both sides take.
        say: receives a line if the input has a column of right answers that cannot be used.

    Raises:
        InputError: nothing is there, a file cannot be read, or its columns cannot be used.
        ConfigError: the expected column has the name of the id column in the results, or the images of the bundle
            cannot be seen as the options say.
    """
    views = tuple(View.of(resolution, fit, config.max_pixels) for fit in config.fit or (None,))
    source, expected = open_source(config), config.expected_column
    refuse_paths(source, config.allow_images_from)
    if expected is None:
        expected = EXPECTED if EXPECTED in source.columns.schemas[0].names else ""
    if expected:
        try:
            kept = _expected_field(source, expected)
        except InputError as error:
            if config.expected_column:
                raise
            say(f"note      expected answers are not used: {error}")
            expected = ""
        else:
            source = replace(source, columns=replace(source.columns, kept=(Kept(expected, kept),)))
    fetcher = Fetcher.of(config)
    return Questions(source, fetcher, views, config.image_rules, config.prompt, expected or None)


def _expected_field(source: Source, name: str) -> pa.Field:
    """The column of right answers with its type in the first file; in others it can be another type of text."""
    if name == ID:
        raise ConfigError(
            f"--expected-column {ID}: the results have the id of a row under that name; rename the column"
        )
    fields: list[pa.Field] = []
    for file, schema in zip(source.files, source.columns.schemas, strict=True):
        if schema.names.count(name) != 1:
            raise InputError(f"{file.path} has no single column {name!r} (--expected-column)")
        field = schema.field(name)
        if not is_textual(field.type):
            what = f"column {name!r} (--expected-column) is {field.type}"
            raise InputError(f"{file.path}: {what}; it must be strings or integers")
        fields.append(field)
    return fields[0]


def _records(table: pa.Table, expected: str | None) -> list[dict[str, Any]]:
    """Rows of a table as fields of a `Question`, and the bytes of the image files."""
    values = {
        "file": table[FILE].to_pylist(),
        "row": table[ROW].to_pylist(),
        "id": readable(table[ID]),
        "conversation": [from_json(text) if text else () for text in table[MESSAGES].to_pylist()],
        "expected": texts(table[expected]) if expected else [None] * len(table),
        IMAGES: table[IMAGES].to_pylist(),
        "failure": failures_of(table),
    }
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
