"""Measure our engine and our Ray job against peers, side by side in one run.

    python jobs/bench.py --bundle FP32 --reduced-bundle INT8 --native-bundle NATIVE --checkpoint DIR
    python jobs/bench.py --only answers --answers-bundle DIR
    python jobs/bench.py --device cuda

All contenders answer the same rows with the same number of forced tokens, in alternating rounds, each
in its own process, peers at their best batch size; medians are reported. First it checks that a row
has the same number of tokens for all, and that answers in fp32 are those of transformers' `generate`.
Writes `bench.json`, whose `ratios` jobs/README.md quotes, and `bench.svg`. With `--only answers`,
`benchmark/answers.py` measures, and with `--device cuda`, `benchmark/gpu.py`.
"""

import argparse
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import AutoConfig

from benchmark import answers, gpu, limits, native, situations
from benchmark.bundle_rows import BundleRows
from benchmark.contenders import FP32, OURS, PEERS, REDUCED, Starter, check_equal_work, openvino_python
from benchmark.figures import (
    DEMO,
    best_batch,
    choose_batch,
    circumstances,
    keep,
    measure,
    medians,
    read_rows,
    show,
    write,
)
from benchmark.host import Host
from benchmark.ours import Ours
from benchmark.rows import Rows
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import read_manifest
from qvl_batch.command_line import exit_status, settings
from qvl_batch.config import check_at_least_one
from qvl_batch.errors import ConfigError, JobError
from qvl_batch.pipeline.plan import DEFAULT_SLOTS

#: Rows of the shorter of two jobs that differ by a factor of ten.
SHORT_JOB_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Measure the engine and the Ray job against transformers' `generate` and OpenVINO GenAI on the same rows, on
    CPUs. `--device cuda` measures on a GPU, with options of its own: see `--device cuda --help`.
    """

    device: Literal["cpu"] = "cpu"
    """Device to measure on."""
    bundle: Path
    """Folder of a bundle in fp32."""
    reduced_bundle: Path | None = None
    """Folder of a bundle of the same checkpoint in reduced precision."""
    native_bundle: Path | None = None
    """Folder of a bundle of the same checkpoint in fp32 whose images keep their own size: compared with --bundle on
    squares, and with peers on images of many sizes."""
    checkpoint: Path
    """Folder of the checkpoint that the bundles were exported from."""
    answers_bundle: Path | None = None
    """Folder of a bundle with a vocabulary of real size: measures what constraints and confidence cost. `--only
    answers` measures nothing else: see `--only answers --help`."""
    against: tuple[Literal["hf", "openvino"], ...] = ("hf",)
    """Peers to measure in fp32: transformers' `generate` (hf), OpenVINO GenAI (openvino). With --reduced-bundle, they
    are measured in reduced precision too: bf16 (hf), what OpenVINO GenAI chooses (openvino)."""
    openvino: Path = Path("build/openvino")
    """Folder with OpenVINO's environment, `venv`, and the checkpoint converted for it, `model`."""
    input: Path = DEMO
    """Parquet file of `id`, `image` and `prompt`."""
    rows: int = 64
    """Rows to answer; the input is repeated if it has fewer."""
    new_tokens: int = 32
    """Tokens of each answer; end tokens are ignored."""
    rounds: int = 3
    """Rounds to measure, after one to warm up."""
    slots: int = DEFAULT_SLOTS
    """Rows that our decoder answers at a time."""
    ray_rows: int = 256
    """Rows of the Ray job; 0 skips it."""
    ten_times: bool = True
    """Also measure time and memory of a Ray job with ten times the rows."""
    situations: bool = True
    """Also measure what our engine gains by sharing an image's features and KV cache between prompts, by keeping
    features on disk, and by refilling slots."""
    output: Path = Path("build/bench")
    """Folder for the figures."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be measured.

        Raises:
            ConfigError: names the option and what to do.
        """
        check_at_least_one(self, "rows", "new_tokens", "rounds", "slots")
        python = openvino_python(self.openvino)
        if "openvino" in self.against and not python.exists():
            raise ConfigError(f"--against openvino: {python} is missing; `make openvino` installs it")

    @property
    def bundles(self) -> dict[str, Path]:
        """Our contenders, and the bundle of each."""
        given = {FP32: self.bundle, REDUCED: self.reduced_bundle}
        return {name: bundle for name, bundle in given.items() if bundle is not None}


