"""Answers that must be something: one of some choices, a match of a regular expression, JSON of a schema."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from answers import demo_rows, requests_of
from checkpoints import penalised_checkpoint
from conftest import TINY, exported
from llguidance import LLMatcher, LLTokenizer
from reference import question
from transformers import LogitsProcessor

from export.checkpoint import load_checkpoint
from export.comparison.reference import PyTorch
from qvl_batch import Captioner
from qvl_batch.constraints import Constraint, constraint_of
from qvl_batch.decoder.answerer import grammars_of
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.engine import Engine
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import ConfigError, ConstraintError, TruncatedError
from qvl_batch.images.pixels import decode_image, see
from qvl_batch.images.view import View

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue", "yellow"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["color", "count", "sure"],
}
#: As different as they can be, so that neighbours in a batch differ.
CONSTRAINTS = (
    constraint_of("choices", ["red", "green", "blue", "yellow", "a red star", "there is none"]),
    None,
    constraint_of("json_schema", SCHEMA),
    constraint_of("regex", "(red|green|blue) (circle|square|star|triangle)s?"),
    constraint_of("choices", ["no", "not sure", "yes"]),
    None,
)
TOKENS = 64


@pytest.fixture(scope="module")
def grammars(tiny_bundle):
    return grammars_of(tiny_bundle, RowLayout(tiny_bundle), threads=2)


@pytest.fixture(scope="module")
def questions():
    return demo_rows()


@pytest.fixture(scope="module")
def requests(tiny_bundle, questions):
    return requests_of(tiny_bundle, questions[:12], TOKENS)


def _guided(bundle, grammars, requests, constraints, slots=5):
    """Outcomes of requests, each with its constraint."""
    decoder = Decoder(bundle, slots, threads=2, guided=True, logprobs=True)
    asked = [
        replace(request, grammar=constraint and grammars.compile(constraint))
        for request, constraint in zip(requests, constraints, strict=True)
    ]
    with Engine(decoder, bundle.manifest.generation.eos_token_ids, grammars=grammars) as engine:
        futures = [engine.submit(request) for request in asked]
        return [future.exception(timeout=120) or future.result() for future in futures]


class _Masked(LogitsProcessor):
    """The masks of a constraint, made anew at each token from all tokens before it."""

    def __init__(self, matcher, prompt_tokens):
        self._matcher, self._prompt_tokens = matcher, prompt_tokens

    def __call__(self, input_ids, scores):
        matcher = self._matcher.deep_copy()
        assert matcher.consume_tokens(input_ids[0, self._prompt_tokens :].tolist())
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: scores.shape[-1]].astype(bool))
        return scores.masked_fill(~allowed, -torch.inf)


class _OneOf(LogitsProcessor):
    """Tokens that go on with one of some choices, or end it."""

    def __init__(self, choices, eos, prompt_tokens):
        self._choices, self._eos, self._prompt_tokens = choices, eos, prompt_tokens

    def __call__(self, input_ids, scores):
        answer = input_ids[0, self._prompt_tokens :].tolist()
        ways = [each for each in self._choices if each[: len(answer)] == answer]
        following = {token for each in ways for token in each[len(answer) :][:1] or self._eos}
        banned = torch.ones_like(scores, dtype=torch.bool)
        banned[0, list(following)] = False
        return scores.masked_fill(banned, -torch.inf)


def _generated(pytorch, bundle, row, constraint):
    """Tokens of transformers' greedy answer under the same masks, without the end token, and their log-probabilities
    with that of the end token.
    """
    asked = question(row)
    ids = pytorch.input_ids(asked)
    processors = []
    if constraint is not None:
        manifest = bundle.manifest
        eos = list(manifest.generation.eos_token_ids)
        tokenizer = LLTokenizer(
            (TINY / "tokenizer.json").read_text(), n_vocab=manifest.decoder.vocab_size, eos_token=eos
        )
        if constraint.kind == "choices":
            spelled = [pytorch.tokenizer(each, add_special_tokens=False).input_ids for each in constraint.choices]
            processors = [_OneOf(spelled, eos, len(ids))]
        else:
            source = (
                LLMatcher.grammar_from_regex(constraint.text)
                if constraint.kind == "regex"
                else LLMatcher.grammar_from_json_schema(constraint.text, overrides={"whitespace_flexible": False})
            )
            processors = [_Masked(LLMatcher(tokenizer, source), len(ids))]
    with torch.inference_mode():
        found = pytorch.model.generate(
            **pytorch.inputs([asked], [ids]),
            logits_processor=processors,
            max_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        logprobs = pytorch.model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)[0]
    answer = found.sequences[0, len(ids) :].tolist()
    is_ended = answer[-1] in bundle.manifest.generation.eos_token_ids
    return answer[:-1] if is_ended else answer, logprobs.tolist()


def _check_against_transformers(bundle, checkpoint, grammars, rows, slots):
    constraints = [CONSTRAINTS[at % len(CONSTRAINTS)] for at in range(len(rows))]
    found = _guided(bundle, grammars, requests_of(bundle, rows, TOKENS), constraints, slots)
    pytorch = PyTorch(checkpoint, max_new_tokens=TOKENS)
    for row, constraint, outcome in zip(rows, constraints, found, strict=True):
        assert not isinstance(outcome, Exception), (constraint, outcome)
        tokens, logprobs = _generated(pytorch, bundle, row, constraint)
        assert outcome.token_ids == tokens, (row["id"], constraint)
        # Where nothing but the end may come next, it has no step here; `generate` has one, of several end tokens.
        assert len(logprobs) - len(outcome.logprobs) in (0, 1)
        assert outcome.logprobs == pytest.approx(logprobs[: len(outcome.logprobs)], abs=1e-4)


def test_guided_answers_are_those_of_transformers_with_the_same_masks(
    tiny_bundle, tiny_checkpoint, grammars, questions
):
    _check_against_transformers(tiny_bundle, tiny_checkpoint, grammars, questions[:12], slots=5)


@pytest.mark.long
def test_guided_answers_of_200_rows_are_those_of_transformers_with_the_same_masks(
    tiny_bundle, tiny_checkpoint, grammars, questions
):
    # Each row meets several of the constraints.
    rows = [questions[(at + at // 64) % 64] for at in range(200)]
    _check_against_transformers(tiny_bundle, tiny_checkpoint, grammars, rows, slots=16)


@pytest.mark.long
def test_masks_follow_the_repetition_penalty(tmp_path, questions):
    checkpoint = penalised_checkpoint(tmp_path / "checkpoint", 1.7)
    bundle = exported(tmp_path / "bundle", checkpoint=checkpoint)
    grammars = grammars_of(bundle, RowLayout(bundle), threads=2)
    _check_against_transformers(bundle, load_checkpoint(checkpoint), grammars, questions[:6], slots=3)


def test_an_answer_that_is_already_what_it_must_be_stays_the_same(tiny_bundle, grammars, requests):
    free = _guided(tiny_bundle, grammars, requests, [None] * len(requests))
    layout = RowLayout(tiny_bundle)
    texts = [layout.text(outcome.token_ids) for outcome in free]
    choices = constraint_of("choices", sorted(set(texts)))
    one_of = _guided(tiny_bundle, grammars, requests, [choices] * len(requests))
    assert [outcome.token_ids for outcome in one_of] == [outcome.token_ids for outcome in free]
    letters = constraint_of("regex", "[A-Za-z ,.]+")
    matches = _guided(tiny_bundle, grammars, requests, [letters] * len(requests))
    kept = [at for at, text in enumerate(texts) if re.fullmatch(letters.text, text)]
    assert kept
    assert [matches[at].token_ids for at in kept] == [free[at].token_ids for at in kept]


def test_rows_without_a_constraint_are_not_touched_by_others(tiny_bundle, grammars, requests):
    free = _guided(tiny_bundle, grammars, requests, [None] * len(requests), slots=1)
    mixed = [CONSTRAINTS[0] if at % 3 else None for at in range(len(requests))]
    found = _guided(tiny_bundle, grammars, requests, mixed, slots=4)
    assert [found[at] for at in range(0, len(requests), 3)] == free[::3]
    alone = _guided(tiny_bundle, grammars, requests, mixed, slots=1)
    assert found == alone


def test_json_is_compact_and_follows_the_schema(tiny_bundle, grammars, requests):
    layout = RowLayout(tiny_bundle)
    for outcome in _guided(tiny_bundle, grammars, requests, [CONSTRAINTS[2]] * len(requests)):
        text = layout.text(outcome.token_ids)
        value = json.loads(text)
        assert list(value) == ["color", "count", "sure"]
        assert value["color"] in SCHEMA["properties"]["color"]["enum"]
        assert 0 <= value["count"] <= 99
        assert isinstance(value["sure"], bool)
        assert text == json.dumps(value, separators=(",", ":"))
        assert outcome.finish_reason == "stop"


def test_an_answer_that_is_cut_before_it_is_what_it_must_be_fails(tiny_bundle, grammars, requests):
    never_ends, ends_anywhere = constraint_of("regex", "(a|b)*c{400}"), constraint_of("regex", "(ab)+|a|b")
    rows = [replace(request, max_new_tokens=9) for request in requests[:3]]
    first, second, third = _guided(tiny_bundle, grammars, rows, [never_ends, ends_anywhere, None])
    assert isinstance(first, TruncatedError)
    assert "cut off at 9 tokens before it was what it must be: raise --max-new-tokens" in str(first)
    assert re.fullmatch("(ab)+|a|b", RowLayout(tiny_bundle).text(second.token_ids))
    assert not isinstance(third, Exception)


@pytest.mark.parametrize(
    "choices",
    [
        ["no", "not sure"],
        ["红色", "绿色", "蓝色"],
        ["<|im_end|>", "<|image_pad|> or not"],
        ['"quoted"', "back\\slash", "new\nline", "a/b|c", " (blank) "],
        [f"label {number}" for number in range(300)],
    ],
)
def test_every_choice_can_be_chosen_exactly(choices, tiny_bundle, tiny_checkpoint, grammars):
    grammar = grammars.compile(constraint_of("choices", choices))
    layout, tokenizer = RowLayout(tiny_bundle), tiny_checkpoint.tokenizer
    eos = set(tiny_bundle.manifest.generation.eos_token_ids)
    special = {at for at, token in tokenizer.added_tokens_decoder.items() if token.special}
    for choice in choices:
        guide = grammar.guide()
        tokens = tokenizer(choice, add_special_tokens=False, split_special_tokens=True).input_ids
        assert layout.text(tokens) == choice
        for token in tokens:
            mask = np.zeros((1, grammar.first_mask.size), np.int32)
            grammars.fill([(guide, 0)], mask)
            allowed = set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
            assert token in allowed
            assert not allowed & special - eos
            guide.accept(token)
        assert guide.may_end
        others = [other for other in choices if other != choice and other.startswith(choice)]
        assert guide.is_complete == (not others)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("choices", [], "the choices are [], they must"),
        ("choices", "yes", "the choices are not JSON"),
        ("choices", [" "], "choice 1 is ' '; it must be text"),
        ("choices", ["a", None], "choice 2 is null; it must be text"),
        ("choices", ["a", "b", "a"], "choice 3, 'a', occurs twice"),
        ("choices", ["\ud800"], "is not valid Unicode text"),
        ("choices", [str(number) for number in range(10_001)], "there are 10,001 choices; the limit is 10,000"),
        ("regex", "", "the regular expression is ''; it must be text"),
        ("regex", "[", "the regular expression cannot be followed: .*unclosed character class"),
        ("regex", "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("json_schema", "{", "the schema is not JSON"),
        ("json_schema", "[]", "the schema is []; it must be an object"),
        ("json_schema", {"type": "strin"}, "the JSON schema cannot be followed: Invalid type: strin"),
        ("json_schema", {"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ("json_schema", {"enum": []}, "the JSON schema cannot be followed: Unsatisfiable schema"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5) is greater than maximum (1)"),
    ],
)
def test_what_no_answer_can_be_is_refused_with_the_reason(kind, value, message, grammars):
    pattern = ".*".join(map(re.escape, message.split(".*"))).replace(r"\],\ they", r"\];\ they")
    with pytest.raises(ConstraintError, match=pattern):
        grammars.compile(constraint_of(kind, value))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("choices", ["yes", "a very long answer indeed"], "a very long answer indeed"),
        ("regex", "[0-9]{40}", "0" * 40),
        ("regex", r"(\w+ ){30}end", "a a a a "),
        ("json_schema", {"type": "array", "items": {"type": "boolean"}, "minItems": 12}, "[true,true,"),
    ],
)
def test_what_has_no_room_is_refused_with_the_tokens_that_it_takes(kind, value, text, grammars):
    grammar = grammars.compile(constraint_of(kind, value))
    message = (
        f"an answer such as '{re.escape(text)}.*' takes \\d+ tokens, and there is room for 5: raise --max-new-tokens"
    )
    with pytest.raises(ConstraintError, match=message):
        grammar.check_room(5)
    grammar.check_room(200)


@pytest.mark.parametrize(
    "choices",
    [
        ["no", "not sure", "yes"],
        pytest.param(["yes", "no"], marks=pytest.mark.long),
        pytest.param(["a red star", "a red circle", "a blue star", "red"], marks=pytest.mark.long),
        ["only this"],
    ],
)
def test_probabilities_of_choices_are_exact(choices, tiny_bundle, tiny_checkpoint, questions):
    rows = questions[:3]
    images, prompts = [row["image"]["bytes"] for row in rows], [row["prompt"] for row in rows]
    with Captioner(tiny_bundle.path, slots=3, confidence=True) as captioner:
        answers = captioner.caption(images, prompts, choices=choices)
        free = captioner.caption(images, prompts)
    with Captioner(tiny_bundle.path, slots=3) as captioner:
        plain = captioner.caption(images, prompts, choices=choices)
        assert [answer.answer for answer in captioner.caption(images, prompts)] == [answer.answer for answer in free]
    pytorch = PyTorch(tiny_checkpoint)
    spelled = [pytorch.tokenizer(choice, add_special_tokens=False).input_ids for choice in choices]
    eos = list(tiny_bundle.manifest.generation.eos_token_ids)
    for row, answer, without in zip(rows, answers, plain, strict=True):
        assert answer.answer == without.answer
        assert answer.answer_tokens == without.answer_tokens
        assert without.choice_probabilities is None
        expected = dict(zip(choices, _probabilities(pytorch, row, spelled, eos), strict=True))
        assert answer.choice_probabilities == pytest.approx(expected, abs=1e-5)
        assert sum(answer.choice_probabilities.values()) == pytest.approx(1, abs=1e-9)
        # A choice can end with any end token; the answer ended with one.
        assert answer.confidence <= answer.choice_probabilities[answer.answer] + 1e-9


def _probabilities(pytorch, row, spelled, eos):
    """Probability of each choice: PyTorch's logits of each whole row, softmax over what may follow."""
    seen = see(decode_image(row["image"]["bytes"]), View.square(672))
    asked = replace(question(row), images=(seen,))
    ids = pytorch.input_ids(asked)
    found = []
    for choice in spelled:
        with torch.inference_mode():
            logits = pytorch.model(**pytorch.inputs([asked], [[*ids, *choice]])).logits[0].double()
        probability = 1.0
        for at in range(len(choice) + 1):
            ways = [each for each in spelled if each[:at] == choice[:at]]
            ends = any(len(each) == at for each in ways)
            tokens = list({each[at] for each in ways if len(each) > at}) + (eos if ends else [])
            chosen = eos if at == len(choice) else [choice[at]]
            weights = torch.softmax(logits[len(ids) - 1 + at, tokens], -1)
            probability *= float(sum(weights[tokens.index(token)] for token in chosen))
        found.append(probability)
    return found


