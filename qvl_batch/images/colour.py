"""Embedded ICC profiles to sRGB.

What enters: a Pillow image of 8 bits a sample, and the bytes of its ICC profile. What leaves: the image in sRGB; or
the image unchanged, if the profile is sRGB within rounding, is broken or too large, or is of another colour space than
the image. Time and memory are bounded by pixels and `LARGEST_PROFILE`.
"""

import functools
import io
from typing import Final

import numpy as np
from PIL import Image, ImageCms

#: Bytes; profiles of printing presses have one to three million.
LARGEST_PROFILE = 4_000_000
#: Levels by which sRGB profiles of different makers differ after rounding, at most.
_ROUNDING = 2
#: Pillow modes of each colour space that a profile can name.
_MODES: Final = {
    "GRAY": {"1", "L", "LA", "La"},
    "RGB ": {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"},
    "CMYK": {"CMYK"},
}


def to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Convert the colours of an image to sRGB; alpha stays as it is."""
    space = next((space for space, modes in _MODES.items() if image.mode in modes), None)
    if not isinstance(profile, bytes) or not 0 < len(profile) <= LARGEST_PROFILE or space is None:
        return image
    is_grey, has_alpha = space == "GRAY", image.has_transparency_data
    mode = "L" if is_grey else "CMYK" if space == "CMYK" else "RGBA" if has_alpha else "RGB"
    transform = _transform(profile, space, mode)
    if transform is None:
        return image
    alpha = image.convert("LA").getchannel("A") if is_grey and has_alpha else None
    colours = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    assert colours is not None
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


@functools.lru_cache(maxsize=8)  # the images of a job have few different profiles, of up to megabytes each
def _transform(profile: bytes, space: str, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if it would change nothing, or the profile is broken or of another
    colour space.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != space:
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        # For grey, evaluating the curve takes no longer than looking it up in LittleCMS's optimised table, and the
        # table is 10 levels off where the curve is steep.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGBA" if mode == "RGBA" else "RGB", flags=flags)
        return None if mode != "CMYK" and _is_identity(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a grid of colours over the whole space stays as it is, within `_ROUNDING`."""
    grid = np.arange(256) if mode == "L" else np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3), axis=-1)
    shape = (1, 256) if mode == "L" else (1, -1, 3)
    colours = Image.fromarray(grid.reshape(shape).astype(np.uint8)).convert(mode)
    transformed = ImageCms.applyTransform(colours, transform)
    assert transformed is not None
    change = np.asarray(transformed.convert("RGB"), np.int16) - np.asarray(colours.convert("RGB"))
    return int(np.abs(change).max()) <= _ROUNDING
