"""Conversations to token ids, by the checkpoint's own chat template and tokenizer, and token ids of answers to text.

What enters: conversations with the sizes of their images, or the token ids of answers. What leaves: token ids of rows
up to the answer, with the places of the images in them, or text.

This module knows nothing of pixels, features or graphs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from qvl_batch.bundle.layout import PlacedImage
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import CHAT_TEMPLATE, TOKENIZER
from qvl_batch.conversation import Conversation, Message, images_of, single_turn
from qvl_batch.decoder.template import ChatTemplate, Rendered
from qvl_batch.errors import BundleError, ConfigError, PromptError

#: Bound on how many times shorter a prompt's UTF-8 becomes by Unicode's NFC, to which the tokenizer normalizes: at most
#: 7 bytes become 2 (U+1FBE U+0308 U+0301).
NFC_SHORTENS = 4
#: Prompt by which template and tokenizer are compared with the layout contract.
_PROBE = "x"


@dataclass(frozen=True, slots=True)
class ShownImage(PlacedImage):
    """The tokens of an image in a row, and its index among the row's images."""

    index: int


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row up to its answer: token ids, (S,), and the images among them, in order."""

    input_ids: list[int]
    images: tuple[ShownImage, ...]


class RowLayout:
    """Converts conversations to rows of token ids, and answers to text. Thread-safe.

    Rows are tokenized exactly as by transformers, with one exception: a special token that is spelled in the text of a
    conversation stays text. Only the template can place one.

    The tokenizer file is the one that transformers wrote for the checkpoint. It is loaded without transformers, whose
    import takes two seconds, and 250 MB if torch is installed.

    Args:
        bundle: the bundle.
        system_prompt: put in front of conversations that have no system message.

    Raises:
        BundleError: template or tokenizer cannot be loaded, or do not reproduce the tokens of the layout contract.
        ConfigError: the system prompt cannot be used with this bundle.
    """

    def __init__(self, bundle: Bundle, system_prompt: str | None = None) -> None:
        self.layout = bundle.manifest.layout
        self._tokenizer = _load_tokenizer(bundle.file(TOKENIZER))
        self._template = ChatTemplate(_read(bundle.file(CHAT_TEMPLATE)), bundle.manifest.special_tokens)
        self._system: Message | None = None
        # The vocabulary spells a token with one character for each byte, a special token as its own text.
        longest = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        #: Longer texts, in bytes of UTF-8, are not tokenized, which would take 300 bytes of memory for each byte.
        self._max_bytes = self.layout.max_seq_len * longest * NFC_SHORTENS
        self._find_special_tokens(bundle.path)
        self._check_contract(bundle.path)
        if system_prompt is not None:
            self._system = Message("system", system_prompt)
            try:
                self.row(single_turn(_PROBE, 1), [(1, 1)])
            except PromptError as error:
                raise ConfigError(f"--system-prompt cannot be used: {error}") from error

    def _find_special_tokens(self, bundle: Path) -> None:
        """Find what the tokenizer would split off before it tokenizes text.

        Raises:
            BundleError: a token also takes the white space beside it, or is compared with normalized text.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        for token in added.values():
            odd = token.lstrip or token.rstrip or token.single_word or token.content != token.content.strip()
            if odd or (token.special and token.normalized):
                raise BundleError(
                    f"{bundle}: the tokenizer's added token {token.content!r} depends on the text beside it "
                    "(lstrip, rstrip, single_word, normalized), which is not supported: change the checkpoint's "
                    "tokenizer and export it again"
                )
        #: Bytes that each of them adds to an answer, by id.
        self._added_bytes = {at: 0 if token.special else len(token.content.encode()) for at, token in added.items()}
        #: Special tokens by their text.
        self._special = {token.content: token_id for token_id, token in added.items() if token.special}
        # Other added tokens are found as well, since a special token inside one of them is none.
        contents = sorted((token.content for token in added.values() if not token.normalized), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, contents)))
        if self.layout.image_token_id not in self._special.values():
            raise BundleError(
                f"{bundle}: the image token {self.layout.image_token_id} is no special token of the tokenizer: "
                "export the checkpoint again"
            )

    def _check_contract(self, bundle: Path) -> None:
        """Tokenize a turn of one image token and text, in pieces and as a whole, and compare with the contract."""
        turn = single_turn(_PROBE, 1)
        try:
            rendered = self._template.render(turn)
            whole, probe = self.encode(rendered.fill(rendered.parts)), self.encode(_PROBE)
            # From here on, the spelling of a special token is tokenized as plain text.
            self._tokenizer.encode_special_tokens = True
            row = self.row(turn, [(1, 1)])
        except PromptError as error:
            raise BundleError(
                f"{bundle}: a turn of one image and text cannot be tokenized ({error}): export the checkpoint again"
            ) from error
        if not row.input_ids == whole == self.layout.row_ids(probe, 1):
            raise BundleError(
                f"{bundle}: template and tokenizer do not reproduce the tokens of the layout contract: "
                "export the checkpoint again"
            )

    def row(self, conversation: Conversation, grids: Sequence[tuple[int, int]]) -> TokenRow:
        """Token ids of a row up to its answer.

        Args:
            conversation: the messages.
            grids: rows and columns of image tokens of each of the row's images.

        Raises:
            PromptError: text is missing, blank, not text, or leaves no room for an answer; the template refuses the
                conversation, or places other images than it shows.
        """
        _check_messages(conversation)
        if self._system is not None and all(message.role != "system" for message in conversation):
            conversation = (self._system, *conversation)
        shown = list(images_of(conversation))
        for index in shown:
            if not 0 <= index < len(grids):
                raise PromptError(f"the conversation shows image {index + 1} of {len(grids)}")
        image_tokens = [rows * columns for rows, columns in (grids[index] for index in shown)]
        self.layout.check_room(image_tokens)
        if self._bytes(conversation) > self._max_bytes:
            self.layout.check_room(image_tokens, text_tokens=None)
        tokens = self._tokens(self._template.render(conversation))
        if tokens.count(self.layout.image_token_id) != len(shown):
            raise PromptError(
                f"the chat template places {tokens.count(self.layout.image_token_id)} images where the conversation "
                f"shows {len(shown)}"
            )
        self.layout.check_room(image_tokens, len(tokens) - len(shown))
        ids: list[int] = []
        images: list[ShownImage] = []
        for token in tokens:
            if token == self.layout.image_token_id:
                index = shown[len(images)]
                rows, columns = grids[index]
                images.append(ShownImage(len(ids), rows, columns, index))
                ids += [token] * (rows * columns)
            else:
                ids.append(token)
        return TokenRow(ids, tuple(images))

    def _bytes(self, conversation: Conversation) -> int:
        """Bytes of UTF-8 of all text."""
        try:
            return sum(len(message.text.encode()) for message in conversation)
        except UnicodeError as error:
            raise PromptError(f"the prompt is not valid Unicode text: {error}") from error

    def _tokens(self, rendered: Rendered) -> list[int]:
        """Token ids of what the template printed; an image is one token.

        It is split at the special tokens of the template. What is between two of them, of the template and of the
        conversation, is tokenized as a whole.
        """
        tokens: list[int] = []
        stretch: list[str | int] = []
        for part in rendered.parts:
            if isinstance(part, int):
                stretch.append(part)
                continue
            end = 0
            for match in self._added.finditer(part):
                if match[0] in self._special:
                    stretch.append(part[end : match.start()])
                    tokens += self.encode(rendered.fill(stretch))
                    tokens.append(self._special[match[0]])
                    stretch = []
                    end = match.end()
            stretch.append(part[end:])
        tokens += self.encode(rendered.fill(stretch))
        return tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of text, in which the spelling of a special token is text.

        Raises:
            PromptError: it is not valid Unicode text.
        """
        if not text:
            return []
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:  # the conversation's text has been looked at
            raise PromptError(f"the chat template prints text that is not valid Unicode: {error}") from error
        return ids

    def text(self, token_ids: list[int]) -> str:
        """Text of an answer, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def byte_lengths(self, token_ids: Sequence[int]) -> list[int]:
        """Bytes of UTF-8 that each token adds to `text`."""
        # The vocabulary spells a token with one character for each byte.
        return [
            self._added_bytes[each] if each in self._added_bytes else len(self._tokenizer.id_to_token(each) or "")
            for each in token_ids
        ]

    def token_text(self, token_id: int | None) -> str | None:
        """Text of one token, also of a special one; None for None."""
        if token_id is None:
            return None
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no class of its own
        raise BundleError(f"{path} cannot be loaded: {error}") from error
    # A checkpoint can have been saved with either.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error


def _check_messages(conversation: Conversation) -> None:
    """Check that there are messages, that text is text, and that each user turn has some, or nothing but images.

    Raises:
        PromptError: it is not so.
    """
    if not conversation:
        raise PromptError("the conversation has no messages")
    if all(message.role != "user" for message in conversation):
        raise PromptError("the conversation has no message of the user")
    for number, message in enumerate(conversation, 1):
        name = "the prompt" if len(conversation) == 1 else f"message {number} ({message.role})"
        parts = message.content if isinstance(message.content, tuple) else (message.content,)
        for part in parts:
            if not isinstance(part, str | int):
                what = "null" if part is None else f"of type {type(part).__name__}, not text"
                raise PromptError(f"{name} is {what}")
        only_images = parts and all(isinstance(part, int) for part in parts)
        if message.role == "user" and not only_images and not message.text.strip():
            raise PromptError(f"{name} is empty")
