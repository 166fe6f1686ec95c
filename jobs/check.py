"""Check that this machine computes a bundle as PyTorch does, by the known answers in the bundle.

    python jobs/check.py BUNDLE

Prints each figure beside its bound. Every process that runs a bundle makes the same check when it starts, and refuses
to run if a figure is out of bounds.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from qvl_batch.bundle.known_answers import Figure, digits
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import Manifest
from qvl_batch.command_line import FAILED, exit_status, settings
from qvl_batch.config import Device, DeviceOption
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.errors import BundleError
from qvl_batch.runtime.devices import memory_on, resolve_device, resolve_vision_device, usable_cpus
from qvl_batch.vision.encoder import VisionEncoder

#: Decoder graphs by name, as options of `Decoder`.
DECODERS = {"decoder": {}, "guided decoder": {"guided": True}, "drawn decoder": {"guided": True, "drawn": True}}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """Check that this machine computes a bundle as PyTorch does, by the known answers in the bundle."""

    bundle: Annotated[str, tyro.conf.Positional]
    """Folder of the bundle that `python -m export` made, or its address."""
    device: DeviceOption = "auto"
    """Where the decoder runs. `auto` is the device that the bundle was exported for; another is refused."""
    vision_device: DeviceOption = "auto"
    """Where the vision tower runs. `auto` is a GPU for a tower in half precision, else the CPU."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A graph, the machine it ran on, its figures, and seconds to load and to run it."""

    graph: str
    machine: str
    figures: list[Figure]
    load_seconds: float
    run_seconds: float


def check(config: CheckConfig, bundle: Bundle) -> list[Checked]:
    """Run the known answers through all graphs of a job, and through the ones in fp32 if the bundle has them too.

    Raises:
        BundleError: it has no known answers, or a graph cannot be loaded.
        DeviceError: the device cannot be used here.
    """
    if bundle.manifest.tolerance is None:
        raise BundleError(
            f"{config.bundle} has no known answers, as it was exported with --skip-parity: export the checkpoint "
            "again without it"
        )
    decoder = resolve_device(config.device, bundle.manifest)
    vision = resolve_vision_device(config.vision_device, bundle.manifest)
    found = _check(bundle, vision, decoder)
    exact = bundle.in_fp32()
    return found + (_check(exact, "cpu", exact.manifest.device, " in fp32") if exact else [])


def _check(bundle: Bundle, vision: Device, decoder: Device, which: str = "") -> list[Checked]:
    threads = usable_cpus()
    return [
        _timed(f"vision{which}", lambda: VisionEncoder(bundle, threads, vision, prove=False)),
        *(
            _timed(f"{name}{which}", partial(_decoder, bundle, threads, decoder, **kind))
            for name, kind in DECODERS.items()
        ),
    ]


def _decoder(bundle: Bundle, threads: int, device: Device, *, guided: bool = False, drawn: bool = False) -> Decoder:
    return Decoder(bundle, 1, threads, memory=memory_on(device), guided=guided, drawn=drawn, prove=False)


def _timed(graph: str, load: Callable[[], VisionEncoder | Decoder]) -> Checked:
    began = time.perf_counter()
    loaded = load()
    ready = time.perf_counter()
    figures = loaded.figures()
    return Checked(graph, loaded.machine, figures, ready - began, time.perf_counter() - ready)


def show(config: CheckConfig, manifest: Manifest, found: list[Checked], console: Console) -> bool:
    """Print a table and a verdict; returns whether all figures are within their bounds."""
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    for line in (
        f"bundle    {config.bundle}: {manifest.source.name}, {manifest.towers}",
        f"exported  with {versions}",
        *(f"machine   {machine}" for machine in dict.fromkeys(checked.machine for checked in found)),
    ):
        console.print(line, markup=False, emoji=False, soft_wrap=True)
    table = Table("graph", "figure", "found", "allowed", "", "load, s", "run, s")
    for checked in found:
        for place, figure in enumerate(checked.figures):
            times = (f"{checked.load_seconds:.2f}", f"{checked.run_seconds:.2f}") if place == 0 else ("", "")
            bound = f"{'at least' if figure.at_least else 'at most'} {digits(figure.bound)}"
            mark = "✓" if figure.is_within else "✗"
            table.add_row(checked.graph, figure.name, digits(figure.found), bound, mark, *times)
    console.print(table)
    wrong = [checked for checked in found if not all(figure.is_within for figure in checked.figures)]
    for checked in wrong:
        console.print(f"wrong     {checked.graph}: this machine does not compute it as PyTorch does")
    if not wrong:
        console.print("right     this machine computes the bundle as PyTorch does, within the bounds of its precision")
    return not wrong


def work() -> int:
    """Check and show; returns the exit status."""
    config = settings(CheckConfig)
    bundle = Bundle.load(config.bundle)
    found = check(config, bundle)
    console = Console(width=None if sys.stdout.isatty() else 120)
    return 0 if show(config, bundle.manifest, found, console) else FAILED


def main() -> int:
    """Run the command; 0 if all is right, 1 if something is wrong or cannot be checked, 130 if it was stopped."""
    return exit_status("check", work)


if __name__ == "__main__":
    sys.exit(main())