#: Values of every kind, behind letters of several bytes, escapes and free text.
VALUES = {
    "type": "object",
    "properties": {
        "é": {"enum": ['é"n', "红"]},
        "note": {"type": "string", "pattern": "^[ab]{2}$"},
        "color": {"enum": ["red", "reddish", "blue"]},
        "place": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "sure": {"type": "boolean"}},
            "required": ["x", "sure"],
        },
    },
    "required": ["é", "note", "color", "place"],
}
#: The values of such an answer.
SPELLED = re.compile(
    '{"é":(?P<kind>"(?:[^"\\\\]|\\\\.)*"),"note":"..","color":(?P<color>"\\w+"),"place":{"x":(?P<x>\\d+),"sure":(?P<sure>\\w+)}}'
    .encode()
)  # fmt: skip


@pytest.mark.long
def test_the_probability_of_a_value_is_that_of_all_ways_to_spell_it(
    tiny_bundle, tiny_checkpoint, questions, monkeypatch
):
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", 128)
    with Captioner(tiny_bundle.path, slots=2, confidence=True) as captioner:
        rows = questions[:2]
        answers = captioner.caption(
            [row["image"]["bytes"] for row in rows], [row["prompt"] for row in rows], json_schema=VALUES
        )
    constraint, pytorch = constraint_of("json_schema", VALUES), PyTorch(tiny_checkpoint, max_new_tokens=128)
    for row, answer in zip(rows, answers, strict=True):
        spelling = _Spelling(pytorch, tiny_bundle, row, constraint)
        assert spelling.text.decode() == answer.answer
        sure = answer.parsed_confidence
        assert list(sure) == ["é", "color", "place"]
        given = {"kind": sure["é"], "color": sure["color"], "x": sure["place"]["x"], "sure": sure["place"]["sure"]}
        for name, span in ((name, SPELLED.fullmatch(spelling.text).span(name)) for name in given):
            came, every = spelling.probabilities(*span)
            assert given[name] == pytest.approx(came, abs=1e-4), name
            # Other spellings are left out. A model that has never seen JSON gives them a tenth at most.
            assert 0.9 * every <= given[name] <= every + 1e-4, name


