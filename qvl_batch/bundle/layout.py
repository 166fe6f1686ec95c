"""The layout contract between exporter, vision graph and decoder: what a row of token ids is made of, which sizes of
images the vision graph takes, and the longest row. The exporter derives it from the checkpoint; the manifest holds it.

Letters used for dimensions, here and everywhere:

    B   rows of a batch            T_img  image tokens of one image (576 at 672 x 672)
    S   tokens of a row            P      index of the first image token in a turn of one image and text
    D   hidden size of the decoder V      vocabulary
    N   slots of the KV cache      L_max  tokens that a slot holds (= the contract's S)
    H   height of an image, W its width, in pixels, as the vision graph sees it
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvl_batch.errors import PromptError

#: An image as input of the vision graph, RGB (H, W, 3), and as input of the decoder, (T_img, D).
Pixels = NDArray[np.uint8]
Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Sizes of images that the vision graph takes.

    Args:
        unit: side in pixels of the square that becomes one image token (28).
        image_size: side in pixels of the square that every image is fitted to; None if images keep their own size and
            proportions, rounded to units (native).
        min_pixels: smallest H x W; for a square, its area.
        max_pixels: largest H x W; for a square, its area.
    """

    unit: int
    image_size: int | None
    min_pixels: int
    max_pixels: int

    @property
    def is_native(self) -> bool:
        """Whether images keep their own size."""
        return self.image_size is None

    @property
    def max_tokens(self) -> int:
        """Most image tokens of one image."""
        return self.max_pixels // self.unit**2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of image tokens of an image of that size; T_img is their product."""
        return height // self.unit, width // self.unit


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """The tokens of an image in a row: index of the first, and their rows and columns."""

    start: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        """Number of its tokens (T_img)."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """Index of the token after its last."""
        return self.start + self.tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """What rows are made of.

    A turn of one image and text, by which exporter and worker agree on tokenizer and template:

        head_ids | image_token_id x T_img | bridge_ids | prompt | tail_ids | answer
                 ^ image_start (P)                                row <= max_seq_len (S)

    Args:
        resolution: sizes of images.
        max_seq_len: longest row in tokens, answer included.
        image_token_id: the token that stands for one image token's features.
        head_ids: tokens before the image.
        bridge_ids: tokens between image and prompt.
        tail_ids: tokens after the prompt.
    """

    resolution: Resolution
    max_seq_len: int
    image_token_id: int
    head_ids: tuple[int, ...]
    bridge_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]

    @property
    def image_start(self) -> int:
        """Index of the first image token (P)."""
        return len(self.head_ids)

    @property
    def room(self) -> int:
        """Tokens left for prompt and answer together, beside one image of the largest size."""
        fixed = len(self.head_ids) + self.resolution.max_tokens + len(self.bridge_ids) + len(self.tail_ids)
        return self.max_seq_len - fixed

    def check_room(self, image_tokens: Sequence[int], text_tokens: int | None = 0) -> None:
        """Check that a row leaves room for an answer.

        Args:
            image_tokens: tokens of each of its images.
            text_tokens: tokens of its text; None if they were not counted, and are more than the longest row's.

        Raises:
            PromptError: it does not.
        """
        images, of_images = len(image_tokens), sum(image_tokens)
        if text_tokens is not None and of_images + text_tokens < self.max_seq_len:
            return
        counts, advice = [], []
        if images:
            counts.append(f"{of_images} of {images} image{'s' * (images > 1)}")
        if text_tokens != 0:
            counts.append(f"{text_tokens or f'more than {self.max_seq_len}'} of text")
            advice.append("shorten the text")
        if images > 1:
            advice.append("use fewer images")
        if images and self.resolution.is_native:
            advice.append("lower --max-pixels")
        raise PromptError(
            f"the row has too many tokens: {' and '.join(counts)}; the bundle takes {self.max_seq_len - 1} beside an "
            f"answer (exported with --max-seq-len {self.max_seq_len}): {' or '.join(advice)}"
        )

    def row_ids(self, prompt_ids: Iterable[int], image_tokens: int) -> list[int]:
        """Token ids, up to its answer, of a turn of one image of `image_tokens` tokens and a prompt."""
        image = [self.image_token_id] * image_tokens
        return [*self.head_ids, *image, *self.bridge_ids, *prompt_ids, *self.tail_ids]


def mrope_positions(length: int, images: Sequence[PlacedImage]) -> NDArray[np.int64]:
    """M-RoPE positions of a row, int64 (3, length), along time, rows and columns.

    Positions of text increase by one along all three axes. Token (r, c) of an image whose first token would have
    position p as text is at time p, row p + r, column p + c. Text after it continues at p + max(rows, columns).

    Qwen2-VL, arXiv 2409.12191, section 2.1; `get_rope_index` of transformers.

    Args:
        length: tokens of the row.
        images: its images, in order.
    """
    positions = np.zeros((3, length), np.int64)
    at = position = 0
    for image in images:
        positions[:, at : image.start] = position + np.arange(image.start - at)
        position += image.start - at
        grid = positions[:, image.start : image.stop].reshape(3, image.rows, image.columns)
        grid[...] = position
        grid[1] += np.arange(image.rows)[:, None]
        grid[2] += np.arange(image.columns)
        position += max(image.rows, image.columns)
        at = image.stop
    positions[:, at:] = position + np.arange(length - at)
    return positions
