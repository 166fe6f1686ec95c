"""The whole export: a checkpoint in, a bundle out, or nothing.

The bundle is written to a temporary directory beside the output and renamed once everything,
the parity gate included, has passed.
"""

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from export.bundle_writer import BundleWriter
from export.calibrated import Calibrated, calibrate
from export.chat import chat_turn
from export.checkpoint import Checkpoint, load_checkpoint
from export.config import AUTO, ExportConfig, check_output, check_settings
from export.graphs import Traces, plain_decoder, plain_vision
from export.names import TOWERS, Tower
from export.precision import Precision, by_layers, check_mix, layers_of, products
from export.progress import Progress
from export.sample import read_sample, sha256_of
from export.stored_integers import stored_integers
from export.tool_graphs import ToolGraph, load_tool_graph, read_tool_graph
from qvl_batch.bundle.layout import Layout, Resolution
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import (
    FP32,
    HALVES,
    INTEGERS,
    Calibration,
    Dtype,
    Manifest,
    is_in,
)
from qvl_batch.config import Device
from qvl_batch.errors import ExportError

#: Fewest tokens that a contract must leave for prompt and answer.
LEAST_ROOM = 32
#: Longest row in tokens by default, for images of one size and for images at their own size.
FIXED_SEQ_LEN, NATIVE_SEQ_LEN = 1024, 4096
#: Share of a row that images at their own size leave to text by default.
TEXT_SHARE = 0.25


def export_bundle(config: ExportConfig, progress: Progress | None = None, traces: Traces | None = None) -> Manifest:
    """Export `config.checkpoint` to `config.output`.

    Args:
        config: what to export, and where to.
        progress: receives each step.
        traces: cache of the graphs that earlier exports traced; new ones are added.

    Raises:
        ExportError: the checkpoint or an option cannot be exported, or the parity gate failed.
    """
    check_settings(config)
    output = config.output.resolve()
    checkpoint = load_checkpoint(
        config.checkpoint, config.revision, config.adapter, ignore_extra=config.ignore_extra_weights
    )
    layout = plan_layout(checkpoint, config)
    traces, progress = traces or Traces(), progress or Progress()
    if checkpoint.weights.ignored:
        progress.say(
            f"note: left out, since they are not weights of the model: {', '.join(checkpoint.weights.ignored)}"
        )
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
        check_output(output, overwrite=config.overwrite)  # again, since an export can take hours
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
    """The towers whose integers are a tool's, which are in a graph or in the checkpoint.

    Raises:
        ExportError: one of them cannot be taken over.
    """
    found: dict[Tower, ToolGraph] = {}
    if config.dtype == "checkpoint":
        found["decoder"] = stored_integers(checkpoint.weights, _floats(config))
    for path in config.from_quantized:
        tower, model = load_tool_graph(path)
        if tower in found:
            other = "--dtype checkpoint" if config.dtype == "checkpoint" and tower == "decoder" else "another graph"
            raise ExportError(f"--from-quantized {path}: the {tower} is also that of {other}; give one of them")
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


def _precision(checkpoint: Checkpoint, config: ExportConfig, tools: Mapping[Tower, ToolGraph]) -> Precision:
    if config.recipe == AUTO:  # what it will be is measured
        return Precision()
    if config.recipe is not None:
        from export.recipe.record import read_recipe  # noqa: PLC0415  (takes a second to import)

        precision = read_recipe(Path(config.recipe), products(checkpoint.weights.skeleton))
        _check_options(precision, config, {})
        return precision
    dtype = _floats(config)
    if "decoder" in tools and config.dtype not in ("fp32", "checkpoint"):
        raise ExportError(f"--dtype {config.dtype}: the graph of --from-quantized says the precision of the decoder")
    if "vision" in tools and config.vision_dtype is not None:
        raise ExportError(
            f"--vision-dtype {config.vision_dtype}: the graph of --from-quantized says the vision tower's precision"
        )
    if config.from_quantized and (config.layers_dtype or config.fp32_layers or config.sample):
        raise ExportError("--layers-dtype, --fp32-layers and --sample are not possible with --from-quantized")
    made_for: Device = "cuda" if dtype in HALVES else "cpu"
    device = config.device or made_for
    if device != made_for and dtype != "fp32":
        raise ExportError(f"--dtype {config.dtype} is for --device {made_for}, not for {device}")
    vision_dtype = config.vision_dtype or dtype
    known = products(checkpoint.weights.skeleton, dtype, vision_dtype)
    dtypes: dict[Tower, Dtype] = {"decoder": dtype, "vision": vision_dtype}
    stored: dict[str, Dtype] = {}
    for tower, tool in tools.items():
        dtypes[tower] = tool.dtype
        stored |= {module: own for module, own in by_layers(tool.dtypes).items() if own != tool.dtype}
    asked = layers_of(config.layers_dtype, config.fp32_layers, known)
    # The innermost module counts, but what is asked for a layer counts more than what its products have.
    layers = {module: own for module, own in stored.items() if not is_in(module, asked)} | asked
    precision = Precision(dtypes["decoder"], dtypes["vision"], layers, device)
    _check_options(precision, config, stored if config.dtype == "checkpoint" else {})
    return precision


def _floats(config: ExportConfig) -> Dtype:
    """Dtype of the decoder; with --dtype checkpoint, of what has no integers.

    On a GPU, the scales of `MatMulNBits` have the type of its activations, and those of AWQ and GPTQ are in fp16.
    """
    if config.dtype != "checkpoint":
        return config.dtype
    return "fp16" if config.device == "cuda" else "fp32"


def _check_options(precision: Precision, config: ExportConfig, kept: Mapping[str, Dtype]) -> None:
    """Refuse options that do not go with a precision, of which `kept` is the checkpoint's own."""
    check_mix(precision, kept)
    reduced = {tower: precision.dtypes(tower) - {"fp32"} for tower in TOWERS}
    if config.with_vision_full and reduced["vision"]:
        found = ", ".join(sorted(reduced["vision"]))
        raise ExportError(f"--with-vision-full is for a vision tower in fp32, and this one is in {found}")
    if config.sample is not None and all(each.isdisjoint(INTEGERS) for each in reduced.values()):
        raise ExportError("--sample is for weights in integers: give --dtype, --vision-dtype or --layers-dtype too")
    if config.with_fp32 and not any(reduced.values()):
        raise ExportError("--with-fp32 needs a reduced --dtype or --vision-dtype: this bundle is in fp32 already")


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
