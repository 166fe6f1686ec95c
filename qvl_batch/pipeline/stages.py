"""The stages that run the graphs, as functions of Arrow tables: an actor holds each.

What enters and leaves: tables with the columns of `columns.COLUMNS`. Pixels and features are binary columns, read
without a copy. Rows that have failed keep their failure and are passed on.

This module knows nothing of Ray.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from qvl_batch.bundle.layout import Features, Pixels
from qvl_batch.bundle.loading import Bundle
from qvl_batch.columns import (
    FAILURE,
    FEATURES,
    IMAGE_KEY,
    PIXELS,
    PROMPT,
    STARTED,
    WORKERS,
    array,
    failure_columns,
    failures_of,
    seconds_column,
    with_columns,
)
from qvl_batch.config import Device
from qvl_batch.decoder.answerer import Answerer, EncodedRow
from qvl_batch.schema import ANSWER_FIELDS, Failure
from qvl_batch.vision.cache import open_vision_cache
from qvl_batch.vision.encoder import VisionEncoder
from qvl_batch.vision.features import ImageFeatures


class VisionStage:
    """Runs the vision graph: the column `PIXELS` becomes `FEATURES`, float32 (T_img, D) as bytes.

    It can be called by several threads at once. With two, the images of the second table fill the threads that the
    first no longer needs.

    Args:
        bundle: folder of the bundle.
        threads: images that are encoded at a time, each by one thread.
        name: called once, returns the name of this worker.
        cache: folder of the vision cache, and its largest size in gigabytes; None for no cache.
        niceness: added to that of this process.
        device: where the graph runs.

    Raises:
        BundleError: the bundle cannot be loaded.
        DeviceError: the device cannot be used, or computes the graph wrongly.
        OutputError: the vision cache cannot be written.
    """

    def __init__(
        self,
        bundle: Path,
        threads: int,
        name: Callable[[], str],
        cache: tuple[Path, float] | None = None,
        niceness: int = 0,
        device: Device = "cpu",
    ) -> None:
        os.nice(niceness)
        self._name = name()
        loaded = Bundle.load(bundle, verify=False)
        self._image_size = loaded.manifest.layout.image_size
        kept = None
        if cache is not None:
            kept = open_vision_cache(*cache, loaded.manifest)
        self._features = ImageFeatures(VisionEncoder(loaded, 1, device), kept, at_once=threads)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode the images of a table."""
        started = time.time()
        size = self._image_size
        failures = failures_of(table)
        images: list[Pixels | Failure] = [
            failure or np.frombuffer(value.as_buffer(), np.uint8).reshape(size, size, 3)
            for value, failure in zip(table[PIXELS], failures, strict=True)
        ]
        encoded = self._features.of(images, table[IMAGE_KEY].to_pylist())
        features = [None if isinstance(row, Failure) else row.tobytes() for row in encoded]
        failed = [row if isinstance(row, Failure) else None for row in encoded]
        rows, worker = table.num_rows, WORKERS["vision"]
        columns = {
            FEATURES: array(FEATURES, features),
            STARTED: array(STARTED, [started] * rows),
            worker: array(worker, [self._name] * rows),
            **seconds_column("vision", self._features.clock.take(), rows),
            **failure_columns(failed),
        }
        return with_columns(table.drop_columns([PIXELS, *FAILURE]), columns)


class DecoderStage:
    """Runs the decoder: `FEATURES` and `PROMPT` become the columns of `ANSWER_FIELDS`.

    It can be called by several threads at once; the rows of all are in one engine.

    Args:
        bundle: folder of the bundle.
        slots: rows that are answered at a time.
        threads: threads of one operator.
        max_new_tokens: longest answer in tokens.
        allow_repetition: keep answers that repeat one phrase until they are cut.
        name: called once, returns the name of this worker.

    Raises:
        BundleError: the bundle cannot be loaded.
        DeviceError: the device cannot be used, or computes the graph wrongly.
    """

    def __init__(
        self,
        bundle: Path,
        slots: int,
        threads: int,
        max_new_tokens: int,
        allow_repetition: bool,
        name: Callable[[], str],
    ) -> None:
        self._name = name()
        loaded = Bundle.load(bundle, verify=False)
        self._max_new_tokens = max_new_tokens
        self._shape = loaded.manifest.feature_shape
        self._answerer = Answerer(loaded, slots, threads, allow_repetition=allow_repetition)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answer the rows of a table."""
        features: list[Features | Failure] = [
            failure or np.frombuffer(value.as_buffer(), np.float32).reshape(self._shape)
            for value, failure in zip(table[FEATURES], failures_of(table), strict=True)
        ]
        rows = list(map(EncodedRow, features, table[PROMPT].to_pylist(), table[IMAGE_KEY].to_pylist()))
        answers = [answer.record() for answer in self._answerer.answer(rows, self._max_new_tokens)]
        columns = {f.name: pa.array([answer[f.name] for answer in answers], f.type) for f in ANSWER_FIELDS}
        columns[WORKERS["decoder"]] = array(WORKERS["decoder"], [self._name] * table.num_rows)
        for work, clock in self._answerer.clocks.items():
            columns |= seconds_column(work, clock.take(), table.num_rows)
        return with_columns(table.drop_columns([FEATURES, PROMPT, IMAGE_KEY, *FAILURE]), columns)
