"""Images and prompts to answers, in order, in one process and without Ray."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.bundle.layout import Pixels
from qvl_batch.bundle.loading import Bundle
from qvl_batch.config import DEFAULT_MAX_NEW_TOKENS, MAX_IMAGE_PIXELS, DeviceOption, Fit, ImageRules
from qvl_batch.decoder.answerer import Answerer, EncodedRow
from qvl_batch.decoder.engine import Stoppable
from qvl_batch.errors import ConfigError, ImageError
from qvl_batch.images.pixels import DEFAULT_RULES, decode_image, fit_image, image_key, upright_rgb
from qvl_batch.runtime.devices import resolve_device, resolve_vision_device, usable_cpus
from qvl_batch.schema import Answer, Failure
from qvl_batch.vision.encoder import VisionEncoder
from qvl_batch.vision.features import ImageFeatures

#: An image: path of a file, bytes of a file, pixels uint8 (H, W, 3), or a Pillow image, whose EXIF orientation is
#: applied as for a file.
ImageLike = str | Path | bytes | bytearray | NDArray[Any] | Image.Image
#: Integer types that Pillow would take for 16-bit or 32-bit grey levels.
_WIDE_INTEGERS = ("int16", "int32", "int64", "uint32", "uint64")
#: Images held in memory as pixels at a time.
WINDOW = 32


class Captioner(Stoppable):
    """A bundle loaded into this process, ready to answer.

        with Captioner("bundle") as captioner:
            answers = captioner.caption(images=["a.jpg"], prompts=["What is this?"])
            print(answers[0])

    An exception that leaves the `with` block, such as Ctrl-C, stops it at once.

    Args:
        bundle: folder of the bundle.
        device: where the decoder runs; `auto` is the device that the bundle was exported for.
        vision_device: where the vision tower runs; `auto` is a GPU for one in half precision, else the CPU.
        slots: rows answered at a time.
        fit: how an image that is not square becomes square.
        max_image_pixels: largest number of pixels of an image.
        allow_truncated: use the intact part of image files that are truncated or damaged.
        allow_repetition: accept an answer that repeats a phrase until it is cut off; without it, the row fails.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        ConfigError: `slots` or `max_image_pixels` is less than 1, or the fit or device is unknown.
        DeviceError: the device cannot be used here, or computes the bundle wrongly.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        device: DeviceOption = "auto",
        vision_device: DeviceOption = "auto",
        slots: int = 8,
        fit: Fit = "letterbox",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        allow_truncated: bool = False,
        allow_repetition: bool = False,
    ) -> None:
        for name, value in (("slots", slots), ("max_image_pixels", max_image_pixels)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if fit not in get_args(Fit):
            raise ConfigError(f"fit must be one of {', '.join(get_args(Fit))}, not {fit!r}")
        self._bundle = Bundle.load(bundle)
        resolve_device(device, self._bundle.manifest)
        encoder_device = resolve_vision_device(vision_device, self._bundle.manifest)
        self._fit: Fit = fit
        self._rules = ImageRules(max_image_pixels, allow_truncated)
        self._process = os.getpid()
        threads = usable_cpus()
        features = ImageFeatures(VisionEncoder(self._bundle, threads, encoder_device))
        answerer = Answerer(self._bundle, slots, threads, allow_repetition=allow_repetition)
        #: None once closed.
        self._parts: tuple[ImageFeatures, Answerer] | None = (features, answerer)

    def caption(
        self,
        images: Iterable[ImageLike],
        prompts: Iterable[str | None] | str,
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> list[Answer]:
        """Answer each prompt about its image.

        A failed row has `finish_reason == "error"` and a `failure`; other rows are not affected.

        Args:
            images: one for each row.
            prompts: one for each row, or one string for all rows.
            max_new_tokens: longest answer in tokens.

        Raises:
            ConfigError: the numbers of prompts and images differ, `images` is a single image and not a list, or
                `max_new_tokens` is less than 1.
            RuntimeError: this object was closed, or created before a fork.
        """
        if self._parts is None:
            raise RuntimeError("the captioner is closed")
        if os.getpid() != self._process:
            raise RuntimeError("this Captioner was created before a fork: create one in this process")
        features, answerer = self._parts
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if isinstance(images, str | Path | bytes | bytearray | Image.Image) or _is_pixels(images):
            raise ConfigError(f"images is a single {type(images).__name__}, not one for each row: give a list, [image]")
        images = list(images)
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(texts) != len(images):
            raise ConfigError(f"{len(images)} images and {len(texts)} prompts: give one prompt each, or one for all")
        answers: list[Answer] = []
        for start in range(0, len(images), WINDOW):
            window = slice(start, start + WINDOW)
            pixels = [self._pixels_or_failure(image) for image in images[window]]
            keys = [None if isinstance(each, Failure) else image_key(each.tobytes(), self._fit) for each in pixels]
            questions = map(EncodedRow, features.of(pixels, keys), texts[window], keys)
            answers.extend(answerer.answer(list(questions), max_new_tokens))
        return answers

    def close(self) -> None:
        """Finish pending rows, then release graphs and threads."""
        for part in self._parts or ():
            part.close()
        self._parts = None

    def stop(self) -> None:
        """Stop at once: pending rows fail. Release graphs and threads."""
        for part in self._parts or ():
            part.stop()
        self._parts = None

    def _pixels_or_failure(self, image: ImageLike) -> Pixels | Failure:
        try:
            return fit_image(_picture(image, self._rules), self._bundle.manifest.layout.image_size, self._fit)
        except ImageError as error:
            return Failure.of(error)


def _is_pixels(images: object) -> bool:
    """Whether `images` is the pixels of one image; an array can also hold several images, or paths."""
    return isinstance(images, np.ndarray) and images.ndim in {2, 3}


def _picture(image: ImageLike, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    if isinstance(image, bytes | bytearray):
        return decode_image(bytes(image), rules)
    if isinstance(image, str | Path):
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise ImageError(f"{image}: {error.strerror}") from error
        except ValueError as error:
            raise ImageError(f"{str(image)!r} is not a valid path: {error}") from error
        return decode_image(data, rules)
    if isinstance(image, Image.Image):
        return upright_rgb(image, rules)
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"{type(image).__name__} is not an image: give a path, the bytes of a file, an array or a Pillow image"
        )
    if image.dtype.name in _WIDE_INTEGERS and image.size and 0 <= image.min() <= image.max() <= np.iinfo(np.uint8).max:
        image = image.astype(np.uint8)
    try:
        picture = Image.fromarray(image)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ImageError(
            f"a {image.dtype} array of shape {image.shape} is not an image: give uint8 (height, width, 3) or "
            "(height, width)"
        ) from error
    return upright_rgb(picture, rules)
