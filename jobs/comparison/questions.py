"""The questions of a comparison: rows of the input, their images decoded and fitted once for both sides."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from comparison.config import CompareConfig
from qvl_batch.columns import FILE, IMAGE, PROMPT, ROW, failures_of
from qvl_batch.config import Fit, ImageRules
from qvl_batch.errors import ConfigError, ImageError, InputError
from qvl_batch.images.pixels import decode_image, fit_image
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit
from qvl_batch.input.source import Source, open_source
from qvl_batch.report.sample import thumbnail
from qvl_batch.rows import Row, RowSet
from qvl_batch.schema import ID, Failure, is_textual, readable, texts

EXPECTED = "expected"
#: Side in pixels of the images on the page.
SIDE = 336


@dataclass(frozen=True, slots=True)
class Question:
    """One row of the input, asked with one way of fitting its image.

    `pixels` is uint8 (H, W, 3), the square that both sides see; None where there is a `failure`.
    `size` is width and height of the image before it was fitted.
    """

    file: int
    row: int
    id: str | int | None
    prompt: str | None
    expected: str | None
    fit: Fit
    size: tuple[int, int] | None
    pixels: NDArray[np.uint8] | None
    failure: Failure | None

    def thumbnail(self) -> bytes | None:
        """The fitted image as a small JPEG."""
        return None if self.pixels is None else thumbnail(self.pixels, SIDE, quality=85)


@dataclass(frozen=True, slots=True)
class Questions:
    """All questions of a comparison."""

    source: Source
    fetcher: Fetcher
    fits: tuple[Fit, ...]
    rules: ImageRules
    prompt: str | None
    expected: str | None
    image_size: int

    def __len__(self) -> int:
        return self.source.rows * len(self.fits)

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
        return [question for record in records for question in self._fitted(record)]

    def _fitted(self, record: dict[str, Any]) -> Iterator[Question]:
        data: bytes | None = record.pop(IMAGE)
        failure: Failure | None = record.pop("failure")
        image: Image.Image | None = None
        if failure is None and data is not None:
            try:
                image = decode_image(data, self.rules)
            except ImageError as error:
                failure = Failure.of(error)
        unfitted = Question(
            **record, fit=self.fits[0], size=image.size if image else None, pixels=None, failure=failure
        )
        for fit in self.fits:
            yield replace(unfitted, fit=fit, pixels=fit_image(image, self.image_size, fit) if image else None)


def open_questions(config: CompareConfig, image_size: int, say: Callable[[str], None]) -> Questions:
    """Find the input and check its columns.

    Args:
        config: what to ask.
        image_size: side in pixels of the square that both sides see.
        say: receives a line if the input has a column of right answers that cannot be used.

    Raises:
        InputError: nothing is there, a file is no parquet, or its columns cannot be used.
        ConfigError: the expected column has the name of the id column in the results.
    """
    source, expected = open_source(config), config.expected_column
    if expected is None:
        expected = EXPECTED if EXPECTED in pq.read_schema(source.files[0].path).names else ""
    if expected:
        try:
            kept = _expected_field(source, expected)
        except InputError as error:
            if config.expected_column:
                raise
            say(f"note      expected answers are not used: {error}")
            expected = ""
        else:
            source = replace(source, columns=replace(source.columns, kept=(kept,)))
    fetcher = Fetcher(config.allow_images_from)
    return Questions(source, fetcher, config.fit, config.image_rules, config.prompt, expected or None, image_size)


def _expected_field(source: Source, name: str) -> pa.Field:
    """The column of right answers with its type in the first file; in others it can be another type of text."""
    if name == ID:
        raise ConfigError(
            f"--expected-column {ID}: the results have the id of a row under that name; rename the column"
        )
    fields: list[pa.Field] = []
    for file in source.files:
        schema = pq.read_schema(file.path)
        if schema.names.count(name) != 1:
            raise InputError(f"{file.path} has no single column {name!r} (--expected-column)")
        field = schema.field(name)
        if not is_textual(field.type):
            what = f"column {name!r} (--expected-column) is {field.type}"
            raise InputError(f"{file.path}: {what}; it must be strings or integers")
        fields.append(field)
    return fields[0]


def _records(table: pa.Table, expected: str | None) -> list[dict[str, Any]]:
    """Rows of a table as fields of a `Question`, and the image file's bytes."""
    values = {
        "file": table[FILE].to_pylist(),
        "row": table[ROW].to_pylist(),
        "id": readable(table[ID]),
        "prompt": table[PROMPT].to_pylist(),
        "expected": texts(table[expected]) if expected else [None] * len(table),
        IMAGE: table[IMAGE].to_pylist(),
        "failure": failures_of(table),
    }
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
