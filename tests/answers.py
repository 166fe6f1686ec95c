"""Demo questions through vision graph and engine, in this process."""

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
from conftest import QUESTIONS
from reference import letterboxed

from qvl_batch.bundle.layout import Features, Layout, PlacedImage
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import Manifest
from qvl_batch.conversation import single_turn
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.decoder.engine import Engine
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.decoder.requests import Completion, Request
from qvl_batch.vision.encoder import VisionEncoder


def demo_rows(count: int | None = None) -> list[dict[str, Any]]:
    """The first rows of the demo, or all."""
    rows: list[dict[str, Any]] = pq.read_table(QUESTIONS).slice(0, count).to_pylist()
    return rows


def requests_of(
    bundle: Bundle, rows: Sequence[dict[str, Any]], max_new_tokens: int, vision: VisionEncoder | None = None
) -> list[Request]:
    """What the engine is asked for rows, nothing shared between them."""
    vision, layout = vision or VisionEncoder(bundle, threads=2), RowLayout(bundle)
    pairs = [(row["prompt"], vision.encode(letterboxed(row["image"]["bytes"]))) for row in rows]
    return [Request(ask(layout, *pair), max_new_tokens) for pair in pairs]


def complete(decoder: Decoder, bundle: Bundle, requests: Sequence[Request]) -> list[Completion]:
    """Answer requests, all in the engine at once."""
    with Engine(decoder, bundle.manifest.generation.eos_token_ids) as engine:
        futures = [engine.submit(request) for request in requests]
        return [future.result(timeout=120) for future in futures]


def square(layout: Layout) -> tuple[int, int]:
    """Rows and columns of image tokens of the contract's square."""
    resolution = layout.resolution
    assert resolution.image_size is not None
    return resolution.grid(resolution.image_size, resolution.image_size)


def feature_shape(manifest: Manifest) -> tuple[int, int]:
    """Shape of the features of the contract's square, (T_img, D)."""
    return manifest.layout.resolution.max_tokens, manifest.decoder.hidden_size


def turn(layout: Layout, prompt_ids: Sequence[int], features: Features) -> PrefillRow:
    """A turn of one square image and a prompt, by its token ids."""
    image = PlacedImage(layout.image_start, *square(layout))
    return PrefillRow(layout.row_ids(prompt_ids, image.tokens), [image], [features])


def ask(layout: RowLayout, prompt: str, features: Features) -> PrefillRow:
    """A turn of one square image and a prompt."""
    tokens = layout.row(single_turn(prompt, 1), [square(layout.layout)])
    return PrefillRow(tokens.input_ids, tokens.images, [features])
