"""Answers without Ray: one process, images and prompts in, answers out, in order."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Self, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.answerer import Answerer, Question
from qvl_batch.bundle import Bundle
from qvl_batch.config import DEFAULT_MAX_NEW_TOKENS, Device, Fit
from qvl_batch.errors import ConfigError, ImageError
from qvl_batch.features import ImageFeatures
from qvl_batch.images import image_key, pixels_or_failure
from qvl_batch.runtime import resolve_device, resolve_vision_device, usable_cpus
from qvl_batch.schema import Answer, Failure
from qvl_batch.vision import VisionEncoder

#: An image as a file's path, as a file's bytes, as pixels uint8 (H, W, 3), or as Pillow has it.
ImageLike = str | Path | bytes | NDArray[np.uint8] | Image.Image
#: Images in memory at a time, as pixels.
WINDOW = 32


class Captioner:
    """A bundle ready to answer, in this process.

        with Captioner("bundle") as captioner:
            answers = captioner.caption(images=["a.jpg"], prompts=["What is this?"])
            print(answers[0])

    Args:
        bundle: folder of the bundle.
        device: where the decoder runs; `auto` is what the bundle was made for.
        vision_device: where the vision tower runs; `auto` is a GPU for one in half precision, else the CPU.
        slots: rows answered at a time.
        fit: how an image that is not square becomes square.
        allow_repetition: an answer that repeats itself until it is cut is an answer, and no failure.

    Raises:
        BundleError: no bundle, or a damaged one.
        ConfigError: `slots` is less than 1, or there is no such fit or device.
        DeviceError: the device cannot be used here.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        device: Device = "auto",
        vision_device: Device = "auto",
        slots: int = 8,
        fit: Fit = "letterbox",
        allow_repetition: bool = False,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"slots must be at least 1, not {slots}")
        if fit not in get_args(Fit):
            raise ConfigError(f"fit {fit!r} is none of {', '.join(get_args(Fit))}")
        self._bundle = Bundle.load(bundle)
        resolve_device(device, self._bundle.manifest)
        encoder_device = resolve_vision_device(vision_device, self._bundle.manifest)
        self._fit: Fit = fit
        threads = usable_cpus()
        self._features = ImageFeatures(VisionEncoder(self._bundle, threads, encoder_device))
        self._answerer = Answerer(self._bundle, slots, threads, allow_repetition=allow_repetition)

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
            ConfigError: there are not as many prompts as images, or `max_new_tokens` is less than 1.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        images = list(images)
        texts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(texts) != len(images):
            raise ConfigError(f"{len(images)} images and {len(texts)} prompts: give one prompt each, or one for all")
        size = self._bundle.manifest.layout.image_size
        answers: list[Answer] = []
        for start in range(0, len(images), WINDOW):
            window = slice(start, start + WINDOW)
            files = [_file_or_failure(image) for image in images[window]]
            keys = [None if isinstance(file, Failure) else image_key(file, self._fit) for file in files]
            pixels = [file if isinstance(file, Failure) else pixels_or_failure(file, size, self._fit) for file in files]
            questions = map(Question, self._features.of(pixels, keys), texts[window], keys)
            answers.extend(self._answerer.answer(list(questions), max_new_tokens))
        return answers

    def close(self) -> None:
        """Stop the engine and let go of the graphs."""
        self._answerer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _file_or_failure(image: ImageLike) -> bytes | Failure:
    try:
        return _file_bytes(image)
    except ImageError as error:
        return Failure.of(error)


def _file_bytes(image: ImageLike) -> bytes:
    """An image as a file, so that all kinds take the same way through decoding."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise ImageError(f"{image}: {error.strerror}") from error
    try:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
    except (TypeError, ValueError, OSError, AttributeError) as error:
        raise ImageError(f"{type(image).__name__} is no image: {error}") from error
    return buffer.getvalue()
