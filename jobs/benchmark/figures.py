"""Shared by the benches on CPU and GPU: input rows, rounds, a table, a plot and the file of figures."""

import itertools
import json
import platform
import statistics
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from benchmark.rows import Rows
from qvl_batch.columns import IMAGES, MESSAGES
from qvl_batch.config import CaptionConfig
from qvl_batch.conversation import from_json
from qvl_batch.errors import JobError
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit
from qvl_batch.input.source import open_source
from qvl_batch.report.summary import installed_versions
from qvl_batch.runtime.devices import processor, usable_cpus

SVG = Environment(autoescape=True).from_string("""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {{ 40 * bars | length + 40 }}" font-family="system-ui, sans-serif" font-size="14">
<rect width="100%" height="100%" fill="#fff"/><text x="12" y="24" font-weight="bold">images a second</text>
{% for name, speed, width, ours in bars %}<text x="12" y="{{ 40 * loop.index0 + 60 }}">{{ name }}</text><rect x="170" y="{{ 40 * loop.index0 + 43 }}" width="{{ width }}" height="24" rx="3" fill="{{ '#17694a' if ours else '#9a958c' }}"/><text x="{{ width + 178 }}" y="{{ 40 * loop.index0 + 60 }}">{{ "%.2f" | format(speed) }}</text>
{% endfor %}</svg>
""")  # noqa: E501
DEMO = Path(__file__).parents[2] / "datasets" / "demo" / "questions.parquet"


class Contender(Protocol):
    """Answers rows in its own process: see `Host`."""

    def call(self, method: str, *args: Any) -> Any: ...  # noqa: D102
    def seconds(self, method: str, *args: Any) -> float: ...  # noqa: D102


def read_rows(bundle: Path, path: Path, count: int, output: Path) -> Rows:
    """The first `count` rows of a file that have one image and a prompt, repeated if there are fewer.

    Args:
        bundle: folder of the bundle that answers them.
        path: the parquet file.
        count: number of rows to return.
        output: folder for the figures, which is never input, like the output of a job.

    Raises:
        JobError: no row has both.
    """
    source = open_source(CaptionConfig(bundle=str(bundle), input=(str(path),), output=str(output)))
    tables = (table for unit in source.units() for table in read_unit(unit, source.columns, None, count, Fetcher(())))
    pairs = [
        (images[0], _prompt(messages))
        for table in tables
        for images, messages in zip(table[IMAGES].to_pylist(), table[MESSAGES].to_pylist(), strict=True)
        if images is not None and len(images) == 1 and _prompt(messages).strip()
    ]
    if not pairs:
        raise JobError(f"{path} has no row with one image and a prompt")
    chosen = list(itertools.islice(itertools.cycle(pairs), count))
    return Rows([image for image, _ in chosen], [prompt for _, prompt in chosen])


def _prompt(messages: str) -> str:
    """Text of the user's last message."""
    return next((message.text for message in reversed(from_json(messages)) if message.role == "user"), "")


def measure(
    hosts: Mapping[str, Contender], rows: Rows, rounds: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, list[dict[str, float]]]]:
    """Answer rows and measure stages in alternating rounds; returns seconds and stages of each contender and round."""
    seconds: dict[str, list[float]] = {name: [] for name in hosts}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in hosts}
    for number in range(rounds):
        for name, host in hosts.items():
            seconds[name].append(host.seconds("answer", rows))
            stages[name].append(host.call("stages", rows))
        speeds = ", ".join(f"{name} {len(rows) / taken[-1]:.2f}" for name, taken in seconds.items())
        console.print(f"round {number + 1} of {rounds}, images/s: {speeds}")
    return seconds, stages


def choose_batch(name: str, host: Contender, rows: Rows, console: Console) -> dict[int, float]:
    """Let a peer try batch sizes and keep the fastest; returns images/s of each."""
    tried: dict[int, float] = host.call("choose_batch", rows)
    console.print(f"{name}: best batch size {best_batch(tried)} of {', '.join(map(str, tried))}")
    return tried


def best_batch(tried: dict[int, float]) -> int:
    """The batch size with the highest speed."""
    return max(tried, key=lambda size: tried[size])


def medians(taken: list[dict[str, float]]) -> dict[str, float]:
    """Medians of figures by name."""
    return {name: statistics.median(each[name] for each in taken) for name in taken[0]}


def circumstances(config: Any, packages: Collection[str], **more: str) -> dict[str, Any]:
    """Machine, versions and settings of a measurement."""
    return {
        "machine": f"{platform.machine()}, {usable_cpus()} CPUs, {processor()}",
        **more,
        "versions": installed_versions(packages),
        "settings": {name: str(value) for name, value in asdict(config).items()},
    }


def keep(figures: dict[str, Any], output: Path) -> None:
    """Write `bench.json`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "bench.json").write_text(json.dumps(figures, indent=1) + "\n")


def write(figures: dict[str, Any], ours: Collection[str], output: Path) -> None:
    """Write `bench.json`, and, if there are contenders, `bench.svg`, in which bars of `ours` have another colour."""
    keep(figures, output)
    if "images_per_second" in figures:
        (output / "bench.svg").write_text(_plot(figures["images_per_second"], ours))


def show(figures: dict[str, Any], console: Console) -> None:
    """Print a table of contenders, if there are any, and ratios as lines."""
    if "images_per_second" in figures:
        _show_contenders(figures, console)
    show_ratios(figures["ratios"], console)


def _show_contenders(figures: dict[str, Any], console: Console) -> None:
    stages = figures["stages_ms_per_image"]
    names = list(next(iter(stages.values())))
    table = Table("", "images/s", "tokens/s", *(f"{name} ms" for name in names), "peak GB")
    for contender, speed in figures["images_per_second"].items():
        took = [f"{stages[contender][name]:.1f}" if contender in stages else "" for name in names]
        tokens, memory = figures["tokens_per_second"][contender], figures["peak_memory_gb"][contender]
        table.add_row(contender, f"{speed:.2f}", f"{tokens:.0f}", *took, f"{memory:.2f}")
    console.print(table)


def show_ratios(ratios: dict[str, float], console: Console) -> None:
    """Print a line for each ratio."""
    for name, ratio in ratios.items():
        console.print(f"{name:<18} {ratio:.2f}")


def _plot(speeds: dict[str, float], ours: Collection[str]) -> str:
    """Bars of images a second."""
    longest = max(speeds.values())
    return SVG.render(bars=[(name, each, round(380 * each / longest), name in ours) for name, each in speeds.items()])
