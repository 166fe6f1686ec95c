"""Measure the engine and each of its stages against transformers' `generate`, side by side.

    python jobs/bench.py --bundle BUNDLE --checkpoint DIR --input PARQUET [--rows 32] [--new-tokens 32]

Both answer the same rows in fp32 on the same threads, with the same number of forced tokens;
that the tokens are equal is checked before anything is measured. Rounds alternate, and medians
are reported. Writes `bench.json`, whose `ratios` are what the README quotes.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qvl_batch.bundle import Bundle
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder import Decoder, PrefillRow
from qvl_batch.engine import PREFILL_ROWS, Engine, Request
from qvl_batch.errors import JobError, NumericError
from qvl_batch.images import decode_image, fit_image
from qvl_batch.layout import RowLayout
from qvl_batch.runtime import usable_cpus
from qvl_batch.source import IMAGE, PROMPT, open_source, read_unit
from qvl_batch.vision import VisionEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Measure the engine against transformers' `generate` on the same rows."""

    bundle: Path
    """Folder of the bundle."""
    checkpoint: Path
    """Folder of the checkpoint that it was exported from."""
    input: Path
    """Parquet file of `id`, `image` and `prompt`."""
    rows: int = 32
    """Rows to answer; the input is repeated if it has fewer."""
    new_tokens: int = 32
    """Tokens of each answer; none ends sooner."""
    rounds: int = 7
    """Rounds of each, after one to warm up."""
    slots: int = 8
    """Rows that our decoder answers at a time, and the batch of `generate`."""
    output: Path = Path("build/bench.json")
    """Where the figures go."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Image files and prompts to answer."""

    files: list[bytes]
    prompts: list[str]


class Ours:
    """Vision encoder and engine in this process, all threads for either."""

    def __init__(self, config: BenchConfig) -> None:
        bundle, threads = Bundle.load(config.bundle), usable_cpus()
        self.config, self.threads = config, threads
        self.vision, self.layout = VisionEncoder(bundle, threads), RowLayout(bundle)
        self.decoder = Decoder(bundle, config.slots, threads)

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        features = [row for row in self.vision.encode(self.fit(rows)) if not isinstance(row, NumericError)]
        with Engine(self.decoder, eos_token_ids=()) as engine:
            futures = [
                engine.submit(Request(self.layout.row_ids(prompt), row, self.config.new_tokens))
                for prompt, row in zip(rows.prompts, features, strict=True)
            ]
            return [future.result().token_ids for future in futures]

    def fit(self, rows: Rows) -> list[np.ndarray]:
        """Decode and fit the images."""
        return [fit_image(decode_image(file), self.layout.layout.image_size) for file in rows.files]

    def stages(self, rows: Rows) -> dict[str, float]:
        """Milliseconds an image of each stage, alone; decode is all of an answer's steps."""
        count, slots = len(rows.files), self.config.slots
        took: dict[str, float] = {}
        pixels = _timed(took, "decode+fit", count, lambda: self.fit(rows))
        features = _timed(took, "vision", count, lambda: self.vision.encode(pixels))
        batch = [PrefillRow(self.layout.row_ids(p), f) for p, f in zip(rows.prompts, features, strict=True)][:slots]

        def prefill() -> list[int]:
            groups = range(0, len(batch), PREFILL_ROWS)
            return [t for at in groups for t in self.decoder.prefill(at, batch[at : at + PREFILL_ROWS]).tolist()]

        tokens = np.array(_timed(took, "prefill", len(batch), prefill), np.int64)

        def decode() -> None:
            following = tokens
            for _ in range(self.config.new_tokens - 1):
                following = self.decoder.step(following)

        _timed(took, "decode", len(batch), decode)
        return took


class Theirs:
    """`Qwen2_5_VLForConditionalGeneration.generate`, in batches padded on the left."""

    def __init__(self, config: BenchConfig, ours: Ours) -> None:
        self.config, self.ours = config, ours
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.checkpoint, dtype=torch.float32).eval()
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(config.checkpoint)

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        tokens: list[list[int]] = []
        for at in range(0, len(rows.files), self.config.slots):
            part = slice(at, at + self.config.slots)
            tokens += self._batch(Rows(rows.files[part], rows.prompts[part]))
        return tokens

    def _batch(self, rows: Rows) -> list[list[int]]:
        layout, settings = self.ours.layout, self.model.config
        ids = [layout.row_ids(prompt) for prompt in rows.prompts]
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        images = self.processor([Image.fromarray(pixels) for pixels in self.ours.fit(rows)], return_tensors="pt")
        forced = GenerationConfig(
            max_new_tokens=self.config.new_tokens,
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


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, and return what goes into `bench.json`."""
    ours = Ours(config)
    theirs = Theirs(config, ours)
    torch.set_num_threads(ours.threads)
    rows = _rows(config)
    contenders: dict[str, Callable[[Rows], list[list[int]]]] = {"qvl-batch": ours.answer, "transformers": theirs.answer}
    answers = {name: answer(rows) for name, answer in contenders.items()}
    equal = sum(a == b for a, b in zip(*answers.values(), strict=True))
    if equal != config.rows:
        raise JobError(f"only {equal} of {config.rows} answers are equal: there is nothing to compare")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    stages: list[dict[str, float]] = []
    for _ in range(config.rounds):
        for name, answer in contenders.items():
            began = time.perf_counter()
            answer(rows)
            seconds[name].append(time.perf_counter() - began)
        stages.append(ours.stages(rows))
    speed = {name: config.rows / statistics.median(times) for name, times in seconds.items()}
    return {
        "ratios": {"hf_fp32": statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))},
        "images_per_second": speed,
        "stages_ms_per_image": {name: statistics.median(s[name] for s in stages) for name in stages[0]},
        "equal_answers": equal,
        "machine": f"{platform.machine()}, {ours.threads} CPUs",
        "versions": {name: version(name) for name in ("onnxruntime-gpu", "torch", "transformers")},
        "settings": {key: str(value) for key, value in asdict(config).items()},
    }


def _rows(config: BenchConfig) -> Rows:
    source = open_source(CaptionConfig(bundle=config.bundle, input=(str(config.input),), output=config.output))
    files: list[bytes] = []
    prompts: list[str] = []
    for unit in source.units:
        for table in read_unit(unit, source.columns, None, 64):
            files += table[IMAGE].to_pylist()
            prompts += table[PROMPT].to_pylist()
    repeats = -(-config.rows // len(files))
    return Rows((files * repeats)[: config.rows], (prompts * repeats)[: config.rows])


def _timed(took: dict[str, float], stage: str, count: int, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    took[stage] = (time.perf_counter() - began) * 1000 / count
    return result


def _print(figures: dict[str, Any], console: Console) -> None:
    table = Table("", "images/s")
    for name, speed in figures["images_per_second"].items():
        table.add_row(name, f"{speed:.2f}")
    console.print(table)
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in figures["stages_ms_per_image"].items())
    console.print(f"ms an image: {stages}")
    console.print(f"qvl-batch over transformers, fp32, median of rounds: {figures['ratios']['hf_fp32']:.2f}")


def main() -> int:
    """Run the command."""
    try:
        config = tyro.cli(BenchConfig)
        figures = bench(config)
    except JobError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(figures, indent=1) + "\n")
    _print(figures, Console())
    print(f"written to {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
