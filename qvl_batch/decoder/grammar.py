"""Constraints as masks over the vocabulary: which tokens may come next in an answer.

What enters: constraints, then the tokens of an answer as they come. What leaves: masks, one bit a token, in rows of
32-bit words: token t is bit t % 32 of word t // 32.

Regular expressions and JSON schemas are followed by llguidance. JSON is compact, without white space between its parts,
and special tokens are never part of it. Choices are a tree of their tokens: each is spelled in one way, as the
tokenizer spells it, so that probabilities of choices add up to one.

This module knows nothing of graphs, slots or prompts.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from numpy.typing import NDArray

from qvl_batch.bundle.manifest import mask_bytes
from qvl_batch.constraints import Constraint, excerpt
from qvl_batch.decoder.draws import Draws, draw_from_all
from qvl_batch.errors import BundleError, ConstraintError

#: The mask of a row, int32 (⌈V / 32⌉,).
Mask = NDArray[np.int32]
#: Grammars that are kept, the least recently used dropped first: rows of one file mostly share a few.
MOST_GRAMMARS = 256
#: A character of a JSON string that needs no escape.
_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
#: Sets of tokens that llguidance allows or refuses as a whole: white space, and text of a JSON string by its length in
#: characters. Its own lengths are 10, 30 and any: near the end of a string with `maxLength`, where none of them fits,
#: it looks at every token. With these, such masks take a fifth of the time (15 to 29 characters before the end) to two
#: thirds (below 6).
SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_CHARACTER}{{1,{most}}}" for most in (6, 8, 10, 12, 15, 20, 30)),
    f"{_CHARACTER}+",
]


class Guide(ABC):
    """Follows one answer through its grammar, token by token."""

    @abstractmethod
    def accept(self, token: int) -> None:
        """Append a token to the answer.

        Raises:
            ConstraintError: the grammar does not allow it, or became too complex.
        """

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether nothing but the end may come next."""

    @property
    @abstractmethod
    def may_end(self) -> bool:
        """Whether the answer so far is one that the grammar allows."""


class Grammar(ABC):
    """A compiled constraint.

    Args:
        first_mask: the mask of the first token of every answer.
        needed: tokens of the longest answer that must have room, and its text.
    """

    def __init__(self, first_mask: Mask, needed: tuple[int, str]) -> None:
        self.first_mask, self._needed = first_mask, needed

    @abstractmethod
    def guide(self) -> Guide:
        """A guide for one answer."""

    def check_room(self, room: int) -> None:
        """Refuse choices that are longer than so many tokens, or a grammar whose shortest answer is.

        Raises:
            ConstraintError: says how many tokens it takes.
        """
        tokens, text = self._needed
        if tokens > room:
            raise ConstraintError(
                f"an answer such as {excerpt(text)!r} takes {tokens} tokens, and there is room for {room}: raise "
                "--max-new-tokens, or ask in fewer tokens"
            )


