"""The parity gate: the graphs on disk against the checkpoint in PyTorch, on the same inputs.

Compared are vision features, all logits of the plain contract graph (where there is none, those
of the cached graph for the first token), and greedy tokens of a ragged batch through the cached
graph. The reference is transformers' own image processor and `forward`; the cached graph is driven
here by a loop of a few lines, so that nothing of the worker's engine stands between the graph and
the verdict. Neither side holds its weights in memory, so that a model of any size can be compared.
Graphs in half precision, which no CPU runs, are emulated.

A last row is for the bundle to carry, and in no figure of the gate: see `proof`.
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
from export.progress import Progress, Update
from qvl_batch.bundle.known_answers import repeated, sample
from qvl_batch.bundle.layout import Layout
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL, HALVES, VISION, Dtype, Parity
from qvl_batch.distances import cosine, divergence, relative_error
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
#: Tokens of the prompts in the batch: ragged, so that padding is put to the test. The last is the known row's.
PROMPT_TOKENS = (3, 19, 8, 12)
SEED = 0

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One row of the batch: its pixels, its token ids, and PyTorch's inputs for it."""

    pixels: NDArray[np.uint8]
    ids: list[int]
    torch_inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ours:
    """Of one row by the graphs: features (T_img, D), those that the decoder was given, its first logits (V,), and its
    greedy tokens (steps,).
    """

    features: Array
    given: Array
    logits: Array
    tokens: Array


@dataclass(frozen=True)
class Reference:
    """Of one row in PyTorch: features (T_img, D); logits (tokens, V) of the prompt; and scores (steps, V), which are
    logits less penalties, of its first token and of those that follow the graphs' tokens.
    """

    features: Array
    logits: Array
    scores: Array

    @property
    def first(self) -> Array:
        """Logits (V,) of the first token of the answer."""
        last: Array = self.logits[-1]
        return last


Compared = tuple[Row, Ours, Reference]


@dataclass(frozen=True, slots=True)
class Gate:
    """What the gate measured; and a last row, which was given a sample of its features, as bundles carry them."""

    parity: Parity
    row: Row
    ours: Ours
    reference: Reference


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
) -> Gate:
    """Compare the graphs in `directory` with `checkpoint`.

    Raises:
        ExportError: a figure is out of tolerance; the message says which and by how much.
    """
    rows = _rows(checkpoint, layout)
    ours = _by_graphs(rows, layout, precision, directory, progress)
    if not all(np.isfinite(each.features).all() and (each.tokens >= 0).all() for each in ours):
        raise ExportError(
            "parity gate: numbers of the graphs are not finite, as this precision does not hold the checkpoint's "
            "(--dtype bf16 or fp32 does); no bundle was written"
        )
    references: list[Reference] = []
    with progress.step("parity: PyTorch") as update:
        for row, each in zip(rows, ours, strict=True):
            update(f"row {len(references) + 1} of {len(rows)}")
            references.append(_reference(checkpoint, row, each))
    *compared, known = zip(rows, ours, references, strict=True)
    error_of_all = None
    if precision.has_full:
        with progress.step("parity: full decoder graph"):
            error_of_all = _error_of_all_logits(layout, compared, directory)
    parity = _measured(compared, error_of_all)
    refuse_beyond_bounds(parity, precision)
    return Gate(parity, *known)


def _measured(compared: list[Compared], error_of_all: float | None) -> Parity:
    """Figures of the gate; without an error of all logits, that of the first ones counts."""
    ours, references = [each for _, each, _ in compared], [reference for *_, reference in compared]
    features, expected = (np.stack([each.features for each in side]) for side in (ours, references))
    firsts, found = np.stack([each.first for each in references]), np.stack([each.logits for each in ours])
    return Parity(
        features=relative_error(features, expected),
        logits=relative_error(found, firsts) if error_of_all is None else error_of_all,
        tokens=sum(each.tokens.size for each in ours),
        tokens_equal=sum(int((each.tokens == reference.scores.argmax(-1)).sum()) for _, each, reference in compared),
        first_token_kl=float(divergence(firsts, found).max()),
        feature_cosine=float(cosine(features, expected).min()),
    )


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


def _reference(checkpoint: Checkpoint, row: Row, ours: Ours) -> Reference:
    """What transformers makes of a row, and then of all of the graphs' answer but its last token.

    If the tokens that follow are those of the answer, then it is the one of greedy decoding: each is
    what the model says after those before it. Its language model is given other features if the graphs' was.
    """
    model, seen = checkpoint.weights.streamed(), []

    def see(_: Any, __: Any, output: Any) -> Any:
        seen.append(output.pooler_output)
        if ours.given is not ours.features:
            output.pooler_output = torch.from_numpy(ours.given)
        return output

    model.model.visual.register_forward_hook(see)
    following = torch.from_numpy(ours.tokens[None, :-1])
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
    logits, more = prompt.logits[0].numpy(), after.logits[0].numpy()
    scores = _penalized(
        np.concatenate([logits[-1:], more]), row.ids, ours.tokens, checkpoint.generation.repetition_penalty
    )
    return Reference(features.numpy(), logits, scores)


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


def _by_graphs(
    rows: list[Row], layout: Layout, precision: Precision, directory: Path, progress: Progress
) -> list[Ours]:
    """All rows through the vision graph, one after the other, and through the decoder graph, all at once."""
    with progress.step("parity: vision graph"):
        session = _session(directory / VISION, precision.vision)
        features = [session.run(None, {"pixels": row.pixels[None]})[0][0] for row in rows]
    given = [*features[:-1], repeated(sample(features[-1]), layout.image_tokens)]
    with progress.step("parity: decoder graph") as update:
        tokens, logits = _graph_tokens(layout, rows, given, directory, precision, update)
    return list(map(Ours, features, given, logits, tokens))


def _error_of_all_logits(layout: Layout, compared: list[Compared], directory: Path) -> float:
    session = _session(directory / DECODER_FULL, "fp32")
    ids, embeds, lengths = _padded(layout, [row for row, *_ in compared], [ours.given for _, ours, _ in compared])
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    found = session.run(None, {"input_ids": ids, "attention_mask": mask, "image_embeds": embeds})[0]
    return max(
        relative_error(logits[: len(reference.logits)], reference.logits)
        for logits, (*_, reference) in zip(found, compared, strict=True)
    )


def _graph_tokens(
    layout: Layout, rows: list[Row], features: list[Array], directory: Path, precision: Precision, update: Update
) -> tuple[Array, Array]:
    """Greedy tokens (rows, steps) of the cached graph, one ragged prefill, then steps of one; and
    logits (rows, V) of the first.
    """
    session = _session(directory / DECODER, precision.decoder)
    steps = min(STEPS, layout.room - max(PROMPT_TOKENS))
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


def _penalized(logits: Array, ids: list[int], answer: Array, penalty: float) -> Array:
    """Logits (steps, V) less penalties for tokens of a prompt, and for what precedes each in an answer (steps,)."""
    scores = logits.copy()
    for step, row in enumerate(scores):
        seen = np.unique([*ids, *answer[:step]])
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return scores


def _padded(layout: Layout, rows: list[Row], features: list[Array]) -> tuple[Array, Array, Array]:
    """Right-padded token ids (B, S), image embeddings (B, S, D), and true lengths (B,)."""
    lengths = np.array([len(row.ids) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
    embeds = np.zeros((*ids.shape, features[0].shape[-1]), np.float32)
    embeds[:, layout.image_start : layout.image_start + layout.image_tokens] = np.stack(features)
    return ids, embeds, lengths
