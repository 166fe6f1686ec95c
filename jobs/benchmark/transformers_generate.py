"""transformers' `generate`, in batches padded on the left."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from benchmark.rows import Peer, Rows, timed
from export.checkpoint import load_checkpoint
from qvl_batch.bundle import Bundle
from qvl_batch.images import decode_image, fit_image
from qvl_batch.layout import RowLayout
from qvl_batch.runtime import usable_cpus


class HuggingFace(Peer):
    """`Qwen2_5_VLForConditionalGeneration.generate` on token ids and pixels as our layout has them.

    Args:
        checkpoint: folder of the checkpoint.
        dtype: of weights and computation, as torch names it.
        bundle: folder of a bundle of it, for the layout.
        new_tokens: tokens of each answer; none ends sooner.
    """

    def __init__(self, checkpoint: Path, dtype: str, bundle: Path, new_tokens: int) -> None:
        super().__init__(new_tokens)
        torch.set_num_threads(usable_cpus())
        loaded = load_checkpoint(checkpoint)
        self.model, self.processor = loaded.model.to(getattr(torch, dtype)), loaded.image_processor
        self.layout = RowLayout(Bundle.load(bundle))

    def prompt_tokens(self, rows: Rows) -> list[int]:
        """Tokens up to the answer of each row."""
        return [len(self.layout.row_ids(prompt)) for prompt in rows.prompts]

    def _vision(self, rows: Rows, images: dict[str, Any]) -> float:
        took: dict[str, float] = {}
        with torch.inference_mode():
            timed(took, "vision", len(rows), lambda: self.model.model.get_image_features(**images))
        return took["vision"]

    def _images(self, rows: Rows) -> dict[str, Any]:
        size = self.layout.layout.image_size
        pixels = [Image.fromarray(fit_image(decode_image(file), size)) for file in rows.files]
        return dict(self.processor(pixels, return_tensors="pt"))

    def _answer(self, rows: Rows, images: dict[str, Any], new_tokens: int) -> list[list[int]]:
        settings = self.model.config
        ids = [self.layout.row_ids(prompt) for prompt in rows.prompts]
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        forced = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=settings.text_config.vocab_size,  # no token has this id
            pad_token_id=0,
        )
        with torch.inference_mode():
            output = self.model.generate(
                **images,
                input_ids=padded,
                attention_mask=mask,
                mm_token_type_ids=(padded == settings.image_token_id).int() * mask,
                generation_config=forced,
            )
        tokens: list[list[int]] = output[:, longest:].tolist()
        return tokens
