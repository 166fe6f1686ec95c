"""The stage that decodes and fits images, as a function of an Arrow table.

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

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qvl_batch.columns import (
    FAILURE,
    IMAGE,
    IMAGE_KEY,
    PIXELS,
    array,
    failure_columns,
    failures_of,
    seconds_column,
    with_columns,
)
from qvl_batch.config import Fit, ImageRules
from qvl_batch.images.pixels import DEFAULT_RULES, image_key, pixels_or_failure
from qvl_batch.pipeline.crash_guard import Attempts, Guarded
from qvl_batch.report.sample import sample_columns
from qvl_batch.rows import Row
from qvl_batch.schema import Failure

#: Longest time for one image in seconds; the largest takes 2.
SECONDS = 120.0


def prepare(
    table: pa.Table,
    image_size: int,
    fit: Fit,
    sample: frozenset[Row] = frozenset(),
    rules: ImageRules = DEFAULT_RULES,
) -> pa.Table:
    """Decode and fit images: the column `IMAGE` becomes `PIXELS`, uint8 (size, size, 3) as bytes, and `IMAGE_KEY`.

    An image that occurs several times in the table is decoded once.

    Args:
        table: rows as they were read.
        image_size: pixels a side.
        fit: how an image that is not square becomes square.
        sample: places of rows that also get `THUMBNAIL` and `ASKED`.
        rules: which images are shown.
    """
    began = time.perf_counter()
    failures = failures_of(table)
    keys: list[bytes | None] = []
    fitted: dict[bytes, NDArray[np.uint8] | Failure] = {}
    for image, failure in zip(table[IMAGE], failures, strict=True):
        keys.append(None)
        if failure is None:
            data: bytes = image.as_py()
            keys[-1] = key = image_key(data, fit)
            if key not in fitted:
                with _watched():
                    fitted[key] = pixels_or_failure(data, image_size, fit, rules)
    results = [failure if key is None else fitted[key] for key, failure in zip(keys, failures, strict=True)]
    columns = {
        PIXELS: array(PIXELS, [row.tobytes() if isinstance(row, np.ndarray) else None for row in results]),
        IMAGE_KEY: array(IMAGE_KEY, keys),
        **failure_columns([row if isinstance(row, Failure) else None for row in results]),
        **sample_columns(table, results, sample),
    }
    columns |= seconds_column("image", time.perf_counter() - began, table.num_rows)
    return with_columns(table.drop_columns([IMAGE, *FAILURE]), columns)


def prepare_guarded(table: pa.Table, attempts: Attempts, **options: Any) -> pa.Table:
    """As `prepare`, isolating rows that crash the process."""
    return Guarded(partial(prepare, **options), "image", attempts)(table)


@contextmanager
def _watched() -> Iterator[None]:
    """Exit this process after `SECONDS`: nothing else can interrupt a C library. `Guarded` then finds the row."""
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
