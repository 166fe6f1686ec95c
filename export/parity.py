"""The parity gate: the graphs on disk against the checkpoint in PyTorch, on the same inputs.

Compared are vision features, all logits of the plain contract graph (where there is none, those
of the cached graph for the first token), and greedy tokens of a ragged batch through the cached
graph. The reference is transformers' own image processor,
`forward` and `generate`; the cached graph is driven here by a loop of a few lines, so that
nothing of the worker's engine stands between the graph and the verdict.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import GenerationConfig

from export.checkpoint import Checkpoint
from export.graphs import Precision
from qvl_batch.bundle import DECODER, DECODER_FULL, VISION, Dtype, Layout, Parity
from qvl_batch.errors import ExportError

#: Largest error allowed over the largest magnitude, of features and of logits. In reduced precision
#: the gate only keeps out what is broken; what answers lose is for a comparison to say.
TOLERANCE: dict[Dtype, float] = {"fp32": 1e-4, "int8": 0.2, "int8wo": 0.1, "int4wo": 0.6}
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


def check_contract(layout: Layout, hidden_size: int, directory: Path) -> None:
    """Run the vision graph once, on a black image, and compare what comes out with the contract.

    Raises:
        ExportError: the features are not (1, T_img, D).
    """
    session = ort.InferenceSession(directory / VISION)
    black = np.zeros((1, layout.image_size, layout.image_size, 3), np.uint8)
    shape = session.run(None, {"pixels": black})[0].shape
    if shape != (1, layout.image_tokens, hidden_size):
        raise ExportError(
            f"the vision graph gives features {shape}, the contract says (1, {layout.image_tokens}, {hidden_size})"
        )


def check_parity(checkpoint: Checkpoint, layout: Layout, precision: Precision, directory: Path) -> Parity:
    """Compare the graphs in `directory` with `checkpoint`.

    Raises:
        ExportError: a figure is out of tolerance; the message says which and by how much.
    """
    steps = min(STEPS, layout.room - max(PROMPT_TOKENS))
    rows = _rows(checkpoint, layout)
    with torch.inference_mode():
        features, feature_error = _check_features(checkpoint, rows, directory)
        expected = np.stack([_torch_tokens(checkpoint, row, steps) for row in rows])
        found, first_logits = _graph_tokens(layout, rows, features, directory, steps)
        if precision.decoder == "fp32":
            logits_error = _check_logits(checkpoint, layout, rows, features, directory)
        else:
            last = [checkpoint.model(**row.torch_inputs, logits_to_keep=1).logits[0, -1].numpy() for row in rows]
            logits_error = _relative_error(first_logits, np.stack(last))
    parity = Parity(feature_error, logits_error, expected.size, int((found == expected).sum()))
    _refuse(parity, precision)
    return parity


def _refuse(parity: Parity, precision: Precision) -> None:
    bounds = {"vision features": (parity.features, TOLERANCE[precision.vision])}
    # The decoder's input is the vision tower's output, errors and all.
    allowed = max(TOLERANCE[precision.vision], TOLERANCE[precision.decoder])
    bounds["logits"] = (parity.logits, allowed)
    for name, (error, bound) in bounds.items():
        if not error <= bound:
            raise ExportError(
                f"parity gate: {name} are off by {error:.2e} of their largest magnitude "
                f"(allowed: {bound:.0e}); no bundle was written"
            )
    exact = precision.decoder == precision.vision == "fp32"
    if exact and parity.tokens_equal != parity.tokens:
        raise ExportError(
            f"parity gate: {parity.tokens_equal} of {parity.tokens} greedy tokens are equal; no bundle was written"
        )


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


def _check_features(checkpoint: Checkpoint, rows: list[Row], directory: Path) -> tuple[Array, float]:
    session = ort.InferenceSession(directory / VISION)
    found = session.run(None, {"pixels": np.stack([row.pixels for row in rows])})[0]
    expected = torch.stack(
        [
            checkpoint.model.model.get_image_features(
                row.torch_inputs["pixel_values"], row.torch_inputs["image_grid_thw"]
            ).pooler_output[0]
            for row in rows
        ]
    ).numpy()
    return found, _relative_error(found, expected)


def _check_logits(checkpoint: Checkpoint, layout: Layout, rows: list[Row], features: Array, directory: Path) -> float:
    session = ort.InferenceSession(directory / DECODER_FULL)
    ids, embeds, lengths = _padded(layout, rows, features)
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    found = session.run(None, {"input_ids": ids, "attention_mask": mask, "image_embeds": embeds})[0]
    errors = []
    for row, logits, length in zip(rows, found, lengths, strict=True):
        expected = checkpoint.model(**row.torch_inputs).logits[0].numpy()
        errors.append(_relative_error(logits[:length], expected))
    return float(np.max(errors))


def _torch_tokens(checkpoint: Checkpoint, row: Row, steps: int) -> Array:
    """Plain greedy decoding by `generate`, with nothing to stop it before `steps`."""
    settings = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=checkpoint.model.config.text_config.vocab_size,  # no token has this id
        pad_token_id=checkpoint.generation.pad_token_id,
        repetition_penalty=1.0,
    )
    output = checkpoint.model.generate(**row.torch_inputs, generation_config=settings)
    return np.asarray(output[0, len(row.ids) :])


def _graph_tokens(layout: Layout, rows: list[Row], features: Array, directory: Path, steps: int) -> tuple[Array, Array]:
    """Greedy tokens (rows, steps) of the cached graph, one ragged prefill, then steps of one; and
    logits (rows, V) of the first.
    """
    session = ort.InferenceSession(directory / DECODER)
    ids, embeds, lengths = _padded(layout, rows, features)
    positions = np.stack([_positions(layout, ids.shape[1])] * len(rows), axis=1)
    past = {
        value.name: np.zeros((len(rows), value.shape[1], layout.max_seq_len, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_")
    }
    tokens: list[Array] = []
    first_logits: Array | None = None
    for _ in range(steps):
        inputs = {
            "input_ids": ids,
            "position_ids": positions,
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
        positions = np.broadcast_to((lengths + layout.position_delta)[None, :, None], (3, len(rows), 1))
        lengths = lengths + 1
    assert first_logits is not None
    return np.stack(tokens, axis=1), first_logits


def _padded(layout: Layout, rows: list[Row], features: Array) -> tuple[Array, Array, Array]:
    """Right-padded token ids (B, S), image embeddings (B, S, D), and true lengths (B,)."""
    lengths = np.array([len(row.ids) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
    embeds = np.zeros((*ids.shape, features.shape[-1]), np.float32)
    embeds[:, layout.image_start : layout.image_start + layout.image_tokens] = features
    return ids, embeds, lengths


def _positions(layout: Layout, length: int) -> Array:
    """M-RoPE positions (3, length) of a row with its image at `image_start`."""
    start, side = layout.image_start, layout.side
    positions = np.tile(np.arange(length), (3, 1))
    patch = np.arange(layout.image_tokens)
    positions[:, start : start + layout.image_tokens] = start + np.stack([patch * 0, patch // side, patch % side])
    positions[:, start + layout.image_tokens :] += layout.position_delta
    return positions


def _relative_error(found: Array, expected: Array) -> float:
    """Largest absolute difference over the largest magnitude; NaN anywhere gives NaN."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
