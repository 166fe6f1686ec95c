"""Ratios of our engine to itself, where its design should pay: what is shared, kept, refilled."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.contenders import Ours, Rows
from qvl_batch.captioner import encode_images
from qvl_batch.engine import Request
from qvl_batch.images import image_key
from qvl_batch.vision_cache import RecentFeatures, VisionCache

#: Answers' lengths in tokens: mostly short, a few as long as may be.
MEAN_TOKENS, MOST_TOKENS, SKEW_SLOTS = 16, 128, 8
SEED = 3
PROMPTS = ("Describe the image.", "How many shapes are there?", "Is there a star?", "What color is the circle?")
OTHER_PROMPT = "What is in the picture?"


def skew(ours: Ours, rows: Rows) -> float:
    """Prefill and decode of skewed lengths: time of static batches over that of refilled slots, 8 wide."""
    ours = Ours(ours.bundle.path, SKEW_SLOTS, ours.new_tokens)
    lengths = _skewed_lengths(len(rows))
    requests = [
        replace(request, max_new_tokens=int(length))
        for request, length in zip(ours.requests(rows, ours.encode(rows)), lengths, strict=True)
    ]

    def static() -> None:
        for start in range(0, len(requests), ours.slots):
            ours.decode(requests[start : start + ours.slots])

    return _seconds(static) / _seconds(lambda: ours.decode(requests))


def four_prompts(ours: Ours, rows: Rows) -> float:
    """Time of four prompts on each image over that of one, vision included."""
    one = _seconds(lambda: _answer_shared(ours, rows, PROMPTS[:1]))
    return _seconds(lambda: _answer_shared(ours, rows, PROMPTS)) / one


def second_prompt(ours: Ours, rows: Rows) -> float:
    """Time of another prompt over the same images, their features kept on disk, over the first run."""
    manifest = ours.bundle.manifest
    with tempfile.TemporaryDirectory() as folder:

        def run(prompt: str) -> None:
            cache = VisionCache(Path(folder), manifest.vision_sha256, manifest.feature_shape, 1 << 40)
            _answer_shared(ours, rows, (prompt,), RecentFeatures(cache))

        first = _seconds(lambda: run(PROMPTS[0]))
        return _seconds(lambda: run(OTHER_PROMPT)) / first


def _answer_shared(ours: Ours, rows: Rows, prompts: tuple[str, ...], cache: RecentFeatures | None = None) -> None:
    keys = [image_key(file, "letterbox") for file in rows.files]
    encoded = encode_images(ours.vision, ours.fit(rows), keys, cache or RecentFeatures())
    requests: list[Request] = []
    for features, key in zip(encoded, keys, strict=True):
        assert isinstance(features, np.ndarray)
        for prompt in prompts:
            requests.append(Request(ours.layout.row_ids(prompt), features, ours.new_tokens, key))  # noqa: PERF401
    ours.decode(requests)


def _skewed_lengths(count: int) -> Any:
    """Lengths (count,) of a geometric distribution, the longest of them `MOST_TOKENS`."""
    lengths = np.random.default_rng(SEED).geometric(1 / MEAN_TOKENS, count).clip(1, MOST_TOKENS)
    lengths[len(lengths) // 2] = MOST_TOKENS
    return lengths


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
