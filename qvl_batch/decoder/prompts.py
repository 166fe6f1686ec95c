"""Prompts to token ids, by the bundle's layout contract, and token ids of answers to text.

What enters: prompts, or the token ids of answers. What leaves: token ids of rows up to the answer, or text.

This module knows nothing of images or of graphs.
"""

from tokenizers import Tokenizer

from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import TOKENIZER
from qvl_batch.errors import BundleError, PromptError

#: Bound on how many times shorter a prompt's UTF-8 becomes by Unicode's NFC, to which the tokenizer normalizes: at most
#: 7 bytes become 2 (U+1FBE U+0308 U+0301).
NFC_SHORTENS = 4


class RowLayout:
    """Converts prompts to rows of token ids, and answers to text, with a bundle's tokenizer. Thread-safe.

    The tokenizer file is the one that transformers wrote for the checkpoint. It is loaded without transformers, whose
    import takes two seconds, and 250 MB if torch is installed.

    Args:
        bundle: the bundle.

    Raises:
        BundleError: the tokenizer cannot be loaded, or does not reproduce the tokens of the layout contract.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.layout = layout = bundle.manifest.layout
        path = bundle.file(TOKENIZER)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no class of its own
            raise BundleError(f"{path} cannot be loaded: {error}") from error
        parts = (layout.head_ids, (layout.image_token_id,), layout.bridge_ids, layout.tail_ids)
        if layout.image_start != len(layout.head_ids) or any(self._retokenize(ids) != ids for ids in parts):
            raise BundleError(
                f"{bundle.path}: the tokenizer does not reproduce the tokens of the layout contract: "
                "export the checkpoint again"
            )
        # The vocabulary spells a token with one character for each byte, a special token as its own text.
        longest = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        #: Longer prompts, in bytes of UTF-8, are not tokenized, which would take 300 bytes of memory for each byte.
        self._max_bytes = layout.room * longest * NFC_SHORTENS
        # The spelling of a special token in a prompt is tokenized as plain text.
        self._tokenizer.encode_special_tokens = True

    def _retokenize(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Decode tokens to text and tokenize it again, special tokens included."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def row_ids(self, prompt: str | None) -> list[int]:
        """Token ids of a row up to its answer.

        Raises:
            PromptError: the prompt is missing, empty, not text, or leaves no room for an answer.
        """
        if not isinstance(prompt, str):
            what = "null" if prompt is None else f"of type {type(prompt).__name__}, not text"
            raise PromptError(f"the prompt is {what}")
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        try:
            if len(prompt.encode()) > self._max_bytes:
                raise self._too_long("too many")
            ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise PromptError(f"the prompt is not valid Unicode text: {error}") from error
        if len(ids) >= self.layout.room:
            raise self._too_long(str(len(ids)))
        return self.layout.row_ids(ids)

    def _too_long(self, tokens: str) -> PromptError:
        return PromptError(
            f"the prompt has {tokens} tokens; the bundle leaves {self.layout.room - 1} beside the image "
            f"(exported with --max-seq-len {self.layout.max_seq_len})"
        )

    def text(self, token_ids: list[int]) -> str:
        """Text of an answer, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def token_text(self, token_id: int | None) -> str | None:
        """Text of one token, also of a special one; None for None."""
        if token_id is None:
            return None
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text