def bench(config: BenchConfig, console: Console) -> dict[str, Any]:
    """Measure, and return what goes into `bench.json`.

    Raises:
        BundleError: there is no bundle.
        ConfigError: the native bundle cannot be compared with the other.
        JobError: the contenders do not do the same work, or there are no rows.
    """
    if config.native_bundle is not None:
        native.check_pair(config.bundle, config.native_bundle)
    rows = read_rows(config.bundle, config.input, config.rows, config.output)
    with ExitStack() as stack:
        hosts = _hosts(config, _starter(config, stack))
        batches = {
            name: choose_batch(name, host, rows, console) for name, host in hosts.items() if name not in config.bundles
        }
        equal = check_equal_work(hosts, rows)
        seconds, stages = measure(hosts, rows, config.rounds, console)
        memory = {name: host.peak_memory() / 1e9 for name, host in hosts.items()}
        speed = {name: len(rows) / statistics.median(taken) for name, taken in seconds.items()}
        figures: dict[str, Any] = {
            "ratios": ratios_of(speed),
            "images_per_second": speed,
            "tokens_per_second": {name: each * config.new_tokens for name, each in speed.items()},
            "stages_ms_per_image": {name: medians(taken) for name, taken in stages.items()},
            "peak_memory_gb": memory,
            "best_batch": {name: best_batch(tried) for name, tried in batches.items()},
            "answers_equal_to_fp32": equal,
            "seconds": seconds,
            "batches_tried": batches,
        }
        best = max(config.bundles, key=lambda name: speed[name])
        ours = (config.bundles[best], config.slots, config.new_tokens)
        if config.ray_rows:
            _ray(figures, config, hosts[best], ours, rows, console)
    if config.native_bundle is not None:
        console.print("images at their own size")
        keep(figures, config.output)  # what took an hour
        _native(figures, config, (config.bundle, config.native_bundle), rows, console)
    console.print("limits of the machine")
    _against_limits(figures, config, rows)
    if config.situations:
        console.print("situations")
        _situations(figures, Ours(*ours), rows.part(0, 16))
    if config.answers_bundle is not None:
        console.print("kinds of answers")
        keep(figures, config.output)
        figures["answers"], found = answers.measured(
            config.answers_bundle, rows.prompts[: config.slots], answers.ROUNDS, config.slots, console
        )
        figures["ratios"] |= found
    return figures | circumstances(config, ("onnxruntime-gpu", "torch", "transformers", "ray"))


def _starter(config: BenchConfig, stack: ExitStack) -> Starter:
    return Starter(stack, config.checkpoint, config.openvino, config.slots, config.new_tokens)


def _hosts(config: BenchConfig, start: Starter) -> dict[str, Host]:
    """All contenders, each in its own process."""
    hosts = {name: start.ours(name, bundle) for name, bundle in config.bundles.items()}
    resolution = read_manifest(config.bundle).layout.resolution
    for key in config.against:
        for name in PEERS[key] if config.reduced_bundle else PEERS[key][:1]:
            hosts[name] = (
                start.transformers(name, config.bundle) if key == "hf" else start.openvino_genai(name, resolution)
            )
    return hosts


def ratios_of(speed: dict[str, float]) -> dict[str, float]:
    """Our images/s over those of each peer: fp32 over fp32, and the best of ours over the best of theirs."""
    ours = max(speed[name] for name in OURS if name in speed)
    ratios: dict[str, float] = {}
    for key, (plain, reduced) in PEERS.items():
        if plain in speed:
            ratios[f"{key}_fp32"] = speed[FP32] / speed[plain]
        if reduced in speed:
            ratios[key] = ours / max(speed[plain], speed[reduced])
    return ratios


