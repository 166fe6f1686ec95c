"""What a forecast needs of each row of a sample.

What enters: tables of answers. What leaves: rows by place.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from qvl_batch.columns import ASKED, THUMBNAIL, places_of
from qvl_batch.report.sample import short
from qvl_batch.rows import Row
from qvl_batch.schema import ID, SIZE_NAMES, readable


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row of the sample and its answer.

    Args:
        place: of the row.
        id: of the row.
        prompt: start of its last question.
        thumbnail: JPEG of its images, None if there is none.
        answer: None if it failed.
        finish_reason: of the answer.
        error: stage and type of the error, None if there is none.
        prompt_tokens, answer_tokens: 0 of a row that failed.
        image_tokens: tokens of images as the model saw them.
        pixels: of the images as they are in their files.
        nbytes: of the row's values in the output, before they are compressed.
    """

    place: Row
    id: Any
    prompt: str | None
    thumbnail: bytes | None
    answer: str | None
    finish_reason: str
    error: str | None
    prompt_tokens: int
    answer_tokens: int
    image_tokens: int
    pixels: int
    nbytes: int


def sampled_rows(tables: Iterable[pa.Table], schema: pa.Schema, unit: int) -> dict[Row, SampledRow]:
    """Rows of tables of answers, by place.

    Args:
        tables: of answers, with the columns `THUMBNAIL` and `ASKED`.
        schema: of the output.
        unit: side in pixels of an image token.
    """
    return {row.place: row for table in tables for row in _rows(table, schema, unit)}


def _rows(table: pa.Table, schema: pa.Schema, unit: int) -> Iterable[SampledRow]:
    names = (
        *("answer", "finish_reason", "error_stage", "error_type", "prompt_tokens", "answer_tokens"),
        *SIZE_NAMES,
        THUMBNAIL,
    )
    columns = (table[name].to_pylist() for name in names)
    texts = (readable(table[name]) for name in (ID, ASKED))
    output = table.select(schema.names)
    for at, (place, row_id, asked, *values) in enumerate(zip(places_of(table), *texts, *columns, strict=True)):
        answer, reason, stage, kind, prompt, tokens, width, height, seen_width, seen_height, thumbnail = values
        yield SampledRow(
            place,
            short(row_id) if isinstance(row_id, str) else row_id,
            asked,
            thumbnail,
            answer,
            reason,
            None if stage is None else f"{stage}: {kind}",
            prompt or 0,
            tokens or 0,
            _area(seen_width, seen_height) // unit**2,
            _area(width, height),
            output.slice(at, 1).nbytes,
        )


def _area(widths: int | Sequence[int] | None, heights: int | Sequence[int] | None) -> int:
    """Pixels of a row's image, or of all of its images."""
    return int(np.dot(0 if widths is None else widths, 0 if heights is None else heights))
