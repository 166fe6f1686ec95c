"""Demo questions as a comparison asks them, their images fitted by Pillow's own means."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from comparison.questions import Question


def question(row: dict[str, Any]) -> Question:
    """A row of `image` (a struct with bytes), `prompt` and perhaps `expected`."""
    return Question(
        file=0,
        row=0,
        id=row["id"],
        prompt=row["prompt"],
        expected=row.get("expected"),
        fit="letterbox",
        size=Image.open(io.BytesIO(row["image"]["bytes"])).size,
        pixels=letterboxed(row["image"]["bytes"]),
        failure=None,
    )


def letterboxed(data: bytes, size: int = 672) -> NDArray[np.uint8]:
    """An image as the job's default fit makes it, written down again with Pillow's own means."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    fitted = ImageOps.pad(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC, (122, 116, 104))
    return np.asarray(fitted)
