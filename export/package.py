"""The whole export: a checkpoint in, a bundle out, or nothing.

The bundle is written to a temporary directory beside the output and renamed once everything,
the parity gate included, has passed.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from export.bundle_writer import BundleWriter
from export.calibrated import Calibrated, calibrate
from export.chat import chat_turn
from export.checkpoint import Checkpoint, load_checkpoint
from export.graphs import Traces, plain_decoder, plain_vision
from export.names import TOWERS, Tower
from export.precision import Precision, check_mix, layers_of, products
from export.progress import Progress, ShownProgress
from export.sample import read_sample, sha256_of
from export.tool_graphs import ToolGraph, load_tool_graph, read_tool_graph
from qvl_batch.bundle.layout import Layout, Resolution
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import (
    FP32,
    HALVES,
    INTEGERS,
    MANIFEST,
    Calibration,
    Dtype,
    Manifest,
    Prefer,
)
from qvl_batch.command_line import exit_status, settings, stop_as_by_ctrl_c
from qvl_batch.config import Device, check_at_least_one
from qvl_batch.errors import ExportError, JobError

#: `--recipe` of one that is to be found.
AUTO = "auto"
#: Fewest tokens that a contract must leave for prompt and answer.
LEAST_ROOM = 32
#: Longest row in tokens by default, for images of one size and for images at their own size.
FIXED_SEQ_LEN, NATIVE_SEQ_LEN = 1024, 4096
#: Share of a row that images at their own size leave to text by default.
TEXT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Export a Qwen2.5-VL checkpoint to a bundle of ONNX graphs that qvl-batch runs."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of the checkpoint, or its id on the Hugging Face hub: Qwen/Qwen2.5-VL-3B-Instruct."""
    output: Path
    """Folder of the bundle to write. It must not exist yet."""
    revision: str | None = None
    """Of an id: branch, tag or commit. Without it, the main branch."""
    dtype: Dtype = "fp32"
    """Precision of the decoder. For a GPU: bf16 or fp16, with the residual stream in fp32. For a CPU: fp32; int8
    weights and activations (int8); int8 or int4 weights only (int8wo, int4wo)."""
    vision_dtype: Dtype | None = None
    """Precision of the vision tower. Without it, that of --dtype. In fp32 it runs on CPU and GPU."""
    device: Device | None = None
    """Device that the decoder is made for. Without it, cuda for bf16 and fp16, else cpu; cuda also works with fp32."""
    fp32_layers: tuple[str, ...] = ()
    """Layers or single products to leave in fp32, by their names in graphs and in a comparison's layer plot:
    decoder.layers.3, or decoder.layers.3.mlp.down."""
    layers_dtype: tuple[str, ...] = ()
    """Precision of layers or single products, as MODULE=DTYPE; a star stands for any number of a layer:
    'decoder.layers.*.mlp.down=int8wo' decoder.head=fp32. Of two for the same module, the later one counts."""
    with_fp32: bool = False
    """Add the checkpoint in fp32 to a bundle of reduced precision: rows that give values that are not finite, or a
    repetitive answer, are then run again in fp32."""
    with_vision_full: bool = False
    """Add `vision_full.onnx` to a bundle whose vision tower is in fp32: the same in standard operators, for tools that
    quantize. The decoder has such a graph, `decoder_full.onnx`, in any case."""
    sample: Path | None = None
    """Rows as those that the bundle will answer: parquet, or a folder that `python -m export.calibration` wrote. Then
    weights in integers are rounded so that the products of these rows change least, and channels that are much larger
    than others are smoothed into weights. Without it, weights are rounded to nearest."""
    sample_rows: int = 64
    """Use only the first SAMPLE_ROWS rows of the sample."""
    recipe: str | None = None
    """`auto`: measure every layer in every integer precision on the sample, and choose each one's so that --max-drift
    and --min-agreement hold at the least time or size on this machine. `recipe.html` in the bundle shows what was
    measured. Or the `recipe.json` of such a bundle, to apply it again."""
    max_drift: float | None = None
    """With --recipe auto: largest error of features and logits of any row of the sample, relative to their largest
    magnitude."""
    min_agreement: float = 0.0
    """With --recipe auto: share of the sample's answers that must be equal to those in fp32, token for token."""
    prefer: Prefer = "speed"
    """With --recipe auto: what the bundle shall have least of: seconds for a row, or bytes."""
    from_quantized: tuple[Path, ...] = ()
    """Graphs that a tool made of the plain graphs of this checkpoint (`decoder_full.onnx`, `vision_full.onnx`): the
    bundle has their integers, scales and zero points. The other tower is as --dtype or --vision-dtype says."""
    max_seq_len: int | None = None
    """Longest row in tokens: text, images and answer together. Without it, 1024, or 4096 for images at their own
    size."""
    image_size: int | Literal["native"] = 672
    """Side in pixels of the square that every image is fitted to, a multiple of 28; or `native`: images keep their own
    size and proportions, as in transformers."""
    min_pixels: int | None = None
    """With --image-size native: smaller images are enlarged. Without it, as the checkpoint's image processor does."""
    max_pixels: int | None = None
    """With --image-size native: larger images are reduced. Without it, as many as leave a quarter of --max-seq-len to
    text, and at most those of the checkpoint's image processor."""
    overwrite: bool = False
    """Replace a bundle that is already at the output."""
    skip_parity: bool = False
    """Skip the comparison with PyTorch, the parity gate; the manifest records that it was skipped."""


