"""Our contenders: vision encoder and engine in one process without Ray, and the whole Ray job."""

import itertools
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Semaphore

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmark.bundle_rows import BundleRows
from benchmark.rows import Rows, median_seconds, timed
from qvl_batch.bundle.layout import Features, Pixels
from qvl_batch.bundle.loading import Bundle
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder.decoder import Decoder, PrefillRow, Tokens
from qvl_batch.decoder.engine import Engine, decoder_clocks
from qvl_batch.decoder.requests import Completion, Request
from qvl_batch.decoder.waiting import fit_one_prefill
from qvl_batch.forecast.memory import PeakMemory
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
        self.vision, self.rows = VisionEncoder(loaded, 1, device), BundleRows(loaded)
        self.images_at_once = CUDA_VISION_THREADS if device == "cuda" else threads
        self._pool = ThreadPoolExecutor(self.images_at_once)
        self.decoder = Decoder(loaded, slots, threads, memory=memory_on(loaded.manifest.device))
        #: The decoder's busy seconds by kind of work.
        self.clocks = decoder_clocks()
        # One engine for all answers: on a GPU, steps are captured once for each thread.
        self._engine = Engine(self.decoder, (), self.clocks)

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        return self.decode(self.requests(rows))

    def prompt_tokens(self, rows: Rows) -> list[int]:
        """Tokens up to the answer of each row."""
        return self.rows.lengths(rows, self.rows.images(rows))

    def requests(self, rows: Rows) -> list[Request]:
        """Requests to the engine, with the images encoded."""
        return [self.request(row) for row in self.encode(rows)]

    def request(self, row: PrefillRow) -> Request:
        """Request to the engine for a row that shares nothing with others."""
        return Request(row, self.new_tokens)

    def encode(self, rows: Rows) -> list[PrefillRow]:
        """What the decoder gets of all rows."""
        images = self.rows.images(rows)
        return self.prefill_rows(rows, images, self.encode_images(images))

    def encode_images(self, images: Sequence[Pixels]) -> list[Features]:
        """Features of images. The largest enter first, so that no CPU is left alone with a large one at the end."""
        places = sorted(range(len(images)), key=lambda place: images[place].size, reverse=True)
        features = self._pool.map(lambda place: self.vision.encode(images[place]), places)
        by_place = dict(zip(places, features, strict=True))
        return [by_place[place] for place in range(len(images))]

    def prefill_rows(self, rows: Rows, images: Sequence[Pixels], features: Sequence[Features]) -> list[PrefillRow]:
        """What the decoder gets of rows, by their pixels and features."""
        return [self.rows.prefill_row(*row) for row in zip(rows.prompts, images, features, strict=True)]

    def decode(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer requests; tokens of each."""
        futures = [self._engine.submit(request) for request in requests]
        return [future.result().token_ids for future in futures]

    def prefill(self, batch: Sequence[PrefillRow]) -> Tokens:
        """Prefill slots from 0 on as the engine does, the shortest row first; first tokens by slot, int64 (B,)."""
        tokens: list[Tokens] = []
        slot = 0
        for group in prefill_groups(batch, self.decoder.prefill_rows, self.decoder.prefill_tokens):
            tokens.append(self._prefill(slot, group))
            slot += len(group)
        return np.concatenate(tokens)

    def _prefill(self, slot: int, group: Sequence[PrefillRow]) -> Tokens:
        length, most = len(group[0].input_ids), self.decoder.prefill_tokens
        if length <= most:
            return self.decoder.prefill(slot, group)
        parts = [(start, min(start + most, length)) for start in range(0, length, most)]
        return [self.decoder.prefill_part(slot, group[0], *part) for part in parts][-1]

    def stages(self, rows: Rows) -> dict[str, float]:
        """Milliseconds per image of each stage by itself; `decode` is all steps of an answer."""
        count = min(len(rows), self.slots)
        rows = rows.part(0, count)
        took: dict[str, float] = {}
        images = timed(took, "decode+fit", count, lambda: self.rows.images(rows))
        features = timed(took, "vision", count, lambda: self.encode_images(images))
        batch = self.prefill_rows(rows, images, features)
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
        turns = Semaphore(self.images_at_once)

        def ask(file: bytes, prompt: str) -> "Future[Completion]":
            image = self.rows.image(file)
            with turns:
                features = self.vision.encode(image)
            return self._engine.submit(self.request(self.rows.prefill_row(prompt, image, features)))

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
        """Median seconds per image of the vision graph, with `at_once` images of one size in one run."""
        pixels = np.stack((self.rows.images(rows.part(0, at_once)) * at_once)[:at_once])
        return median_seconds(lambda: self.vision.run(pixels), times) / at_once

    def prefill_seconds(self, rows: Rows, at_once: int, times: int) -> float:
        """Median seconds per row of a prefill, with `at_once` rows in one run."""
        batch = self._prefill_rows(rows, at_once)
        return median_seconds(lambda: self.decoder.prefill(0, batch), times) / at_once

    def _prefill_rows(self, rows: Rows, count: int) -> list[PrefillRow]:
        """`count` rows, repeated if there are fewer."""
        return list(itertools.islice(itertools.cycle(self.encode(rows.part(0, count))), count))


def prefill_groups(rows: Sequence[PrefillRow], most_rows: int, most_tokens: int) -> list[list[PrefillRow]]:
    """Rows by length, in groups for one prefill each, by the limits of the engine.

    Args:
        rows: the rows.
        most_rows: most rows of a group.
        most_tokens: most tokens of a group, padding included. A longer row is a group by itself.
    """
    groups: list[list[PrefillRow]] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids)):
        group = [*groups[-1], row] if groups else [row]
        lengths = [len(each.input_ids) for each in group]
        if 1 < len(group) <= most_rows and fit_one_prefill(lengths, most_tokens):
            groups[-1] = group
        else:
            groups.append([row])
    return groups


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
                bundle=str(self.bundle),
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
