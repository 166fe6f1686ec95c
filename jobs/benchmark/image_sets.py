"""Rows to compare a native bundle on, made of the rows of the bench: the same images as squares, and as a mix of sizes.

What enters: `Rows`. What leaves: `ImageSet`, whose images are PNG files of exactly the size at which they are seen. So
no contender resizes them, and all see the same pixels.
"""

import io
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from benchmark.rows import Rows
from qvl_batch.bundle.layout import Resolution
from qvl_batch.errors import ConfigError
from qvl_batch.images.pixels import decode_image, see
from qvl_batch.images.view import View

#: Smallest and largest image of the mix in pixels. The smallest is also the least that the stock image processor takes.
LEAST_PIXELS, MOST_PIXELS = 56 * 56, 1024 * 1024
#: Longest side over shortest.
ELONGATED = 3.0
#: Steps of the sequence that areas and proportions are drawn from. Any stretch of it covers both evenly, so that a few
#: rows have about the same mean as all. https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences/
STEPS = (0.7548776662466927, 0.5698402909980532)
SEED = 7


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Rows, and the number of image tokens of all of them."""

    rows: Rows
    image_tokens: int


def squares(rows: Rows, resolution: Resolution) -> ImageSet:
    """The images as a bundle that takes squares sees them."""
    view = View.of(resolution)
    files = [_png(Image.fromarray(see(decode_image(file), view).pixels)) for file in rows.files]
    return ImageSet(Rows(files, rows.prompts), len(rows) * resolution.max_tokens)


def mixed(rows: Rows, resolution: Resolution, mean_tokens: int) -> ImageSet:
    """The images resized to sizes and proportions from a seeded list.

    Args:
        rows: rows of the bench.
        resolution: of a bundle whose images keep their own size.
        mean_tokens: about as many image tokens an image has on average.

    Raises:
        ConfigError: the resolution does not take such a mix.
    """
    sizes = mixed_sizes(len(rows), resolution, mean_tokens)
    files = [
        _png(decode_image(file).resize(size, Image.Resampling.BICUBIC))
        for file, size in zip(rows.files, sizes, strict=True)
    ]
    tokens = sum(width * height for width, height in sizes) // resolution.unit**2
    return ImageSet(Rows(files, rows.prompts), tokens)


def mixed_sizes(count: int, resolution: Resolution, mean_tokens: int) -> list[tuple[int, int]]:
    """Width and height of `count` images: many small ones, and ever fewer towards a megapixel.

    Args:
        count: number of images.
        resolution: sizes that the vision graph takes.
        mean_tokens: about the mean number of image tokens.

    Raises:
        ConfigError: the resolution does not take images of that mean and of sizes around it.
    """
    least, most = max(LEAST_PIXELS, resolution.min_pixels), min(MOST_PIXELS, resolution.max_pixels)
    mean = mean_tokens * resolution.unit**2
    if not least < mean < most:
        raise ConfigError(
            f"--native-bundle takes images of {resolution.min_pixels} to {resolution.max_pixels} pixels, which is no "
            f"range around the {mean} of --bundle: export it without --min-pixels and --max-pixels"
        )
    # The mean of u ** power is 1 / (power + 1), if u is spread evenly over 0 to 1.
    power = (most - least) / (mean - least) - 1
    view = View.of(replace(resolution, min_pixels=least, max_pixels=most))
    spread = (np.random.default_rng(SEED).random(2) + np.outer(np.arange(count), STEPS)) % 1
    areas, proportions = least + (most - least) * spread[:, 0] ** power, ELONGATED ** (2 * spread[:, 1] - 1)
    widths = np.sqrt(areas * proportions)
    return [view.size_of(round(w), round(a / w)) for w, a in zip(widths.tolist(), areas.tolist(), strict=True)]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