def export_bundle(config: ExportConfig, progress: Progress | None = None, traces: Traces | None = None) -> Manifest:
    """Export `config.checkpoint` to `config.output`.

    Args:
        config: what to export, and where to.
        progress: receives each step.
        traces: cache of the graphs that earlier exports traced; new ones are added.

    Raises:
        ExportError: the checkpoint or an option cannot be exported, or the parity gate failed.
    """
    output = config.output.resolve()
    _check_output(output, overwrite=config.overwrite)
    _check_recipe(config)
    check_at_least_one(config, "sample_rows")
    checkpoint = load_checkpoint(config.checkpoint, config.revision)
    layout = plan_layout(checkpoint, config)
    traces, progress = traces or Traces(), progress or Progress()
    tools = _tool_graphs(checkpoint, layout, config, traces, progress)
    precision = _precision(checkpoint, config, tools)
    output.parent.mkdir(parents=True, exist_ok=True)
    writer = BundleWriter(checkpoint, layout, traces, progress)
    with _staging(output) as staging:
        bundle = writer.begin(staging)
        calibrated = Calibrated({key: made for tool in tools.values() for key, made in tool.rounded.items()})
        gate = not config.skip_parity
        if config.recipe == AUTO:
            bundle, calibrated, precision = _recipe(bundle, writer, config, staging / "recipe")
        elif config.sample is not None:
            bundle, calibrated = _calibration(bundle, writer, precision, config)
        bundle = writer.fill(bundle, precision, calibrated, with_vision_full=config.with_vision_full, gate=gate)
        del calibrated
        if config.with_fp32 and config.recipe == AUTO:
            (staging / "recipe" / FP32).rename(staging / FP32)
        elif config.with_fp32:
            writer.write(staging / FP32, Precision(), Calibrated(), gate=gate)
        shutil.rmtree(staging / "recipe", ignore_errors=True)
        manifest = writer.finish(bundle).manifest
        _check_output(output, overwrite=config.overwrite)  # again, since an export can take hours
        if output.exists():
            shutil.rmtree(output)
        staging.rename(output)
    return manifest


