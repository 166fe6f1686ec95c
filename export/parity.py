"""The parity gate: the graphs on disk against the checkpoint in PyTorch, on the same inputs.

Compared are vision features, all logits of the plain contract graph (where there is none, those
of the cached graph for the first token), and greedy tokens of a ragged batch through the cached
graph. The reference is transformers' own image processor and `forward`; the cached graph is driven
here by a loop of a few lines, so that nothing of the worker's engine stands between the graph and
the verdict. Neither side holds its weights in memory, so that a model of any size can be compared.
Graphs in half precision, which no CPU runs, are emulated.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL import Image

from export.checkpoint import Checkpoint
from export.graphs import Precision
from export.half import emulated_graph
from export.measures import cosine, divergence, relative_error
from export.progress import Progress, Update
from qvl_batch.bundle import DECODER, DECODER_FULL, HALVES, VISION, Dtype, Layout, Parity
from qvl_batch.errors import ExportError


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the gate lets through, by the names of `Parity`."""

    error: float
    first_token_kl: float
    feature_cosine: float
    agreement: float


#: Of a tower in fp32 everything is exact. In half precision the bounds are some four times what the tiny
#: checkpoint gives; in integers the gate only keeps out what is broken. What answers lose is for a
#: comparison to say.
BOUNDS: dict[Dtype, Bounds] = {
    "fp32": Bounds(1e-4, 1e-6, 1 - 1e-6, 1.0),
    "fp16": Bounds(1e-2, 1e-3, 0.9999, 0.95),
    "bf16": Bounds(1e-1, 5e-2, 0.999, 0.9),
    "int8": Bounds(0.2, np.inf, 0, 0),
    "int8wo": Bounds(0.1, np.inf, 0, 0),
    "int4wo": Bounds(0.6, np.inf, 0, 0),
}
STEPS = 32
#: Tokens of the prompts in the batch: ragged, so that padding is put to the test.
PROMPT_TOKENS = (3, 19, 8)
SEED = 0

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One row of the batch: its pixels, its token ids, and PyTorch's inputs for it."""

    pixels: NDArray[np.uint8]
    ids: list[int]
    torch_inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Reference:
    """Of one row in PyTorch: features (T_img, D), and logits (tokens, V)."""

    features: Array
    logits: Array


def check_contract(layout: Layout, hidden_size: int, directory: Path, precision: Precision) -> None:
    """Run the vision graph once, on a black image, and compare what comes out with the contract.

    Raises:
        ExportError: the features are not (1, T_img, D).
    """
    session = _session(directory / VISION, precision.vision)
    black = np.zeros((1, layout.image_size, layout.image_size, 3), np.uint8)
    shape = session.run(None, {"pixels": black})[0].shape
    if shape != (1, layout.image_tokens, hidden_size):
        raise ExportError(
            f"the vision graph gives features {shape}, the contract says (1, {layout.image_tokens}, {hidden_size})"
        )


