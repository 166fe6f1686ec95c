"""Measure the tiny checkpoint by `generate` in PyTorch, on fresh scenes at 672 x 672.

    python datasets/evaluate.py [CHECKPOINT] [--scenes 500] [--seed 11]

Prints the share of answers that are exactly right, with a 95 % Wilson interval, and by kind of
question. The seed is neither training's nor the demo's.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import torch
from make_demo import KINDS, demo_rows
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qvl_batch.images import decode_image, fit_image

IMAGE_SIZE = 672


class Answerer:
    """The checkpoint in PyTorch, fp32, one question at a time."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def __call__(self, data: bytes, prompt: str) -> str:
        """The greedy answer."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pixels = Image.fromarray(fit_image(decode_image(data), IMAGE_SIZE))
        image = self.processor([pixels], return_tensors="pt")
        count = int(image["image_grid_thw"].prod()) // 4
        ids = self.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt").input_ids
        with torch.inference_mode():
            output = self.model.generate(
                **image,
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                max_new_tokens=64,
            )
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share (E. B. Wilson, JASA 22, 1927)."""
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=Path(__file__).parent / "tiny-qwen2.5-vl")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    answerer = Answerer(args.checkpoint)
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for index, row in enumerate(demo_rows(args.scenes, args.seed)):
        kind = KINDS[index % len(KINDS)]
        answer = answerer(row["image"]["bytes"], row["prompt"])
        asked[kind] += 1
        right[kind] += answer == row["expected"]
        if answer != row["expected"]:
            print(f"{row['id']} {row['prompt']} {answer!r}, expected {row['expected']!r}")
    for kind in asked:
        print(f"{kind:<10} {right[kind]:4} of {asked[kind]:4} {right[kind] / asked[kind]:7.1%}")
    low, high = wilson(right.total(), asked.total())
    share = right.total() / asked.total()
    print(f"all        {right.total():4} of {asked.total():4} {share:7.1%}   (95 %: {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
