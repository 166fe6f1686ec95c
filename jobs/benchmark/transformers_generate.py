"""transformers' `generate`, in batches padded on the left."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from benchmark.bundle_rows import BundleRows
from benchmark.rows import BATCHES, Peer, Rows, timed
from export.checkpoint import load_checkpoint
from qvl_batch.bundle.loading import Bundle
from qvl_batch.runtime.devices import usable_cpus


class HuggingFace(Peer):
    """`Qwen2_5_VLForConditionalGeneration.generate` on the token ids and pixels of a bundle.

    Images of a batch can have different sizes.

    Args:
        checkpoint: folder of the checkpoint.
        dtype: type of weights and computation, as torch names it.
        bundle: folder of a bundle of it, which says how images are seen and what rows are made of.
        new_tokens: tokens of each answer; end tokens are ignored.
        batches: sizes of a batch to try.
        device: where the model is, as torch names it.
        cache: kind of KV cache, as `generate` names it; with a static one it compiles its decode step on a GPU.
    """

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        bundle: Path,
        new_tokens: int,
        batches: Sequence[int] = BATCHES,
        device: str = "cpu",
        cache: str | None = None,
    ) -> None:
        super().__init__(new_tokens, batches)
        torch.set_num_threads(usable_cpus())
        loaded = load_checkpoint(checkpoint)
        self.model, self.processor = loaded.model.to(device, getattr(torch, dtype)), loaded.image_processor
        self._cache = cache
        self.rows = BundleRows(Bundle.load(bundle))

    def prompt_tokens(self, rows: Rows) -> list[int]:
        """Tokens up to the answer of each row."""
        return [len(ids) for ids in self._ids(rows, self._images(rows))]

    def _vision(self, rows: Rows, images: dict[str, Any]) -> float:
        took: dict[str, float] = {}
        with torch.inference_mode():
            on_device = self._on_device(images)
            # Reads the result, which waits for the GPU.
            encode = lambda: self.model.model.get_image_features(**on_device).pooler_output[-1].sum().item()  # noqa: E731
            timed(took, "vision", len(rows), encode)
        return took["vision"]

    def _images(self, rows: Rows) -> dict[str, Any]:
        pixels = [Image.fromarray(image) for image in self.rows.images(rows)]
        return dict(self.processor(pixels, do_resize=False, return_tensors="pt"))

    def _ids(self, rows: Rows, images: dict[str, Any]) -> list[list[int]]:
        """Token ids up to the answer of each row."""
        merge = self.processor.merge_size
        grids = [(height // merge, width // merge) for _, height, width in images["image_grid_thw"].tolist()]
        return [self.rows.tokens(*row).input_ids for row in zip(rows.prompts, grids, strict=True)]

    def _on_device(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor.to(self.model.device) for name, tensor in tensors.items()}

    def _answer(self, rows: Rows, images: dict[str, Any], new_tokens: int) -> list[list[int]]:
        settings = self.model.config
        ids = self._ids(rows, images)
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        forced = GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=settings.text_config.vocab_size,  # no token has this id
            pad_token_id=0,
            cache_implementation=self._cache,
        )
        with torch.inference_mode():
            text = {
                "input_ids": padded,
                "attention_mask": mask,
                "mm_token_type_ids": (padded == settings.image_token_id).int() * mask,
            }
            output = self.model.generate(**self._on_device(images | text), generation_config=forced)
        tokens: list[list[int]] = output[:, longest:].tolist()
        return tokens


class Ahead(HuggingFace):
    """The same, with all CPUs decoding the images of later batches while one is answered."""

    def answer(self, rows: Rows) -> list[list[int]]:
        """Answer all rows; tokens of each."""
        parts = [rows.part(at, at + self.batch) for at in range(0, len(rows), self.batch)]
        with ThreadPoolExecutor(usable_cpus()) as pool:
            images = pool.map(self._images, (rows.part(at, at + 1) for at in range(len(rows))))
            batches = ([next(images) for _ in range(len(part))] for part in parts)
            answers = (
                self._answer(
                    part, {name: torch.cat([one[name] for one in batch]) for name in batch[0]}, self.new_tokens
                )
                for part, batch in zip(parts, batches, strict=True)
            )
            return [tokens for answered in answers for tokens in answered]
