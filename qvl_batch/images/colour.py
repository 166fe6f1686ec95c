"""Colours as the embedded profile means them, in sRGB.

What enters: an image as Pillow has it, 8 bits a sample, and the bytes of the ICC profile that came with it. What
leaves: the same in sRGB, or the image itself where the profile says nothing else, is broken, or is of other colours
than the image's. Time and memory are bounded by pixels and `LARGEST_PROFILE`.
"""

import functools
import io
from typing import Final

import numpy as np
from PIL import Image, ImageCms

#: Bytes; those of printing presses have one to three million.
LARGEST_PROFILE = 4_000_000
#: Levels by which sRGB profiles of various makers differ after rounding.
_ROUNDING = 2
#: Modes of which the colours are of each space of a profile.
_MODES: Final = {
    "GRAY": {"1", "L", "LA", "La"},
    "RGB ": {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"},
    "CMYK": {"CMYK"},
}


def to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Colours of sRGB; what shows through stays as it is."""
    space = next((space for space, modes in _MODES.items() if image.mode in modes), None)
    if not isinstance(profile, bytes) or not 0 < len(profile) <= LARGEST_PROFILE or space is None:
        return image
    is_grey, is_seen_through = space == "GRAY", image.has_transparency_data
    mode = "L" if is_grey else "CMYK" if space == "CMYK" else "RGBA" if is_seen_through else "RGB"
    transform = _transform(profile, space, mode)
    if transform is None:
        return image
    alpha = image.convert("LA").getchannel("A") if is_grey and is_seen_through else None
    colours = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    assert colours is not None
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


@functools.lru_cache(maxsize=8)  # a job's images have few, and each may hold megabytes
def _transform(profile: bytes, space: str, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What makes sRGB of colours of a profile; None where they are, or it is no profile of such colours."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != space:
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        # Of shades, the curve itself takes no longer than a table of it, which is 10 levels off where it is steep.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGBA" if mode == "RGBA" else "RGB", flags=flags)
        return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours from all over the space stay as they are."""
    steps = np.arange(256) if mode == "L" else np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3), axis=-1)
    shape = (1, 256) if mode == "L" else (1, -1, 3)
    colours = Image.fromarray(steps.reshape(shape).astype(np.uint8)).convert(mode)
    found = ImageCms.applyTransform(colours, transform)
    assert found is not None
    change = np.asarray(found.convert("RGB"), np.int16) - np.asarray(colours.convert("RGB"))
    return int(np.abs(change).max()) <= _ROUNDING
