"""The bench on a GPU: engine against transformers' `generate` on the same card, and against the card's limits.

Without a given bundle, a made-up model of real shape is exported. The engine runs without Ray, like the
actor of one decoder: CPUs decode the images, the vision tower runs on the GPU, or on the CPUs for
comparison, and the decoder on the GPU.
"""

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from transformers import AutoConfig

from benchmark import limits
from benchmark.bundle_rows import BundleRows
from benchmark.figures import (
    DEMO,
    best_batch,
    choose_batch,
    circumstances,
    keep,
    measure,
    medians,
    read_rows,
    show_ratios,
)
from benchmark.host import ROOT, Host
from benchmark.rows import Rows
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import MANIFEST
from qvl_batch.config import check_at_least_one
from qvl_batch.errors import ConfigError, JobError
from qvl_batch.runtime.devices import open_cuda, require_cuda

OURS = CUDA_VISION, CPU_VISION = "qvl-batch", "qvl-batch, CPU vision"
DYNAMIC = "transformers"
PEERS = {"dynamic": DYNAMIC, "static": "transformers, static cache"}
#: Names of the ratios to the best peer, and the contender of each.
HF_RATIOS = {"hf": CUDA_VISION, "hf_cpu_vision": CPU_VISION}
TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
#: Batch sizes that `generate` is tried with.
BATCHES = (1, 8, 32, 64, 128)
#: Decode steps, and runs of other stages, to take the median time of.
STEPS, RUNS = 32, 5

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBenchConfig:
    """Measure the engine on a GPU against transformers' `generate` on the same card, and against the card's limits."""

    device: Literal["cuda"] = "cuda"
    """Device to measure on."""
    bundle: Path | None = None
    """Folder of a bundle in half precision. Without it, a made-up model is exported into --output."""
    cpu_vision_bundle: Path | None = None
    """Folder of a bundle with the vision tower in fp32, for the CPU. Without --bundle, it is exported too."""
    checkpoint: Path | None = None
    """Folder of the bundles' checkpoint. Without it, a made-up one is written into --output."""
    shape: str = "3b"
    """Shape of the made-up model, one of those in datasets/make_model.py."""
    dtype: Literal["bf16", "fp16"] = "bf16"
    """Precision of the made-up model's bundle."""
    against: tuple[Literal["dynamic", "static"], ...] = ("dynamic", "static")
    """Kinds of KV cache to measure transformers' `generate` with. With a static cache it compiles its decode step, and
    is tried only at the best batch size of the dynamic one."""
    input: Path = DEMO
    """Parquet file of `id`, `image` and `prompt`."""
    rows: int = 256
    """Rows to answer; the input is repeated if it has fewer."""
    cpu_vision_rows: int = 32
    """Rows to answer with the vision tower on the CPU; 0 skips it."""
    new_tokens: int = 64
    """Tokens of each answer; end tokens are ignored."""
    rounds: int = 3
    """Rounds to measure, after one to warm up."""
    slots: int = 128
    """Rows that our decoder answers at a time."""
    step_rows: tuple[int, ...] = (1, 8, 32, 128)
    """Numbers of rows to measure a decode step with, against the bytes that it must read."""
    at_once: tuple[int, ...] = (1, 2, 4, 8)
    """Further batch sizes to time the vision graph and the prefill with, beside those that the engine uses."""
    output: Path = Path("build/bench-gpu")
    """Folder for model, bundles and figures."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be measured.

        Raises:
            ConfigError: names the option and what to do.
        """
        check_at_least_one(self, "rows", "new_tokens", "rounds", "slots")
        if (self.bundle is None) != (self.checkpoint is None):
            raise ConfigError("--bundle and --checkpoint belong together: give both, or neither for a made-up model")
        if min(self.at_once, default=1) < 1:
            raise ConfigError("--at-once must be at least 1")
        if self.step_rows and not 1 <= min(self.step_rows) <= max(self.step_rows) <= self.slots:
            raise ConfigError(f"--step-rows must be from 1 to --slots, which is {self.slots}")


class OnCard:
    """A contender in its own process; `held` counts the bytes that it allocates on the card. It frees none.

    Args:
        card: process that measures the card.
        stack: closes the contender's process.
        name, module, kind, args: of the contender, as for `Host`.
    """

    def __init__(self, card: Host, stack: ExitStack, name: str, module: str, kind: str, *args: Any) -> None:
        self._card, self.held = card, 0
        self._host = self._counting(lambda: stack.enter_context(Host(name, f"benchmark.{module}", kind, *args)))

    def call(self, method: str, *args: Any) -> Any:
        """As `Host.call`."""
        return self._counting(lambda: self._host.call(method, *args))

    def seconds(self, method: str, *args: Any) -> float:
        """As `Host.seconds`."""
        return self._counting(lambda: self._host.seconds(method, *args))

    def _counting(self, work: Callable[[], T]) -> T:
        before = self._card.call("used_bytes")
        result = work()
        self.held += self._card.call("used_bytes") - before
        return result