def plan_layout(checkpoint: Checkpoint, config: ExportConfig) -> Layout:
    """The layout contract of a checkpoint.

    Raises:
        ExportError: the image size does not fit the patches or the processor, or the contract
            leaves no room for prompt and answer.
    """
    model = checkpoint.config
    head, bridge, tail = chat_turn(checkpoint.tokenizer, model.image_token_id)
    native = config.image_size == "native"
    longest = model.text_config.max_position_embeddings
    max_seq_len = config.max_seq_len or (min(NATIVE_SEQ_LEN, longest) if native else FIXED_SEQ_LEN)
    if max_seq_len > longest:
        raise ExportError(
            f"--max-seq-len {max_seq_len} is more than the {longest} positions the checkpoint was made for"
        )
    text = len(head) + len(bridge) + len(tail)
    resolution = _native(checkpoint, config, max_seq_len - text) if native else _square(checkpoint, config)
    layout = Layout(
        resolution=resolution,
        max_seq_len=max_seq_len,
        image_token_id=model.image_token_id,
        head_ids=head,
        bridge_ids=bridge,
        tail_ids=tail,
    )
    if layout.room < LEAST_ROOM:
        raise ExportError(
            f"--max-seq-len {max_seq_len} leaves {layout.room} tokens for prompt and answer beside "
            f"{resolution.max_tokens} of image and {text} of the template; at least {LEAST_ROOM} are needed"
        )
    return layout


