"""A user's own rows, read, seen and laid out as the job does.

What enters: the settings of a job's input, and the layout of rows. What leaves: for each row its place, and its tokens
with the pixels of its images, or the failure that the job would record. Only a few rows are in memory at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvl_batch.bundle.layout import Layout, Pixels, PlacedImage
from qvl_batch.bundle.loading import Bundle
from qvl_batch.columns import FILE, IMAGES, MESSAGES, ROW, failures_of
from qvl_batch.config import Fit, JobConfig
from qvl_batch.conversation import from_json
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import InputError, PromptError, RowError
from qvl_batch.images.pixels import Seen, seen_or_failure
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit, refuse_paths
from qvl_batch.input.source import open_source
from qvl_batch.schema import ID, Failure, first_failure, readable

#: Index of a folder of `python -m export.calibration`.
INDEX = "calibration.json"
#: Rows of the input that are read at a time.
ROWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is: the path of its file, its index in it, and its id."""

    file: str
    row: int
    id: str | int | None


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row up to its answer: token ids (S,), its images among them, and their pixels in the same order."""

    input_ids: Sequence[int]
    images: Sequence[PlacedImage]
    pixels: Sequence[Pixels]


def read_sample(path: Path, rows: int, bundle: Bundle, say: Callable[[str], None]) -> list[SampleRow]:
    """The first rows of a sample that can be used.

    Args:
        path: a file or folder that a job reads, with the columns that it reads by default; or a folder of
            `python -m export.calibration`.
        rows: how many, at most.
        bundle: with the contract, the tokenizer and the chat template.
        say: receives a line about rows that are left out.

    Raises:
        JobError: the sample cannot be used, or none of its rows can.
    """
    if (path / INDEX).is_file():
        return [_of_calibration(path, row, bundle.manifest.layout) for row in _index(path)[:rows]]
    config = JobConfig(bundle=str(bundle.path), input=(str(path),), output=str(bundle.path), limit=rows)
    found: list[SampleRow] = []
    left_out: list[tuple[Place, Failure]] = []
    try:
        sample = SampleRows(config, RowLayout(bundle), None)
    except InputError as error:
        raise InputError(f"--sample {path}: {str(error).removeprefix(f'--input {path}: ')}") from error
    for place, row in sample:
        if isinstance(row, Failure):
            left_out.append((place, row))
        else:
            found.append(row)
    if left_out:
        place, failure = left_out[0]
        say(f"left out  {len(left_out)} rows of the sample; the first, {place.id}: {failure.type}: {failure.message}")
    if not found:
        raise InputError(f"--sample {path}: none of its rows can be used")
    return found


def sha256_of(rows: Iterable[SampleRow]) -> str:
    """A hash of the rows' tokens and pixels."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.array(row.input_ids, np.int64).data)
        for pixels in row.pixels:
            digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _index(folder: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX} is not what `python -m export.calibration` wrote: {error}") from error
    return rows


def _of_calibration(folder: Path, row: Mapping[str, Any], layout: Layout) -> SampleRow:
    feeds = np.load(folder / row["decoder"])
    ids = feeds["input_ids"][0][feeds["attention_mask"][0] > 0].tolist()
    pixels = [np.load(folder / file)["pixels"][0] for file in row["vision"]]
    images: list[PlacedImage] = []
    at = 0
    for each in pixels:
        at = ids.index(layout.image_token_id, at)
        images.append(PlacedImage(at, *layout.resolution.grid(*each.shape[:2])))
        at = images[-1].stop
    return SampleRow(ids, images, pixels)


class SampleRows:
    """Rows of the input, in order.

    Args:
        config: what to read.
        layout: of rows.
        fit: how an image that is not square becomes square.
        max_tokens: longer rows are failures.

    Raises:
        InputError: the input cannot be used.
        ConfigError: images cannot be seen as `config` and `fit` say.
    """

    def __init__(self, config: JobConfig, layout: RowLayout, fit: Fit | None, max_tokens: int | None = None) -> None:
        self._config, self._layout, self._max_tokens = config, layout, max_tokens
        self._view = View.of(layout.layout.resolution, fit, config.max_pixels)
        self._source = open_source(config)
        refuse_paths(self._source, config.allow_images_from)

    def __iter__(self) -> Iterator[tuple[Place, SampleRow | Failure]]:
        """Each row's place, and the row or why there is none."""
        fetcher = Fetcher.of(self._config)
        for unit in self._source.units():
            for table in read_unit(unit, self._source.columns, self._config.prompt, ROWS_AT_ONCE, fetcher):
                for at, failure in enumerate(failures_of(table)):
                    record = {name: table[name][at].as_py() for name in (FILE, ROW, MESSAGES, IMAGES)}
                    place = Place(
                        self._source.files[record[FILE]].path, record[ROW], readable(table.slice(at, 1)[ID])[0]
                    )
                    yield place, failure or self._laid_out(record)

    def _laid_out(self, record: Mapping[str, Any]) -> SampleRow | Failure:
        seen = [seen_or_failure(file, self._view, self._config.image_rules) for file in record[IMAGES] or []]
        wrong: Failure | None = first_failure(seen)
        if wrong is not None:
            return wrong
        pixels = [image.pixels for image in seen if isinstance(image, Seen)]
        try:
            tokens = self._layout.row(
                from_json(record[MESSAGES]), [self._view.resolution.grid(*each.shape[:2]) for each in pixels]
            )
            length = len(tokens.input_ids)
            if self._max_tokens is not None and length > self._max_tokens:
                raise PromptError(f"the row has {length} tokens, more than --pad-to {self._max_tokens}")
        except RowError as error:
            return Failure.of(error)
        return SampleRow(tokens.input_ids, tokens.images, [pixels[image.index] for image in tokens.images])
