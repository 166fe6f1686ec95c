"""Ask a checkpoint about new scenes, by transformers' `generate`, and print how many answers are right to the letter.

    python datasets/evaluate.py datasets/tiny-qwen2.5-vl [--rows 500] [--seed 11] [--styles native pairs]

Styles are those of `make_demo.py`; images of `fixed` are fitted to 672 x 672. Figures are by kind of question, by field
of answers in JSON, which nothing holds to a schema here, and by image: image tokens of the smallest of a row's images,
and proportions of its longest.
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from make_demo import KINDS, STYLES, demo_rows, native_rows
from PIL import Image, ImageOps
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qvl_batch.images.pixels import LETTERBOX_RGB, decode_image

FIXED = 672
MOST_PIXELS = 1280 * 28 * 28
#: Upper bounds of groups by image tokens, and of groups by longer side over shorter.
TOKENS = (8, 50, 150, 400, 1280)
PROPORTIONS = (2, 4, 20)


class Answers:
    """Answers of a checkpoint, in fp32."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint, max_pixels=MOST_PIXELS)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], messages: list[dict[str, Any]]) -> tuple[str, list[int]]:
        """The answer to the last message, and the tokens of each image."""
        seen = self.processor(images=list(images), return_tensors="pt")
        tokens = [int(grid.prod()) // 4 for grid in seen.image_grid_thw]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = text.split("<|image_pad|>")
        filled = "".join(piece + "<|image_pad|>" * n for piece, n in zip(pieces, [*tokens, 0], strict=True))
        ids = self.tokenizer(filled, return_tensors="pt").input_ids
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=seen.pixel_values,
            image_grid_thw=seen.image_grid_thw,
            mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
            max_new_tokens=96,
            do_sample=False,
        )
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), tokens


def rows_of(style: str, count: int, seed: int) -> Iterator[tuple[str, list[Image.Image], list[dict[str, Any]], str]]:
    """Kind of question, images, messages and expected answer of each row."""
    if style != "fixed":
        for row in native_rows(style, count, seed):
            yield row.kind, [decode_image(data) for data, _ in row.images], row.messages, row.expected
        return
    for row, kind in zip(demo_rows(count, seed), itertools.cycle(KINDS), strict=False):
        image = decode_image(row["image"]["bytes"])
        image = ImageOps.pad(image, (FIXED, FIXED), Image.Resampling.BICUBIC, LETTERBOX_RGB)
        content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
        yield kind, [image], [{"role": "user", "content": content}], row["expected"]


def evaluate(answers: Answers, style: str, count: int, seed: int, *, show: bool) -> None:
    """Ask, and print the figures."""
    groups = ("", "kind", "field", "tokens", "proportion")
    right: dict[str, dict[str, list[bool]]] = {group: defaultdict(list) for group in groups}
    for kind, images, messages, expected in rows_of(style, count, seed):
        given, tokens = answers(images, messages)
        proportion = max(max(image.size) / min(image.size) for image in images)
        names = {"": "all", "kind": kind, "tokens": _bound(min(tokens), TOKENS)}
        names["proportion"] = _bound(proportion, PROPORTIONS)
        for group, name in names.items():
            right[group][name].append(given == expected)
        given_fields = _fields(given)
        for name, value in _fields(expected).items():
            right["field"][name].append(given_fields.get(name) == value)
        if show and given != expected:
            question = messages[-1]["content"][-1].get("text") or messages[-1]["content"][0]["text"]
            print(f"  {question} {given!r}, not {expected!r}; {[image.size for image in images]}", file=sys.stderr)
    for group, by_name in right.items():
        if not by_name:
            continue
        figures = ", ".join(f"{name} {sum(some)} of {len(some)}" for name, some in by_name.items())
        print(f"{style:10} {group:10} {figures}", flush=True)


def _fields(text: str) -> dict[str, Any]:
    """The fields of an answer in JSON, or none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _bound(value: float, bounds: Sequence[int]) -> str:
    """The group of a value, by its upper bound."""
    return f"<= {next((bound for bound in bounds if value <= bound + 0.5), bounds[-1])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=STYLES)
    parser.add_argument("--show", action="store_true", help="print wrong answers")
    args = parser.parse_args()
    answers = Answers(args.checkpoint)
    for style in args.styles:
        evaluate(answers, style, args.rows, args.seed, show=args.show)


if __name__ == "__main__":
    main()
