"""Our contenders: vision encoder and engine in one process without Ray, and the whole Ray job."""

import itertools
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmark.memory import PeakMemory
from benchmark.rows import Rows, median_seconds, timed
from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.loading import Bundle
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.decoder.engine import Completion, Engine, Request, decoder_clocks
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.images.pixels import decode_image, fit_image
from qvl_batch.pipeline.capacity import CUDA_VISION_THREADS
from qvl_batch.runtime.devices import memory_on, resolve_vision_device, usable_cpus
from qvl_batch.vision.encoder import VisionEncoder


class Ours:
    """Vision encoder and engine in this process, on the devices that the bundle is for.

    On a CPU the two take turns, each with all threads. As in a job, one image takes one thread.

    Args:
        bundle: folder of the bundle.
        slots: rows that the decoder answers at a time.
        new_tokens: tokens of each answer; end tokens are ignored.
    """

    def __init__(self, bundle: Path, slots: int, new_tokens: int) -> None:
        loaded, threads = Bundle.load(bundle), usable_cpus()
        device = resolve_vision_device("auto", loaded.manifest)
        self.bundle, self.new_tokens, self.slots = loaded, new_tokens, slots
        self.vision, self.layout = VisionEncoder(loaded, 1, device), RowLayout(loaded)
        self.images_at_once = CUDA_VISION_THREADS if device == "cuda" else threads
        self._pool = ThreadPoolExecutor(self.images_at_once)
        self.decoder = Decoder(loaded, slots, threads, memory=memory_on(loaded.manifest.device))
        #: The decoder's busy seconds by kind of work.
        self.clocks = decoder_clocks()
        # One engine for all answers: on a GPU, steps are captured once for each thread.
        self._engine = Engine(self.decoder, (), self.clocks)

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        return self.decode(self.requests(rows, self.encode(rows)))

    def prompt_tokens(self, rows: Rows) -> list[int]:
        """Tokens up to the answer of each row."""
        return [len(self.layout.row_ids(prompt)) for prompt in rows.prompts]

    def encode(self, rows: Rows) -> list[Features]:
        """Features of all rows."""
        return self.encode_pixels(self.fit(rows))

    def encode_pixels(self, pixels: Sequence[Any]) -> list[Features]:
        """Features of fitted images."""
        return list(self._pool.map(self.vision.encode, pixels))

    def requests(self, rows: Rows, features: Sequence[Features]) -> list[Request]:
        """Requests to the engine; rows share no prefix."""
        pairs = zip(rows.prompts, features, strict=True)
        return [Request(self.layout.row_ids(prompt), row, self.new_tokens) for prompt, row in pairs]

    def decode(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer requests; tokens of each."""
        futures = [self._engine.submit(request) for request in requests]
        return [future.result().token_ids for future in futures]

    def fit(self, rows: Rows) -> list[Any]:
        """Decode and fit the images."""
        return [fit_image(decode_image(file), self.layout.layout.image_size) for file in rows.files]

    def prefill(self, batch: Sequence[PrefillRow]) -> Any:
        """Prefill slots from 0 on as the engine does, a few rows at a time; first tokens int64 (B,)."""
        width = self.decoder.prefill_rows
        groups = range(0, len(batch), width)
        return np.concatenate([self.decoder.prefill(at, batch[at : at + width]) for at in groups])

    def stages(self, rows: Rows) -> dict[str, float]:
        """Milliseconds per image of each stage by itself; `decode` is all steps of an answer."""
        count = min(len(rows), self.slots)
        rows = rows.part(0, count)
        took: dict[str, float] = {}
        pixels = timed(took, "decode+fit", count, lambda: self.fit(rows))
        features = timed(took, "vision", count, lambda: self.encode_pixels(pixels))
        batch = [PrefillRow(self.layout.row_ids(p), f) for p, f in zip(rows.prompts, features, strict=True)]
        tokens = timed(took, "prefill", count, lambda: self.prefill(batch))

        def decode() -> None:
            following = tokens
            for _ in range(self.new_tokens - 1):
                following = self.decoder.step(following)

        timed(took, "decode", count, decode)
        return took


class Overlapped(Ours):
    """As in a job: all CPUs decode images while others are encoded and rows are answered."""

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        turns, size = Semaphore(self.images_at_once), self.layout.layout.image_size

        def ask(file: bytes, prompt: str) -> "Future[Completion]":
            pixels = fit_image(decode_image(file), size)
            with turns:
                features = self.vision.encode(pixels)
            return self._engine.submit(Request(self.layout.row_ids(prompt), features, self.new_tokens))

        with ThreadPoolExecutor(usable_cpus()) as pool:
            return [future.result().token_ids for future in list(pool.map(ask, rows.files, rows.prompts))]

    def step_seconds(self, rows: Rows, live: int, steps: int) -> float:
        """Median seconds of a decode step of `live` rows."""
        tokens = self.prefill(self._prefill_rows(rows, live))

        def step() -> None:
            nonlocal tokens
            tokens = self.decoder.step(tokens)

        return median_seconds(step, steps)

    def vision_seconds(self, rows: Rows, at_once: int, times: int) -> float:
        """Median seconds per image of the vision graph, with `at_once` images in one run."""
        pixels = np.stack((self.fit(rows.part(0, at_once)) * at_once)[:at_once])
        return median_seconds(lambda: self.vision.run(pixels), times) / at_once

    def prefill_seconds(self, rows: Rows, at_once: int, times: int) -> float:
        """Median seconds per row of a prefill, with `at_once` rows in one run."""
        batch = self._prefill_rows(rows, at_once)
        return median_seconds(lambda: self.decoder.prefill(0, batch), times) / at_once

    def _prefill_rows(self, rows: Rows, count: int) -> list[PrefillRow]:
        """`count` rows, repeated if there are fewer."""
        rows = rows.part(0, count)
        made = [PrefillRow(self.layout.row_ids(p), f) for p, f in zip(rows.prompts, self.encode(rows), strict=True)]
        return list(itertools.islice(itertools.cycle(made), count))


class RayJob:
    """The whole job on Ray, as `jobs/caption.py` runs it.

    Args:
        bundle: folder of the bundle.
        slots: rows that its decoder answers at a time.
        new_tokens: the longest answer.
    """

    def __init__(self, bundle: Path, slots: int, new_tokens: int) -> None:
        self.bundle, self.slots, self.new_tokens = bundle, slots, new_tokens

    def run(self, rows: Rows, count: int, memory: bool) -> dict[str, float]:
        """Answer `count` rows, by repeating the given ones; returns figures of the job.

        With `memory`, its peak memory is among them; sampling it takes a twentieth of two cores.
        """
        from qvl_batch.pipeline.run import run  # noqa: PLC0415  (starts what only the job needs)

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.parquet"
            pq.write_table(_repeated(rows, count), path, row_group_size=16)
            config = CaptionConfig(
                bundle=self.bundle,
                input=(str(path),),
                output=str(Path(folder) / "answers"),
                max_new_tokens=self.new_tokens,
                allow_repetition=True,  # a made-up model may repeat itself
                slots=self.slots,
            )
            with PeakMemory() if memory else nullcontext() as watch:
                report = run(config)
        found = {
            "rows": count,
            "answer_tokens": report.tally.answer_tokens,
            "steady_images_per_second": report.steady_images_per_second,
            "seconds": report.seconds,
            "workers_seconds": report.workers_seconds,
            "ray_seconds": report.startup_seconds,
        }
        return found | ({"peak_memory": watch.peak} if watch else {})


def _repeated(rows: Rows, count: int) -> pa.Table:
    """`count` rows. Equal files would share features, so each repetition ends in bytes that no image decoder reads."""
    places = [(n % len(rows), n // len(rows)) for n in range(count)]
    files = [rows.files[place] + number.to_bytes(4, "little") for place, number in places]
    return pa.table(
        {
            "id": [str(n) for n in range(count)],
            "image": [{"bytes": file, "path": None} for file in files],
            "prompt": [rows.prompts[place] for place, _ in places],
        },
        schema=pa.schema(
            {
                "id": pa.string(),
                "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
                "prompt": pa.string(),
            }
        ),
    )
