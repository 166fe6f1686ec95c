"""Settings of an export: one frozen dataclass that is also the command line, and what can be refused without torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from export.adapter_files import adapter_file, adapter_settings
from export.checkpoint_files import check_folder
from export.hub import is_id
from qvl_batch.bundle.manifest import MANIFEST, Dtype, Prefer
from qvl_batch.config import Device, check_at_least_one
from qvl_batch.errors import ExportError

#: `--recipe` of one that is to be found.
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Export a Qwen2.5-VL checkpoint to a bundle of ONNX graphs that qvl-batch runs."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of the checkpoint, or its id on the Hugging Face hub: Qwen/Qwen2.5-VL-3B-Instruct."""
    output: Path
    """Folder of the bundle to write. It must not exist yet."""
    revision: str | None = None
    """Of an id: branch, tag or commit. Without it, the main branch."""
    adapter: Path | None = None
    """Folder of an adapter, as peft saves it, to merge into the weights: of LoRA, or of trained tokens."""
    ignore_extra_weights: bool = False
    """Leave out tensors of the checkpoint that are not weights of the model, such as another head."""
    dtype: Dtype | Literal["checkpoint"] = "fp32"
    """Precision of the decoder. For a GPU: bf16 or fp16, with the residual stream in fp32. For a CPU: fp32; int8
    weights and activations (int8); int8 or int4 weights only (int8wo, int4wo). For either: the integers that the
    checkpoint has of AWQ or GPTQ (checkpoint), on a CPU with all else in fp32, with --device cuda in fp16."""
    vision_dtype: Dtype | None = None
    """Precision of the vision tower. Without it, that of --dtype; with --dtype checkpoint, fp32 or fp16 as all that has
    no integers. In fp32 it runs on CPU and GPU."""
    device: Device | None = None
    """Device that the decoder is made for. Without it, cuda for bf16 and fp16, else cpu; cuda also works with fp32 and
    checkpoint."""
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


def check_settings(config: ExportConfig) -> None:
    """Refuse what cannot be exported, as far as it can be seen without reading weights.

    Raises:
        ExportError: names the option or the file.
    """
    check_output(config.output, overwrite=config.overwrite)
    _check_recipe(config)
    check_at_least_one(config, "sample_rows")
    if config.dtype == "checkpoint" and config.adapter is not None:
        raise ExportError("--dtype checkpoint keeps integers, to which --adapter cannot be added: give another --dtype")
    if config.dtype == "checkpoint" and config.sample is not None:
        raise ExportError("--sample is for weights that are rounded, and --dtype checkpoint keeps those that there are")
    if not is_id(config.checkpoint):
        check_folder(config.checkpoint)
    if config.adapter is not None:
        adapter_settings(config.adapter)
        adapter_file(config.adapter)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a bundle and may be overwritten."""
    if not output.exists():
        return
    if not overwrite:
        raise ExportError(f"{output} exists: give another --output, or --overwrite to replace it")
    if not (output / MANIFEST).is_file():
        raise ExportError(f"{output} exists and is not a bundle, so it is not overwritten: give another --output")


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