def _ray(
    figures: dict[str, Any],
    config: BenchConfig,
    engine: Host,
    arguments: tuple[Any, ...],
    rows: Rows,
    console: Console,
) -> None:
    """The Ray job, without its start-up, against the engine alone, before and after it; and ten times the rows."""

    def job(count: int, *, memory: bool = False) -> dict[str, float]:
        console.print(f"Ray job of {count} rows")
        with Host("Ray job", "benchmark.ours", "RayJob", *arguments) as host:
            found: dict[str, float] = host.call("run", rows, count, memory)
            return found

    before = engine.seconds("answer", rows)
    figures["ray"] = found = job(config.ray_rows)
    alone = 2 * len(rows) / (before + engine.seconds("answer", rows))
    figures["ray"]["engine_images_per_second"] = alone
    figures["ratios"]["ray"] = found["steady_images_per_second"] / alone
    if config.ten_times:
        few, many = job(SHORT_JOB_ROWS, memory=True), job(10 * SHORT_JOB_ROWS, memory=True)
        figures["ten_times"] = [few, many]
        taken = [found["seconds"] - found["workers_seconds"] for found in (few, many)]
        figures["ratios"] |= {
            "rows_10x_time": taken[1] / taken[0],
            "rows_10x_memory": many["peak_memory"] / few["peak_memory"],
        }


def _native(
    figures: dict[str, Any], config: BenchConfig, bundles: tuple[Path, Path], rows: Rows, console: Console
) -> None:
    """The native bundle, with contenders of its own."""
    with ExitStack() as stack:
        start = _starter(config, stack)
        figures["native"], ratios = native.compared(start, bundles, config.against, rows, config.rounds, console)
    figures["ratios"] |= ratios


def _against_limits(figures: dict[str, Any], config: BenchConfig, rows: Rows) -> None:
    """Share of the measured matrix peak and memory bandwidth that each of our bundles reaches."""
    model_config = AutoConfig.from_pretrained(config.checkpoint)
    bandwidth = limits.copy_bandwidth()
    found: dict[str, Any] = {"copy_gb_per_second": bandwidth / 1e9}
    for name, folder in config.bundles.items():
        bundle, live = Bundle.load(folder), min(config.slots, len(rows))
        manifest, took = bundle.manifest, figures["stages_ms_per_image"][name]
        sizes, lengths = BundleRows(bundle).work(rows.part(0, live))
        peak = limits.gemm_peak(manifest.vision_dtype)
        vision = limits.vision_operations(model_config, sizes) / (took["vision"] / 1e3)
        prefill = limits.prefill_operations(model_config, lengths) / (took["prefill"] / 1e3)
        step = took["decode"] / 1e3 * live / (config.new_tokens - 1)
        read = limits.step_bytes(bundle, live, statistics.mean(lengths) + config.new_tokens // 2) / step
        found[name] = {
            "gemm_peak_gflops": peak / 1e9,
            "vision_peak": vision / peak,
            "prefill_peak": prefill / peak,
            "decode_bandwidth": read / bandwidth,
        }
    figures["limits"] = found
    figures["ratios"] |= {key: found[FP32][key] for key in ("vision_peak", "prefill_peak", "decode_bandwidth")}


def _situations(figures: dict[str, Any], engine: Ours, few: Rows) -> None:
    """Ratios of our engine to itself."""
    engine.answer(few)
    figures["ratios"] |= situations.skew(engine, few)
    figures["ratios"] |= {
        "four_prompts": situations.four_prompts(engine, few),
        "second_prompt": situations.second_prompt(engine, few),
    }


def work() -> int:
    """Measure, write and show; returns the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    what = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    what.add_argument("--device")
    what.add_argument("--only")
    asked = what.parse_known_args()[0]
    if asked.only == "answers":
        config: Any = settings(answers.AnswersConfig)
        figures = answers.bench(config, console)
    elif asked.device == "cuda":
        config = settings(gpu.GpuBenchConfig)
        figures = gpu.bench(config, console)
    else:
        config = settings(BenchConfig)
        figures = bench(config, console)
    write(figures, {*OURS, *gpu.OURS}, config.output)
    show(figures, console)
    print(f"written to {config.output}")
    return 0


def main() -> int:
    """Run the command; 0 if all was measured, 1 if not, 130 if it was stopped."""
    return exit_status("bench", work, expected=(JobError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
