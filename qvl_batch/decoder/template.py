"""The checkpoint's chat template: conversations to the text that the model is shown.

What enters: the template, its special tokens by name, and conversations. What leaves: the printed text, and where in it
the conversation's own text is.

A template is a program that anyone may have written. It runs in Jinja's sandbox, set up as transformers sets it up.

This module knows nothing of tokenizers or files.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qvl_batch.conversation import Conversation
from qvl_batch.errors import BundleError, PromptError

#: Longest quotation of a template's error, in characters: it can contain the conversation.
ERROR_LENGTH = 300

# A mark stands for one piece of text. It is made of surrogates, which valid text does not contain.
_MARK_START, _MARK_END = "\ud800", "\ud801"
_DIGITS = str.maketrans("0123456789", "\udc00\udc01\udc02\udc03\udc04\udc05\udc06\udc07\udc08\udc09")
_NUMBERS = {mark: digit for digit, mark in _DIGITS.items()}
_MARK = re.compile(f"{_MARK_START}([\udc00-\udc09]+){_MARK_END}")

#: Text that the template printed, and indices of pieces of the conversation's text, in order.
Parts = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the template prints it.

    Args:
        parts: what is printed, in order: text of the template, with the white space around pieces; or the index of a
            piece.
        pieces: the conversation's text, without white space at its ends.
    """

    parts: Parts
    pieces: tuple[str, ...]

    def fill(self, parts: Sequence[str | int]) -> str:
        """Some of the parts as text."""
        return "".join(part if isinstance(part, str) else self.pieces[part] for part in parts)


class ChatTemplate:
    """Prints conversations as transformers does. Thread-safe.

    Args:
        text: the template.
        special_tokens: special tokens by the names that the template has for them, as `bos_token`.

    Raises:
        BundleError: the template cannot be compiled.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(text)
        except Exception as error:  # of Jinja's own, or of Python's compiler
            raise BundleError(f"the chat template cannot be compiled: {_first_line(error)}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, conversation: Conversation) -> Rendered:
        """Print a conversation, and the start of the answer to it.

        The text of the conversation is printed once as it is and once as marks, which shows its place. If the two
        differ in more than that, the template does more with the text than print it and strip its ends.

        Args:
            conversation: messages; their text is valid Unicode.

        Raises:
            PromptError: the template raises an error, or changes the text.
        """
        now = datetime.now()  # noqa: DTZ005  (local time, as in transformers)
        try:
            printed = self._print(conversation, str, now)
        except _RefusalError as error:
            raise PromptError(f"the chat template refuses the conversation: {_first_line(error)}") from error
        except Exception as error:  # a template is a program and can raise anything
            name = type(error).__name__
            raise PromptError(f"the chat template fails: {name}: {_first_line(error)}") from error
        pieces: list[str] = []
        try:
            marked = self._print(conversation, lambda text: _marked(text, pieces), now)
            rendered = Rendered(_split(marked), tuple(pieces))
            known = rendered.fill(rendered.parts) == printed
        except Exception:  # the template cannot work with marks
            known = False
        if not known or _MARK_START in printed:
            raise PromptError(
                "the chat template rewrites the text of this conversation, so that text and template cannot be told "
                "apart: change the text, or export the checkpoint with a template that prints it as it is"
            )
        return rendered

    def _print(self, conversation: Conversation, shown: Callable[[str], str], now: datetime) -> str:
        """What the template prints if each text of the conversation is `shown(text)`."""
        messages = []
        for message in conversation:
            content: str | list[dict[str, str]]
            if isinstance(message.content, str):
                content = shown(message.content)
            else:
                content = [
                    {"type": "text", "text": shown(part)} if isinstance(part, str) else {"type": "image"}
                    for part in message.content
                ]
            messages.append({"role": message.role, "content": content})
        variables = {
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": now.strftime,
        }
        return self._template.render(variables)


def _marked(text: str, pieces: list[str]) -> str:
    """A mark between the white space at the ends of `text`; what it stands for becomes the last of the pieces."""
    piece = text.strip()
    if not piece:
        return text
    start = len(text) - len(text.lstrip())
    mark = _MARK_START + str(len(pieces)).translate(_DIGITS) + _MARK_END
    pieces.append(piece)
    return text[:start] + mark + text[start + len(piece) :]


def _split(printed: str) -> Parts:
    """What is printed with marks, as parts."""
    texts = _MARK.split(printed)
    parts = (int(text.translate(_NUMBERS)) if index % 2 else text for index, text in enumerate(texts))
    return tuple(part for part in parts if part != "")


def _first_line(error: Exception) -> str:
    """First line of an error's text, as valid Unicode."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line[:ERROR_LENGTH].encode(errors="replace").decode()


# What follows is the environment in which transformers runs templates (`transformers.utils.chat_template_utils`).


class _Generation(Extension):
    """`{% generation %}`, by which training finds what the assistant says; printed as it is."""

    tags = {"generation"}  # noqa: RUF012  (as in Jinja)

    def parse(self, parser: Parser) -> nodes.CallBlock:
        """A block with a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_printed"), [], [], body)
        block.set_lineno(line)
        return block

    def _printed(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` of templates: no class, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` of templates: sets no attribute that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        namespace, *rest = args  # so that a template can name an attribute `self`
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(namespace, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot have an attribute {name!r}")


class _RefusalError(TemplateError):
    """What a template raises on purpose."""


def _raise_exception(message: str) -> None:
    raise _RefusalError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT002  (as templates call it)
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT002
) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
