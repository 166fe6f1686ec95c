"""Conversations: what a row asks, as messages of text and images.

    Conversation ((Message("user", (0, 1, "Which image has the star?")),)      two images, then text
    Conversation ((Message("system", "Be brief."), Message("user", "Hello."),))   text only

An image is its index among the row's images. A message's content is a string if the input had it as a string, else its
parts: templates can treat the two differently.

This module knows nothing of templates, tokens or files.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
#: A piece of text, or the index of an image among the row's images.
Part = str | int


@dataclass(frozen=True, slots=True)
class Message:
    """One message: who says it, and its content, a string or parts in order."""

    role: Role
    content: str | tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts."""
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        """All of its text."""
        return "".join(part for part in self.parts if isinstance(part, str))


Conversation = tuple[Message, ...]


def single_turn(prompt: str, images: int) -> Conversation:
    """One user turn: images first, then the text."""
    return (Message("user", (*range(images), prompt)),)


def images_of(conversation: Conversation) -> Iterator[int]:
    """Indices of the images, in the order in which the conversation shows them."""
    return (part for message in conversation for part in message.parts if isinstance(part, int))


def to_json(conversation: Conversation) -> str:
    """As ASCII text, for a column of a table; `from_json` reads it."""
    return json.dumps([[message.role, message.content] for message in conversation])


def from_json(text: str) -> Conversation:
    """The inverse of `to_json`."""
    return tuple(
        Message(role, content if isinstance(content, str) else tuple(content)) for role, content in json.loads(text)
    )
