"""Writes bundles of one checkpoint.

What enters: a checkpoint, the layout contract, the precision of products, and weights that were rounded. What leaves: a
folder with graphs, tokenizer, known answers and manifest.
"""

import importlib.metadata
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.calibrated import Calibrated
from export.checkpoint import Checkpoint
from export.graphs import Traces, export_decoders, export_vision, graph_spec
from export.parity import check_contract, check_parity
from export.precision import Precision
from export.progress import Progress
from export.proof import known_answers, tolerance_of
from qvl_batch.bundle.layout import Layout
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import (
    CHAT_TEMPLATE,
    DECODER,
    DECODER_DRAWN,
    DECODER_FULL,
    DECODER_GUIDED,
    FORMAT_VERSION,
    TOKENIZER,
    VISION,
    VISION_FULL,
    DecoderShape,
    File,
    Manifest,
    Parity,
    Tolerance,
    file_sha256,
)

GRAPHS = (VISION, VISION_FULL, DECODER, DECODER_GUIDED, DECODER_DRAWN, DECODER_FULL)


@dataclass(frozen=True, slots=True)
class BundleWriter:
    """Writes bundles.

    Args:
        checkpoint: whose model they have.
        layout: their contract.
        traces: cache of traced graphs; new ones are added.
        progress: receives each step.
    """

    checkpoint: Checkpoint
    layout: Layout
    traces: Traces
    progress: Progress

    def begin(self, folder: Path) -> Bundle:
        """Write tokenizer, template and configs; the bundle has no graphs yet."""
        checkpoint = self.checkpoint
        for path in checkpoint.copied_files:
            shutil.copyfile(path, folder / path.name)
        # As transformers loads them, which can differ from the checkpoint's own files.
        (folder / TOKENIZER).write_text(checkpoint.tokenizer.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / CHAT_TEMPLATE).write_text(checkpoint.tokenizer.chat_template, encoding="utf-8", newline="")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            source=checkpoint.source,
            dtype="fp32",
            device="cpu",
            vision_dtype="fp32",
            layers_dtype={},
            calibration=None,
            recipe=None,
            special_tokens=checkpoint.special_tokens,
            layout=self.layout,
            decoder=_decoder_shape(checkpoint.config.text_config),
            generation=checkpoint.generation,
            graphs={},
            parity=None,
            tolerance=None,
            versions={n: importlib.metadata.version(n) for n in ("torch", "transformers", "onnx", "onnxscript")},
            files=_files(folder),
        )
        return Bundle(folder, manifest)

    def fill(
        self,
        bundle: Bundle,
        precision: Precision,
        calibrated: Calibrated,
        *,
        with_vision_full: bool = False,
        with_guided: bool = True,
        gate: bool = True,
    ) -> Bundle:
        """Write the graphs into a bundle that has none.

        Args:
            bundle: from `begin`.
            precision: of the products.
            calibrated: weights that were rounded already; the others are rounded to nearest.
            with_vision_full: also write `vision_full.onnx`.
            with_guided: also write the decoders for guided and for drawn answers.
            gate: compare the graphs with PyTorch, and write the known answers.

        Raises:
            ExportError: a graph is not valid, or differs from PyTorch.
        """
        checkpoint, folder, processor = self.checkpoint, bundle.path, self.checkpoint.image_processor
        export_vision(
            checkpoint.weights,
            self.layout,
            processor.image_mean,
            processor.image_std,
            precision,
            folder,
            self.progress,
            self.traces,
            calibrated,
            with_plain=with_vision_full,
        )
        export_decoders(
            checkpoint.weights,
            self.layout,
            precision,
            checkpoint.generation.repetition_penalty,
            folder,
            self.progress,
            self.traces,
            calibrated,
            with_guided=with_guided,
        )
        check_contract(self.layout, checkpoint.config.text_config.hidden_size, folder, precision)
        parity, tolerance = self._pass_gate(folder, precision) if gate else (None, None)
        manifest = replace(
            bundle.manifest,
            dtype=precision.decoder,
            device=precision.device,
            vision_dtype=precision.vision,
            layers_dtype=dict(precision.layers),
            graphs={name: graph_spec(folder / name) for name in GRAPHS if (folder / name).is_file()},
            parity=parity,
            tolerance=tolerance,
        )
        return Bundle(folder, manifest)

    def finish(self, bundle: Bundle) -> Bundle:
        """Hash all files in the folder, and write the manifest."""
        with self.progress.step("hashes"):
            manifest = replace(bundle.manifest, files=_files(bundle.path))
        manifest.write(bundle.path)
        return Bundle(bundle.path, manifest)

    def write(
        self, folder: Path, precision: Precision, calibrated: Calibrated, *, with_guided: bool = True, gate: bool
    ) -> Bundle:
        """Write a whole bundle into a new folder; arguments and errors are those of `fill`."""
        folder.mkdir()
        return self.finish(self.fill(self.begin(folder), precision, calibrated, with_guided=with_guided, gate=gate))

    def _pass_gate(self, folder: Path, precision: Precision) -> tuple[Parity, Tolerance]:
        """Run the parity gate and write the known answers; returns what the manifest records of both."""
        gate = check_parity(self.checkpoint, self.layout, precision, folder, self.progress)
        parity, tolerance = gate.parity, tolerance_of(gate, precision)
        known_answers(gate, tolerance).write(folder)
        self.progress.say(
            f"parity: features {parity.features:.1e}, logits {parity.logits:.1e}, "
            f"first token {parity.first_token_kl:.0e} nats, tokens {parity.tokens_equal}/{parity.tokens}"
        )
        return parity, tolerance


def _files(folder: Path) -> dict[str, File]:
    """All files so far."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): File(path.stat().st_size, file_sha256(path)) for path in paths}


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
