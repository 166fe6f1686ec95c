"""The parity gate: the graphs on disk against the checkpoint in PyTorch, on the same inputs.

Compared are vision features, all logits of the plain contract graph (where there is none, those
of the cached graph for the first token), and greedy tokens of a ragged batch through the cached
graph. The reference is transformers' own image processor and `forward`; the cached graph is driven
here by a loop of a few lines, so that nothing of the worker's engine stands between the graph and
the verdict. Neither side holds its weights in memory, so that a model of any size can be compared.
Graphs in half precision, which no CPU runs, are emulated.

A last row goes with the bundle: its known answers, which every machine must come near to.
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
from qvl_batch.bundle import DECODER, DECODER_FULL, HALVES, VISION, Dtype, Layout, Parity, Tolerance
from qvl_batch.errors import ExportError
from qvl_batch.known_answers import STEPS as KNOWN_STEPS
from qvl_batch.known_answers import KnownAnswers, repeated, sample
from qvl_batch.measures import cosine, divergence, relative_error


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
#: Integer products are the same on every machine, and what is in fp32 between them differs in its last digits: this is
#: how many times the error of the exporting machine another may have.
SAME = 2.0
#: A token is decided if it leads by so many times the error that logits may have.
LEAD = 3.0

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


@dataclass(frozen=True, slots=True)
class Proof:
    """What the gate measured, and what a machine that runs the bundle is to be held to."""

    parity: Parity
    known: KnownAnswers
    tolerance: Tolerance


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
) -> Proof:
    """Compare the graphs in `directory` with `checkpoint`.

    Raises:
        ExportError: a figure is out of tolerance; the message says which and by how much.
    """
    steps = min(STEPS, layout.room - max(PROMPT_TOKENS))
    rows = _rows(checkpoint, layout)
    with progress.step("parity: vision graph"):
        features = _graph_features(rows, directory, precision)
    given = features.copy()
    given[-1] = repeated(sample(features[-1]), layout.image_tokens)
    with progress.step("parity: decoder graph") as update:
        tokens, first_logits = _graph_tokens(layout, rows, given, directory, precision, steps, update)
    if not np.isfinite(features).all() or (tokens < 0).any():
        raise ExportError(
            "parity gate: numbers of the graphs are not finite, as this precision does not hold the checkpoint's "
            "(--dtype bf16 or fp32 does); no bundle was written"
        )
    with progress.step("parity: PyTorch") as update:
        references: list[_Reference] = []
        for index, (row, answer) in enumerate(zip(rows, tokens, strict=True)):
            update(f"row {index + 1} of {len(rows)}")
            in_place = given[-1] if index == len(rows) - 1 else None
            references.append(_reference(checkpoint, row, answer, in_place))
    compared = slice(len(rows) - 1)
    prompts = [reference.logits[: len(row.ids)] for reference, row in zip(references, rows, strict=True)][compared]
    firsts = np.stack([logits[-1] for logits in prompts])
    if precision.has_full:
        with progress.step("parity: full decoder graph"):
            logits_error = _error_of_all_logits(layout, rows[compared], features[compared], directory, prompts)
    else:
        logits_error = relative_error(first_logits[compared], firsts)
    penalty = checkpoint.generation.repetition_penalty
    scores = [
        _scores(reference.logits[len(row.ids) - 1 :], row.ids, answer, penalty)
        for reference, row, answer in zip(references, rows, tokens, strict=True)
    ]
    expected = np.stack([reference.features for reference in references[compared]])
    greedy = np.stack([each.argmax(-1) for each in scores[compared]])
    parity = Parity(
        features=relative_error(features[compared], expected),
        logits=logits_error,
        tokens=greedy.size,
        tokens_equal=int((tokens[compared] == greedy).sum()),
        first_token_kl=float(divergence(firsts, first_logits[compared]).max()),
        feature_cosine=float(cosine(features[compared], expected).min()),
    )
    refuse_beyond_bounds(parity, precision)
    return _proof(parity, precision, rows[-1], references[-1], features[-1], first_logits[-1], tokens[-1], scores[-1])


def _proof(
    parity: Parity,
    precision: Precision,
    row: Row,
    reference: _Reference,
    features: Array,
    first_logits: Array,
    answer: Array,
    scores: Array,
) -> Proof:
    """The known answers: of the last row, PyTorch's side as reference, and the graphs' for what is allowed."""
    expected, logits = sample(reference.features), reference.logits[len(row.ids) - 1]
    tolerance = _tolerance(
        precision,
        features=relative_error(sample(features), expected),
        feature_cosine=float(cosine(sample(features), expected).min()),
        logits=relative_error(first_logits, logits),
    )
    scores = scores[:KNOWN_STEPS]
    best = np.sort(scores, axis=-1)
    lead = (best[:, -1] - best[:, -2]) / np.abs(scores).max(axis=-1)
    known = KnownAnswers(
        pixels=row.pixels,
        features=expected,
        input_ids=np.array(row.ids),
        embeds=sample(features),
        logits=logits,
        answer=answer[:KNOWN_STEPS],
        following=scores.argmax(-1),
        is_decided=lead > LEAD * tolerance.logits,
    )
    figures = [*known.of_vision(features, tolerance), *known.of_decoder(first_logits, answer[:KNOWN_STEPS], tolerance)]
    for figure in figures:
        if not figure.is_within:
            raise ExportError(f"parity gate: of the known answers, {figure}; no bundle was written")
    return Proof(parity, known, tolerance)


def _tolerance(precision: Precision, features: float, feature_cosine: float, logits: float) -> Tolerance:
    """The bounds of the gate, but of integers what this machine found, and some more."""
    exact, vision, decoder = BOUNDS["fp32"], BOUNDS[precision.vision], BOUNDS[precision.decoder]
    if precision.vision.startswith("int"):
        most = max(exact.error, min(vision.error, SAME * features))
        least = min(exact.feature_cosine, max(vision.feature_cosine, 1 - SAME * (1 - feature_cosine)))
    else:
        most, least = vision.error, vision.feature_cosine
    error = decoder.error
    if precision.decoder.startswith("int"):
        error = max(exact.error, min(error, SAME * logits))
    return Tolerance(features=most, feature_cosine=least, logits=error)


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


def _reference(checkpoint: Checkpoint, row: Row, answer: Array, embeds: Array | None) -> _Reference:
    """What transformers makes of a row, and then of all of an answer (steps,) but its last token.

    If the tokens that follow are those of the answer, then it is the one of greedy decoding: each is
    what the model says after those before it. `embeds`, if given, are what its language model gets in place
    of its features.
    """
    model, seen = checkpoint.weights.streamed(), []

    def see(_: Any, __: Any, output: Any) -> Any:
        seen.append(output.pooler_output)
        if embeds is not None:
            output.pooler_output = torch.from_numpy(embeds)
        return output

    model.model.visual.register_forward_hook(see)
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


def _scores(logits: Array, ids: list[int], answer: Array, penalty: float) -> Array:
    """Logits (steps, V), penalized for a prompt and for what precedes each in an answer (steps,)."""
    scores = logits.copy()
    for step, row in enumerate(scores):
        seen = np.unique([*ids, *answer[:step]])
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return scores


def _padded(layout: Layout, rows: list[Row], features: Array) -> tuple[Array, Array, Array]:
    """Right-padded token ids (B, S), image embeddings (B, S, D), and true lengths (B,)."""
    lengths = np.array([len(row.ids) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
    embeds = np.zeros((*ids.shape, features.shape[-1]), np.float32)
    embeds[:, layout.image_start : layout.image_start + layout.image_tokens] = features
    return ids, embeds, lengths
