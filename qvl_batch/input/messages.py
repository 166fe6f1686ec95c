r"""Conversations as the input has them, to conversations as the worker knows them.

What enters: a value of the messages column, unchecked, and the row's values of the image column. What leaves: a
`Conversation`, the values of its images, and the answer that it had; or a `RecordError`.

Two forms are known, as Python values or as JSON text:

    [{"role": "user", "content": "Hello."}, ...]                       content: text, or a list of parts
    [{"from": "human", "value": "<image>\nWhat is this?"}, ...]         LLaVA's

Parts are `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`, and `{"type": "image_url", "image_url":
...}`, an address or `{"url": address}`, as OpenAI has it. A part of type image without a value stands for the next
image of the image column, or for the one that its `index` names, from 0 on. Keys whose value is null are as good as
absent. JSON may not name a key twice in one object: which value counts would be a guess.

In a message of the user that is text, a mark `<image>` stands for the next image of the image column. A line break on
either side of it belongs to it, so that `<image>\nWhat is this?` asks the same as an image part and `What is this?`.
Qwen-VL-Series-Finetune reads marks in the same way. Others differ: Qwen's own fine-tuning script also takes all other
white space off the ends of the text between marks; LLaMA-Factory, ms-swift and verl keep the line break. Marks in other
messages and in parts are text.

This module knows nothing of files or tables.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from qvl_batch.conversation import Conversation, Message, Part, Role
from qvl_batch.errors import RecordError

#: Mark of an image in text.
MARK = "<image>"
#: The same with the line breaks that belong to it.
_MARK = re.compile(rf"(?:\r?\n)?{MARK}(?:\r?\n)?")
ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant",
}  # fmt: skip
#: Keys under which a part has its image.
_IMAGE_KEYS = ("image", "image_url", "url", "bytes", "path")
#: Most messages and parts of a row. No model that this package runs has room for as many tokens.
MOST_PARTS = 100_000
#: Most images of a row. A part can name an image in a few characters, and tables have the bytes of each.
MOST_IMAGES = 1_000
#: Longest JSON text in characters, those of images included; and most values in it, or in lists of a table: as Python
#: objects, more of them would take gigabytes.
MOST_CHARACTERS, MOST_VALUES = 1 << 28, 1_000_000
#: Characters of a value that a message repeats.
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation, the values of its images by index, and the answer that was cut off its end, if one was."""

    conversation: Conversation
    images: tuple[object, ...]
    expected: str | None = None


def read_messages(value: object, images: Sequence[object], *, answer_last_turn_again: bool = False) -> Asked:
    """Read a value of the messages column.

    Args:
        value: the messages, as Python objects or as JSON text.
        images: values of the image column, which messages refer to in order.
        answer_last_turn_again: cut off an assistant's turn at the end.

    Raises:
        RecordError: they are no messages of a known form, or cannot be answered; the text says which message.
    """
    reading = _Reading(images)
    conversation = tuple(reading.message(number, each) for number, each in enumerate(_list(value), 1))
    reading.check_images()
    if not conversation:
        raise RecordError("there are no messages")
    if any(message.role == "system" for message in conversation[1:]):
        raise RecordError("a system message must be the first")
    if conversation[-1].role == "user":
        return Asked(conversation, reading.shown)
    if conversation[-1].role == "system":
        raise RecordError("the messages end with a system message: there is nothing to answer")
    if not answer_last_turn_again:
        raise RecordError(
            "the messages end with an assistant's turn: give --answer-last-turn-again to answer them without it"
        )
    *before, last = conversation
    if not before or before[-1].role != "user":
        raise RecordError("without the assistant's turn at the end, the messages do not end with a user's")
    if any(isinstance(part, int) for part in last.parts):
        raise RecordError("the assistant's turn at the end has an image")
    return Asked(tuple(before), reading.shown, last.text)


