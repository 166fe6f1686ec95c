"""Images and prompts, or conversations, to answers, in order, in one process and without Ray."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.loading import Bundle
from qvl_batch.config import DEFAULT_MAX_NEW_TOKENS, MAX_IMAGE_PIXELS, DeviceOption, Fit, ImageRules
from qvl_batch.constraints import Constraint, Kind, constraint_of
from qvl_batch.conversation import single_turn
from qvl_batch.decoder.answerer import Answerer, EncodedImage, EncodedRow
from qvl_batch.decoder.engine import Stoppable
from qvl_batch.errors import ConfigError, ConstraintError, ImageError, RowError, SamplingError, stable_message
from qvl_batch.grounding import Box, boxes, complete
from qvl_batch.images.pixels import DEFAULT_RULES, Seen, array_rgb, decode_image, image_key, see, upright_rgb
from qvl_batch.images.view import ImageSize, View
from qvl_batch.input.image_cells import plain_image
from qvl_batch.input.messages import Asked, read_messages
from qvl_batch.runtime.devices import resolve_device, resolve_vision_device, usable_cpus
from qvl_batch.sampling import GREEDY, Sampling
from qvl_batch.schema import Answer, Failure, first_failure
from qvl_batch.vision.encoder import VisionEncoder
from qvl_batch.vision.features import ImageFeatures


class SupportsArray(Protocol):
    """What NumPy can make an array of, such as a tensor of PyTorch."""

    def __array__(self) -> NDArray[Any]:
        """The array."""


#: An image: path, bytes or open file of an image file; text that is a `data:` address or base64; a mapping of `bytes`
#: and `path`; an array or tensor, read as `images.arrays` says; or a Pillow image, whose EXIF orientation is applied as
#: for a file.
ImageLike = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Mapping[str, Any] | NDArray[Any]
    | SupportsArray | Image.Image
)  # fmt: skip
#: Messages of a conversation: mappings of `role` and `content`, as for `--messages-column` of the job.
Messages = Sequence[Mapping[str, Any]]
#: Rows whose images are held in memory as pixels at a time.
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
        fit: how an image that is not square becomes square, by default letterbox; not for a bundle that shows images at
            their own size.
        max_pixels: largest number of pixels that the model sees of an image, for a bundle that shows images at their
            own size; by default the bundle's limit.
        system_prompt: text of a system message for rows that have none; by default the chat template's own.
        max_image_pixels: largest number of pixels of an image.
        allow_truncated: use the intact part of image files that are truncated or damaged.
        allow_repetition: accept an answer that repeats a phrase until it is cut off; without it, the row fails.
        confidence: answers say how sure the model is.
        stop: texts before which an answer ends, whichever comes first; not for answers that must be something.
        include_stop: keep the text that ended an answer.
        min_new_tokens: shortest answer in tokens; not for answers that must be something.
        abstain_below: answers whose `confidence` is below this have the `finish_reason` `abstain`; implies
            `confidence`.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        ConfigError: `slots`, `max_image_pixels` or `min_new_tokens` is less than 1, a stop text is empty,
            `abstain_below` is not above 0 or above 1, the fit or device is unknown, or `fit`, `max_pixels` or
            `system_prompt` cannot be used with this bundle.
        DeviceError: the device cannot be used here, or computes the bundle wrongly.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        device: DeviceOption = "auto",
        vision_device: DeviceOption = "auto",
        slots: int = 8,
        fit: Fit | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        allow_truncated: bool = False,
        allow_repetition: bool = False,
        confidence: bool = False,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_new_tokens: int | None = None,
        abstain_below: float | None = None,
    ) -> None:
        numbers = {"slots": slots, "max_image_pixels": max_image_pixels, "min_new_tokens": min_new_tokens}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if isinstance(stop, str) or not all(stop):
            raise ConfigError(f"stop must be a list of texts that are not empty, not {stop!r}")
        self._ends_by_itself = not stop and min_new_tokens is None
        if abstain_below is not None and not 0 < abstain_below <= 1:
            raise ConfigError(f"abstain_below must be above 0 and at most 1, not {abstain_below}")
        if fit is not None and fit not in get_args(Fit):
            raise ConfigError(f"fit must be one of {', '.join(get_args(Fit))}, not {fit!r}")
        self._bundle = Bundle.load(bundle)
        resolve_device(device, self._bundle.manifest)
        encoder_device = resolve_vision_device(vision_device, self._bundle.manifest)
        self._view = View.of(self._bundle.manifest.layout.resolution, fit, max_pixels)
        self._rules = ImageRules(max_image_pixels, allow_truncated)
        self._process, self._abstain_below = os.getpid(), abstain_below
        threads = usable_cpus()
        features = ImageFeatures(VisionEncoder(self._bundle, threads, encoder_device))
        answerer = Answerer(
            self._bundle,
            slots,
            threads,
            system_prompt=system_prompt,
            allow_repetition=allow_repetition,
            stop=stop,
            include_stop=include_stop,
            min_new_tokens=min_new_tokens or 0,
            guided=True,
            logprobs=confidence or abstain_below is not None,
            drawn=True,
        )
        #: None once closed.
        self._parts: tuple[ImageFeatures, Answerer] | None = (features, answerer)

    def caption(
        self,
        images: Iterable[ImageLike | Sequence[ImageLike]] | None = None,
        prompts: Iterable[str | None] | str | None = None,
        *,
        messages: Iterable[Messages] | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> list[Answer]:
        """Answer each prompt about its image or images, or each conversation.

            captioner.caption(["a.jpg", ["b.jpg", "c.jpg"]], ["What is this?", "What is the difference?"])
            captioner.caption(messages=[[{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, ...]}]])

        A failed row has `finish_reason == "error"` and a `failure`; other rows are not affected.

        Args:
            images: one for each row, or a list of them. With `messages`, those that the messages have no images for.
            prompts: one for each row, or one string for all rows.
            messages: in place of prompts, a conversation for each row, as for `--messages-column` of the job.
            max_new_tokens: longest answer in tokens.
            choices: every answer is one of these texts.
            regex: every answer is a match of this regular expression, from its first character to its last.
            json_schema: every answer is compact JSON that follows this schema: objects, or text.
            sampling: draw tokens by `temperature`, `top_k`, `top_p` and `min_p`, and with `samples` several answers to
                each row, by random numbers of a `seed`: names and numbers, such as {"temperature": 0.7, "samples": 4}.
                A row is answered the same whatever else is asked in this call or before.

        Raises:
            ConfigError: the numbers of prompts and images differ, `images` is a single image and not a list, both
                prompts and messages are given or neither, `max_new_tokens` is less than 1, or what answers must be is
                wrong, or given twice, or a value of `sampling` is.
            RuntimeError: this object was closed, or created before a fork.
        """
        if self._parts is None:
            raise RuntimeError("the captioner is closed")
        if os.getpid() != self._process:
            raise RuntimeError("this Captioner was created before a fork: create one in this process")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        constraint = _constraint({"choices": choices, "regex": regex, "json_schema": json_schema})
        if constraint and not self._ends_by_itself:
            raise ConfigError(f"{constraint.kind}: it says where an answer ends; no `stop` or `min_new_tokens` can")
        try:
            drawn = GREEDY.with_values(sampling)
        except SamplingError as error:
            raise ConfigError(f"sampling: {error}") from error
        rows = _asked(images, prompts, messages)
        answers: list[Answer] = []
        for start in range(0, len(rows), WINDOW):
            answers.extend(self._answer(rows[start : start + WINDOW], max_new_tokens, constraint, drawn))
        return answers

    def boxes(self, answer: Answer, *, upright: bool = False) -> list[Box] | None:
        """Boxes and points that an answer names as JSON, in pixels of the image files: see `qvl_batch.boxes`."""
        sizes = [ImageSize(*size) for size in answer.image_sizes]
        return boxes(complete(answer), sizes, self._view.fit, upright=upright)

    def _answer(
        self,
        rows: Sequence[Asked | Failure],
        max_new_tokens: int,
        constraint: Constraint | None,
        sampling: Sampling,
    ) -> list[Answer]:
        assert self._parts is not None
        features, answerer = self._parts
        seen = [row if isinstance(row, Failure) else self._seen(row.images) for row in rows]
        shown = [[] if isinstance(row, Failure) else row for row in seen]
        images = [[image.pixels for image in row] for row in shown]
        keys = [[image_key(each.tobytes(), self._view) for each in row] for row in images]
        encoded = features.of_rows(images, keys)
        questions = [self._question(*row) for row in zip(rows, seen, encoded, keys, strict=True)]
        asked = [
            row if isinstance(row, Failure) else replace(row, constraint=constraint, sampling=sampling)
            for row in questions
        ]
        answers = answerer.answer(asked, max_new_tokens)
        sizes = [tuple(image.size.numbers for image in row) for row in shown]
        return [
            replace(answer, image_sizes=each).held_to(self._abstain_below)
            for answer, each in zip(answers, sizes, strict=True)
        ]

    def _question(
        self,
        asked: Asked | Failure,
        seen: list[Seen] | Failure,
        encoded: list[Features] | Failure,
        keys: Sequence[bytes],
    ) -> EncodedRow | Failure:
        """A row for the decoder, or the first of its failures."""
        if isinstance(asked, Failure):
            return asked
        if isinstance(seen, Failure):
            return seen
        if isinstance(encoded, Failure):
            return encoded
        grids = [self._view.resolution.grid(*image.pixels.shape[:2]) for image in seen]
        images = (EncodedImage(each, *grid, key) for each, grid, key in zip(encoded, grids, keys, strict=True))
        return EncodedRow(asked.conversation, tuple(images))

    def _seen(self, images: Sequence[object]) -> list[Seen] | Failure:
        """Images of a row as they are seen, or the failure of the first that cannot be."""
        results = [self._seen_or_failure(image) for image in images]
        return first_failure(results) or [each for each in results if isinstance(each, Seen)]

    def _seen_or_failure(self, image: object) -> Seen | Failure:
        try:
            return see(_picture(image, self._rules), self._view)
        except ImageError as error:
            return Failure.of(error)

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


def _asked(
    images: Iterable[ImageLike | Sequence[ImageLike]] | None,
    prompts: Iterable[str | None] | str | None,
    messages: Iterable[Messages] | None,
) -> list[Asked | Failure]:
    """What each row asks.

    Raises:
        ConfigError: the arguments do not belong together.
    """
    if (prompts is None) == (messages is None):
        raise ConfigError("give prompts or messages, and not both")
    if isinstance(images, str | os.PathLike | bytes | bytearray | Mapping | Image.Image) or _is_one(images):
        raise ConfigError(f"images is a single {type(images).__name__}, not one for each row: give a list, [image]")
    if messages is not None:
        conversations = list(messages)
        rows = [()] * len(conversations) if images is None else list(map(_as_list, images))
        _check_count(rows, conversations, "conversations")
        return [_conversation(*row) for row in zip(conversations, rows, strict=True)]
    if images is None:
        raise ConfigError("prompts need images: give one for each row, or messages for rows without images")
    rows = list(map(_as_list, images))
    texts = [prompts] * len(rows) if isinstance(prompts, str) else list(prompts or ())
    _check_count(rows, texts, "prompts")
    return [
        Asked(single_turn(cast("str", text), len(row)), tuple(row))
        if row
        else Failure.of(ImageError("the list of images is empty"))
        for text, row in zip(texts, rows, strict=True)
    ]


def _constraint(given: Mapping[Kind, object]) -> Constraint | None:
    """What every answer must be.

    Raises:
        ConfigError: it is wrong, or there is more than one.
    """
    found = [(kind, value) for kind, value in given.items() if value is not None]
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(kind for kind, _ in found)}: an answer can only be one of them; give one")
    try:
        return constraint_of(*found[0]) if found else None
    except ConstraintError as error:
        raise ConfigError(f"{found[0][0]}: {error}") from error


def _check_count(images: Sequence[object], others: Sequence[object], name: str) -> None:
    if len(images) != len(others):
        raise ConfigError(f"{len(images)} images and {len(others)} {name}: give one each, or one prompt for all")


def _conversation(messages: Messages, images: Sequence[object]) -> Asked | Failure:
    try:
        return read_messages(list(messages) if isinstance(messages, tuple) else messages, images)
    except RowError as error:
        return Failure.of(error)


def _as_list(images: ImageLike | Sequence[ImageLike]) -> Sequence[object]:
    """Images of a row."""
    return images if isinstance(images, list | tuple) else [images]


def _is_one(images: object) -> bool:
    """Whether `images` is an open file, or the pixels of one image; an array can also hold several images, or paths."""
    return hasattr(images, "read") or (hasattr(images, "__array__") and getattr(images, "ndim", None) in {2, 3})


def _picture(image: object, rules: ImageRules = DEFAULT_RULES) -> Image.Image:
    image = plain_image(image)
    if isinstance(image, Image.Image):
        return upright_rgb(image, rules)
    if isinstance(image, str | os.PathLike) or hasattr(image, "read"):
        image = _read(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode_image(bytes(image), rules)
    array = _array(image)
    if array is None:
        raise ImageError(
            f"{type(image).__name__} is not an image: give a path, the bytes of a file, an open file, an array, a "
            "tensor or a Pillow image"
        )
    return array_rgb(array, rules)


def _read(image: Any) -> object:
    """Contents of a file: of its path, or open."""
    try:
        if not hasattr(image, "read"):
            return Path(os.fsdecode(image)).read_bytes()
        if image.seekable():
            image.seek(0)  # it can be there twice
        data: object = image.read()
    except OSError as error:
        raise ImageError(f"{image}: {error.strerror or error}") from error
    except ValueError as error:
        raise ImageError(f"{str(image)!r} is not a valid path: {error}") from error
    if isinstance(data, str):
        raise ImageError("the file of the image is open as text: open it with mode 'rb'")
    return data


def _array(image: Any) -> NDArray[Any] | None:
    """The array of pixels that an array or a tensor is, None if it is neither."""
    try:
        if hasattr(image, "detach"):  # a tensor of PyTorch: with gradients, on a GPU, or in a type that NumPy lacks
            image = image.detach().cpu()
            image = image.float() if str(image.dtype) == "torch.bfloat16" else image
        return np.asarray(image) if hasattr(image, "__array__") else None
    except Exception as error:  # libraries of tensors raise errors of any type
        raise ImageError(f"{type(image).__name__} cannot be made an array: {stable_message(error)}") from error