class Grammars:
    """Compiles constraints for one vocabulary. Thread-safe.

    Args:
        tokenizer: file of the tokenizer, as transformers writes it.
        vocab_size: tokens that the model knows; those that the tokenizer lacks are never allowed.
        eos_token_ids: tokens that end an answer.
        threads: threads that make masks.
        spelling: how the tokenizer spells text, in which special tokens are text: text to token ids, and back.
    """

    def __init__(
        self,
        tokenizer: Path,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        threads: int,
        spelling: tuple[Callable[[str], list[int]], Callable[[list[int]], str]],
    ) -> None:
        self._encode, self._decode = spelling
        self._file, self._vocab_size = tokenizer, vocab_size
        self._executor = LLExecutor(threads)
        self._words, self._eos = mask_bytes(vocab_size) // 4, tuple(eos_token_ids)
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """The vocabulary as llguidance has it. That takes it seconds, and choices do not need it."""
        try:
            text = self._file.read_text(encoding="utf-8")
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(self._eos), slices=SLICES)
        except Exception as error:  # llguidance raises no class of its own
            raise BundleError(f"{self._file} cannot be used for answers with a constraint: {error}") from error

    def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of a constraint, kept for rows with the same.

        Raises:
            BundleError: the tokenizer cannot be read.
            ConstraintError: it is wrong, or uses what cannot be followed.
        """
        with self._lock:
            found = self._kept.pop(constraint, None)
        if found is None:
            found = self._choices(constraint) if constraint.kind == "choices" else self._language(constraint)
        with self._lock:
            self._kept[constraint] = found
            if len(self._kept) > MOST_GRAMMARS:
                self._kept.popitem(last=False)
        return found

    def fill(self, guides: Sequence[tuple[Guide, int]], masks: NDArray[np.int32]) -> None:
        """Write the mask of the next token of each guide into its row of `masks`, int32 (N, ⌈V / 32⌉)."""
        languages: list[tuple[LLMatcher, int]] = []
        for guide, row in guides:
            if isinstance(guide, _LanguageGuide):
                languages.append((guide.matcher, row))
            elif isinstance(guide, _ChoicesGuide):
                masks[row] = guide.node.mask(self._words, self._eos)
        if languages:
            self._executor.unsafe_compute_mask_ptr(languages, masks.ctypes.data, masks.strides[0], len(masks))

    def _language(self, constraint: Constraint) -> "_Language":
        if constraint.kind == "regex":
            source = LLMatcher.grammar_from_regex(constraint.text)
        else:
            source = LLMatcher.grammar_from_json_schema(
                constraint.text, overrides={"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
            )
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise _error(constraint, matcher)
        needed = (0, "")
        for text in constraint.shortest():
            tokens, answer = self._encode(text), matcher.deep_copy()
            if answer.consume_tokens(tokens) and answer.is_accepting():
                needed = max(needed, (len(tokens), text))
        mask = np.zeros(self._words, np.int32)
        matcher.deep_copy().unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return _Language(constraint, matcher, mask, needed)

    def _choices(self, constraint: Constraint) -> "ChoiceTree":
        root, needed = _Node(), (0, "")
        for choice in constraint.choices:
            tokens = self._encode(choice)
            if (spelled := self._decode(tokens)) != choice:
                raise ConstraintError(f"the tokenizer spells choice {choice!r} as {spelled!r}: write it so")
            node = root
            for token in tokens:
                node = node.children.setdefault(token, _Node())
            node.choice = choice
            needed = max(needed, (len(tokens), choice))
        return ChoiceTree(root, self._eos, root.mask(self._words, self._eos), needed)


@dataclass(frozen=True, slots=True)
class Branch:
    """A place where an answer can go on in several ways: the tokens before it, and those that can come next."""

    tokens: tuple[int, ...]
    following: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice, its tokens, their log-probabilities with that of the end if other choices go on there, and the
    probability of each choice, as drawn token by token among those that are allowed. Probabilities add up to 1.
    """

    choice: str
    token_ids: list[int]
    logprobs: list[float]
    probabilities: dict[str, float]


@dataclass(slots=True)
class _Node:
    """A place in the tree of choices: what may come next, and the choice that ends here, if one does."""

    children: "dict[int, _Node]" = field(default_factory=dict)
    choice: str | None = None
    _mask: Mask | None = None

    @property
    def is_branch(self) -> bool:
        """Whether there are several ways to go on."""
        return len(self.children) + (self.choice is not None) > 1

    def following(self, eos: Sequence[int]) -> tuple[int, ...]:
        """Tokens that may come next, those of the end last."""
        return (*self.children, *(() if self.choice is None else eos))

    def mask(self, words: int, eos: Sequence[int]) -> Mask:
        """The mask of the next token."""
        if self._mask is None:
            bits = np.zeros(32 * words, np.uint8)
            bits[list(self.following(eos))] = 1
            self._mask = np.packbits(bits, bitorder="little").view(np.int32)
        return self._mask