def bench(config: GpuBenchConfig, console: Console) -> dict[str, Any]:
    """Measure, and return what goes into `bench.json`.

    Raises:
        DeviceError: there is no GPU here.
        ConfigError: a bundle is made for the CPU.
        JobError: the contenders do not do the same work, or there is no model to measure.
    """
    checkpoint, folder, cpu_vision = prepare(config, console)
    for option, path in (("--bundle", folder), ("--cpu-vision-bundle", cpu_vision)):
        if path is not None and Bundle.load(path).manifest.device != "cuda":
            raise ConfigError(
                f"{option} {path} is made for the CPU: export it with --dtype bf16 to measure it on a GPU"
            )
    open_cuda("--device cuda")
    return measured(config, checkpoint, folder, cpu_vision, console)


def measured(
    config: GpuBenchConfig, checkpoint: Path, folder: Path, cpu_vision: Path | None, console: Console
) -> dict[str, Any]:
    """The measurements of `bench`, for bundles of either device.

    The engine alone is measured first, and `bench.json` is written after each part, so that a run that is cut short
    leaves figures.

    Raises:
        JobError: the contenders do not do the same work.
    """
    bundle = Bundle.load(folder)
    rows = read_rows(folder, config.input, config.rows, config.output)
    ours = (config.slots, config.new_tokens)
    with Host("limits of the card", "benchmark.device_limits", "DeviceLimits", bundle.manifest.device) as card:
        figures: dict[str, Any] = circumstances(
            config, ("onnxruntime-gpu", "torch", "transformers"), card=card.call("name")
        )
        with ExitStack() as stack:
            engine = OnCard(card, stack, CUDA_VISION, "ours", "Overlapped", folder, *ours)
            engine.call("stages", rows)  # warms up: captures its decode steps
            found, ratios = _against_limits(card, config, engine, AutoConfig.from_pretrained(checkpoint), bundle, rows)
            figures |= {"ratios": ratios, "limits": found}
            console.print(f"against the limits of {figures['card']}: {found}")
            show_ratios(ratios, console)
            keep(figures, config.output)
            peers, tried, failures = _peers(config, card, stack, (checkpoint, bundle), rows, console)
            contenders = {CUDA_VISION: engine, **peers}
            _check(contenders, rows, config.new_tokens)
            seconds, stages = measure(contenders, rows, config.rounds, console)
        speed = {name: len(rows) / statistics.median(taken) for name, taken in seconds.items()}
        figures |= {
            "images_per_second": speed,
            "stages_ms_per_image": {name: medians(taken) for name, taken in stages.items()},
            "best_batch": {name: best_batch(sizes) for name, sizes in tried.items()},
            "seconds": seconds,
            "batches_tried": tried,
            "not_measured": failures,
        }
        keep(figures, config.output)
        if cpu_vision is not None:
            contenders[CPU_VISION], speed[CPU_VISION] = _with_cpu_vision(config, card, cpu_vision, rows, console)
    theirs = max((each for name, each in speed.items() if name not in OURS), default=None)
    if theirs:
        figures["ratios"] |= {key: speed[name] / theirs for key, name in HF_RATIOS.items() if name in speed}
    return figures | {
        "tokens_per_second": {name: each * config.new_tokens for name, each in speed.items()},
        "peak_memory_gb": {name: each.held / 1e9 for name, each in contenders.items()},
    }


def _with_cpu_vision(
    config: GpuBenchConfig, card: Host, folder: Path, rows: Rows, console: Console
) -> tuple[OnCard, float]:
    """Answer with the vision tower on the CPU: the contender, which has ended by then, and its images/s."""
    rows = rows.part(0, config.cpu_vision_rows)
    console.print(f"{CPU_VISION}: {len(rows)} rows")
    with ExitStack() as stack:
        engine = OnCard(card, stack, CPU_VISION, "ours", "Overlapped", folder, config.slots, config.new_tokens)
        engine.call("answer", rows.part(0, 2))  # warms up
        return engine, len(rows) / engine.seconds("answer", rows)


