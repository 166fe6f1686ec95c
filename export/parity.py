"""The parity gate: compares the graphs on disk with the checkpoint in PyTorch, on the same inputs.

Compared are vision features (of `vision_full.onnx` too, if there is one), all logits of `decoder_full.onnx`
(in a bundle without it, the cached graph's logits of the first token), and greedy tokens of a ragged batch
through the cached graph. The
reference is transformers' own image processor and `forward`. The cached graph is driven by a short
loop in this module, so that the result does not depend on the worker's engine. Neither side loads all
its weights into memory, so that a model of any size can be compared. Graphs in half precision, which
no CPU runs, are emulated.

The last row is in no figure of the gate. It becomes the bundle's known answers: see `export.proof`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL import Image

from export.checkpoint import Checkpoint
from export.half import emulated_graph
from export.precision import Precision
from export.progress import Progress, Update
from qvl_batch.bundle.known_answers import repeated, sample
from qvl_batch.bundle.layout import Layout, PlacedImage, mrope_positions
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL, HALVES, VISION, VISION_FULL, Dtype, Parity
from qvl_batch.distances import cosine, divergence, relative_error
from qvl_batch.errors import ExportError


@dataclass(frozen=True, slots=True)
class GateBounds:
    """Bounds of the gate for one precision: `error` of features and logits, the others by the names of `Parity`."""

    error: float
    first_token_kl: float
    feature_cosine: float
    agreement: float


#: A tower in fp32 is exact. In half precision the bounds of errors are 14 to 17 times what the tiny checkpoint gives;
#: in integer precision the gate only refuses broken graphs. What quantization costs in answers, a comparison measures.
BOUNDS: dict[Dtype, GateBounds] = {
    "fp32": GateBounds(1e-4, 1e-6, 1 - 1e-6, 1.0),
    "fp16": GateBounds(1e-2, 1e-3, 0.9999, 0.95),
    "bf16": GateBounds(1e-1, 5e-2, 0.999, 0.9),
    "int8": GateBounds(0.2, np.inf, 0, 0),
    "int8wo": GateBounds(0.1, np.inf, 0, 0),
    "int4wo": GateBounds(0.6, np.inf, 0, 0),
}
#: Greedy tokens of each row.
STEPS = 32
#: Prompt lengths in tokens. They differ, so that padding is tested. The last is that of the known-answers row.
PROMPT_TOKENS = (3, 19, 8, 12)
#: Rows and columns of image tokens of the same rows where images keep their own size: windows are cut at the right, at
#: the bottom, at both, and at none.
NATIVE_GRIDS = ((16, 11), (7, 20), (13, 13), (16, 16))
SEED = 0

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One row of the batch.

    Args:
        pixels: uint8 (H, W, 3).
        ids: token ids of the row up to its answer.
        image: where its image is among them.
        torch_inputs: the same row as inputs of transformers' model.
        is_known_answer: whether it becomes the bundle's known answers. Both decoders are then given a sample of the
            graph's features, repeated, since that is what a bundle stores.
    """

    pixels: NDArray[np.uint8]
    ids: list[int]
    image: PlacedImage
    torch_inputs: dict[str, torch.Tensor]
    is_known_answer: bool


@dataclass(frozen=True)
class GraphOutputs:
    """Outputs of the graphs for one row.

    Args:
        features: (T_img, D), of the vision graph.
        decoder_features: (T_img, D), what the decoder graph was given.
        logits: (V,), of the first token.
        tokens: (steps,), greedy.
    """

    features: Array
    decoder_features: Array
    logits: Array
    tokens: Array


@dataclass(frozen=True)
class Reference:
    """Outputs of PyTorch for one row.

    Args:
        features: (T_img, D).
        logits: (tokens, V), of the row up to its answer.
        scores: (steps, V), logits after the repetition penalty: of the first token of the answer, and of the token
            after each of the graphs' tokens but the last.
    """

    features: Array
    logits: Array
    scores: Array

    @property
    def first_logits(self) -> Array:
        """Logits (V,) of the first token of the answer."""
        last: Array = self.logits[-1]
        return last


Compared = tuple[Row, GraphOutputs, Reference]


@dataclass(frozen=True, slots=True)
class Gate:
    """What the gate measured; and the known-answers row with the outputs of both sides."""

    parity: Parity
    row: Row
    graphs: GraphOutputs
    reference: Reference


