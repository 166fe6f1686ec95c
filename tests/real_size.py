"""Export a checkpoint of real size with made-up weights, and trace the shapes that are larger still.

    python tests/real_size.py [--work-dir build/real-size] [--shape 3b] [--dtype fp32] [--image-size 672]
        [--most 1.3] [--on-paper 7b 32b 72b]

The export must take at most `--most` times the memory of the checkpoint's weights, parity gate included.
Larger shapes are traced without weights: every parameter must be in a graph, in its shape.
Exit status 1 says that something is not as it should be.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
from conftest import ROOT, TINY
from make_model import SHAPES, make_model, write_config

from export.checkpoint import load_checkpoint
from export.config import ExportConfig
from export.graphs import trace_decoder, trace_vision
from export.lazy import Part, decoder_parts, vision_parts
from export.names import HEAD
from export.package import plan_layout
from qvl_batch.bundle.loading import Bundle

GIGABYTE = 1e9


def export(checkpoint: Path, dtype: str, image_size: str, output: Path, most: float) -> bool:
    """Export, print what it took, and say whether that is within bounds."""
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    began = time.time()
    command = [sys.executable, "-m", "export", checkpoint, "--output", output, "--overwrite"]
    command += ["--dtype", dtype, "--image-size", image_size]
    with subprocess.Popen([*map(str, command)], cwd=ROOT) as process:
        own = mapped = 0
        while process.poll() is None:
            now = _resident_bytes(process.pid)
            own, mapped = max(own, now.get("RssAnon", 0)), max(mapped, now.get("RssFile", 0))
            time.sleep(0.2)
    if process.returncode:
        return False
    bundle = Bundle.load(output)
    large = {name: file.size for name, file in bundle.manifest.files.items() if file.size > 2 * GIGABYTE}
    print(
        f"weights {weights / GIGABYTE:.2f} GB, memory {own / GIGABYTE:.2f} GB ({own / weights:.2f} of it), "
        f"files mapped up to {mapped / GIGABYTE:.2f} GB, {time.time() - began:.0f} s; "
        f"files over 2 GB: {', '.join(f'{name} {size / GIGABYTE:.1f}' for name, size in large.items())}"
    )
    return own <= most * weights


def on_paper(shape: str) -> bool:
    """Trace a shape without weights, and say whether all of its parameters are in the graphs."""
    began = time.time()
    tiny = load_checkpoint(TINY)  # its tokenizer is the shape's too
    layout = plan_layout(tiny, ExportConfig(checkpoint=TINY, output=Path(shape)))
    mean, std = tiny.image_processor.image_mean, tiny.image_processor.image_std
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(Path(folder) / shape, shape)
    vision = trace_vision(model, layout.resolution, mean, std, "bf16")
    decoder = trace_decoder(model, layout, "bf16", "cuda")
    wrong = _wrong(vision, vision_parts(model, std, "bf16"), model)
    wrong += _wrong(decoder, decoder_parts(model, "bf16"), model)
    count = sum(parameter.numel() for parameter in model.parameters())
    figures = f"{count / 1e9:.1f} G parameters, {len(wrong)} of another shape in the graphs"
    print(f"{shape} on paper: {figures}, {time.time() - began:.0f} s", *wrong[:5], sep="\n  ")
    return not wrong


def _wrong(graph: ir.Model, parts: list[Part], model: Any) -> list[str]:
    """Parameters that a graph does not have as the checkpoint does."""
    found = {name: tuple(map(int, value.shape or ())) for name, value in graph.graph.initializers.items()}
    made = {name: tensor for part in parts for name, tensor in part.of(model.get_submodule(part.module)).items()}
    if model.config.tie_word_embeddings:
        made.pop(f"{HEAD}.weight", None)  # the graph has the table of tokens in its place
    return [
        f"{name} is {found.get(name)}, not {tuple(tensor.shape)}"
        for name, tensor in made.items()
        if found.get(name) != tuple(tensor.shape)
    ]


def _resident_bytes(process: int) -> dict[str, int]:
    """Bytes of a process's memory, by kind; nothing if it has just ended."""
    try:
        lines = (Path("/proc") / str(process) / "status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work-dir", type=Path, default=Path("build/real-size"))
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--image-size", default="672")
    parser.add_argument("--on-paper", nargs="*", choices=SHAPES, default=["7b", "32b", "72b"])
    parser.add_argument("--most", type=float, default=1.3, help="memory of the export over the bytes of the weights")
    options = parser.parse_args()
    checkpoint = options.work_dir / options.shape
    if not (checkpoint / "model.safetensors.index.json").is_file():
        shutil.rmtree(checkpoint, ignore_errors=True)
        print(f"{make_model(checkpoint, options.shape):,} parameters in {checkpoint}", flush=True)
    output = options.work_dir / f"{options.shape}-{options.dtype}-{options.image_size}"
    right = export(checkpoint, options.dtype, options.image_size, output, options.most)
    return 0 if all([right, *map(on_paper, options.on_paper)]) else 1


if __name__ == "__main__":
    sys.exit(main())