def prepare(config: GpuBenchConfig, console: Console) -> tuple[Path, Path, Path | None]:
    """Checkpoint, bundle, and bundle with vision on the CPU if that is measured; made-up ones if none are given.

    Raises:
        DeviceError: there is no GPU.
        JobError: making up a model or exporting it failed.
    """
    if config.bundle is not None and config.checkpoint is not None:
        return config.checkpoint, config.bundle, config.cpu_vision_bundle if config.cpu_vision_rows else None
    require_cuda("--device cuda")
    output = config.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    model = output / f"model-{config.shape}"
    bundle = output / f"{config.shape}-{config.dtype}"
    cpu_vision = output / f"{config.shape}-{config.dtype}-vision-fp32"
    export = ["-m", "export", model, "--dtype", config.dtype, "--skip-parity", "--output"]
    # Each command by the last file that it writes.
    commands: dict[Path, list[Any]] = {
        model / "model.safetensors.index.json": ["datasets/make_model.py", model, "--shape", config.shape],
        bundle / MANIFEST: [*export, bundle],
    }
    if config.cpu_vision_rows:
        commands[cpu_vision / MANIFEST] = [*export, cpu_vision, "--vision-dtype", "fp32"]
    for file, command in commands.items():
        if not file.is_file():
            console.print(f"making {file.parent}")
            shutil.rmtree(file.parent, ignore_errors=True)  # an incomplete one
            if subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=False).returncode:  # noqa: S603
                raise JobError(f"{file.parent} could not be made: see above")
    return model, bundle, cpu_vision if config.cpu_vision_rows else None


def _peers(
    config: GpuBenchConfig, card: Host, stack: ExitStack, of: tuple[Path, Bundle], rows: Rows, console: Console
) -> tuple[dict[str, OnCard], dict[str, dict[int, float]], dict[str, str]]:
    """Peers, images/s by batch size of each, and the errors of those that could not be measured."""
    checkpoint, bundle = of
    dtype, device = TORCH_NAMES[bundle.manifest.dtype], bundle.manifest.device
    peers: dict[str, OnCard] = {}
    tried: dict[str, dict[int, float]] = {}
    failures: dict[str, str] = {}
    for kind in sorted(config.against):  # the dynamic one first
        name = PEERS[kind]
        sizes = BATCHES if kind == "dynamic" or DYNAMIC not in tried else (best_batch(tried[DYNAMIC]),)
        cache = "static" if kind == "static" else None
        arguments = (checkpoint, dtype, bundle.path, config.new_tokens, sizes, device, cache)
        try:
            peer = OnCard(card, stack, name, "transformers_generate", "Ahead", *arguments)
            tried[name] = choose_batch(name, peer, rows, console)
        except RuntimeError as error:
            if kind == "dynamic":
                raise
            failures[name] = str(error).strip().split("\n")[-1]
            console.print(f"{name} is not measured: {failures[name]}")
        else:
            peers[name] = peer
    return peers, tried, failures


def _check(contenders: dict[str, OnCard], rows: Rows, new_tokens: int) -> None:
    """Answer once to warm up.

    Raises:
        JobError: the contenders do not do the same work.
    """
    few = rows.part(0, 4)
    lengths = {name: contender.call("prompt_tokens", few) for name, contender in contenders.items()}
    if any(found != lengths[CUDA_VISION] for found in lengths.values()):
        raise JobError(
            f"contenders count different numbers of tokens for the same rows, so they are not compared: {lengths}"
        )
    for name, contender in contenders.items():
        short = sum(len(answer) != new_tokens for answer in contender.call("answer", rows))
        if short:
            raise JobError(f"{short} answers of {name} do not have {new_tokens} tokens, so contenders are not compared")


def _against_limits(
    card: Host, config: GpuBenchConfig, engine: OnCard, model_config: Any, bundle: Bundle, rows: Rows
) -> tuple[dict[str, Any], dict[str, float]]:
    """The card's measured limits with the times of stages and steps, and the share of a limit that each reaches."""
    rate, bandwidth = card.call("matrix_rate", TORCH_NAMES[bundle.manifest.dtype]), card.call("copy_bandwidth")
    took = medians([engine.call("stages", rows) for _ in range(config.rounds)])
    found: dict[str, Any] = {"matrix_tflops": rate / 1e12, "copy_gb_per_second": bandwidth / 1e9, "stages_ms": took}
    sizes, lengths = BundleRows(bundle).work(rows.part(0, config.slots))
    operations = {
        "vision": limits.vision_operations(model_config, sizes),
        "prefill": limits.prefill_operations(model_config, lengths),
    }
    ratios = {f"{stage}_peak": count / (took[stage] / 1e3) / rate for stage, count in operations.items()}
    # The vision graph for images of any size takes one at a time.
    at_once = {"vision": (1,) if bundle.manifest.layout.resolution.is_native else config.at_once}
    for stage, counts in (at_once | {"prefill": config.at_once}).items():
        found[f"{stage}_ms_at_once"] = {
            count: 1e3 * engine.call(f"{stage}_seconds", rows, count, RUNS) for count in counts
        }
    found["step_ms"] = {live: 1e3 * engine.call("step_seconds", rows, live, STEPS) for live in config.step_rows}
    for live, milliseconds in found["step_ms"].items():
        read = limits.step_bytes(bundle, live, statistics.mean(lengths) + STEPS // 2)
        ratios[f"step_{live}"] = read / (milliseconds / 1e3) / bandwidth
    return found, ratios
