"""Measure our engine and our Ray job against what else there is, side by side in one run.

    python jobs/bench.py --bundle FP32 --reduced-bundle INT8 --checkpoint DIR [--against hf openvino]

All answer the same rows with the same number of forced tokens, in rounds that alternate, each in a
process of its own and at its best batch size; medians are reported. That rows are the same tokens
for all, and that answers in fp32 are those of transformers' `generate`, is checked first. Writes
`bench.json`, whose `ratios` are what the README quotes, and `bench.svg`.
"""

import itertools
import json
import platform
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from benchmark import limits, situations
from benchmark.host import Host
from benchmark.ours import Ours
from benchmark.rows import Rows
from qvl_batch.bundle import Bundle
from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ConfigError, JobError
from qvl_batch.fetch import Fetcher
from qvl_batch.layout import RowLayout
from qvl_batch.plan import DEFAULT_SLOTS
from qvl_batch.reader import read_unit
from qvl_batch.report import installed_versions
from qvl_batch.runtime import usable_cpus
from qvl_batch.source import IMAGE, PROMPT, open_source

FP32, REDUCED = "qvl-batch fp32", "qvl-batch reduced"
HF_FP32, HF_BF16 = "transformers fp32", "transformers bf16"
OV_FP32, OV_OWN = "OpenVINO GenAI fp32", "OpenVINO GenAI"
DEMO = Path(__file__).parents[1] / "datasets" / "demo" / "questions.parquet"
#: Rows whose tokens up to the answer are compared: counting them takes a peer as long as answering.
CHECKED_ROWS = 4
#: Answers of a peer in fp32 that must be those of the reference; of made-up weights, some are near ties.
TIES = 0.9
#: Rows of the shorter of two jobs that differ by a factor of ten.
TENTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Measure the engine and the Ray job against transformers' `generate` and OpenVINO GenAI on the same rows."""

    bundle: Path
    """Folder of a bundle in fp32."""
    reduced_bundle: Path | None = None
    """Folder of a bundle of the same checkpoint in reduced precision."""
    checkpoint: Path
    """Folder of the checkpoint that they were exported from."""
    against: tuple[Literal["hf", "openvino"], ...] = ("hf",)
    """Peers: transformers' `generate` in fp32 and bf16, OpenVINO GenAI in fp32 and as it chooses."""
    openvino: Path = Path("build/openvino")
    """Folder with OpenVINO's environment, `venv`, and the checkpoint as it takes it, `model`."""
    input: Path = DEMO
    """Parquet file of `id`, `image` and `prompt`."""
    rows: int = 64
    """Rows to answer; the input is repeated if it has fewer."""
    new_tokens: int = 32
    """Tokens of each answer; none ends sooner."""
    rounds: int = 3
    """Rounds of each, after one to warm up."""
    slots: int = DEFAULT_SLOTS
    """Rows that our decoder answers at a time."""
    ray_rows: int = 256
    """Rows of the Ray job; 0 leaves it out."""
    ten_times: bool = True
    """Measure what ten times the rows take of the Ray job, time and memory."""
    output: Path = Path("build/bench")
    """Folder for the figures."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: names the option and what to do.
        """
        for name in ("rows", "new_tokens", "rounds", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if "openvino" in self.against and not self.openvino_python.exists():
            raise ConfigError(f"--against openvino: {self.openvino_python} is missing; `make openvino` installs it")

    @property
    def bundles(self) -> dict[str, Path]:
        """Our contenders, and the bundle of each."""
        given = {FP32: self.bundle, REDUCED: self.reduced_bundle}
        return {name: bundle for name, bundle in given.items() if bundle is not None}

    @property
    def openvino_python(self) -> Path:
        """Interpreter of OpenVINO's environment."""
        return self.openvino / "venv" / "bin" / "python"


def bench(config: BenchConfig, console: Console) -> dict[str, Any]:
    """Measure, and return what goes into `bench.json`."""
    rows = _rows(config)
    with ExitStack() as stack:
        hosts = _hosts(config, stack)
        batches: dict[str, dict[int, float]] = {}
        for name, host in hosts.items():
            if name in config.bundles:
                continue
            batches[name] = host.call("choose_batch", rows)
            console.print(f"{name}: best at {_best(batches[name])} rows of {', '.join(map(str, batches[name]))}")
        equal = _check(hosts, rows)
        seconds: dict[str, list[float]] = {name: [] for name in hosts}
        stages: dict[str, list[dict[str, float]]] = {name: [] for name in hosts}
        for number in range(config.rounds):
            for name, host in hosts.items():
                seconds[name].append(host.seconds("answer", rows))
                stages[name].append(host.call("stages", rows))
            speeds = ", ".join(f"{name} {len(rows) / taken[-1]:.2f}" for name, taken in seconds.items())
            console.print(f"round {number + 1} of {config.rounds}, images/s: {speeds}")
        memory = {name: host.peak_memory() / 1e9 for name, host in hosts.items()}
        speed = {name: len(rows) / statistics.median(taken) for name, taken in seconds.items()}
        figures: dict[str, Any] = {
            "ratios": _ratios(speed),
            "images_per_second": speed,
            "tokens_per_second": {name: each * config.new_tokens for name, each in speed.items()},
            "stages_ms_per_image": {name: _medians(taken) for name, taken in stages.items()},
            "peak_memory_gb": memory,
            "best_batch": {name: _best(tried) for name, tried in batches.items()},
            "answers_equal_to_fp32": equal,
            "seconds": seconds,
            "batches_tried": batches,
        }
        best = max(config.bundles, key=lambda name: speed[name])
        ours = (config.bundles[best], config.slots, config.new_tokens)
        if config.ray_rows:
            _ray(figures, config, hosts[best], ours, rows, console)
    console.print("limits of the machine, and situations")
    _against_limits(figures, config, rows)
    engine = Ours(*ours)
    few = rows.part(0, 16)
    engine.answer(few)
    figures["ratios"] |= situations.skew(engine, few)
    figures["ratios"] |= {
        "four_prompts": situations.four_prompts(engine, few),
        "second_prompt": situations.second_prompt(engine, few),
    }
    return figures | _circumstances(config)


def _hosts(config: BenchConfig, stack: ExitStack) -> dict[str, Host]:
    """All contenders, each in its process."""
    made: list[tuple[str, str, str, tuple[Any, ...], Path | None]] = [
        (name, "ours", "Ours", (bundle, config.slots, config.new_tokens), None)
        for name, bundle in config.bundles.items()
    ]
    if "hf" in config.against:
        for name, dtype in ((HF_FP32, "float32"), (HF_BF16, "bfloat16")):
            arguments: tuple[Any, ...] = (config.checkpoint, dtype, config.bundle, config.new_tokens)
            made.append((name, "transformers_generate", "HuggingFace", arguments, None))
    if "openvino" in config.against:
        size = Bundle.load(config.bundle).manifest.layout.image_size
        for name, precision in ((OV_FP32, "f32"), (OV_OWN, None)):
            arguments = (config.openvino / "model", precision, size, config.new_tokens)
            made.append((name, "openvino_genai", "OpenVino", arguments, config.openvino_python))
    return {
        name: stack.enter_context(Host(name, f"benchmark.{module}", kind, *arguments, python=python))
        for name, module, kind, arguments, python in made
    }


def _check(hosts: dict[str, Host], rows: Rows) -> dict[str, list[int]]:
    """Answer once to warm up; how many answers of each are those of the reference, and out of how many.

    Raises:
        JobError: the contenders do not do the same work.
    """
    lengths = {name: host.call("prompt_tokens", rows.part(0, CHECKED_ROWS)) for name, host in hosts.items()}
    if any(found != lengths[FP32] for found in lengths.values()):
        raise JobError(f"rows are not of the same tokens for all, there is nothing to compare: {lengths}")
    answers = {name: host.call("answer", rows) for name, host in hosts.items()}
    reference = answers.get(HF_FP32, answers[FP32])
    equal = {name: sum(a == b for a, b in zip(found, reference, strict=True)) for name, found in answers.items()}
    for name, least in ((FP32, len(rows)), (OV_FP32, TIES * len(rows))):
        if equal.get(name, len(rows)) < least:
            raise JobError(f"only {equal[name]} of {len(rows)} answers of {name} are those of the reference in fp32")
    return {name: [count, len(rows)] for name, count in equal.items()}


def _ratios(speed: dict[str, float]) -> dict[str, float]:
    ours = max(speed[name] for name in (FP32, REDUCED) if name in speed)
    ratios: dict[str, float] = {}
    for key, plain, reduced in (("hf", HF_FP32, HF_BF16), ("openvino", OV_FP32, OV_OWN)):
        if plain in speed:
            ratios |= {f"{key}_fp32": speed[FP32] / speed[plain], key: ours / max(speed[plain], speed[reduced])}
    return ratios


def _ray(
    figures: dict[str, Any],
    config: BenchConfig,
    engine: Host,
    made_of: tuple[Any, ...],
    rows: Rows,
    console: Console,
) -> None:
    """The whole job against the engine alone, before and after, start-up excluded; and ten times the rows."""

    def job(count: int, *, memory: bool = False) -> dict[str, float]:
        console.print(f"Ray job of {count} rows")
        with Host("Ray job", "benchmark.ours", "Job", *made_of) as host:
            found: dict[str, float] = host.call("run", rows, count, memory)
            return found

    before = engine.seconds("answer", rows)
    figures["ray"] = found = job(config.ray_rows)
    alone = 2 * len(rows) / (before + engine.seconds("answer", rows))
    figures["ray"]["engine_images_per_second"] = alone
    figures["ratios"]["ray"] = found["steady_images_per_second"] / alone
    if config.ten_times:
        few, many = job(TENTH, memory=True), job(10 * TENTH, memory=True)
        figures["ten_times"] = [few, many]
        taken = [found["seconds"] - found["workers_seconds"] for found in (few, many)]
        figures["ratios"] |= {
            "rows_10x_time": taken[1] / taken[0],
            "rows_10x_memory": many["peak_memory"] / few["peak_memory"],
        }


def _against_limits(figures: dict[str, Any], config: BenchConfig, rows: Rows) -> None:
    """Shares of the measured matrix peak and memory bandwidth, of each of our bundles."""
    settings = AutoConfig.from_pretrained(config.checkpoint)
    bandwidth = limits.copy_bandwidth()
    found: dict[str, Any] = {"copy_gb_per_second": bandwidth / 1e9}
    for name, folder in config.bundles.items():
        bundle = Bundle.load(folder)
        manifest, took = bundle.manifest, figures["stages_ms_per_image"][name]
        tokens = len(RowLayout(bundle).row_ids(rows.prompts[0]))
        peak = limits.gemm_peak(manifest.vision_dtype)
        vision = limits.vision_operations(settings, manifest.layout) / (took["vision"] / 1e3)
        prefill = limits.prefill_operations(settings, tokens) / (took["prefill"] / 1e3)
        live = min(config.slots, len(rows))
        step = took["decode"] / 1e3 * live / (config.new_tokens - 1)
        read = limits.step_bytes(bundle, live, tokens + config.new_tokens // 2) / step
        found[name] = {
            "gemm_peak_gflops": peak / 1e9,
            "vision_peak": vision / peak,
            "prefill_peak": prefill / peak,
            "decode_bandwidth": read / bandwidth,
        }
    figures["limits"] = found
    figures["ratios"] |= {key: found[FP32][key] for key in ("vision_peak", "prefill_peak", "decode_bandwidth")}


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
    settings = CaptionConfig(bundle=config.bundle, input=(str(config.input),), output="")
    source = open_source(settings)
    tables = (
        table for unit in source.units() for table in read_unit(unit, source.columns, None, config.rows, Fetcher(()))
    )
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


def _best(tried: dict[int, float]) -> int:
    return max(tried, key=lambda size: tried[size])


def _medians(taken: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in taken) for name in taken[0]}


def _print(figures: dict[str, Any], console: Console) -> None:
    stages = figures["stages_ms_per_image"]
    names = list(next(iter(stages.values())))
    table = Table("", "images/s", "tokens/s", *(f"{name} ms" for name in names), "peak GB")
    for contender, speed in figures["images_per_second"].items():
        took = [f"{stages[contender][name]:.1f}" for name in names]
        tokens, memory = figures["tokens_per_second"][contender], figures["peak_memory_gb"][contender]
        table.add_row(contender, f"{speed:.2f}", f"{tokens:.0f}", *took, f"{memory:.2f}")
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
    ours = (FP32, REDUCED)
    return SVG.render(bars=[(name, each, round(380 * each / longest), name in ours) for name, each in speeds.items()])


def main() -> int:
    """Run the command."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        config = tyro.cli(BenchConfig)
        figures = bench(config, console)
    except (JobError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")
    (config.output / "bench.svg").write_text(_plot(figures))
    _print(figures, console)
    print(f"written to {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