def check_parity(
    checkpoint: Checkpoint, layout: Layout, precision: Precision, directory: Path, progress: Progress
) -> Parity:
    """Compare the graphs in `directory` with `checkpoint`.

    Raises:
        ExportError: a figure is out of tolerance; the message says which and by how much.
    """
    steps = min(STEPS, layout.room - max(PROMPT_TOKENS))
    rows = _rows(checkpoint, layout)
    with progress.step("parity: vision graph"):
        features = _graph_features(rows, directory, precision)
    with progress.step("parity: decoder graph") as update:
        tokens, first_logits = _graph_tokens(layout, rows, features, directory, precision, steps, update)
    if not np.isfinite(features).all() or (tokens < 0).any():
        raise ExportError(
            "parity gate: numbers of the graphs are not finite, as this precision does not hold the checkpoint's "
            "(--dtype bf16 or fp32 does); no bundle was written"
        )
    with progress.step("parity: PyTorch") as update:
        references: list[_Reference] = []
        for row, found in zip(rows, tokens, strict=True):
            update(f"row {len(references) + 1} of {len(rows)}")
            references.append(_reference(checkpoint, row, found))
    prompts = [reference.logits[: len(row.ids)] for reference, row in zip(references, rows, strict=True)]
    firsts = np.stack([logits[-1] for logits in prompts])
    if precision.has_full:
        with progress.step("parity: full decoder graph"):
            logits_error = _error_of_all_logits(layout, rows, features, directory, prompts)
    else:
        logits_error = relative_error(first_logits, firsts)
    penalty = checkpoint.generation.repetition_penalty
    greedy = [
        _greedy(reference.logits[len(row.ids) - 1 :], row.ids, answer, penalty)
        for reference, row, answer in zip(references, rows, tokens, strict=True)
    ]
    expected = np.stack([reference.features for reference in references])
    parity = Parity(
        features=relative_error(features, expected),
        logits=logits_error,
        tokens=tokens.size,
        tokens_equal=int((tokens == np.stack(greedy)).sum()),
        first_token_kl=float(divergence(firsts, first_logits).max()),
        feature_cosine=float(cosine(features, expected).min()),
    )
    refuse_beyond_bounds(parity, precision)
    return parity


def refuse_beyond_bounds(parity: Parity, precision: Precision) -> None:
    """Raise ExportError, naming the figure, where one is out of bounds."""
    vision = BOUNDS[precision.vision]
    # The decoder's input is the vision tower's output, errors and all.
    both = (vision, BOUNDS[precision.decoder])
    error, kl = max(b.error for b in both), max(b.first_token_kl for b in both)
    agreement = min(b.agreement for b in both)
    off = "off by {:.2e} of their largest magnitude (allowed: {:.0e})"
    for is_within, what in (
        (parity.features <= vision.error, f"vision features are {off.format(parity.features, vision.error)}"),
        (
            parity.feature_cosine >= vision.feature_cosine,
            f"an image token's features have cosine {parity.feature_cosine:.6f} (allowed: {vision.feature_cosine})",
        ),
        (parity.logits <= error, f"logits are {off.format(parity.logits, error)}"),
        (
            parity.first_token_kl <= kl,
            f"the first token's distribution diverges by {parity.first_token_kl:.2e} nats (allowed: {kl:.0e})",
        ),
        (
            parity.agreement >= agreement,
            f"{parity.tokens_equal} of {parity.tokens} greedy tokens are equal (allowed: {agreement:.0%})",
        ),
    ):
        if not is_within:
            raise ExportError(f"parity gate: {what}; no bundle was written")