class _Spelling:
    """An answer of PyTorch's to a row, and how probable other tokens for parts of it were."""

    def __init__(self, pytorch, bundle, row, constraint):
        self._pytorch, self._asked, self._eos = pytorch, question(row), bundle.manifest.generation.eos_token_ids
        self._ids = pytorch.input_ids(self._asked)
        vocab_size = bundle.manifest.decoder.vocab_size
        tokenizer = LLTokenizer((TINY / "tokenizer.json").read_text(), n_vocab=vocab_size, eos_token=list(self._eos))
        source = LLMatcher.grammar_from_json_schema(constraint.text, overrides={"whitespace_flexible": False})
        self._matcher = LLMatcher(tokenizer, source)
        self._bytes = [tokenizer.decode_bytes([token]) for token in range(vocab_size)]
        self._tokens, self._logprobs = _generated(pytorch, bundle, row, constraint)
        self._ends = np.cumsum([len(self._bytes[token]) for token in self._tokens]).tolist()
        self.text = b"".join(self._bytes[token] for token in self._tokens)

    def probabilities(self, start, end):
        """Of the value in these bytes: as it was spelled, and spelled in any way. A number ends before another byte."""
        behind = self.text[start:end].isdigit()
        begins = [0, *self._ends[:-1]]
        parts = [at for at in range(len(self._tokens)) if self._ends[at] > start and begins[at] < end + behind]
        came = np.exp(sum(self._logprobs[at] for at in parts))
        return came, self._every(self._tokens[: parts[0]], b"", self.text[begins[parts[0]] : end], behind)

    def _every(self, before, spelled, value, behind):
        """Probability that an answer that begins with some tokens goes on with a value, of which a part is spelled."""
        matcher = self._matcher.deep_copy()
        assert matcher.consume_tokens(before)
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: len(self._bytes)]).tolist()
        inputs = self._pytorch.inputs([self._asked], [[*self._ids, *before]])
        with torch.inference_mode():
            logits = self._pytorch.model(**inputs).logits[0, -1, allowed].double()
        total = 0.0
        for token, probability in zip(allowed, torch.softmax(logits, -1).tolist(), strict=True):
            now = spelled + self._bytes[token]
            if token in self._eos or probability < 1e-7:
                continue
            if len(now) < len(value) + behind:
                if value.startswith(now):
                    total += probability * self._every([*before, token], now, value, behind)
            elif now.startswith(value) and not now[len(value) :][:1].isdigit():
                total += probability
        return total