class _Reading:
    """Reads the messages of one row, and collects their images."""

    def __init__(self, column: Sequence[object]) -> None:
        self._column = column
        #: Images of the column that are shown, and how many of them as the next one.
        self._used: set[int] = set()
        self._taken = 0
        self._values: list[object] = []
        self._parts = 0

    @property
    def shown(self) -> tuple[object, ...]:
        """Values of the images, in order."""
        return tuple(self._values)

    def message(self, number: int, value: object) -> Message:
        """Read one message."""
        self._count(1)
        where = f"message {number}"
        message = _record(value, where)
        named = message.get("role", message.get("from"))
        if not isinstance(named, str) or named not in ROLES:
            raise RecordError(f"{where}: its role is {_shown(named)}; known are {', '.join(ROLES)}")
        role = ROLES[named]
        content = message.get("content", message.get("value"))
        if content is None:
            raise RecordError(f"{where} ({named}) has no content")
        if isinstance(content, str):
            text = _text(content, where)
            return Message(role, self._marked(text) if role == "user" else text)
        if not isinstance(content, list | tuple):
            raise RecordError(f"{where}: its content is {_shown(content)}, not text or a list of parts")
        self._count(len(content))
        parts = tuple(self._part(part, f"{where}, part {place}") for place, part in enumerate(content, 1))
        return Message(role, parts)

    def check_images(self) -> None:
        """Refuse marks without an image, and images that no message shows, unless all have images of their own."""
        used, found = len(self._used), len(self._column)
        if self._taken > found:
            raise RecordError(
                f"the messages show {self._taken} images of the image column (--image-column), which has {found}"
            )
        if used < found and (used or not self._values):
            raise RecordError(
                f"the messages show {used} of the {found} images of the image column: put {MARK} into the text of a "
                "user's message where an image is to be shown, or a part of type image beside it"
            )

    def _count(self, parts: int) -> None:
        self._parts += parts
        if self._parts > MOST_PARTS:
            raise RecordError(f"there are more than {MOST_PARTS:,} messages and parts")

    def _marked(self, text: str) -> str | tuple[Part, ...]:
        """Text with marks as parts; without a mark, the text."""
        if MARK not in text:
            return text
        self._count(text.count(MARK))
        first, *others = _MARK.split(text)
        parts: list[Part] = [first]
        for piece in others:
            parts += [self._of_column(), piece]
        return tuple(part for part in parts if part != "")

    def _part(self, value: object, where: str) -> Part:
        if isinstance(value, str):
            return _text(value, where)
        part = _record(value, where)
        kind = part.get("type")
        if kind is None:
            kind = _kind(part, where)
        if kind == "text":
            return _text(part.get("text"), where)
        if kind not in ("image", "image_url"):
            raise RecordError(f"{where}: its type is {_shown(kind)}; known are text, image and image_url")
        image = next((part[key] for key in _IMAGE_KEYS if key in part), None)
        if isinstance(image, dict) or _is_map(image):
            given = _record(image, where)
            image = given.get("url", given or None)
        if image is not None:
            return self._add(image)
        if kind == "image_url":
            raise RecordError(f"{where} has no image_url")
        index = part.get("index")
        if index is not None and (type(index) is not int or not 0 <= index < len(self._column)):
            raise RecordError(
                f"{where}: its index is {_shown(index)}; the image column has {len(self._column)} images, from 0 on"
            )
        return self._of_column(index)

    def _of_column(self, index: int | None = None) -> int:
        """An image of the image column, by default the next; if there is none, `check_images` says so."""
        if index is None:
            index = self._taken
            self._taken += 1
        if index >= len(self._column):
            return self._add(None)
        self._used.add(index)
        return self._add(self._column[index])

    def _add(self, image: object) -> int:
        if len(self._values) == MOST_IMAGES:
            raise RecordError(f"the messages show more than {MOST_IMAGES:,} images")
        self._values.append(image)
        return len(self._values) - 1


def _list(value: object) -> list[Any]:
    """The messages as a list; JSON text is parsed."""
    if value is None:
        raise RecordError("the messages are null")
    if isinstance(value, str):
        value = _of_json(value)
    if not isinstance(value, list):
        raise RecordError(f"the messages are of type {type(value).__name__}, not a list")
    return value


def _of_json(text: str) -> object:
    if len(text) > MOST_CHARACTERS:
        raise RecordError(f"the messages are JSON of {len(text):,} characters; the limit is {MOST_CHARACTERS:,}")
    if sum(map(text.count, "[{,")) > MOST_VALUES:  # those in strings are so few that they need not be left out
        raise RecordError(f"the messages are JSON of more than {MOST_VALUES:,} values")
    try:
        value: object = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise RecordError(f"the messages are not valid JSON: {error}") from error
    except RecursionError as error:
        raise RecordError("the messages are not valid JSON: nested too deeply") from error
    return value


def _kind(part: dict[str, Any], where: str) -> str | None:
    """Type of a part that does not say it, None if it is not known."""
    is_image = not part.keys().isdisjoint({*_IMAGE_KEYS, "index"})
    if "text" in part and is_image:
        raise RecordError(f"{where} has both text and an image, and no type: make it two parts")
    return "text" if "text" in part else "image" if is_image else None


def _record(value: object, where: str) -> dict[str, Any]:
    """A message, a part or an image as a dictionary without nulls."""
    if _is_map(value):
        try:
            value = _unique(value)
        except ValueError as error:
            raise RecordError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise RecordError(f"{where} is {_shown(value)}, not a record")
    return {str(key): each for key, each in value.items() if each is not None}


def _is_map(value: object) -> TypeGuard[list[tuple[str, Any]]]:
    """Whether a value is one of Arrow's maps whose keys are text, which are lists of pairs."""
    return isinstance(value, list) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)  # noqa: PLR2004
        for pair in value
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Pairs of keys and values as a dictionary.

    Raises:
        ValueError: a key occurs twice.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {_shown(twice)} occurs twice in one object")
    return record


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: its text is {_shown(value)}")
    try:
        value.encode()
    except UnicodeError as error:
        raise RecordError(f"{where}: its text is not valid Unicode: {error}") from error
    return value


def _shown(value: object) -> str:
    """A value for a message, cut."""
    if value is None:
        return "missing"
    if not isinstance(value, str | int | float):
        return f"of type {type(value).__name__}"
    text = repr(value[:_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
