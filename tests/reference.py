"""Demo questions as a comparison asks them, their images fitted by Pillow's own means."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from export.comparison.questions import Question
from qvl_batch.conversation import single_turn
from qvl_batch.images.pixels import Seen
from qvl_batch.images.view import ImageSize, View


def question(row: dict[str, Any]) -> Question:
    """A row of `image` (a struct with bytes), `prompt` and perhaps `expected`."""
    width, height = ImageOps.exif_transpose(Image.open(io.BytesIO(row["image"]["bytes"]))).size
    return Question(
        file=0,
        row=0,
        id=row["id"],
        conversation=single_turn(row["prompt"], 1),
        expected=row.get("expected"),
        view=View.square(672),
        images=(Seen(letterboxed(row["image"]["bytes"]), ImageSize(width, height, 672, 672)),),
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