@pytest.mark.parametrize("confidence", [False, True])
def test_a_row_without_room_for_its_choices_fails_alone(confidence, tiny_bundle, questions):
    image, longest = questions[0]["image"]["bytes"], tiny_bundle.manifest.layout.max_seq_len
    with Captioner(tiny_bundle.path, slots=2, confidence=confidence) as captioner:
        (short,) = captioner.caption([image], ["?"])
        long = "a " * (longest - short.prompt_tokens - 6) + "?"
        (free,) = captioner.caption([image], [long])
        assert 0 < longest - free.prompt_tokens < 12
        full, other = captioner.caption([image] * 2, [long, "How many?"], choices=["yes", "no, there is none at all"])
    assert re.search(r"'no, there is none at all' takes \d+ tokens, and there is room for \d+: raise", str(full))
    assert other.failure is None


def test_a_constraint_survives_its_text():
    for constraint in filter(None, CONSTRAINTS):
        assert Constraint.from_json(constraint.to_json()) == constraint


def test_a_captioner_answers_with_what_it_must(tiny_bundle, questions):
    images, prompts = ([row["image"]["bytes"] for row in questions[:3]], [row["prompt"] for row in questions[:3]])
    with Captioner(tiny_bundle.path, slots=2) as captioner:
        free = captioner.caption(images, prompts)
        chosen = captioner.caption(images, prompts, choices=["yes", "no"])
        objects = captioner.caption(images, prompts, json_schema=SCHEMA)
        numbers = captioner.caption(images, prompts, regex="[0-9]")
        assert captioner.caption(images, prompts) == free
        short = captioner.caption(images, prompts, json_schema=SCHEMA, max_new_tokens=3)
        with pytest.raises(ConfigError, match="choices and regex: an answer can only be one of them"):
            captioner.caption(images, prompts, choices=["yes"], regex="yes")
        with pytest.raises(ConfigError, match="choices: the choices are"):
            captioner.caption(images, prompts, choices=[])
    assert {answer.answer for answer in chosen} <= {"yes", "no"}
    assert all(set(json.loads(answer.answer)) == set(SCHEMA["properties"]) for answer in objects)
    assert all(answer.answer.isdigit() and answer.answer_tokens == 1 for answer in numbers)
    assert all(answer.failure.type == "ConstraintError" for answer in short)


def test_columns_of_schemas_are_in_types_of_their_own():
    assert constraint_of("json_schema", SCHEMA).parsed_type == pa.struct(
        {"color": pa.string(), "count": pa.int64(), "sure": pa.bool_()}
    )
