"""The layout contract between exporter, vision graph and decoder: the position of the image in a row of token ids, and
the longest row. The exporter derives it from the checkpoint's chat template; the manifest holds it.

Letters used for dimensions, here and everywhere:

    B   rows of a batch            T_img  image tokens (576 at 672 x 672)
    S   tokens of a row            P      index of the first image token
    D   hidden size of the decoder V      vocabulary
    N   slots of the KV cache      L_max  tokens that a slot holds (= the contract's S)
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: An image as input of the vision graph, RGB (H, W, 3), and as input of the decoder, (T_img, D).
Pixels = NDArray[np.uint8]
Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions in a row of token ids.

        head_ids | image_token_id x image_tokens | bridge_ids | prompt | tail_ids | answer
                 ^ image_start (P)                                     row <= max_seq_len (S)

    The image is square: `image_size` pixels a side, `side` merged patches a side.
    """

    image_size: int
    image_tokens: int
    image_start: int
    max_seq_len: int
    image_token_id: int
    head_ids: tuple[int, ...]
    bridge_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]

    @property
    def side(self) -> int:
        """Merged patches along one side of the image, `sqrt(image_tokens)`."""
        return math.isqrt(self.image_tokens)

    @property
    def room(self) -> int:
        """Tokens left for prompt and answer together."""
        fixed = len(self.head_ids) + self.image_tokens + len(self.bridge_ids) + len(self.tail_ids)
        return self.max_seq_len - fixed

    def row_ids(self, prompt_ids: Iterable[int]) -> list[int]:
        """Token ids of a row up to its answer."""
        image = [self.image_token_id] * self.image_tokens
        return [*self.head_ids, *image, *self.bridge_ids, *prompt_ids, *self.tail_ids]
