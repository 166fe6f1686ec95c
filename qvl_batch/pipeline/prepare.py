"""The stage that decodes images and makes them what the vision graph gets, as a function of an Arrow table.

It runs in short tasks, in many processes, so this module imports no ONNX Runtime.
"""

import faulthandler
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from qvl_batch.columns import (
    FAILURE,
    IMAGE_KEYS,
    IMAGES,
    PIXELS,
    SIZES,
    array,
    failure_columns,
    failures_of,
    seconds_column,
    with_columns,
)
from qvl_batch.config import ImageRules
from qvl_batch.images.pixels import DEFAULT_RULES, Seen, image_key, seen_or_failure
from qvl_batch.images.view import View
from qvl_batch.pipeline.crash_guard import Attempts, Guarded
from qvl_batch.report.sample import sample_columns
from qvl_batch.rows import Row
from qvl_batch.schema import Failure

#: Longest time for one image in seconds; the largest takes 2.
SECONDS = 120.0


def prepare(
    table: pa.Table,
    view: View,
    sample: frozenset[Row] | None = frozenset(),
    rules: ImageRules = DEFAULT_RULES,
) -> pa.Table:
    """Decode images and see them: the column `IMAGES` becomes `PIXELS`, uint8 (H, W, 3) as bytes, `SIZES` and
    `IMAGE_KEYS`.

    An image that occurs several times in the table is decoded once. An image that cannot be decoded fails its row.

    Args:
        table: rows as they were read.
        view: how images are seen.
        sample: places of rows that also get `THUMBNAIL` and `ASKED`; None for all.
        rules: which images are shown.
    """
    began = time.perf_counter()
    seeing = _Seeing(view, rules)
    rows = [failure or seeing.row(row.values) for row, failure in zip(table[IMAGES], failures_of(table), strict=True)]
    images = [None if isinstance(row, Failure) else [seen for _, seen in row] for row in rows]
    columns = {
        PIXELS: array(PIXELS, [None if row is None else [seen.pixels.tobytes() for seen in row] for row in images]),
        SIZES: array(
            SIZES, [None if row is None else [each for seen in row for each in seen.size.numbers] for row in images]
        ),
        IMAGE_KEYS: array(IMAGE_KEYS, [None if isinstance(row, Failure) else [key for key, _ in row] for row in rows]),
        **failure_columns([row if isinstance(row, Failure) else None for row in rows]),
        **sample_columns(table, [[seen.pixels for seen in row or ()] for row in images], sample),
    }
    columns |= seconds_column("image", time.perf_counter() - began, table.num_rows)
    return with_columns(table.drop_columns([IMAGES, *FAILURE]), columns)


def prepare_guarded(table: pa.Table, attempts: Attempts, **options: Any) -> pa.Table:
    """As `prepare`, isolating rows that crash the process."""
    return Guarded(partial(prepare, **options), "image", attempts)(table)


class _Seeing:
    """Sees images of one table, each of them once."""

    def __init__(self, view: View, rules: ImageRules) -> None:
        self._view, self._rules = view, rules
        self._known: dict[bytes, Seen | Failure] = {}

    def row(self, files: pa.Array) -> list[tuple[bytes, Seen]] | Failure:
        """Keys and images of a row, in order; or the failure of the first that cannot be seen.

        Args:
            files: bytes of the image files.
        """
        found: list[tuple[bytes, Seen]] = []
        for number, file in enumerate(files, 1):
            data: bytes = file.as_py()
            key = image_key(data, self._view)
            if key not in self._known:
                with _watched():
                    self._known[key] = seen_or_failure(data, self._view, self._rules)
            seen = self._known[key]
            if isinstance(seen, Failure):
                return seen.of_image(number, len(files))
            found.append((key, seen))
        return found


@contextmanager
def _watched() -> Iterator[None]:
    """Exit this process after `SECONDS`: nothing else can interrupt a C library. `Guarded` then finds the row."""
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
