"""Ratios of our engine to itself where its design should pay off: shared images, features on disk, refilled slots."""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.ours import Ours
from benchmark.rows import Rows, seconds
from qvl_batch.decoder.requests import Request
from qvl_batch.images.pixels import image_key
from qvl_batch.images.view import View
from qvl_batch.runtime.devices import usable_cpus
from qvl_batch.vision.cache import VisionCache, open_vision_cache
from qvl_batch.vision.features import ImageFeatures

#: Mean and maximum answer length in tokens: most answers are short, a few have the maximum.
MEAN_TOKENS, MOST_TOKENS = 16, 128
#: Rows and slots for these lengths: many rows for each slot, or the longest answer alone would determine the time.
SKEW_ROWS, SKEW_SLOTS = 256, 16
SEED = 3
PROMPTS = ("Describe the image.", "How many shapes are there?", "Is there a star?", "What color is the circle?")
OTHER_PROMPT = "What is in the picture?"
#: Bound on the features on disk, more than there are.
CACHE_GIGABYTES = 1000.0


def skew(ours: Ours, rows: Rows) -> dict[str, float]:
    """Answers of skewed lengths: time of static batches over that of refilled slots of the same number.

    `skew` is that of the decode steps alone. `skew_with_prefill` includes the prefill, which is the same for
    both, so that it depends on how long the model's prefill takes.
    """
    ours = Ours(ours.bundle.path, SKEW_SLOTS, MOST_TOKENS)
    lengths = _skewed_lengths(SKEW_ROWS)
    plain = ours.requests(rows)
    requests = [replace(plain[n % len(plain)], max_new_tokens=int(length)) for n, length in enumerate(lengths)]
    batches = [requests[at : at + SKEW_SLOTS] for at in range(0, SKEW_ROWS, SKEW_SLOTS)]
    ours.prefill([request.row for request in batches[0]])  # touches all memory
    prefill = static = 0.0
    for batch in batches:
        prefill += seconds(partial(ours.prefill, [request.row for request in batch]))
        static += seconds(partial(_static, ours, batch))
    refilled = seconds(lambda: ours.decode(requests))
    return {"skew": static / ours.clocks["decode"].take(), "skew_with_prefill": (prefill + static) / refilled}


def _static(ours: Ours, batch: list[Request]) -> None:
    """Decode steps of a prefilled batch, with all of its rows until the longest ends."""
    tokens = np.zeros(len(batch), np.int64)
    for _ in range(max(request.max_new_tokens for request in batch) - 1):
        tokens = ours.decoder.step(tokens)


def four_prompts(ours: Ours, rows: Rows) -> float:
    """Time of four prompts on each image over that of one, vision included."""
    one = seconds(lambda: _answer_shared(ours, rows, PROMPTS[:1]))
    return seconds(lambda: _answer_shared(ours, rows, PROMPTS)) / one


def second_prompt(ours: Ours, rows: Rows) -> float:
    """Time of another prompt on the same images, with their features kept on disk, over that of the first prompt."""
    with tempfile.TemporaryDirectory() as folder:

        def run(prompt: str) -> None:
            cache = open_vision_cache(Path(folder), CACHE_GIGABYTES, ours.bundle.manifest)
            _answer_shared(ours, rows, (prompt,), cache)

        first = seconds(lambda: run(PROMPTS[0]))
        return seconds(lambda: run(OTHER_PROMPT)) / first


def _answer_shared(ours: Ours, rows: Rows, prompts: tuple[str, ...], cache: VisionCache | None = None) -> None:
    view = View.of(ours.rows.resolution)
    images, keys = ours.rows.images(rows), [image_key(file, view) for file in rows.files]
    encoded = ImageFeatures(ours.vision, cache, usable_cpus()).of(images, keys)
    requests: list[Request] = []
    for image, features, key in zip(images, encoded, keys, strict=True):
        assert isinstance(features, np.ndarray)
        for prompt in prompts:
            row = ours.rows.prefill_row(prompt, image, features)
            requests.append(Request(row, ours.new_tokens, [key]))
    ours.decode(requests)


def _skewed_lengths(count: int) -> Any:
    """Lengths (count,) of a geometric distribution, the longest of them `MOST_TOKENS`."""
    lengths = np.random.default_rng(SEED).geometric(1 / MEAN_TOKENS, count).clip(1, MOST_TOKENS)
    lengths[len(lengths) // 2] = MOST_TOKENS
    return lengths
