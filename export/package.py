"""The whole export: a checkpoint in, a bundle out, or nothing.

The bundle is written to a temporary directory beside the output and renamed once everything,
the parity gate included, has passed.
"""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from export.chat import chat_turn
from export.checkpoint import Checkpoint, load_checkpoint
from export.graphs import Precision, Traces, export_decoders, export_vision, graph_spec, layer_names
from export.parity import check_contract, check_parity
from export.progress import Progress, ShownProgress
from export.proof import known_answers, tolerance_of
from qvl_batch.bundle.layout import Layout
from qvl_batch.bundle.manifest import (
    DECODER,
    DECODER_FULL,
    FORMAT_VERSION,
    FP32,
    HALVES,
    MANIFEST,
    TOKENIZER,
    VISION,
    DecoderShape,
    Dtype,
    File,
    Manifest,
    Parity,
    Tolerance,
    file_sha256,
)
from qvl_batch.command_line import exit_status, settings, stop_as_by_ctrl_c
from qvl_batch.config import Device
from qvl_batch.errors import ExportError, JobError

#: Fewest tokens that a contract must leave for prompt and answer.
LEAST_ROOM = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Export a Qwen2.5-VL checkpoint to a bundle of ONNX graphs that qvl-batch runs."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Folder of the checkpoint, as downloaded."""
    output: Path
    """Folder of the bundle to write. It must not exist yet."""
    dtype: Dtype = "fp32"
    """Precision of the decoder. For a GPU: bf16 or fp16, with the residual stream in fp32. For a CPU: fp32; int8
    weights and activations (int8); int8 or int4 weights only (int8wo, int4wo)."""
    vision_dtype: Dtype | None = None
    """Precision of the vision tower. Without it, that of --dtype. In fp32 it runs on CPU and GPU."""
    device: Device | None = None
    """Device that the decoder is made for. Without it, cuda for bf16 and fp16, else cpu; cuda also works with fp32."""
    fp32_layers: tuple[str, ...] = ()
    """Layers to leave in fp32, by their names in a comparison's layer plot, such as "decoder layer 3"."""
    with_fp32: bool = False
    """Add the checkpoint in fp32 to a bundle of reduced precision: rows that give values that are not finite, or a
    repetitive answer, are then run again in fp32."""
    max_seq_len: int = 1024
    """Longest row in tokens: system text, image, prompt and answer together."""
    image_size: int = 672
    """Side in pixels of the square that every image is fitted to; a multiple of 28."""
    system_prompt: str | None = None
    """Text of a system turn. Without it, the chat template's own default applies."""
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
    checkpoint = load_checkpoint(config.checkpoint)
    layout = plan_layout(checkpoint, config)
    precision = _precision(checkpoint, config)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _staging(output) as staging:
        manifest = _fill(staging, checkpoint, layout, precision, config, progress or Progress(), traces or Traces())
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
    model, vision = checkpoint.config, checkpoint.config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    size, processor = config.image_size, checkpoint.image_processor.size
    if size <= 0 or size % unit:
        raise ExportError(f"--image-size {size} is not a multiple of {unit}")
    if not processor["shortest_edge"] <= size**2 <= processor["longest_edge"]:
        raise ExportError(
            f"--image-size {size}: the checkpoint's image processor would resize it, as it takes "
            f"{processor['shortest_edge']} to {processor['longest_edge']} pixels"
        )
    head, bridge, tail = chat_turn(checkpoint.tokenizer, model.image_token_id, config.system_prompt)
    layout = Layout(
        image_size=size,
        image_tokens=(size // unit) ** 2,
        image_start=len(head),
        max_seq_len=config.max_seq_len,
        image_token_id=model.image_token_id,
        head_ids=head,
        bridge_ids=bridge,
        tail_ids=tail,
    )
    if layout.room < LEAST_ROOM:
        raise ExportError(
            f"--max-seq-len {config.max_seq_len} leaves {layout.room} tokens for prompt and answer beside "
            f"{layout.image_tokens} of image and {len(head)} of system text; at least {LEAST_ROOM} are needed"
        )
    if config.max_seq_len > model.text_config.max_position_embeddings:
        raise ExportError(
            f"--max-seq-len {config.max_seq_len} is more than the {model.text_config.max_position_embeddings} "
            "positions the checkpoint was made for"
        )
    return layout


def _precision(checkpoint: Checkpoint, config: ExportConfig) -> Precision:
    known = layer_names(checkpoint.config)
    for name in config.fp32_layers:
        if name not in known:
            raise ExportError(f"--fp32-layers {name!r}: there is no such layer; there are {', '.join(known)}")
    made_for: Device = "cuda" if config.dtype in HALVES else "cpu"
    device = config.device or made_for
    if device != made_for and config.dtype != "fp32":
        raise ExportError(f"--dtype {config.dtype} is for --device {made_for}, not for {device}")
    precision = Precision(config.dtype, config.vision_dtype or config.dtype, config.fp32_layers, device)
    if config.with_fp32 and precision.decoder == precision.vision == "fp32":
        raise ExportError("--with-fp32 needs a reduced --dtype or --vision-dtype: this bundle is in fp32 already")
    return precision


def _check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a bundle and may be overwritten."""
    if not output.exists():
        return
    if not overwrite:
        raise ExportError(f"{output} exists: give another --output, or --overwrite to replace it")
    if not (output / MANIFEST).is_file():
        raise ExportError(f"{output} exists and is not a bundle, so it is not overwritten: give another --output")


def _fill(
    staging: Path,
    checkpoint: Checkpoint,
    layout: Layout,
    precision: Precision,
    config: ExportConfig,
    progress: Progress,
    traces: Traces,
) -> Manifest:
    """Write everything into `staging`, the manifest last."""
    processor, penalty = checkpoint.image_processor, checkpoint.generation.repetition_penalty
    normalisation = (processor.image_mean, processor.image_std)
    export_vision(checkpoint.weights, layout, *normalisation, precision, staging, progress, traces)
    export_decoders(checkpoint.weights, layout, precision, penalty, staging, progress, traces)
    names = [name for name in (VISION, DECODER, DECODER_FULL) if (staging / name).is_file()]
    graphs = {name: graph_spec(staging / name) for name in names}
    check_contract(layout, checkpoint.config.text_config.hidden_size, staging, precision)
    parity, tolerance = None, None
    if not config.skip_parity:
        parity, tolerance = _pass_gate(staging, checkpoint, layout, precision, progress)
    if config.with_fp32:
        (staging / FP32).mkdir()
        _fill(staging / FP32, checkpoint, layout, Precision(), replace(config, with_fp32=False), progress, traces)
    for path in checkpoint.copied_files:
        shutil.copyfile(path, staging / path.name)
    # As transformers loads it, which can differ from the checkpoint's tokenizer.json.
    (staging / TOKENIZER).write_text(checkpoint.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
    with progress.step("hashes"):
        files = {
            path.relative_to(staging).as_posix(): File(path.stat().st_size, file_sha256(path))
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=checkpoint.source,
        dtype=precision.decoder,
        device=precision.device,
        vision_dtype=precision.vision,
        fp32_layers=precision.fp32_layers,
        system_prompt=config.system_prompt,
        layout=layout,
        decoder=_decoder_shape(checkpoint.config.text_config),
        generation=checkpoint.generation,
        graphs=graphs,
        parity=parity,
        tolerance=tolerance,
        versions={n: importlib.metadata.version(n) for n in ("torch", "transformers", "onnx", "onnxscript")},
        files=files,
    )
    manifest.write(staging)
    return manifest


def _pass_gate(
    staging: Path, checkpoint: Checkpoint, layout: Layout, precision: Precision, progress: Progress
) -> tuple[Parity, Tolerance]:
    """Run the parity gate and write the known answers; returns what the manifest records of both.

    Raises:
        ExportError: the graphs differ from PyTorch.
    """
    gate = check_parity(checkpoint, layout, precision, staging, progress)
    parity, tolerance = gate.parity, tolerance_of(gate, precision)
    known_answers(gate, tolerance).write(staging)
    progress.say(
        f"parity: features {parity.features:.1e}, logits {parity.logits:.1e}, "
        f"first token {parity.first_token_kl:.0e} nats, tokens {parity.tokens_equal}/{parity.tokens}"
    )
    return parity, tolerance


def _decoder_shape(config: Any) -> DecoderShape:
    return DecoderShape(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
    )


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
    layout = manifest.layout
    print(
        f"{config.output}: {size / 1e6:,.1f} MB, rows of up to {layout.max_seq_len} tokens, "
        f"{layout.image_tokens} of them for the image, which starts at token {layout.image_start}"
    )
    return 0


def main() -> int:
    """Run `python -m export`; 0 if there is a bundle, 1 if not, 130 if it was stopped."""
    stop_as_by_ctrl_c()  # so that a stopped export removes its temporary directory
    return exit_status("export", work, stopped=lambda: "no bundle was written", expected=(JobError, OSError))
