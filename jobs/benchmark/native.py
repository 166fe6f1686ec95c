"""A native bundle against the bundle of the same checkpoint that takes squares, and against peers.

Our two bundles answer the same squares. On images of many sizes, the native bundle is compared with peers, and its
image tokens per second with those of the other bundle on squares. All are in fp32, and take turns in each round.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from benchmark import limits
from benchmark.bundle_rows import BundleRows
from benchmark.contenders import FP32, HF_FP32, NATIVE, OV_FP32, PEERS, Starter, check_equal_work
from benchmark.figures import Contender, best_batch, choose_batch, medians
from benchmark.host import Host
from benchmark.image_sets import ImageSet, mixed, mixed_sizes, squares
from benchmark.rows import Rows
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import Manifest, read_manifest
from qvl_batch.errors import ConfigError

#: Added to the name of a contender for its figures on the mix of sizes.
ON_MIXED = ", mixed sizes"


def check_pair(fixed: Path, native: Path) -> None:
    """Refuse bundles that cannot be compared.

    Raises:
        BundleError: one of them is no bundle.
        ConfigError: names the option and what to do.
    """
    one, other = read_manifest(fixed), read_manifest(native)
    if one.layout.resolution.is_native:
        raise ConfigError(f"--bundle {fixed} does not take squares: with --native-bundle, give one that does")
    if not other.layout.resolution.is_native:
        raise ConfigError(f"--native-bundle {native} takes squares: export it with --image-size native")
    if other.source.sha256 != one.source.sha256:
        raise ConfigError(f"--native-bundle {native} is not of the same checkpoint as --bundle: export both again")
    for option, path, manifest in (("--bundle", fixed, one), ("--native-bundle", native, other)):
        if not _is_fp32(manifest):
            raise ConfigError(f"{option} {path} is not in fp32, in which native bundles are compared: export it again")
    mixed_sizes(1, other.layout.resolution, one.layout.resolution.max_tokens)


def _is_fp32(manifest: Manifest) -> bool:
    return manifest.dtype == manifest.vision_dtype == "fp32"


def compared(
    start: Starter, bundles: tuple[Path, Path], against: Sequence[str], rows: Rows, rounds: int, console: Console
) -> tuple[dict[str, Any], dict[str, float]]:
    """Compare.

    Args:
        start: starts contenders.
        bundles: one that takes squares, and a native one.
        against: names of peers to compare on the mix of sizes.
        rows: rows whose images are used.
        rounds: rounds to measure.
        console: says what goes on.

    Returns:
        Figures, and ratios by name.

    Raises:
        JobError: the contenders do not do the same work.
    """
    fixed, native = bundles
    square, any_size = (read_manifest(bundle).layout.resolution for bundle in bundles)
    sets = {"squares": squares(rows, square), "mixed": mixed(rows, any_size, square.max_tokens)}
    ours = {FP32: start.ours(FP32, fixed), NATIVE: start.ours(NATIVE, native)}
    peers: dict[str, Host] = {}
    if "hf" in against:
        peers[HF_FP32] = start.transformers(HF_FP32, native)
    if "openvino" in against:
        peers[OV_FP32] = start.openvino_genai(OV_FP32, any_size)
    mix = {NATIVE: ours[NATIVE], **peers}
    tried = {
        _on_mixed(name): choose_batch(_on_mixed(name), peer, sets["mixed"].rows, console)
        for name, peer in peers.items()
    }
    equal = check_equal_work(ours, sets["squares"].rows)
    # Each row of the mix has another number of tokens.
    found = check_equal_work(mix, sets["mixed"].rows, counted=len(rows))
    runs = {name: (host, sets["squares"]) for name, host in ours.items()}
    runs |= {_on_mixed(name): (host, sets["mixed"]) for name, host in mix.items()}
    figures, ratios = _measured(runs, rounds, console)
    figures |= {
        "operations_per_image_token": _operations(start.checkpoint, native, sets),
        "mean_image_tokens": {name: images.image_tokens / len(rows) for name, images in sets.items()},
        "peak_memory_gb": {name: host.peak_memory() / 1e9 for name, host in (ours | peers).items()},
        "best_batch": {name: best_batch(sizes) for name, sizes in tried.items()},
        "answers_equal_to_reference": equal | {_on_mixed(name): count for name, count in found.items()},
        "batches_tried": tried,
    }
    return figures, ratios


def _operations(checkpoint: Path, bundle: Path, sets: Mapping[str, ImageSet]) -> dict[str, float]:
    """Operations of vision and prefill by set. Attention makes them grow faster than the tokens of an image."""
    config = AutoConfig.from_pretrained(checkpoint)
    as_seen = BundleRows(Bundle.load(bundle))

    def of_set(images: ImageSet) -> float:
        sizes, lengths = as_seen.work(images.rows)
        row = limits.vision_operations(config, sizes) + limits.prefill_operations(config, lengths)
        return len(sizes) * row / images.image_tokens

    return {name: of_set(images) for name, images in sets.items()}


def _on_mixed(name: str) -> str:
    return name + ON_MIXED


def _measured(
    runs: Mapping[str, tuple[Contender, ImageSet]], rounds: int, console: Console
) -> tuple[dict[str, Any], dict[str, float]]:
    """Answer in rounds in which all take turns; and the stages of our bundles."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    stages: dict[str, list[dict[str, float]]] = {FP32: [], NATIVE: [], _on_mixed(NATIVE): []}
    for number in range(rounds):
        for name, (host, images) in runs.items():
            seconds[name].append(host.seconds("answer", images.rows))
            if name in stages:
                stages[name].append(host.call("stages", images.rows))
        speeds = ", ".join(f"{name} {len(runs[name][1].rows) / taken[-1]:.2f}" for name, taken in seconds.items())
        console.print(f"round {number + 1} of {rounds}, images/s: {speeds}")
    took = {name: statistics.median(taken) for name, taken in seconds.items()}
    speed = {name: len(images.rows) / took[name] for name, (_, images) in runs.items()}
    image_tokens = {name: images.image_tokens / took[name] for name, (_, images) in runs.items()}
    figures = {
        "images_per_second": speed,
        "image_tokens_per_second": image_tokens,
        "stages_ms_per_image": {name: medians(taken) for name, taken in stages.items()},
        "seconds": seconds,
    }
    return figures, ratios_of(speed, image_tokens)


def ratios_of(speed: dict[str, float], image_tokens: dict[str, float]) -> dict[str, float]:
    """The native bundle over what it is compared with.

    Args:
        speed: images/s of each contender, on squares, and with `ON_MIXED` after its name, on the mix.
        image_tokens: image tokens/s of the same.
    """
    ratios = {
        "native_over_fixed": speed[NATIVE] / speed[FP32],
        "mixed_over_fixed": image_tokens[_on_mixed(NATIVE)] / image_tokens[FP32],
    }
    theirs = {f"{key}_mixed": speed.get(_on_mixed(name)) for key, (name, _) in PEERS.items()}
    return ratios | {key: speed[_on_mixed(NATIVE)] / each for key, each in theirs.items() if each}
