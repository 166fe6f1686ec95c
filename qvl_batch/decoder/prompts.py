"""Rows of token ids, as the bundle's layout contract has them.

Letters used for dimensions, here and everywhere:

    B   rows of a batch            T_img  image tokens (576 at 672 x 672)
    S   tokens of a row            P      index of the first image token
    D   hidden size of the decoder V      vocabulary
    N   slots of the KV cache      L_max  tokens that a slot holds (= the contract's S)

What enters: prompts. What leaves: token ids of whole rows, and back again, answers from ids.

This module knows nothing of images or of graphs.
"""

from tokenizers import Tokenizer

from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import TOKENIZER
from qvl_batch.errors import BundleError, PromptError

#: What a prompt's bytes may shrink by: the tokenizer brings text into Unicode's NFC, which makes 2 bytes of 7 where
#: it shortens most (U+1FBE U+0308 U+0301).
NFC_SHORTENS = 4


class RowLayout:
    """Turns prompts into rows and answer ids into text, with a bundle's tokenizer; threads may share it.

    The tokenizer is the one that transformers made of the checkpoint, without transformers: to
    import that takes a worker two seconds and, where there is a torch, 250 MB.

    Raises:
        BundleError: the tokenizer cannot be loaded, or its tokens are not those of the contract.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.layout = layout = bundle.manifest.layout
        path = bundle.file(TOKENIZER)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers has no class of its own for it
            raise BundleError(f"{path} cannot be loaded: {error}") from error
        parts = (layout.head_ids, (layout.image_token_id,), layout.bridge_ids, layout.tail_ids)
        if layout.image_start != len(layout.head_ids) or any(self._again(ids) != ids for ids in parts):
            raise BundleError(f"{bundle.path}: the tokens of the contract are not the tokenizer's: export again")
        # A token is spelled with a character for each byte, or as itself.
        longest = max(len(token.encode()) for token in self._tokenizer.get_vocab())
        #: Bytes of a prompt that may fit; the tokenizer takes 300 bytes of memory for each.
        self._most_bytes = layout.room * longest * NFC_SHORTENS
        # A special token spelled in a prompt is text like any other.
        self._tokenizer.encode_special_tokens = True

    def _again(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """What the text of these tokens is tokenized to, special tokens and all."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def row_ids(self, prompt: str | None) -> list[int]:
        """Token ids of a row up to its answer.

        Raises:
            PromptError: no prompt, none that is text, or one that leaves no room for an answer.
        """
        if not isinstance(prompt, str):
            what = "null" if prompt is None else f"{type(prompt).__name__} and no text"
            raise PromptError(f"the prompt is {what}")
        if not prompt.strip():
            raise PromptError("the prompt is empty")
        try:
            if len(prompt.encode()) > self._most_bytes:
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
        """Text of an answer, special tokens left out."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def token_text(self, token_id: int | None) -> str | None:
        """One token as the vocabulary spells it, special tokens too."""
        if token_id is None:
            return None
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text
