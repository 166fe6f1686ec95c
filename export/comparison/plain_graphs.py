"""Plain graphs that a tool has quantized, in place of a bundle's.

They have the inputs and outputs of `vision_full.onnx` and `decoder_full.onnx`, and no KV cache: an answer is decoded by
running its row again for each token. Rows of the same number of tokens are batched, but not where a graph works scales
out while it runs: a row's answer would depend on its neighbours.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from export.calibration import Feeds, decoder_feeds
from export.comparison.traces import Array, Decoded, penalised
from qvl_batch.bundle.external_data import external_locations
from qvl_batch.bundle.layout import Features, Pixels
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import TensorSpec, combined_sha256, file_sha256
from qvl_batch.decoder.requests import Request
from qvl_batch.errors import BundleError, ConfigError, NumericError
from qvl_batch.runtime.session import Session
from qvl_batch.schema import Failure

#: Rows in one run, and most bytes of its logits.
ROWS, LOGITS_BYTES = 8, 1 << 28
#: Begins the names of operators that work scales out while they run.
DYNAMIC = "DynamicQuantize"
Tensors = dict[str, TensorSpec]


class PlainVision:
    """A plain vision graph.

    Args:
        path: its file.
        bundle: whose layout it must have.
        threads: threads that one operator may use.

    Raises:
        ConfigError: it is not a vision graph of this bundle's checkpoint, or cannot be loaded.
    """

    def __init__(self, path: Path, bundle: Bundle, threads: int) -> None:
        resolution, width = bundle.manifest.layout.resolution, bundle.manifest.decoder.hidden_size
        side, tokens = resolution.image_size or "H", "T" if resolution.is_native else resolution.max_tokens
        inputs = {"pixels": TensorSpec("uint8", ("B", side, side, 3))}
        outputs = {"image_features": TensorSpec("float", ("B", tokens, width))}
        self._session = _load("--vision-graph", path, threads, inputs, outputs)

    def encode(self, pixels: Pixels) -> Features:
        """Features (T_img, D) of an image (H, W, 3).

        Raises:
            NumericError: they are not finite.
        """
        features: Features = self._session.run(list(self._session.outputs), {"pixels": pixels[None]})[0][0]
        if not np.isfinite(features).all():
            raise NumericError("the image's features are not finite")
        return features


class PlainDecoder:
    """A plain decoder graph.

    Args:
        path: its file.
        bundle: whose layout it must have.
        threads: threads that one operator may use.

    Raises:
        ConfigError: it is not a decoder graph of this bundle's checkpoint, or cannot be loaded.
    """

    def __init__(self, path: Path, bundle: Bundle, threads: int) -> None:
        self._manifest = bundle.manifest
        shape, rows = bundle.manifest.decoder, ("B", "S")
        inputs = {
            "input_ids": TensorSpec("int64", rows),
            "attention_mask": TensorSpec("int64", rows),
            "image_embeds": TensorSpec("float", (*rows, shape.hidden_size)),
        }
        if bundle.manifest.layout.resolution.is_native:
            inputs["position_ids"] = TensorSpec("int64", (3, *rows))
        outputs = {"logits": TensorSpec("float", (*rows, shape.vocab_size))}
        self._session = _load("--decoder-graph", path, threads, inputs, outputs)
        graph = onnx.load(path, load_external_data=False).graph
        self._is_dynamic = any(node.op_type.startswith(DYNAMIC) for node in graph.node)

    def complete(self, requests: Sequence[Request]) -> list[Decoded | Failure]:
        """Answer rows greedily, in order."""
        answers = [_Answer(request, decoder_feeds(request.row, self._manifest)) for request in requests]
        by_length: defaultdict[int, list[_Answer]] = defaultdict(list)
        for answer in answers:
            by_length[answer.length].append(answer)
        for length, group in by_length.items():
            rows = self._rows_at_once(length)
            for start in range(0, len(group), rows):
                self._answer(group[start : start + rows])
        return [answer.failure or Decoded(answer.tokens, answer.logits) for answer in answers]

    def _rows_at_once(self, length: int) -> int:
        fitting = LOGITS_BYTES // (4 * length * self._manifest.decoder.vocab_size)
        return 1 if self._is_dynamic else max(1, min(ROWS, fitting))

    def _answer(self, answers: list["_Answer"]) -> None:
        """Answer rows with the same number of tokens."""
        generation = self._manifest.generation
        while answers:
            feeds = _joined([answer.feeds for answer in answers])
            logits = self._session.run(list(self._session.outputs), feeds)[0][:, -1]
            for answer, found in zip(answers, logits, strict=True):
                answer.take(found.copy(), generation.repetition_penalty)
            answers = [answer for answer in answers if not answer.is_over(generation.eos_token_ids)]


@dataclass(slots=True)
class _Answer:
    """A row and its answer so far."""

    request: Request
    feeds: Feeds
    tokens: list[int] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def length(self) -> int:
        """Tokens of the row, its answer so far included."""
        return int(self.feeds["input_ids"].shape[1])

    def take(self, logits: Array, penalty: float) -> None:
        """Take the most probable token after the repetition penalty; `logits` (V,) are before it."""
        if not np.isfinite(logits).all():
            self.failure = Failure.of(NumericError("logits are not finite"))
            return
        scores, seen = logits.copy(), np.unique(self.feeds["input_ids"])
        scores[seen] = penalised(scores[seen], penalty)
        self.tokens.append(int(scores.argmax()))
        self.logits.append(logits)
        self._append(self.tokens[-1])

    def is_over(self, ends: Sequence[int]) -> bool:
        """Whether the answer has failed, ended, or is as long as it may be."""
        is_full = len(self.tokens) >= self.request.max_new_tokens
        return self.failure is not None or is_full or self.tokens[-1] in ends

    def _append(self, token: int) -> None:
        feeds = self.feeds
        added = {
            "input_ids": np.array([[token]]),
            "attention_mask": np.ones((1, 1), np.int64),
            "image_embeds": np.zeros((1, 1, feeds["image_embeds"].shape[2]), np.float32),
        }
        if "position_ids" in feeds:
            added["position_ids"] = feeds["position_ids"][..., -1:] + 1  # a row ends in text
        axes = {"position_ids": 2}
        self.feeds = {name: np.concatenate([feeds[name], new], axes.get(name, 1)) for name, new in added.items()}


def _joined(rows: Sequence[Feeds]) -> Feeds:
    """Rows of equal length as one batch."""
    return {
        name: np.concatenate([row[name] for row in rows], axis=1 if name == "position_ids" else 0) for name in rows[0]
    }


def graph_sha256(option: str, path: Path) -> str:
    """Identifies a graph that an option names: a hash of its file and of the files that its weights are in.

    Raises:
        ConfigError: it is not there, is not an ONNX graph, or lacks a file of weights.
    """
    try:
        locations = external_locations(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not an ONNX graph"
        raise ConfigError(f"{option} {path}: {reason}") from error
    for name in sorted(locations):
        if not (path.parent / name).is_file():
            raise ConfigError(f"{option} {path} has weights in {name}, which is not beside it: copy it there")
    return combined_sha256((name, file_sha256(path.parent / name)) for name in (path.name, *locations))


def _load(option: str, path: Path, threads: int, inputs: Tensors, outputs: Tensors) -> Session:
    """Load a graph with these inputs and outputs; dimensions that are named may be any.

    Raises:
        ConfigError: it has others, or cannot be loaded.
    """
    graph = onnx.load(path, load_external_data=False).graph
    for what, wanted, found in (("inputs", inputs, graph.input), ("outputs", outputs, graph.output)):
        specs = {value.name: _spec(value) for value in found}
        if what == "outputs" and len(specs) == len(wanted):
            specs = dict(zip(wanted, specs.values(), strict=True))  # some tools rename it
        if specs.keys() != wanted.keys() or not all(_fits(specs[name], wanted[name]) for name in wanted):
            raise ConfigError(
                f"{option} {path} has the {what} {_listed(specs)}, not {_listed(wanted)}: it must be made from a plain "
                "graph of this bundle's checkpoint"
            )
    try:
        return Session(path, threads)
    except BundleError as error:
        raise ConfigError(f"{option} {' '.join(str(error).split())}") from error


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    return TensorSpec(dtype, tuple(dim.dim_value or dim.dim_param or "?" for dim in tensor.shape.dim))


def _fits(found: TensorSpec, wanted: TensorSpec) -> bool:
    """Whether types, ranks and all sizes that both name are equal."""
    return (
        found.dtype == wanted.dtype
        and len(found.shape) == len(wanted.shape)
        and all(
            a == b for a, b in zip(found.shape, wanted.shape, strict=True) if isinstance(a, int) and isinstance(b, int)
        )
    )


def _listed(specs: Tensors) -> str:
    return ", ".join(f"{name} {spec.dtype}({', '.join(map(str, spec.shape))})" for name, spec in specs.items())
