"""Rows as people have them: images of many sizes, several of them, conversations."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
from image_files import image_file
from PIL import Image

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
MIXED = pa.schema({"id": pa.string(), "images": pa.list_(IMAGE), "messages": pa.string()})
#: Width and height: small, long, at and beside the edges of windows and units.
SIZES = (
    (28, 28), (30, 41), (56, 560), (700, 35), (112, 112), (140, 336), (333, 97), (448, 448), (200, 640), (97, 1000),
    (1000, 700), (57, 55), (224, 225),
)  # fmt: skip


def picture(seed: int, size: tuple[int, int]) -> bytes:
    """A PNG of coloured noise, coarse and fine."""
    chance = np.random.default_rng((seed, *size))
    coarse = Image.fromarray(chance.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse) ^ chance.integers(0, 16, (size[1], size[0], 3), dtype=np.uint8)
    data: bytes = image_file(Image.fromarray(pixels))
    return data


def mixed_rows(count: int, seed: int = 0, most_images: int = 4) -> list[dict[str, Any]]:
    """Conversations of one to three turns of the user, with images among and between the texts, or none."""
    chance = np.random.default_rng(seed)
    texts = (
        "How many shapes are there?",
        "Is there a star?\n",
        " And its size?",
        "What color is the circle?",
        "é 漢字 🙂",
    )
    rows = []
    for number in range(count):
        images, messages = [], []
        if chance.random() < 0.3:
            messages.append({"role": "system", "content": "Answer in one word."})
        for turn in range(1 + int(chance.integers(3))):
            parts = [{"type": "text", "text": str(chance.choice(texts))}]
            for _ in range(int(chance.integers(3)) if len(images) < most_images - 1 else 0):
                images.append(picture(seed * 1000 + number, SIZES[int(chance.integers(len(SIZES)))]))
                parts.insert(int(chance.integers(len(parts) + 1)), {"type": "image"})
            if turn:
                messages.append({"role": "assistant", "content": "yes"})
            messages.append({"role": "user", "content": parts if len(parts) > 1 else parts[0]["text"]})
        rows.append(
            {
                "id": f"row-{number}",
                "images": [{"bytes": image, "path": None} for image in images],
                "messages": json.dumps(messages),
            }
        )
    return rows
