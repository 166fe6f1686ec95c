"""A random sample of rows to show on the page: which rows, and the columns that carry them to the driver.

What enters: the rows to answer; later, tables of them. What leaves: places; columns of thumbnails and questions; values
to show. Rows are drawn from those that are left to answer, always with the same seed, so two bundles on the same input
show the same rows.
"""

import io
import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.columns import ASKED, MESSAGES, THUMBNAIL, array, places_of
from qvl_batch.conversation import from_json
from qvl_batch.rows import Row, Span
from qvl_batch.schema import ANSWER_FIELDS, CHOICES_FIELD, CONFIDENCE_FIELDS, ID, readable

#: Rows of the sample, pixels of a thumbnail's longer side, and characters of a text that are kept.
ROWS, SIDE, CHARACTERS = 24, 160, 1_000
#: Images of a row that are as large in its thumbnail as a single one; more share the width of these. Pixels between
#: two of them, and their colour.
ABREAST, GAP, BETWEEN = 4, 4, (255, 255, 255)
#: Most images of a row that are shown: a JPEG is at most 65,500 pixels wide.
MOST_ABREAST = 16
#: Columns of an answer that are shown, the last two if there are some.
SHOWN = (*(field.name for field in ANSWER_FIELDS), CONFIDENCE_FIELDS[0].name, CHOICES_FIELD.name)
#: Choices of a row that are shown, the most probable ones.
CHOICES = 2


def choose(count: int, spans: Iterable[tuple[int, Span]]) -> frozenset[Row]:
    """Choose `ROWS` rows, or all if there are fewer.

    Args:
        count: number of rows to choose from.
        spans: those rows, each span with the number of its file.

    Returns:
        Their places.
    """
    wanted = sorted(random.Random(0).sample(range(count), min(ROWS, count)))  # noqa: S311  (nothing secret)
    return frozenset(places_at(wanted, spans))


def places_at(positions: Iterable[int], spans: Iterable[tuple[int, Span]]) -> list[Row]:
    """Places of the rows that have these positions, ascending, among the rows of the spans."""
    wanted = deque(positions)
    places: list[Row] = []
    passed = 0
    for file, (start, stop) in spans:
        while wanted and wanted[0] < passed + stop - start:
            places.append((file, start + wanted.popleft() - passed))
        passed += stop - start
    return places


def sample_columns(
    table: pa.Table, images: Sequence[Sequence[NDArray[np.uint8]]], sample: frozenset[Row] | None
) -> dict[str, pa.Array]:
    """The columns `THUMBNAIL` and `ASKED` for a table that has `MESSAGES`.

    Args:
        table: rows to add the columns to.
        images: for each row its images, uint8 (H, W, 3); none if it has none, or has failed.
        sample: places of the sampled rows; None for all.
    """
    shown = [sample is None or row in sample for row in places_of(table)]
    thumbnails = [
        side_by_side(row, SIDE, quality=80) if show and row else None for show, row in zip(shown, images, strict=True)
    ]
    asked = [short(_asked(text.as_py())) if show else None for show, text in zip(shown, table[MESSAGES], strict=True)]
    return {THUMBNAIL: array(THUMBNAIL, thumbnails), ASKED: array(ASKED, asked)}


def sampled(table: pa.Table, sample: frozenset[Row]) -> dict[Row, dict[str, Any]]:
    """Sampled rows of a table of answers, by place: `id`, `prompt`, `thumbnail`, and the columns of an answer."""
    chosen = {place: index for index, place in enumerate(places_of(table)) if place in sample}
    names = {ID: ID, ASKED: "prompt", THUMBNAIL: "thumbnail"}
    names |= {name: name for name in SHOWN if name in table.column_names}
    rows = table.select(list(names)).take(pa.array(chosen.values(), pa.int64()))
    values = zip(*(readable(column) for column in rows.columns), strict=True)
    return {
        place: {name: _shortened(name, each) for name, each in zip(names.values(), row, strict=True)}
        for place, row in zip(chosen, values, strict=True)
    }


def _shortened(name: str, value: Any) -> Any:
    if name == CHOICES_FIELD.name and value is not None:
        return [(short(choice), probability) for choice, probability in value[:CHOICES]]
    return short(value) if isinstance(value, str) else value


def short(text: str | None) -> str | None:
    """The text, cut to `CHARACTERS`."""
    return text if text is None or len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"


def side_by_side(images: Sequence[NDArray[np.uint8]], side: int, quality: int) -> bytes:
    """A small JPEG of the images of a row, pixels (H, W, 3), from left to right.

    Args:
        images: at least one; of more than `MOST_ABREAST`, the first are shown.
        side: longest side of an image in pixels; more than `ABREAST` of them share the width of so many.
        quality: of the JPEG; 160 pixels take about 5 KB at 80.
    """
    images = images[:MOST_ABREAST]
    small = [_small(pixels, max(1, side * ABREAST // max(ABREAST, len(images)))) for pixels in images]
    width = sum(image.width for image in small) + GAP * (len(small) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in small)), BETWEEN)
    left = 0
    for image in small:
        canvas.paste(image, (left, 0))
        left += image.width + GAP
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _small(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return image


def _asked(messages: str | None) -> str | None:
    """Text of the last user message of a conversation in JSON, None if there is no such message."""
    conversation = () if messages is None else from_json(messages)
    return next((message.text for message in reversed(conversation) if message.role == "user"), None)
