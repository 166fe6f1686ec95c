"""The stages that run the graphs, as functions of Arrow tables: an actor holds each.

What enters and leaves: tables with the columns of `columns.COLUMNS`. Pixels and features are lists of binary values,
read without a copy. Rows that have failed keep their failure and are passed on.

This module knows nothing of Ray.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from qvl_batch.bundle.loading import BundleReference
from qvl_batch.columns import (
    CONSTRAINT,
    FAILURE,
    FEATURES,
    IMAGE_KEYS,
    MESSAGES,
    PIXELS,
    SAMPLING,
    SIZES,
    STARTED,
    WORKERS,
    array,
    failure_columns,
    failures_of,
    seconds_column,
    with_columns,
)
from qvl_batch.config import Device, Fit
from qvl_batch.constraints import Constraint
from qvl_batch.conversation import from_json
from qvl_batch.decoder.answerer import Answerer, EncodedImage, EncodedRow
from qvl_batch.decoder.engine import Load
from qvl_batch.grounding import boxes, complete
from qvl_batch.images.view import ImageSize, sizes_of
from qvl_batch.json_schema import value_of
from qvl_batch.sampling import GREEDY, Sampling
from qvl_batch.schema import (
    BOXES_FIELD,
    ID,
    PARSED,
    PARSED_CONFIDENCE,
    SAMPLES,
    Answer,
    Failure,
    answer_fields,
    samples_type,
    texts,
)
from qvl_batch.vision.cache import open_vision_cache
from qvl_batch.vision.encoder import VisionEncoder
from qvl_batch.vision.features import ImageFeatures


class VisionStage:
    """Runs the vision graph: the column `PIXELS` becomes `FEATURES`.

    It can be called by several threads at once. With two, the images of the second table fill the threads that the
    first no longer needs.

    Args:
        bundle: what runs.
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
        bundle: BundleReference,
        threads: int,
        name: Callable[[], str],
        cache: tuple[Path, float] | None = None,
        niceness: int = 0,
        device: Device = "cpu",
    ) -> None:
        os.nice(niceness)
        self._name = name()
        loaded = bundle.load()
        kept = None
        if cache is not None:
            kept = open_vision_cache(*cache, loaded.manifest)
        self._features = ImageFeatures(VisionEncoder(loaded, 1, device), kept, at_once=threads)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode the images of a table."""
        started = time.time()
        failures = failures_of(table)
        images = [
            [np.frombuffer(each, np.uint8).reshape(size.seen_height, size.seen_width, 3) for each, size in row]
            for row in _images(table, PIXELS)
        ]
        encoded = self._features.of_rows(images, [keys or () for keys in table[IMAGE_KEYS].to_pylist()])
        results = [failure or row for failure, row in zip(failures, encoded, strict=True)]
        failed = [row if isinstance(row, Failure) else None for row in results]
        features = [None if isinstance(row, Failure) else [each.tobytes() for each in row] for row in results]
        rows, worker = table.num_rows, WORKERS["vision"]
        columns = {
            FEATURES: array(FEATURES, features),
            STARTED: array(STARTED, [started] * rows),
            worker: array(worker, [self._name] * rows),
            **seconds_column("vision", self._features.clock.take(), rows),
            **failure_columns(failed),
        }
        return with_columns(table.drop_columns([PIXELS, *FAILURE]), columns)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How rows are asked, and how their answers are written.

    Args:
        max_new_tokens: longest answer in tokens.
        allow_repetition: keep answers that repeat one phrase until they are cut.
        system_prompt: text of the system message of conversations that have none.
        fit: how images became square; None if they kept their own size.
        lists: sizes of images are lists.
        boxes: add the boxes that answers contain.
        constraint: what answers must be, where a row has nothing of its own.
        guided: answers must be something, of some rows at least.
        confidence: add how sure the model is.
        choices: add the probability of each choice.
        sampling: how answers are drawn, where a row has nothing of its own.
        drawn: some answers are drawn.
        samples: add all answers that were drawn to a row.
        stop: texts before which an answer ends.
        include_stop: keep the text that ended an answer.
        min_new_tokens: shortest answer in tokens.
        abstain_below: answers of less confidence abstain.
    """

    max_new_tokens: int
    allow_repetition: bool = False
    system_prompt: str | None = None
    fit: Fit | None = None
    lists: bool = False
    boxes: bool = False
    constraint: Constraint | None = None
    guided: bool = False
    confidence: bool = False
    choices: bool = False
    sampling: Sampling = GREEDY
    drawn: bool = False
    samples: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_new_tokens: int = 0
    abstain_below: float | None = None

    @property
    def parsed_type(self) -> pa.DataType | None:
        """Type of the column `PARSED`; None if there is none."""
        return self.constraint.parsed_type if self.constraint else None

    @property
    def confidence_type(self) -> pa.DataType | None:
        """Type of the column `PARSED_CONFIDENCE`; None if there is none."""
        return self.constraint.confidence_type if self.constraint and self.confidence else None


