"""Answers without Ray: one process, images and prompts in, answers out, in order."""

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

#: An image as a file's path, as a file's bytes, as pixels uint8 (H, W, 3), or as Pillow has it, where EXIF says
#: which side is up as it does in a file.
ImageLike = str | Path | bytes | bytearray | NDArray[Any] | Image.Image
#: Whole numbers beyond a byte that Pillow would take for shades of 16 or 32 bits.
_WIDE = ("int16", "int32", "int64", "uint32", "uint64")
#: Images in memory at a time, as pixels.
WINDOW = 32


class Captioner(Stoppable):
    """A bundle ready to answer, in this process.

        with Captioner("bundle") as captioner:
            answers = captioner.caption(images=["a.jpg"], prompts=["What is this?"])
            print(answers[0])

    Leaving `with` by an exception, such as Ctrl-C, stops it at once.

    Args:
        bundle: folder of the bundle.
        device: where the decoder runs; `auto` is what the bundle was made for.
        vision_device: where the vision tower runs; `auto` is a GPU for one in half precision, else the CPU.
        slots: rows answered at a time.
        fit: how an image that is not square becomes square.
        max_image_pixels: most pixels of an image.
        allow_truncated: show what there is of image files that are cut or damaged.
        allow_repetition: an answer that repeats itself until it is cut is an answer, and no failure.

    Raises:
        BundleError: no bundle, or a damaged one.
        ConfigError: `slots` or `max_image_pixels` is less than 1, or there is no such fit or device.
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
            raise ConfigError(f"fit {fit!r} is none of {', '.join(get_args(Fit))}")
        self._bundle = Bundle.load(bundle)
        resolve_device(device, self._bundle.manifest)
        encoder_device = resolve_vision_device(vision_device, self._bundle.manifest)
        self._fit: Fit = fit
        self._rules = ImageRules(max_image_pixels, allow_truncated)
        self._process = os.getpid()
        threads = usable_cpus()
        features = ImageFeatures(VisionEncoder(self._bundle, threads, encoder_device))
        answerer = Answerer(self._bundle, slots, threads, allow_repetition=allow_repetition)
        #: None once it is closed.
        self._parts: tuple[ImageFeatures, Answerer] | None = (features, answerer)

    def caption(
        self,
        images: Iterable[ImageLike],
        prompts: Iterable[str | None] | str,
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    ) -> list[Answer]:
        """Answer each prompt about its image.

        A row that fails has `finish_reason == "error"` and its `failure`; the others go on.

        Args:
            images: one for each row.
            prompts: one for each row, or one for all of them.
            max_new_tokens: longest answer in tokens.

        Raises:
            ConfigError: there are not as many prompts as images, one image is given in place of a list, or
                `max_new_tokens` is less than 1.
            RuntimeError: it was closed, or made by the process that this one was forked from.
        """
        if self._parts is None:
            raise RuntimeError("the captioner is closed")
        if os.getpid() != self._process:
            raise RuntimeError("the captioner is another process's, whose threads a fork leaves behind: make one here")
        features, answerer = self._parts
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if isinstance(images, str | Path | bytes | bytearray | Image.Image) or _is_pixels(images):
            raise ConfigError(f"images is one {type(images).__name__}, not one for each row: give a list, [image]")
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
        """Stop when what was asked is answered, and let go of graphs and threads."""
        for part in self._parts or ():
            part.close()
        self._parts = None

    def stop(self) -> None:
        """Stop at once: what is being answered fails. Let go of graphs and threads."""
        for part in self._parts or ():
            part.stop()
        self._parts = None

    def _pixels_or_failure(self, image: ImageLike) -> Pixels | Failure:
        try:
            return fit_image(_picture(image, self._rules), self._bundle.manifest.layout.image_size, self._fit)
        except ImageError as error:
            return Failure.of(error)


def _is_pixels(images: object) -> bool:
    """Whether it is pixels of one image; an array may also hold several, or paths."""
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
            raise ImageError(f"{str(image)!r} is no path: {error}") from error
        return decode_image(data, rules)
    if isinstance(image, Image.Image):
        return upright_rgb(image, rules)
    if not isinstance(image, np.ndarray):
        raise ImageError(
            f"{type(image).__name__} is no image: give a path, a file's bytes, an array, or Pillow's image"
        )
    if image.dtype.name in _WIDE and image.size and 0 <= image.min() <= image.max() <= np.iinfo(np.uint8).max:
        image = image.astype(np.uint8)
    try:
        picture = Image.fromarray(image)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise ImageError(
            f"an array {image.shape} of {image.dtype} is no image: give uint8 (height, width, 3), or (height, width)"
        ) from error
    return upright_rgb(picture, rules)