class ChoiceTree(Grammar):
    """Choices as a tree of their tokens.

    Args:
        root: where answers begin.
        eos: tokens that end an answer.
        first_mask: as for `Grammar`.
        needed: as for `Grammar`.
    """

    def __init__(self, root: _Node, eos: Sequence[int], first_mask: Mask, needed: tuple[int, str]) -> None:
        super().__init__(first_mask, needed)
        self._root, self._eos = root, eos

    def guide(self) -> Guide:
        """As `Grammar.guide`."""
        return _ChoicesGuide(self._root)

    def branches(self) -> list[Branch]:
        """All places where there are several ways. `chosen` takes their scores."""
        return [Branch(tokens, node.following(self._eos)) for tokens, node in self._places() if node.is_branch]

    def chosen(self, scores: Sequence[Sequence[float]], draws: Sequence[Draws | None] = (None,)) -> "list[Chosen]":
        """The choices that decoding gives, and the probability of each.

        Args:
            scores: of `branches`, logits of the tokens that can follow.
            draws: for each choice to make, how it is drawn; None for greedy decoding.
        """
        # Log-probabilities of what can follow each place, its end last.
        following = {tokens: [0.0] for tokens, _ in self._places()}
        for branch, found in zip(self.branches(), scores, strict=True):
            following[branch.tokens] = _log_softmax(found)
        logprobs: dict[tuple[int, ...], float] = {(): 0.0}
        probabilities: dict[str, float] = {}
        for tokens, node in self._places():
            before, after = logprobs[tokens], following[tokens]
            logprobs |= {(*tokens, token): before + after[at] for at, token in enumerate(node.children)}
            if node.choice is not None:
                ends = after[len(node.children) :] or [0.0]
                probabilities[node.choice] = math.fsum(math.exp(before + each) for each in ends)
        return [Chosen(*self._walk(following, each), probabilities) for each in draws]

    def _walk(
        self, following: Mapping[tuple[int, ...], list[float]], draws: Draws | None
    ) -> tuple[str, list[int], list[float]]:
        """A choice, its tokens, and their log-probabilities with that of the end."""
        node = self._root
        tokens: list[int] = []
        logprobs: list[float] = []
        uniforms = draws.uniforms(self._depth + 1) if draws else None
        while True:
            after = following[tuple(tokens)]
            ways = node.following(self._eos) if node.is_branch else (*node.children, *self._eos)[:1]
            if draws is None or uniforms is None:
                # The lowest token of several with the same logit, as argmax takes it.
                at = max(range(len(after)), key=lambda at: (after[at], -ways[at]))
            else:
                at = draw_from_all(np.array(after), draws.sampling, uniforms[len(tokens)])
            if (token := ways[at]) not in node.children:
                assert node.choice is not None
                return node.choice, tokens, [*logprobs, *([after[at]] if node.is_branch else [])]
            node = node.children[token]
            tokens.append(token)
            logprobs.append(after[at])

    @cached_property
    def _depth(self) -> int:
        """Tokens of the longest choice."""
        return max(len(tokens) for tokens, _ in self._places())

    def _places(self) -> Iterator[tuple[tuple[int, ...], _Node]]:
        """Every place, with the tokens before it; a place comes before those behind it."""
        waiting: list[tuple[tuple[int, ...], _Node]] = [((), self._root)]
        for tokens, node in waiting:
            yield tokens, node
            waiting += [((*tokens, token), child) for token, child in node.children.items()]


def _log_softmax(scores: Sequence[float]) -> list[float]:
    """Log-probabilities: x - log(sum(exp(x)))."""
    best = max(scores)
    total = best + math.log(math.fsum(math.exp(score - best) for score in scores))
    return [score - total for score in scores]


class _ChoicesGuide(Guide):
    def __init__(self, root: _Node) -> None:
        self.node = root

    def accept(self, token: int) -> None:
        if token not in self.node.children:
            raise ConstraintError(f"token {token} is not in any of the choices here")
        self.node = self.node.children[token]

    @property
    def is_complete(self) -> bool:
        return not self.node.children

    @property
    def may_end(self) -> bool:
        return self.node.choice is not None


class _Language(Grammar):
    """What llguidance follows: a regular expression or a JSON schema."""

    def __init__(self, constraint: Constraint, matcher: LLMatcher, first_mask: Mask, needed: tuple[int, str]) -> None:
        super().__init__(first_mask, needed)
        self._constraint, self._matcher = constraint, matcher

    def guide(self) -> Guide:
        return _LanguageGuide(self._matcher.deep_copy(), self._constraint)


class _LanguageGuide(Guide):
    def __init__(self, matcher: LLMatcher, constraint: Constraint) -> None:
        self.matcher, self._constraint = matcher, constraint

    def accept(self, token: int) -> None:
        if not self.matcher.consume_token(token):
            raise _error(self._constraint, self.matcher)

    @property
    def is_complete(self) -> bool:
        return self.matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        return self.matcher.is_accepting()


def _error(constraint: Constraint, matcher: LLMatcher) -> ConstraintError:
    """What llguidance says, in one line."""
    what = {"regex": "regular expression", "json_schema": "JSON schema"}[constraint.kind]
    reason = " ".join(line.strip() for line in matcher.get_error().splitlines() if line.strip(" ^|-"))
    return ConstraintError(f"the {what} cannot be followed: {reason}")
