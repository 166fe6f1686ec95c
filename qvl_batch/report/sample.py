"""A few rows of a run to look at: which, and what travels with them to the driver.

Chosen are places of the input that are left to answer, at random and always alike: two bundles
over the same input show the same rows.
"""

import io
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.input.source import OWN, PROMPT, Source, rows_of
from qvl_batch.rows import Row
from qvl_batch.schema import ANSWER_FIELDS, ID, readable

#: Rows of a sample, pixels of a thumbnail's side, and characters of a text that are kept.
ROWS, SIDE, CHARACTERS = 24, 160, 1_000
#: Columns of the sampled rows, null in the others.
THUMBNAIL, ASKED = f"{OWN}thumbnail", f"{OWN}asked"


def choose(source: Source) -> frozenset[Row]:
    """Places of `ROWS` rows of a source, or of all if it has fewer."""
    count = source.rows
    wanted = deque(sorted(random.Random(0).sample(range(count), min(ROWS, count))))  # noqa: S311  (nothing secret)
    chosen: list[Row] = []
    passed = 0
    for file, (start, stop) in source.spans():
        while wanted and wanted[0] < passed + stop - start:
            chosen.append((file, start + wanted.popleft() - passed))
        passed += stop - start
    return frozenset(chosen)


def sample_columns(
    table: pa.Table, pixels: Sequence[NDArray[np.uint8] | object], sample: frozenset[Row]
) -> dict[str, pa.Array]:
    """Columns `THUMBNAIL`, of what pixels there are, and `ASKED` for a table that has `PROMPT`."""
    shown = [row in sample for row in rows_of(table)]
    thumbnails = [
        _thumbnail(image) if show and isinstance(image, np.ndarray) else None
        for show, image in zip(shown, pixels, strict=True)
    ]
    asked = [short(text.as_py()) if show else None for show, text in zip(shown, table[PROMPT], strict=True)]
    return {THUMBNAIL: pa.array(thumbnails, pa.binary()), ASKED: pa.array(asked, pa.large_string())}


def sampled(table: pa.Table, sample: frozenset[Row]) -> dict[Row, dict[str, Any]]:
    """Rows of a table of answers that are in the sample, by place: `id`, `prompt`, `thumbnail`, and the answer."""
    chosen = {place: index for index, place in enumerate(rows_of(table)) if place in sample}
    names = {ID: ID, ASKED: "prompt", THUMBNAIL: "thumbnail"} | {field.name: field.name for field in ANSWER_FIELDS}
    rows = table.select(list(names)).take(pa.array(chosen.values(), pa.int64()))
    values = zip(*(readable(column) for column in rows.columns), strict=True)
    shortened = [[short(each) if isinstance(each, str) else each for each in row] for row in values]
    return {place: dict(zip(names.values(), row, strict=True)) for place, row in zip(chosen, shortened, strict=True)}


def short(text: str | None) -> str | None:
    """A text, or its beginning."""
    return text if text is None or len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"


def _thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A small JPEG of what the vision graph sees, about 5 KB."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
