"""A random sample of rows to show on the page: which rows, and the columns that carry them to the driver.

What enters: the rows to answer; later, tables of them. What leaves: places; columns with thumbnails and prompts; values
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

from qvl_batch.columns import ASKED, PROMPT, THUMBNAIL, array, places_of
from qvl_batch.rows import Row, Span
from qvl_batch.schema import ANSWER_FIELDS, ID, readable

#: Rows of the sample, pixels of a thumbnail's longer side, and characters of a text that are kept.
ROWS, SIDE, CHARACTERS = 24, 160, 1_000


def choose(count: int, spans: Iterable[tuple[int, Span]]) -> frozenset[Row]:
    """Choose `ROWS` rows, or all if there are fewer.

    Args:
        count: number of rows to choose from.
        spans: those rows, each span with the number of its file.

    Returns:
        Their places.
    """
    wanted = deque(sorted(random.Random(0).sample(range(count), min(ROWS, count))))  # noqa: S311  (nothing secret)
    chosen: list[Row] = []
    passed = 0
    for file, (start, stop) in spans:
        while wanted and wanted[0] < passed + stop - start:
            chosen.append((file, start + wanted.popleft() - passed))
        passed += stop - start
    return frozenset(chosen)


def sample_columns(
    table: pa.Table, pixels: Sequence[NDArray[np.uint8] | object], sample: frozenset[Row]
) -> dict[str, pa.Array]:
    """The columns `THUMBNAIL` and `ASKED` for a table that has `PROMPT`.

    Args:
        table: rows to add the columns to.
        pixels: for each row uint8 (H, W, 3), or any other object if it has none.
        sample: places of the sampled rows.
    """
    shown = [row in sample for row in places_of(table)]
    thumbnails = [
        thumbnail(image, SIDE, quality=80) if show and isinstance(image, np.ndarray) else None
        for show, image in zip(shown, pixels, strict=True)
    ]
    asked = [short(text.as_py()) if show else None for show, text in zip(shown, table[PROMPT], strict=True)]
    return {THUMBNAIL: array(THUMBNAIL, thumbnails), ASKED: array(ASKED, asked)}


def sampled(table: pa.Table, sample: frozenset[Row]) -> dict[Row, dict[str, Any]]:
    """Sampled rows of a table of answers, by place: `id`, `prompt`, `thumbnail`, and the columns of an answer."""
    chosen = {place: index for index, place in enumerate(places_of(table)) if place in sample}
    names = {ID: ID, ASKED: "prompt", THUMBNAIL: "thumbnail"} | {field.name: field.name for field in ANSWER_FIELDS}
    rows = table.select(list(names)).take(pa.array(chosen.values(), pa.int64()))
    values = zip(*(readable(column) for column in rows.columns), strict=True)
    shortened = [[short(each) if isinstance(each, str) else each for each in row] for row in values]
    return {place: dict(zip(names.values(), row, strict=True)) for place, row in zip(chosen, shortened, strict=True)}


def short(text: str | None) -> str | None:
    """The text, cut to `CHARACTERS`."""
    return text if text is None or len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"


def thumbnail(pixels: NDArray[np.uint8], side: int, quality: int) -> bytes:
    """A small JPEG of pixels (H, W, 3), its longer side at most `side`; 160 pixels take about 5 KB."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
