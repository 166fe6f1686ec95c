"""How images are seen: which size the vision graph gets of an image, and where its pixels come from.

What enters: sizes of images. What leaves: sizes, and places in the user's file of places in what the model saw.

    file ─ turned upright ─ original ─ scaled, with bars or a cut ─ seen

A place is a point between pixels: (0, 0) is the top left corner of the top left pixel, (width, height) the opposite
corner of the picture.

This module knows nothing of pixels.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace

from qvl_batch.bundle.layout import Resolution
from qvl_batch.config import Fit
from qvl_batch.errors import ConfigError, ImageError

#: Longest side over shortest, as in transformers' `smart_resize`.
MOST_ELONGATED = 200

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class View:
    """How images are seen. It is part of an image's key, so it is hashed; equal views give equal pixels.

    Args:
        resolution: sizes that the vision graph takes.
        fit: how an image becomes square; None, and only then, if it keeps its proportions (native).
    """

    resolution: Resolution
    fit: Fit | None

    @classmethod
    def of(cls, resolution: Resolution, fit: Fit | None = None, max_pixels: int | None = None) -> "View":
        """The view of a bundle.

        Args:
            resolution: the bundle's.
            fit: how an image becomes square, by default letterbox; only for a bundle that takes squares.
            max_pixels: lowers the bundle's limit; only for a bundle whose images keep their own size.

        Raises:
            ConfigError: one of them is not for such a bundle, or not within its limits.
        """
        if not resolution.is_native:
            if max_pixels is not None:
                raise ConfigError(
                    f"--max-pixels {max_pixels}: this bundle shows every image as a square of {resolution.image_size} "
                    "pixels a side; export with --image-size native for images at their own size"
                )
            return cls(resolution, fit or "letterbox")
        if fit is not None:
            raise ConfigError(f"--fit {fit}: this bundle shows images at their own size and proportions; leave it out")
        least, most = resolution.min_pixels, resolution.max_pixels
        if max_pixels is not None and not least <= max_pixels <= most:
            raise ConfigError(f"--max-pixels {max_pixels}: this bundle takes {least} to {most}")
        return cls(replace(resolution, max_pixels=max_pixels or most), None)

    @classmethod
    def square(cls, image_size: int, fit: Fit = "letterbox") -> "View":
        """The view of a bundle that takes squares of `image_size` pixels a side."""
        return cls(Resolution(1, image_size, image_size**2, image_size**2), fit)

    @property
    def name(self) -> str:
        """What identifies it beside the version of the pixels. A square's size is left out: it is the bundle's own."""
        if self.fit is not None:
            return self.fit
        return f"native {self.resolution.unit} {self.resolution.min_pixels} {self.resolution.max_pixels}"

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height, as they are seen, of an image of that width and height.

        Raises:
            ImageError: an image that keeps its proportions is too long for its width, or the other way round.
        """
        if self.resolution.image_size is not None:
            return self.resolution.image_size, self.resolution.image_size
        smallest, largest = self.resolution.min_pixels, self.resolution.max_pixels
        seen_height, seen_width = smart_resize(height, width, self.resolution.unit, smallest, largest)
        if seen_width * seen_height > largest:
            raise ImageError(
                f"the image has {width:,} x {height:,} pixels and would be seen as {seen_width:,} x {seen_height:,}; "
                f"the limit is {largest:,} pixels: pad or cut it, so that its sides are more alike"
            )
        return seen_width, seen_height


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Sizes of an image, and the turn that made it upright.

    Args:
        width, height: pixels of the original, upright.
        seen_width, seen_height: pixels of what the model saw.
        orientation: the file's EXIF orientation, 1 to 8; 1 if it has none. It is also 1 where Pillow's reader turns the
            picture itself, as it does for TIFF and HEIF.
    """

    width: int
    height: int
    seen_width: int
    seen_height: int
    orientation: int = 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """All five, in order."""
        return astuple(self)

    def original_point(self, fit: Fit | None, point: Point) -> Point:
        """The place in the upright original of a place in what the model saw; outside of it, if that is in a bar.

        Args:
            fit: the view's; None stands for an image that kept its proportions.
            point: x and y.
        """
        x, y = point
        if fit == "letterbox":
            bar_left, bar_top, width, height = letterboxed(self.width, self.height, self.seen_width)
            return (x - bar_left) * self.width / width, (y - bar_top) * self.height / height
        if fit == "crop":
            left, top, side = cropped(self.width, self.height)
            return left + x * side / self.seen_width, top + y * side / self.seen_height
        return x * self.width / self.seen_width, y * self.height / self.seen_height

    def stored_point(self, point: Point) -> Point:
        """The place in the file's picture, before it was turned, of a place in the upright original."""
        (x, y), width, height = point, self.width, self.height
        return {
            2: (width - x, y),
            3: (width - x, height - y),
            4: (x, height - y),
            5: (y, x),
            6: (y, width - x),
            7: (height - y, width - x),
            8: (height - y, x),
        }.get(self.orientation, point)


def sizes_of(numbers: Iterable[int]) -> list[ImageSize]:
    """The sizes of images whose `ImageSize.numbers` follow one another."""
    values = list(numbers)
    step = len(fields(ImageSize))
    return [ImageSize(*values[at : at + step]) for at in range(0, len(values), step)]


def letterboxed(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Where a letterbox of `size` pixels a side shows an image of that width and height: left, top, width, height."""
    longer = max(width, height)
    shown_width, shown_height = (max(1, round(side * size / longer)) for side in (width, height))
    return (size - shown_width) // 2, (size - shown_height) // 2, shown_width, shown_height


def cropped(width: int, height: int) -> tuple[float, float, int]:
    """The square that a crop keeps of an image of that width and height: left, top, side."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side


def smart_resize(height: int, width: int, unit: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size at which an image that keeps its proportions is seen, number for number as transformers' function of
    this name has it: sides are multiples of `unit`, their product is within the limits, and their quotient is close to
    the image's.

    Very small limits cannot be kept for long images, since no side is below `unit`; then the product exceeds them.

    Returns:
        Height and width.

    Raises:
        ImageError: one side is more than `MOST_ELONGATED` times the other.
    """
    if max(height, width) / min(height, width) > MOST_ELONGATED:
        raise ImageError(
            f"the image has {width:,} x {height:,} pixels; one side can be at most {MOST_ELONGATED} times the other"
        )
    seen_height, seen_width = round(height / unit) * unit, round(width / unit) * unit
    if seen_height * seen_width > max_pixels:
        scale = math.sqrt((height * width) / max_pixels)
        seen_height = max(unit, math.floor(height / scale / unit) * unit)
        seen_width = max(unit, math.floor(width / scale / unit) * unit)
    elif seen_height * seen_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        seen_height = math.ceil(height * scale / unit) * unit
        seen_width = math.ceil(width * scale / unit) * unit
    return seen_height, seen_width
