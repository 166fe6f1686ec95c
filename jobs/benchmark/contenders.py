"""Who answers: our engine in this process, our Ray job, and transformers' `generate`."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import GenerationConfig

from export.checkpoint import load_checkpoint
from qvl_batch.bundle import Bundle
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder import Decoder, PrefillRow
from qvl_batch.engine import PREFILL_ROWS, Engine, Request
from qvl_batch.errors import NumericError
from qvl_batch.images import decode_image, fit_image
from qvl_batch.layout import RowLayout
from qvl_batch.report import Report
from qvl_batch.runtime import usable_cpus
from qvl_batch.vision import Features, VisionEncoder

#: Rows of a batch that are tried; the fastest counts.
BATCHES = (1, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Rows:
    """Image files and prompts to answer."""

    files: list[bytes]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def part(self, start: int, stop: int) -> "Rows":
        """Rows `start` to `stop` - 1."""
        return Rows(self.files[start:stop], self.prompts[start:stop])


class Ours:
    """Vision encoder and engine in this process, all threads for either.

    Args:
        bundle: folder of the bundle.
        slots: rows that the decoder answers at a time.
        new_tokens: tokens of each answer; none ends sooner.
    """

    def __init__(self, bundle: Path, slots: int, new_tokens: int) -> None:
        loaded, threads = Bundle.load(bundle), usable_cpus()
        self.bundle, self.new_tokens, self.slots = loaded, new_tokens, slots
        self.vision, self.layout = VisionEncoder(loaded, threads), RowLayout(loaded)
        self.decoder = Decoder(loaded, slots, threads)

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        return self.decode(self.requests(rows, self.encode(rows)))

    def encode(self, rows: Rows) -> list[Features]:
        """Features of all rows."""
        encoded = self.vision.encode(self.fit(rows))
        return [features for features in encoded if not isinstance(features, NumericError)]

    def requests(self, rows: Rows, features: Sequence[Features]) -> list[Request]:
        """What the engine takes, nothing shared between rows."""
        pairs = zip(rows.prompts, features, strict=True)
        return [Request(self.layout.row_ids(prompt), row, self.new_tokens) for prompt, row in pairs]

    def decode(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer requests; tokens of each."""
        with Engine(self.decoder, eos_token_ids=()) as engine:
            futures = [engine.submit(request) for request in requests]
            return [future.result().token_ids for future in futures]

    def fit(self, rows: Rows) -> list[Any]:
        """Decode and fit the images."""
        return [fit_image(decode_image(file), self.layout.layout.image_size) for file in rows.files]

    def stages(self, rows: Rows) -> dict[str, float]:
        """Milliseconds an image of each stage, alone; decode is all of an answer's steps."""
        count = min(len(rows), self.slots)
        rows = rows.part(0, count)
        took: dict[str, float] = {}
        pixels = _timed(took, "decode+fit", count, lambda: self.fit(rows))
        features = _timed(took, "vision", count, lambda: self.vision.encode(pixels))
        batch = [PrefillRow(self.layout.row_ids(p), f) for p, f in zip(rows.prompts, features, strict=True)]

        def prefill() -> list[int]:
            groups = range(0, count, PREFILL_ROWS)
            return [t for at in groups for t in self.decoder.prefill(at, batch[at : at + PREFILL_ROWS]).tolist()]

        tokens = np.array(_timed(took, "prefill", count, prefill), np.int64)

        def decode() -> None:
            following = tokens
            for _ in range(self.new_tokens - 1):
                following = self.decoder.step(following)

        _timed(took, "decode", count, decode)
        return took


class HuggingFace:
    """`Qwen2_5_VLForConditionalGeneration.generate`, in batches padded on the left, at the best size.

    Args:
        checkpoint: folder of the checkpoint.
        dtype: of weights and computation.
        ours: lends its layout, so that the same rows are answered.
    """

    def __init__(self, checkpoint: Path, dtype: torch.dtype, ours: Ours) -> None:
        loaded = load_checkpoint(checkpoint)
        self.model, self.processor = loaded.model.to(dtype), loaded.image_processor
        self.ours, self.batch = ours, 1

    def choose_batch(self, rows: Rows) -> dict[int, float]:
        """Try every batch size on a few rows and keep the fastest; images/s of each."""
        rows = rows.part(0, max(BATCHES))
        speeds: dict[int, float] = {}
        for self.batch in BATCHES:
            self.answer(rows.part(0, self.batch))
            began = time.perf_counter()
            self.answer(rows)
            speeds[self.batch] = len(rows) / (time.perf_counter() - began)
        self.batch = max(speeds, key=lambda size: speeds[size])
        return speeds

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        parts = (rows.part(at, at + self.batch) for at in range(0, len(rows), self.batch))
        return [tokens for part in parts for tokens in self._batch(part)]

    def _batch(self, rows: Rows) -> list[list[int]]:
        settings = self.model.config
        ids = [self.ours.layout.row_ids(prompt) for prompt in rows.prompts]
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        images = self.processor([Image.fromarray(pixels) for pixels in self.ours.fit(rows)], return_tensors="pt")
        forced = GenerationConfig(
            max_new_tokens=self.ours.new_tokens,
            do_sample=False,
            eos_token_id=settings.text_config.vocab_size,  # no token has this id
            pad_token_id=0,
        )
        with torch.inference_mode():
            output = self.model.generate(
                **images,
                input_ids=padded,
                attention_mask=mask,
                mm_token_type_ids=(padded == settings.image_token_id).int() * mask,
                generation_config=forced,
            )
        tokens: list[list[int]] = output[:, longest:].tolist()
        return tokens


def ray_job(bundle: Path, inputs: tuple[str, ...], rows: int, new_tokens: int) -> Report:
    """Run the whole job as `jobs/caption.py` does; the input is repeated until it has `rows` rows."""
    from qvl_batch.pipeline import run  # noqa: PLC0415  (starts what only this contender needs)

    with tempfile.TemporaryDirectory() as folder:
        table = pa.concat_tables([pq.read_table(path) for path in inputs])
        repeats = -(-rows // table.num_rows)
        # Equal images would share their features: each repetition gets bytes of its own.
        parts = [_renamed(table, number) for number in range(repeats)]
        path = Path(folder) / "rows.parquet"
        pq.write_table(pa.concat_tables(parts).slice(0, rows), path, row_group_size=16)
        config = CaptionConfig(
            bundle=bundle, input=(str(path),), output=Path(folder) / "answers", max_new_tokens=new_tokens
        )
        return run(config)


def _renamed(table: Any, number: int) -> Any:
    """The same images with a byte behind them that no decoder reads."""
    images = [{**image, "bytes": image["bytes"] + bytes([number])} for image in table["image"].to_pylist()]
    return table.set_column(
        table.schema.get_field_index("image"), "image", pa.array(images, table.schema.field("image").type)
    )


def _timed(took: dict[str, float], stage: str, count: int, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    took[stage] = (time.perf_counter() - began) * 1000 / count
    return result