def check_contract(layout: Layout, hidden_size: int, directory: Path, precision: Precision) -> None:
    """Run the vision graph once, on a black image, and compare the shape of its features with the layout contract.

    Raises:
        ExportError: the features are not (1, T_img, D).
    """
    session = _session(directory / VISION, precision.vision)
    rows, columns = grids(layout)[0]
    unit = layout.resolution.unit
    black = np.zeros((1, rows * unit, columns * unit, 3), np.uint8)
    shape = session.run(None, {"pixels": black})[0].shape
    if shape != (1, rows * columns, hidden_size):
        raise ExportError(
            f"the vision graph returns features of shape {shape}, the layout contract says "
            f"(1, {rows * columns}, {hidden_size})"
        )


def grids(layout: Layout) -> list[tuple[int, int]]:
    """Rows and columns of image tokens of the gate's rows."""
    resolution = layout.resolution
    if resolution.image_size is not None:
        return [resolution.grid(resolution.image_size, resolution.image_size)] * len(PROMPT_TOKENS)
    # Smaller ones where the contract takes no images of such sizes; halved, they still differ.
    found = list(NATIVE_GRIDS)
    while max(rows * columns for rows, columns in found) > resolution.max_tokens:
        found = [(max(1, rows // 2), max(1, columns // 2)) for rows, columns in found]
    return found


def check_parity(
    checkpoint: Checkpoint, layout: Layout, precision: Precision, directory: Path, progress: Progress
) -> Gate:
    """Compare the graphs in `directory` with `checkpoint`.

    Raises:
        ExportError: a figure is out of tolerance; the message says which and by how much.
    """
    rows = _rows(checkpoint, layout)
    outputs = _run_graphs(rows, layout, precision, directory, progress)
    if not all(np.isfinite(each.features).all() and (each.tokens >= 0).all() for each in outputs):
        is_narrow = "fp16" in (precision.vision, precision.decoder)
        why = (
            "the checkpoint's exceed the range of fp16 (use --dtype bf16 or fp32)"
            if is_narrow
            else "look for weights of the checkpoint that are not finite"
        )
        raise ExportError(f"parity gate: values in the graphs are not finite: {why}; no bundle was written")
    references: list[Reference] = []
    with progress.step("parity: PyTorch") as update:
        for row, each in zip(rows, outputs, strict=True):
            update(f"row {len(references) + 1} of {len(rows)}")
            references.append(_reference(checkpoint, row, each))
    *compared, known = zip(rows, outputs, references, strict=True)
    full_logits_error = None
    if precision.has_full:
        with progress.step("parity: full decoder graph"):
            full_logits_error = _full_logits_error(compared, directory)
    parity = _measured(compared, full_logits_error)
    if (directory / VISION_FULL).is_file():
        with progress.step("parity: full vision graph"):
            parity = replace(parity, features=max(parity.features, _full_features_error(compared, directory)))
    refuse_beyond_bounds(parity, precision)
    return Gate(parity, *known)


def _measured(compared: list[Compared], full_logits_error: float | None) -> Parity:
    """Figures of the gate. Without the error of all logits, that of the first token's logits is taken."""
    outputs, references = [each for _, each, _ in compared], [reference for *_, reference in compared]
    features, expected = (np.concatenate([each.features for each in side]) for side in (outputs, references))
    logits = np.stack([each.logits for each in outputs])
    expected_logits = np.stack([each.first_logits for each in references])
    return Parity(
        features=relative_error(features, expected),
        logits=relative_error(logits, expected_logits) if full_logits_error is None else full_logits_error,
        tokens=sum(each.tokens.size for each in outputs),
        tokens_equal=sum(int((each.tokens == reference.scores.argmax(-1)).sum()) for _, each, reference in compared),
        first_token_kl=float(divergence(expected_logits, logits).max()),
        feature_cosine=float(cosine(features, expected).min()),
    )


def refuse_beyond_bounds(parity: Parity, precision: Precision) -> None:
    """Refuse graphs with a figure out of bounds.

    Raises:
        ExportError: names the first such figure, its value and its bound.
    """
    vision = bounds_of(precision.rounded_to("vision"))
    # The decoder's input is the vision tower's output, errors included.
    both = bounds_of(precision.rounded_to("vision") | precision.rounded_to("decoder"))
    kl = both.first_token_kl
    off = "off by {:.2e} of their largest magnitude (allowed: {:.0e})"
    for is_within, what in (
        (parity.features <= vision.error, f"vision features are {off.format(parity.features, vision.error)}"),
        (
            parity.feature_cosine >= vision.feature_cosine,
            f"an image token's features have cosine {parity.feature_cosine:.6f} (allowed: {vision.feature_cosine})",
        ),
        (parity.logits <= both.error, f"logits are {off.format(parity.logits, both.error)}"),
        (
            parity.first_token_kl <= kl,
            f"the first token's distribution diverges by {parity.first_token_kl:.2e} nats (allowed: {kl:.0e})",
        ),
        (
            parity.agreement >= both.agreement,
            f"{parity.tokens_equal} of {parity.tokens} greedy tokens are equal (allowed: {both.agreement:.0%})",
        ),
    ):
        if not is_within:
            raise ExportError(f"parity gate: {what}; no bundle was written")


def bounds_of(dtypes: Iterable[Dtype]) -> GateBounds:
    """For each figure, the widest of these dtypes' bounds."""
    each = [BOUNDS[dtype] for dtype in dtypes]
    return GateBounds(
        error=max(bounds.error for bounds in each),
        first_token_kl=max(bounds.first_token_kl for bounds in each),
        feature_cosine=min(bounds.feature_cosine for bounds in each),
        agreement=min(bounds.agreement for bounds in each),
    )


def _rows(checkpoint: Checkpoint, layout: Layout) -> list[Row]:
    rng = np.random.default_rng(SEED)
    rows: list[Row] = []
    unit = layout.resolution.unit
    for count, grid in zip(PROMPT_TOKENS, grids(layout), strict=True):
        height, width = (side * unit for side in grid)
        coarse = rng.integers(0, 256, (*grid, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image) ^ rng.integers(0, 8, (height, width, 3), dtype=np.uint8)
        placed = PlacedImage(layout.image_start, *grid)
        prompt = rng.integers(0, _ordinary_tokens(checkpoint.tokenizer), count).tolist()
        ids = layout.row_ids(prompt, placed.tokens)
        # Resized, images could be of other sizes than the grids.
        inputs = dict(checkpoint.image_processor([Image.fromarray(pixels)], do_resize=False, return_tensors="pt"))
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == layout.image_token_id).int()
        rows.append(Row(pixels, ids, placed, inputs, is_known_answer=len(rows) == len(PROMPT_TOKENS) - 1))
    return rows


def _ordinary_tokens(tokenizer: Any) -> int:
    """Number of ordinary tokens: ids below it are text, added tokens come after."""
    return int(min(tokenizer.added_tokens_decoder))


def _reference(checkpoint: Checkpoint, row: Row, outputs: GraphOutputs) -> Reference:
    """Run transformers on a row, then on the graphs' answer without its last token.

    The graphs' answer is that of greedy decoding if each of its tokens is the one that the model chooses after
    those before it.
    """
    model, features_of_runs = checkpoint.weights.streamed(), []

    def catch_features(_: Any, __: Any, output: Any) -> Any:
        features_of_runs.append(output.pooler_output)
        if row.is_known_answer:
            output.pooler_output = torch.from_numpy(outputs.decoder_features)
        return output

    model.model.visual.register_forward_hook(catch_features)
    answer = torch.from_numpy(outputs.tokens[None, :-1])
    with torch.inference_mode():
        prompt = model(**row.torch_inputs, use_cache=True)
        # A second call, as in `generate`: an image token in an answer is not part of the image.
        positions = torch.arange(len(row.ids), len(row.ids) + answer.shape[1]) + model.model.rope_deltas
        after = model(
            input_ids=answer,
            position_ids=positions.expand(3, 1, -1),
            past_key_values=prompt.past_key_values,
            use_cache=True,
        )
    (features,) = features_of_runs
    logits, answer_logits = prompt.logits[0].numpy(), after.logits[0].numpy()
    scores = _penalized(
        np.concatenate([logits[-1:], answer_logits]), row.ids, outputs.tokens, checkpoint.generation.repetition_penalty
    )
    return Reference(features.numpy(), logits, scores)


def _session(path: Path, dtype: Dtype) -> ort.InferenceSession:
    """A session that maps float weights from disk instead of copying them, so that they take no memory."""
    options = ort.SessionOptions()
    if dtype == "fp32":
        options.add_session_config_entry("session.disable_prepacking", "1")
    if dtype not in HALVES:
        return ort.InferenceSession(path, options)
    # Constant folding would keep each weight's cast to fp32 in memory, at twice the weight's size. So would the
    # default order of execution, in which nodes without dependencies run first, and an arena that keeps freed memory.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return ort.InferenceSession(emulated_graph(path), options)


def _run_graphs(
    rows: list[Row], layout: Layout, precision: Precision, directory: Path, progress: Progress
) -> list[GraphOutputs]:
    """Run the vision graph on one row after the other, and the decoder graph on all of them as a batch."""
    with progress.step("parity: vision graph"):
        session = _session(directory / VISION, precision.vision)
        features = [session.run(None, {"pixels": row.pixels[None]})[0][0] for row in rows]
    decoder_features = [
        repeated(sample(found), row.image.tokens) if row.is_known_answer else found
        for row, found in zip(rows, features, strict=True)
    ]
    with progress.step("parity: decoder graph") as update:
        tokens, logits = _greedy(layout, rows, decoder_features, directory, precision, update)
    return list(map(GraphOutputs, features, decoder_features, logits, tokens))


def _full_logits_error(compared: list[Compared], directory: Path) -> float:
    """Largest error of the logits of `decoder_full.onnx`, of all tokens up to the answers."""
    session = _session(directory / DECODER_FULL, "fp32")
    features = [outputs.decoder_features for _, outputs, _ in compared]
    padded = _padded([row for row, *_ in compared], features)
    inputs = {
        "input_ids": padded.ids,
        "attention_mask": (np.arange(padded.ids.shape[1]) < padded.lengths[:, None]).astype(np.int64),
        "image_embeds": padded.embeds,
        "position_ids": padded.positions,
    }
    found = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})[0]
    return max(
        relative_error(logits[: len(reference.logits)], reference.logits)
        for logits, (*_, reference) in zip(found, compared, strict=True)
    )


def _full_features_error(compared: list[Compared], directory: Path) -> float:
    """Largest error of the features of `vision_full.onnx`."""
    session = _session(directory / VISION_FULL, "fp32")
    found = [session.run(None, {"pixels": row.pixels[None]})[0][0] for row, *_ in compared]
    return relative_error(np.concatenate(found), np.concatenate([reference.features for *_, reference in compared]))


def _greedy(
    layout: Layout, rows: list[Row], features: list[Array], directory: Path, precision: Precision, update: Update
) -> tuple[Array, Array]:
    """Greedy tokens (rows, steps) of the cached graph, by one ragged prefill and then decode steps; and
    logits (rows, V) of the first token.
    """
    session = _session(directory / DECODER, precision.decoder)
    steps = min(STEPS, layout.max_seq_len - max(len(row.ids) for row in rows))
    padded = _padded(rows, features)
    ids, positions, lengths = padded.ids, padded.positions, padded.lengths
    embeds, image_mask = padded.embeds, padded.image_mask
    # A row ends in text, whose positions are equal along all axes.
    last_position = positions[0, np.arange(len(rows)), lengths - 1]
    cache_position = np.tile(np.arange(ids.shape[1]), (len(rows), 1))
    past = {
        value.name: np.zeros((len(rows), *value.shape[1:]), np.bool_ if value.name == "past_seen" else np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    tokens: list[Array] = []
    first_logits: Array | None = None
    for step in range(steps):
        update(f"token {step + 1} of {steps}")
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
            "cache_position": cache_position,
            "image_embeds": embeds,
            "image_mask": image_mask,
            "seqlens_k": (lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(lengths.max(), np.int32),
        }
        names = ["next_token", "logits", *(name.replace("past", "present") for name in past)]
        following, scores, *present = session.run(names, inputs | past)
        past = dict(zip(past, present, strict=True))
        tokens.append(following)
        first_logits = scores if first_logits is None else first_logits
        ids, embeds, image_mask = following[:, None], np.zeros_like(embeds[:, :1]), np.zeros_like(image_mask[:, :1])
        last_position = last_position + 1
        positions = np.tile(last_position[:, None], (3, 1, 1))
        cache_position = lengths[:, None]
        lengths = lengths + 1
    assert first_logits is not None
    return np.stack(tokens, axis=1), first_logits


def _penalized(logits: Array, ids: list[int], answer: Array, penalty: float) -> Array:
    """Logits (steps, V) after the repetition penalty on `ids` and on the tokens of `answer` before each step."""
    scores = logits.copy()
    for step, row in enumerate(scores):
        seen = np.unique([*ids, *answer[:step]])
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return scores


@dataclass(frozen=True)
class Padded:
    """Rows, right-padded: token ids (B, S), M-RoPE positions (3, B, S), image embeddings (B, S, D) and where they are,
    bool (B, S); and their true lengths (B,).
    """

    ids: Array
    positions: Array
    embeds: Array
    image_mask: Array
    lengths: Array


def _padded(rows: list[Row], features: list[Array]) -> Padded:
    lengths = np.array([len(row.ids) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    positions = np.zeros((3, *ids.shape), np.int64)
    embeds = np.zeros((*ids.shape, features[0].shape[-1]), np.float32)
    image_mask = np.zeros(ids.shape, np.bool_)
    for index, (row, found) in enumerate(zip(rows, features, strict=True)):
        image = slice(row.image.start, row.image.stop)
        ids[index, : len(row.ids)] = row.ids
        positions[:, index, : len(row.ids)] = mrope_positions(len(row.ids), [row.image])
        embeds[index, image], image_mask[index, image] = found, True
    return Padded(ids, positions, embeds, image_mask, lengths)
