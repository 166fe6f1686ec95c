"""Rows of token ids and their M-RoPE positions, as the bundle's layout contract has them.

Letters used for dimensions, here and everywhere:

    B   rows of a batch            T_img  image tokens (576 at 672 x 672)
    S   tokens of a row            P      index of the first image token
    D   hidden size of the decoder V      vocabulary
    N   slots of the KV cache      L_max  tokens that a slot holds (= the contract's S)

What enters: prompts. What leaves: token ids of whole rows, and back again, answers from ids.

This module knows nothing of images or of graphs.
"""

import os
import threading

import numpy as np
from numpy.typing import NDArray

# Read when transformers is imported: that a worker has no torch is no news.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from transformers import AutoTokenizer

from qvl_batch.bundle import Bundle, Layout, chat_turn
from qvl_batch.errors import BundleError, PromptError


class RowLayout:
    """Turns prompts into rows and answer ids into text, with a bundle's tokenizer.

    Raises:
        BundleError: the tokenizer's chat template does not give the contract of the manifest.
    """

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.layout = manifest.layout
        # A fast tokenizer takes settings by mutation, and fails when two threads are in it at once.
        self._lock = threading.Lock()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(bundle.path, local_files_only=True)
        except Exception as error:  # transformers raises whatever its parsing met
            raise BundleError(f"{bundle.path}: the tokenizer cannot be loaded: {error}") from error
        derived = chat_turn(self._tokenizer, self.layout.image_token_id, manifest.system_prompt)
        written = (self.layout.head_ids, self.layout.bridge_ids, self.layout.tail_ids)
        if derived != written or self.layout.image_start != len(self.layout.head_ids):
            raise BundleError(
                f"{bundle.path}: the chat template puts the image at {len(derived[0])} and gives other "
                f"tokens around it than the contract (image at {self.layout.image_start}): export again"
            )

    def row_ids(self, prompt: str | None) -> list[int]:
        """Token ids of a row up to its answer.

        A prompt is data: a special token spelled in it is text like any other.

        Raises:
            PromptError: no prompt, or one that leaves no room for an answer.
        """
        if prompt is None or not prompt.strip():
            raise PromptError("the prompt is null" if prompt is None else "the prompt is empty")
        try:
            with self._lock:
                ids = self._tokenizer(prompt, add_special_tokens=False, split_special_tokens=True).input_ids
        except (TypeError, UnicodeError) as error:
            raise PromptError(f"the prompt is not valid Unicode text: {error}") from error
        if len(ids) >= self.layout.room:
            raise PromptError(
                f"the prompt has {len(ids)} tokens; the bundle leaves {self.layout.room - 1} beside the image "
                f"(exported with --max-seq-len {self.layout.max_seq_len})"
            )
        return self.layout.row_ids(ids)

    def text(self, token_ids: list[int]) -> str:
        """Text of an answer, special tokens left out."""
        with self._lock:
            text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def token_text(self, token_id: int | None) -> str | None:
        """One token as the vocabulary spells it, special tokens too."""
        if token_id is None:
            return None
        with self._lock:
            text: str = self._tokenizer.decode([token_id])
        return text


def mrope_positions(layout: Layout) -> NDArray[np.int64]:
    """M-RoPE positions int64 (3, S) of any row, since the image stands at P in all of them.

    Text counts on by one along all three axes. Merged patch k of the image stands at time P,
    row P + k / side, column P + k % side. Text after it goes on at P + side.

    Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    start, side = layout.image_start, layout.side
    stop = start + layout.image_tokens
    positions = np.tile(np.arange(layout.max_seq_len, dtype=np.int64), (3, 1))
    patch = np.arange(layout.image_tokens)
    positions[:, start:stop] = start + np.stack([np.zeros_like(patch), patch // side, patch % side])
    positions[:, stop:] += layout.position_delta
    return positions
