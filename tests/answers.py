"""Demo questions through vision graph and engine, in this process."""

from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
from conftest import QUESTIONS
from reference import letterboxed

from qvl_batch.bundle.loading import Bundle
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.engine import Completion, Engine, Request
from qvl_batch.decoder.prompts import RowLayout
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
    pairs = [(layout.row_ids(row["prompt"]), vision.encode(letterboxed(row["image"]["bytes"]))) for row in rows]
    return [Request(ids, features, max_new_tokens) for ids, features in pairs]


def complete(decoder: Decoder, bundle: Bundle, requests: Sequence[Request]) -> list[Completion]:
    """Answer requests, all in the engine at once."""
    with Engine(decoder, bundle.manifest.generation.eos_token_ids) as engine:
        futures = [engine.submit(request) for request in requests]
        return [future.result(timeout=120) for future in futures]