def _square(checkpoint: Checkpoint, config: ExportConfig) -> Resolution:
    size, unit, processor = config.image_size, _unit(checkpoint), checkpoint.image_processor.size
    assert isinstance(size, int)
    for option, value in (("--min-pixels", config.min_pixels), ("--max-pixels", config.max_pixels)):
        if value is not None:
            raise ExportError(f"{option} is for --image-size native; here every image has {size} x {size} pixels")
    if size <= 0 or size % unit:
        raise ExportError(f"--image-size {size} is not a multiple of {unit}")
    if not processor["shortest_edge"] <= size**2 <= processor["longest_edge"]:
        largest = unit * (math.isqrt(processor["longest_edge"]) // unit)
        possible = largest and largest**2 >= processor["shortest_edge"]
        raise ExportError(
            f"--image-size {size}: the checkpoint's image processor would resize it, as it takes "
            f"{processor['shortest_edge']} to {processor['longest_edge']} pixels: give "
            f"{f'at most --image-size {largest}, or ' if possible else ''}--image-size native"
        )
    return Resolution(unit, size, size**2, size**2)


def _native(checkpoint: Checkpoint, config: ExportConfig, room: int) -> Resolution:
    """Sizes of images that keep their own, where the template leaves `room` tokens."""
    unit, processor = _unit(checkpoint), checkpoint.image_processor.size
    default = min(processor["longest_edge"], int(room * (1 - TEXT_SHARE)) * unit**2)
    least = config.min_pixels or processor["shortest_edge"]
    most = config.max_pixels or default
    if not unit**2 <= least <= most:
        raise ExportError(
            f"--min-pixels {least} and --max-pixels {most}: the first must be at least {unit**2}, the pixels of one "
            "image token, and at most the second"
        )
    return Resolution(unit, None, least, most)


def _unit(checkpoint: Checkpoint) -> int:
    """Side in pixels of the square that becomes one image token."""
    vision = checkpoint.config.vision_config
    return int(vision.patch_size * vision.spatial_merge_size)


def _tool_graphs(
    checkpoint: Checkpoint, layout: Layout, config: ExportConfig, traces: Traces, progress: Progress
) -> dict[Tower, ToolGraph]:
    """The graphs of tools, by tower.

    Raises:
        ExportError: one of them cannot be taken over.
    """
    found: dict[Tower, ToolGraph] = {}
    for path in config.from_quantized:
        tower, model = load_tool_graph(path)
        if tower in found:
            raise ExportError(f"--from-quantized {path}: there are two graphs of the {tower}; give one of each tower")
        processor = checkpoint.image_processor
        if tower == "vision":
            plain = plain_vision(checkpoint.weights, layout, processor.image_mean, processor.image_std, traces)
        else:
            plain = plain_decoder(checkpoint.weights, layout, traces)
        found[tower] = read_tool_graph(path, model, plain)
        if found[tower].saturates:
            progress.say(
                f"note: {path} has int8 weights whose products saturate on x86 without VNNI; a worker there refuses "
                "the bundle if it matters (--dtype int8 makes weights that do not)"
            )
    return found


def _check_recipe(config: ExportConfig) -> None:
    """Refuse options that a recipe does not go with, and those of a recipe without one."""
    of_auto = {
        "--max-drift": config.max_drift is not None,
        "--min-agreement": bool(config.min_agreement),
        "--prefer": config.prefer != "speed",
    }
    given = next((option for option, is_given in of_auto.items() if is_given), None)
    if config.recipe != AUTO and given:
        raise ExportError(f"{given} is for --recipe auto")
    if config.recipe is None:
        return
    others = {
        "--dtype": config.dtype != "fp32",
        "--vision-dtype": config.vision_dtype is not None,
        "--layers-dtype": bool(config.layers_dtype),
        "--fp32-layers": bool(config.fp32_layers),
        "--from-quantized": bool(config.from_quantized),
        "--device cuda": config.device == "cuda",
    }
    other = next((option for option, is_given in others.items() if is_given), None)
    if other:
        raise ExportError(
            f"{other} is not possible with --recipe: a recipe says the precision of all layers, on the CPU"
        )
    if config.recipe == AUTO:
        if config.sample is None or config.max_drift is None:
            raise ExportError("--recipe auto needs --sample and --max-drift: rows to measure on, and what to keep")
        if config.with_vision_full:
            raise ExportError("--with-vision-full is for a vision tower in fp32, and --recipe auto may reduce it")
        if not config.max_drift > 0 or not 0 <= config.min_agreement <= 1:
            raise ExportError("--max-drift must be more than 0, and --min-agreement from 0 to 1")


def _precision(checkpoint: Checkpoint, config: ExportConfig, tools: Mapping[Tower, ToolGraph]) -> Precision:
    if config.recipe == AUTO:  # what it will be is measured
        return Precision()
    if config.recipe is not None:
        from export.recipe.record import read_recipe  # noqa: PLC0415  (takes a second to import)

        precision = read_recipe(Path(config.recipe), products(checkpoint.weights.skeleton))
        _check_options(precision, config)
        return precision
    if "decoder" in tools and config.dtype != "fp32":
        raise ExportError(f"--dtype {config.dtype}: the graph of --from-quantized says the precision of the decoder")
    if "vision" in tools and config.vision_dtype is not None:
        raise ExportError(
            f"--vision-dtype {config.vision_dtype}: the graph of --from-quantized says the vision tower's precision"
        )
    if tools and (config.layers_dtype or config.fp32_layers or config.sample):
        raise ExportError("--layers-dtype, --fp32-layers and --sample are not possible with --from-quantized")
    made_for: Device = "cuda" if config.dtype in HALVES else "cpu"
    device = config.device or made_for
    if device != made_for and config.dtype != "fp32":
        raise ExportError(f"--dtype {config.dtype} is for --device {made_for}, not for {device}")
    vision_dtype = config.vision_dtype or config.dtype
    known = products(checkpoint.weights.skeleton, config.dtype, vision_dtype)
    layers = layers_of(config.layers_dtype, config.fp32_layers, known)
    dtypes: dict[Tower, Dtype] = {"decoder": config.dtype, "vision": vision_dtype}
    for tower, tool in tools.items():
        dtypes[tower] = tool.dtype
        layers |= {product: dtype for product, dtype in tool.dtypes.items() if dtype != tool.dtype}
    precision = Precision(dtypes["decoder"], dtypes["vision"], layers, device)
    _check_options(precision, config)
    return precision


def _check_options(precision: Precision, config: ExportConfig) -> None:
    """Refuse options that do not go with a precision."""
    check_mix(precision)
    reduced = {tower: precision.dtypes(tower) - {"fp32"} for tower in TOWERS}
    if config.with_vision_full and reduced["vision"]:
        found = ", ".join(sorted(reduced["vision"]))
        raise ExportError(f"--with-vision-full is for a vision tower in fp32, and this one is in {found}")
    if config.sample is not None and all(each.isdisjoint(INTEGERS) for each in reduced.values()):
        raise ExportError("--sample is for weights in integers: give --dtype, --vision-dtype or --layers-dtype too")
    if config.with_fp32 and not any(reduced.values()):
        raise ExportError("--with-fp32 needs a reduced --dtype or --vision-dtype: this bundle is in fp32 already")


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a bundle and may be overwritten."""
    if not output.exists():
        return
    if not overwrite:
        raise ExportError(f"{output} exists: give another --output, or --overwrite to replace it")
    if not (output / MANIFEST).is_file():
        raise ExportError(f"{output} exists and is not a bundle, so it is not overwritten: give another --output")


def _recipe(
    bundle: Bundle, writer: BundleWriter, config: ExportConfig, folder: Path
) -> tuple[Bundle, Calibrated, Precision]:
    """Find a recipe on the sample; returns the bundle that records it, too."""
    # It takes a second to import, and few exports need it.
    from export.recipe.page import write_recipe  # noqa: PLC0415
    from export.recipe.record import in_manifest  # noqa: PLC0415
    from export.recipe.search import find_recipe  # noqa: PLC0415
    from export.recipe.trial import Goal  # noqa: PLC0415

    assert config.sample is not None
    assert config.max_drift is not None
    goal = Goal(config.max_drift, config.min_agreement, config.prefer)
    rows = read_sample(config.sample, config.sample_rows, bundle, writer.progress.say)
    folder.mkdir()
    recipe, calibrated = find_recipe(writer, rows, goal, folder, gate=not config.skip_parity)
    writer.progress.say(str(recipe))
    write_recipe(recipe, bundle.manifest.source.name, bundle.path)
    calibration = Calibration(len(rows), sha256_of(rows))
    manifest = replace(bundle.manifest, calibration=calibration, recipe=in_manifest(recipe))
    return replace(bundle, manifest=manifest), calibrated, recipe.precision


def _calibration(
    bundle: Bundle, writer: BundleWriter, precision: Precision, config: ExportConfig
) -> tuple[Bundle, Calibrated]:
    """Calibrate the rounding of weights on the sample; returns the bundle that records it, too."""
    assert config.sample is not None
    rows = read_sample(config.sample, config.sample_rows, bundle, writer.progress.say)
    calibrated = calibrate(
        writer.checkpoint,
        writer.layout,
        rows,
        lambda product: {precision.of(product)},
        writer.progress,
        (lambda _: INTEGERS) if config.recipe else None,  # as when the recipe was found
    )
    calibration = Calibration(len(rows), sha256_of(rows))
    return replace(bundle, manifest=replace(bundle.manifest, calibration=calibration)), calibrated


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A temporary directory beside `output`, which is removed afterwards unless it was renamed."""
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    staging.chmod(0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def work() -> int:
    """Export and print a summary; returns the exit status."""
    config = settings(ExportConfig, prog="python -m export")
    manifest = export_bundle(config, ShownProgress(Console()))
    size = sum(file.size for file in manifest.files.values())
    layout, resolution = manifest.layout, manifest.layout.resolution
    images = (
        f"images of {resolution.min_pixels:,} to {resolution.max_pixels:,} pixels, at most {resolution.max_tokens}"
        if resolution.is_native
        else f"{resolution.max_tokens} of them for an image"
    )
    print(f"{config.output}: {size / 1e6:,.1f} MB, rows of up to {layout.max_seq_len} tokens, {images}")
    return 0


def main() -> int:
    """Run `python -m export`; 0 if there is a bundle, 1 if not, 130 if it was stopped."""
    stop_as_by_ctrl_c()  # so that a stopped export removes its temporary directory
    return exit_status("export", work, stopped=lambda: "no bundle was written", expected=(JobError, OSError))
