"""The questions of a comparison: rows of the input, their images decoded and fitted once for both sides."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from comparison.config import CompareConfig
from qvl_batch.config import Fit
from qvl_batch.errors import ConfigError, ImageError, InputError
from qvl_batch.fetch import Fetcher
from qvl_batch.images import decode_image, fit_image
from qvl_batch.reader import read_unit
from qvl_batch.schema import ID, Failure
from qvl_batch.source import FILE, IMAGE, PROMPT, ROW, Source, failures_of, open_source

EXPECTED = "expected"
#: Pixels a side of the images on the page.
THUMBNAIL = 336


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
        if self.pixels is None:
            return None
        image = Image.fromarray(self.pixels)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Questions:
    """All questions of a comparison, in chunks that follow from the input alone."""

    source: Source
    fetcher: Fetcher
    fits: tuple[Fit, ...]
    prompt: str | None
    expected: str | None
    image_size: int

    def __len__(self) -> int:
        return self.source.rows * len(self.fits)

    def chunks(self, rows: int, skip: int) -> "Iterator[list[Question]]":
        """Questions, at most `rows` rows of the input at a time, after the first `skip` chunks."""
        waiting: list[dict[str, Any]] = []
        left = skip * rows
        for unit in self.source.units():
            # Chunks that are done are not decoded again.
            if left >= unit.rows:
                left -= unit.rows
                continue
            for table in read_unit(unit, self.source.columns, self.prompt, rows, self.fetcher):
                records = _records(table, self.expected)[left:]
                left = max(0, left - table.num_rows)
                waiting += records
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
                image = decode_image(data)
            except ImageError as error:
                failure = Failure.of(error)
        bare = Question(**record, fit=self.fits[0], size=image.size if image else None, pixels=None, failure=failure)
        for fit in self.fits:
            yield replace(bare, fit=fit, pixels=fit_image(image, self.image_size, fit) if image else None)


def open_questions(config: CompareConfig, image_size: int) -> Questions:
    """Find the input and check its columns.

    Raises:
        InputError: nothing is there, a file is no parquet, or its columns cannot be used.
        ConfigError: the expected column has the name of one that the comparison writes.
    """
    fetcher = Fetcher(config.allow_images_from)
    expected = config.expected_column
    if expected is None:
        plain = open_source(config.captions(()))
        if EXPECTED not in pq.read_schema(plain.files[0].path).names:
            return Questions(plain, fetcher, config.fit, config.prompt, None, image_size)
        expected = EXPECTED
    try:
        source = open_source(config.captions((expected,)))
    except (InputError, ConfigError) as error:
        raise type(error)(str(error).replace("--keep-columns", "--expected-column")) from error
    (kept,) = source.columns.kept
    if not pa.types.is_string(kept.type) and not pa.types.is_large_string(kept.type):
        raise InputError(f"column {expected!r} (--expected-column) is {kept.type}; it must be strings")
    return Questions(source, fetcher, config.fit, config.prompt, expected, image_size)


def _records(table: pa.Table, expected: str | None) -> list[dict[str, Any]]:
    """Rows of a table as what a `Question` is made of."""
    return [
        {
            "file": row[FILE],
            "row": row[ROW],
            "id": row[ID],
            "prompt": row[PROMPT],
            "expected": row[expected] if expected else None,
            IMAGE: row[IMAGE],
            "failure": failure,
        }
        for row, failure in zip(table.to_pylist(), failures_of(table), strict=True)
    ]
