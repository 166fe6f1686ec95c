"""Measure our engine and our Ray job against transformers' `generate`, side by side in one run.

    python jobs/bench.py --bundle FP32 --reduced-bundle INT8 --checkpoint DIR --input PARQUET [--rows 64]

All answer the same rows with the same number of forced tokens, in rounds that alternate; medians
are reported. That the fp32 engine's tokens are those of `generate` in fp32 is checked first.
Writes `bench.json`, whose `ratios` are what the README quotes, and `bench.svg`.
"""

import itertools
import json
import platform
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from benchmark import limits, situations
from benchmark.contenders import HuggingFace, Ours, Rows, ray_job
from qvl_batch.config import CaptionConfig
from qvl_batch.errors import JobError
from qvl_batch.report import installed_versions
from qvl_batch.runtime import usable_cpus
from qvl_batch.source import IMAGE, PROMPT, open_source, read_unit

FP32, REDUCED = "qvl-batch fp32", "qvl-batch reduced"
HF_FP32, HF_BF16 = "transformers fp32", "transformers bf16"
OURS, THEIRS = (FP32, REDUCED), (HF_FP32, HF_BF16)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Measure the engine and the Ray job against transformers' `generate` on the same rows."""

    bundle: Path
    """Folder of a bundle in fp32."""
    reduced_bundle: Path | None = None
    """Folder of a bundle of the same checkpoint in reduced precision."""
    checkpoint: Path
    """Folder of the checkpoint that they were exported from."""
    input: Path
    """Parquet file of `id`, `image` and `prompt`."""
    rows: int = 64
    """Rows to answer; the input is repeated if it has fewer."""
    new_tokens: int = 32
    """Tokens of each answer; none ends sooner."""
    rounds: int = 3
    """Rounds of each, after one to warm up."""
    slots: int = 16
    """Rows that our decoder answers at a time."""
    ray_rows: int = 256
    """Rows of the Ray job; 0 leaves it out."""
    output: Path = Path("build/bench")
    """Folder for the figures."""


