"""Answers of the checkpoint in PyTorch, by transformers' own template, image processor and `generate`."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class Reference:
    """A checkpoint loaded in fp32."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def inputs(self, pixels: NDArray[np.uint8], prompt: str, system_prompt: str | None = None) -> dict[str, Any]:
        """Inputs of the model for one fitted image and its prompt."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system_prompt})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        image = self.processor([Image.fromarray(pixels)], return_tensors="pt")
        count = int(image["image_grid_thw"].prod()) // self.processor.merge_size**2
        pad = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        ids = torch.tensor([self.tokenizer(text.replace(pad, pad * count)).input_ids])
        return {
            **image,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
        }

    def answer(self, pixels: NDArray[np.uint8], prompt: str, max_new_tokens: int = 128) -> str:
        """The greedy answer, by the checkpoint's own generation config."""
        inputs = self.inputs(pixels, prompt)
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def answers(self, rows: Sequence[dict[str, Any]], max_new_tokens: int = 128) -> list[str]:
        """Answers to rows of `image` (a struct with bytes) and `prompt`."""
        return [self.answer(letterboxed(row["image"]["bytes"]), row["prompt"], max_new_tokens) for row in rows]


def letterboxed(data: bytes, size: int = 672) -> NDArray[np.uint8]:
    """An image as the job's default fit makes it, written down again with Pillow's own means."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    fitted = ImageOps.pad(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC, (122, 116, 104))
    return np.asarray(fitted)