class DecoderStage:
    """Runs the decoder: `MESSAGES`, `FEATURES` and `SIZES` become the columns of an answer.

    It can be called by several threads at once; the rows of all are in one engine.

    Args:
        bundle: what runs.
        slots: rows that are answered at a time.
        threads: threads of one operator.
        form: how rows are asked and answers are written.
        name: called once, returns the name of this worker.

    Raises:
        BundleError: the bundle cannot be loaded.
        ConfigError: the system prompt cannot be used with this bundle.
        DeviceError: the device cannot be used, or computes the graph wrongly.
    """

    def __init__(
        self, bundle: BundleReference, slots: int, threads: int, form: AnswerForm, name: Callable[[], str]
    ) -> None:
        self._name, self._form = name(), form
        loaded = bundle.load()
        self._grid, self._hidden_size = loaded.manifest.layout.resolution.grid, loaded.manifest.decoder.hidden_size
        self._answerer = Answerer(
            loaded,
            slots,
            threads,
            system_prompt=form.system_prompt,
            allow_repetition=form.allow_repetition,
            stop=form.stop,
            include_stop=form.include_stop,
            min_new_tokens=form.min_new_tokens,
            guided=form.guided,
            logprobs=form.confidence,
            drawn=form.drawn,
        )
        self._parsed_type, self._confidence_type = form.parsed_type, form.confidence_type

    def __call__(self, table: pa.Table) -> pa.Table:
        """Answer the rows of a table."""
        form = self._form
        failures, images = failures_of(table), _images(table, FEATURES)
        keys, messages = table[IMAGE_KEYS].to_pylist(), table[MESSAGES].to_pylist()
        sizes = [sizes_of(numbers or ()) for numbers in table[SIZES].to_pylist()]
        constraints = [self._constraint(each) for each in table[CONSTRAINT].to_pylist()]
        samplings = [self._sampling(each) for each in table[SAMPLING].to_pylist()]
        ids = [each or "" for each in texts(table[ID])] if form.drawn else [""] * table.num_rows
        rows = [
            failure
            or EncodedRow(
                from_json(messages[at]),
                tuple(map(self._encoded, images[at], keys[at])),
                constraints[at],
                samplings[at],
                ids[at],
            )
            for at, failure in enumerate(failures)
        ]
        answers = [
            replace(answer, image_sizes=tuple(size.numbers for size in seen)).held_to(form.abstain_below)
            for answer, seen in zip(self._answerer.answer(rows, form.max_new_tokens), sizes, strict=True)
        ]
        kinds = {"lists": form.lists, "confidence": form.confidence, "choices": form.choices}
        records = [answer.record(**kinds) for answer in answers]
        columns = {
            field.name: pa.array([record[field.name] for record in records], field.type)
            for field in answer_fields(**kinds)
        }
        if self._parsed_type is not None:
            columns[PARSED] = pa.array(map(self._parsed, answers), self._parsed_type)
        if self._confidence_type is not None:
            sure = [each.parsed_confidence for each in answers]
            columns[PARSED_CONFIDENCE] = pa.array(sure, self._confidence_type)
        if form.samples:
            columns[SAMPLES] = self._samples(answers)
        if form.boxes:
            found = [boxes(complete(each), seen, form.fit) for each, seen in zip(answers, sizes, strict=True)]
            values = [None if each is None else [asdict(box) for box in each] for each in found]
            columns[BOXES_FIELD.name] = pa.array(values, BOXES_FIELD.type)
        columns[WORKERS["decoder"]] = array(WORKERS["decoder"], [self._name] * table.num_rows)
        for work, clock in self._answerer.clocks.items():
            columns |= seconds_column(work, clock.take(), table.num_rows)
        done = [FEATURES, MESSAGES, CONSTRAINT, SAMPLING, SIZES, IMAGE_KEYS, *FAILURE]
        return with_columns(table.drop_columns(done), columns)

    @property
    def load(self) -> Load:
        """How busy the decoder is."""
        return self._answerer.load

    def _constraint(self, text: str | None) -> Constraint | None:
        """What the answer of a row must be."""
        return self._form.constraint if text is None else Constraint.from_json(text)

    def _sampling(self, text: str | None) -> Sampling:
        """How the answer of a row is drawn."""
        return self._form.sampling if text is None else Sampling.from_json(text)

    def _samples(self, answers: Sequence[Answer]) -> pa.Array:
        """The column of all answers that were drawn to each row; of one that was not drawn, the only one; null for a
        row that could not be asked.
        """
        kind = samples_type(self._parsed_type, confidence=self._form.confidence)
        all_ = [answer.samples or ((answer,) if answer.failure is None else None) for answer in answers]
        return pa.array([each and list(map(self._sample, each)) for each in all_], kind)

    def _sample(self, answer: Answer) -> dict[str, Any]:
        return {
            "answer": answer.answer,
            PARSED: self._parsed(answer),
            "confidence": answer.confidence,
            "finish_reason": answer.finish_reason,
            "answer_tokens": answer.answer_tokens,
            "error_message": answer.failure.message if answer.failure else None,
        }

    def _parsed(self, answer: Answer) -> Any:
        """The value of an answer that is JSON of one schema; None if it is none."""
        if answer.answer is None or self._parsed_type is None:
            return None
        return value_of(answer.answer, self._parsed_type)

    def _encoded(self, image: tuple[pa.Buffer, ImageSize], key: bytes) -> EncodedImage:
        features, size = image
        grid = self._grid(size.seen_height, size.seen_width)
        return EncodedImage(np.frombuffer(features, np.float32).reshape(-1, self._hidden_size), *grid, key)


def _images(table: pa.Table, column: str) -> list[list[tuple[pa.Buffer, ImageSize]]]:
    """Bytes and sizes of the images of each row, none for a failed row."""
    rows: list[list[tuple[pa.Buffer, ImageSize]]] = []
    for images, numbers in zip(table[column], table[SIZES].to_pylist(), strict=True):
        buffers = [image.as_buffer() for image in images.values] if images.is_valid else []
        rows.append(list(zip(buffers, sizes_of(numbers or ()), strict=images.is_valid)))
    return rows