def bench(config: BenchConfig, console: Console) -> dict[str, Any]:
    """Measure, and return what goes into `bench.json`."""
    torch.set_num_threads(usable_cpus())
    rows = _rows(config)
    ours = {FP32: Ours(config.bundle, config.slots, config.new_tokens)}
    if config.reduced_bundle:
        ours[REDUCED] = Ours(config.reduced_bundle, config.slots, config.new_tokens)
    dtypes = {HF_FP32: torch.float32, HF_BF16: torch.bfloat16}
    theirs = {name: HuggingFace(config.checkpoint, dtype, ours[FP32]) for name, dtype in dtypes.items()}
    batches = {name: contender.choose_batch(rows) for name, contender in theirs.items()}
    contenders: dict[str, Any] = {**ours, **theirs}
    answers = {name: contender.answer(rows) for name, contender in contenders.items()}
    equal = {name: sum(a == b for a, b in zip(found, answers[HF_FP32], strict=True)) for name, found in answers.items()}
    if equal[FP32] != len(rows):
        raise JobError(f"only {equal[FP32]} of {len(rows)} answers are equal in fp32: there is nothing to compare")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in ours}
    for number in range(config.rounds):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender.answer(rows)
            seconds[name].append(time.perf_counter() - began)
        for name, engine in ours.items():
            stages[name].append(engine.stages(rows))
        console.print(f"round {number + 1} of {config.rounds}: " + ", ".join(_last_speeds(seconds, len(rows))))
    speed = {name: len(rows) / statistics.median(taken) for name, taken in seconds.items()}
    medians = {name: {k: statistics.median(r[k] for r in taken) for k in taken[0]} for name, taken in stages.items()}
    figures: dict[str, Any] = {
        "ratios": _ratios(speed),
        "images_per_second": speed,
        "tokens_per_second": {name: each * config.new_tokens for name, each in speed.items()},
        "seconds": seconds,
        "answers_equal_to_fp32": {name: [count, len(rows)] for name, count in equal.items()},
        "batches_tried": batches,
        "stages_ms_per_image": medians,
        "peak_memory_gb_of_all_in_one_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    _against_limits(figures, config, ours, theirs[HF_FP32], rows)
    best = ours.get(REDUCED, ours[FP32])
    few = rows.part(0, 16)
    figures["ratios"] |= {
        "skew": situations.skew(best, rows),
        "four_prompts": situations.four_prompts(best, few),
        "second_prompt": situations.second_prompt(best, few),
    }
    if config.ray_rows:
        _ray(figures, config)
    return figures | _circumstances(config)


def _ratios(speed: dict[str, float]) -> dict[str, float]:
    ratios = {"hf_fp32": speed[FP32] / speed[HF_FP32]}
    ratios["hf"] = max(speed[n] for n in OURS if n in speed) / max(speed[n] for n in THEIRS)
    return ratios


def _against_limits(
    figures: dict[str, Any], config: BenchConfig, ours: dict[str, Ours], reference: HuggingFace, rows: Rows
) -> None:
    """Shares of the measured matrix peak and memory bandwidth, of each of our bundles."""
    settings = reference.model.config
    bandwidth = limits.copy_bandwidth()
    found: dict[str, Any] = {"copy_gb_per_second": bandwidth / 1e9}
    for name, engine in ours.items():
        manifest, took = engine.bundle.manifest, figures["stages_ms_per_image"][name]
        tokens = len(engine.layout.row_ids(rows.prompts[0]))
        peak = limits.gemm_peak(manifest.vision_dtype)
        vision = limits.vision_operations(settings, manifest.layout) / (took["vision"] / 1e3)
        prefill = limits.prefill_operations(settings, tokens) / (took["prefill"] / 1e3)
        live = min(config.slots, len(rows))
        step = took["decode"] / 1e3 * live / (config.new_tokens - 1)
        read = limits.step_bytes(engine.bundle, live, tokens + config.new_tokens // 2) / step
        found[name] = {
            "gemm_peak_gflops": peak / 1e9,
            "vision_peak": vision / peak,
            "prefill_peak": prefill / peak,
            "decode_bandwidth": read / bandwidth,
        }
    figures["limits"] = found
    figures["ratios"] |= {key: found[FP32][key] for key in ("vision_peak", "prefill_peak", "decode_bandwidth")}


def _ray(figures: dict[str, Any], config: BenchConfig) -> None:
    """The whole job against the engine alone, start-up excluded."""
    name = REDUCED if config.reduced_bundle else FP32
    bundle = config.reduced_bundle or config.bundle
    report = ray_job(bundle, (str(config.input),), config.ray_rows, config.new_tokens)
    figures["ray"] = {
        "rows": config.ray_rows,
        "steady_images_per_second": report.steady_images_per_second,
        "seconds": report.seconds,
        "workers_seconds": report.workers_seconds,
        "startup_seconds": report.startup_seconds,
    }
    figures["ratios"]["ray"] = report.steady_images_per_second / figures["images_per_second"][name]


def _circumstances(config: BenchConfig) -> dict[str, Any]:
    packages = ("onnxruntime-gpu", "torch", "transformers", "ray")
    return {
        "machine": f"{platform.machine()}, {usable_cpus()} CPUs, {_processor()}",
        "versions": installed_versions(packages),
        "settings": {name: str(value) for name, value in asdict(config).items()},
    }


def _processor() -> str:
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _rows(config: BenchConfig) -> Rows:
    settings = CaptionConfig(bundle=config.bundle, input=(str(config.input),), output=Path())
    source = open_source(settings)
    tables = (table for unit in source.units for table in read_unit(unit, source.columns, None, config.rows))
    pairs = [
        (image, prompt)
        for table in tables
        for image, prompt in zip(table[IMAGE].to_pylist(), table[PROMPT].to_pylist(), strict=True)
        if image is not None and prompt
    ]
    if not pairs:
        raise JobError(f"{config.input} has no row with an image and a prompt")
    chosen = list(itertools.islice(itertools.cycle(pairs), config.rows))
    return Rows([image for image, _ in chosen], [prompt for _, prompt in chosen])


def _last_speeds(seconds: dict[str, list[float]], rows: int) -> list[str]:
    return [f"{name} {rows / taken[-1]:.2f}" for name, taken in seconds.items()]


def _print(figures: dict[str, Any], console: Console) -> None:
    stages = figures["stages_ms_per_image"]
    names = list(next(iter(stages.values())))
    table = Table("", "images/s", *(f"{name} ms" for name in names))
    for contender, speed in figures["images_per_second"].items():
        cells = [f"{stages[contender][name]:.1f}" for name in names] if contender in stages else []
        table.add_row(contender, f"{speed:.2f}", *cells)
    console.print(table)
    for name, ratio in figures["ratios"].items():
        console.print(f"{name:<18} {ratio:.2f}")


SVG = Environment(autoescape=True).from_string("""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {{ 40 * bars | length + 40 }}" font-family="system-ui, sans-serif" font-size="14">
<rect width="100%" height="100%" fill="#fff"/><text x="12" y="24" font-weight="bold">images a second</text>
{% for name, speed, width, ours in bars %}<text x="12" y="{{ 40 * loop.index0 + 60 }}">{{ name }}</text><rect x="170" y="{{ 40 * loop.index0 + 43 }}" width="{{ width }}" height="24" rx="3" fill="{{ '#17694a' if ours else '#9a958c' }}"/><text x="{{ width + 178 }}" y="{{ 40 * loop.index0 + 60 }}">{{ "%.2f" | format(speed) }}</text>
{% endfor %}</svg>
""")  # noqa: E501


def _plot(figures: dict[str, Any]) -> str:
    """Bars of images a second."""
    speeds = figures["images_per_second"]
    longest = max(speeds.values())
    return SVG.render(bars=[(name, each, round(380 * each / longest), name in OURS) for name, each in speeds.items()])


def main() -> int:
    """Run the command."""
    console = Console()
    try:
        config = tyro.cli(BenchConfig)
        figures = bench(config, console)
    except JobError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    (config.output / "bench.svg").write_text(_plot(figures))
    _print(figures, console)
    print(f"written to {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