def _rows(checkpoint: Checkpoint, layout: Layout) -> list[Row]:
    rng = np.random.default_rng(SEED)
    rows = []
    for count in PROMPT_TOKENS:
        coarse = rng.integers(0, 256, (layout.side, layout.side, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((layout.image_size,) * 2, Image.Resampling.BICUBIC)
        pixels = np.asarray(image) ^ rng.integers(0, 8, (layout.image_size, layout.image_size, 3), dtype=np.uint8)
        ids = layout.row_ids(rng.integers(0, _ordinary_tokens(checkpoint.tokenizer), count).tolist())
        inputs = dict(checkpoint.image_processor([Image.fromarray(pixels)], return_tensors="pt"))
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == layout.image_token_id).int()
        rows.append(Row(pixels, ids, inputs))
    return rows


def _ordinary_tokens(tokenizer: Any) -> int:
    """Ids below this one are text; added tokens come after them."""
    return int(min(tokenizer.added_tokens_decoder))


def _reference(checkpoint: Checkpoint, row: Row, answer: Array) -> _Reference:
    """What transformers makes of a row, and then of all of an answer (steps,) but its last token.

    If the tokens that follow are those of the answer, then it is the one of greedy decoding: each is
    what the model says after those before it.
    """
    model, seen = checkpoint.weights.streamed(), []
    model.model.visual.register_forward_hook(lambda _, __, output: seen.append(output.pooler_output))
    following = torch.from_numpy(answer[None, :-1])
    with torch.inference_mode():
        prompt = model(**row.torch_inputs, use_cache=True)
        # Apart, as in `generate`: an image token in an answer is no part of the image.
        positions = torch.arange(len(row.ids), len(row.ids) + following.shape[1]) + model.model.rope_deltas
        after = model(
            input_ids=following,
            position_ids=positions.expand(3, 1, -1),
            past_key_values=prompt.past_key_values,
            use_cache=True,
        )
    (features,) = seen
    return _Reference(features.numpy(), torch.cat([prompt.logits, after.logits], dim=1)[0].numpy())


def _session(path: Path, dtype: Dtype) -> ort.InferenceSession:
    """A session that reads weights that are floats where they lie on disk, so that large ones take no memory."""
    options = ort.SessionOptions()
    if dtype == "fp32":
        options.add_session_config_entry("session.disable_prepacking", "1")
    if dtype not in HALVES:
        return ort.InferenceSession(path, options)
    # Folded, a weight's cast to fp32 would be a weight of twice the size in memory. So it is if, as by default,
    # what depends on nothing runs first, or if memory is kept when it is no longer needed.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return ort.InferenceSession(emulated_graph(path), options)


def _graph_features(rows: list[Row], directory: Path, precision: Precision) -> Array:
    """Features (rows, T_img, D), an image after the other."""
    session = _session(directory / VISION, precision.vision)
    return np.concatenate([session.run(None, {"pixels": row.pixels[None]})[0] for row in rows])


def _error_of_all_logits(
    layout: Layout, rows: list[Row], features: Array, directory: Path, expected: list[Array]
) -> float:
    session = _session(directory / DECODER_FULL, "fp32")
    ids, embeds, lengths = _padded(layout, rows, features)
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    found = session.run(None, {"input_ids": ids, "attention_mask": mask, "image_embeds": embeds})[0]
    return max(
        relative_error(logits[: len(reference)], reference) for logits, reference in zip(found, expected, strict=True)
    )


def _graph_tokens(
    layout: Layout, rows: list[Row], features: Array, directory: Path, precision: Precision, steps: int, update: Update
) -> tuple[Array, Array]:
    """Greedy tokens (rows, steps) of the cached graph, one ragged prefill, then steps of one; and
    logits (rows, V) of the first.
    """
    session = _session(directory / DECODER, precision.decoder)
    ids, embeds, lengths = _padded(layout, rows, features)
    positions = np.tile(np.arange(ids.shape[1]), (len(rows), 1))
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
            "cache_position": positions,
            "image_embeds": embeds,
            "seqlens_k": (lengths - 1).astype(np.int32),
            "total_sequence_length": np.array(lengths.max(), np.int32),
        }
        names = ["next_token", "logits", *(name.replace("past", "present") for name in past)]
        following, scores, *present = session.run(names, inputs | past)
        past = dict(zip(past, present, strict=True))
        tokens.append(following)
        first_logits = scores if first_logits is None else first_logits
        ids, embeds = following[:, None], np.zeros_like(embeds[:, :1])
        positions = lengths[:, None]
        lengths = lengths + 1
    assert first_logits is not None
    return np.stack(tokens, axis=1), first_logits


def _greedy(logits: Array, ids: list[int], answer: Array, penalty: float) -> Array:
    """Tokens (steps,) that logits (steps, V) choose after a prompt and what precedes each in an answer (steps,)."""
    scores = logits.copy()
    for step, row in enumerate(scores):
        seen = np.unique([*ids, *answer[:step]])
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    tokens: Array = scores.argmax(-1)
    return tokens


def _padded(layout: Layout, rows: list[Row], features: Array) -> tuple[Array, Array, Array]:
    """Right-padded token ids (B, S), image embeddings (B, S, D), and true lengths (B,)."""
    lengths = np.array([len(row.ids) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
    embeds = np.zeros((*ids.shape, features.shape[-1]), np.float32)
    embeds[:, layout.image_start : layout.image_start + layout.image_tokens] = features
    return ids, embeds, lengths
