"""Answers that are drawn: by the model's own distribution, and the same whatever runs beside them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from answers import demo_rows, requests_of
from reference import question
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from export.comparison.reference import PyTorch
from qvl_batch import Captioner
from qvl_batch.constraints import constraint_of
from qvl_batch.decoder import draws
from qvl_batch.decoder.answerer import grammars_of
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.draws import UNDECIDED, Draws, draw, draw_from_all
from qvl_batch.decoder.engine import Engine
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import ConfigError, SamplingError
from qvl_batch.sampling import Sampling

HOT = Sampling(temperature=1.5, seed=7)
TOKENS = 24


@pytest.fixture(scope="module")
def questions():
    return demo_rows(8)


@pytest.fixture(scope="module")
def requests(tiny_bundle, questions):
    return requests_of(tiny_bundle, questions, TOKENS)


def _drawn(bundle, requests, samplings, slots, grammars=None):
    """Completions of each request's samples."""
    decoder = Decoder(bundle, slots, threads=2, guided=True, logprobs=True, drawn=True)
    asked = [
        replace(request, draws=Draws(sampling, request.content.tobytes(), sample) if sampling else None)
        for request, sampling in zip(requests, samplings, strict=True)
        for sample in range(sampling.samples if sampling else 1)
    ]
    with Engine(decoder, bundle.manifest.generation.eos_token_ids, grammars=grammars) as engine:
        found = iter([engine.submit(request) for request in asked])
        return [
            [next(found).result(timeout=120) for _ in range(sampling.samples if sampling else 1)]
            for sampling in samplings
        ]


def _tokens(found):
    return [[each.token_ids for each in row] for row in found]


def test_a_drawn_answer_is_the_same_whatever_runs_beside_it(tiny_bundle, requests):
    samplings = [replace(HOT, samples=1 + at % 4) if at % 3 else None for at in range(len(requests))]
    together = _tokens(_drawn(tiny_bundle, requests, samplings, slots=6))
    assert _tokens(_drawn(tiny_bundle, requests, samplings, slots=4)) == together
    backwards = _drawn(tiny_bundle, requests[::-1], samplings[::-1], slots=5)
    assert _tokens(backwards)[::-1] == together
    alone = [_drawn(tiny_bundle, [request], [each], slots=1) for request, each in zip(requests, samplings, strict=True)]
    assert [tokens for (tokens,) in map(_tokens, alone)] == together
    # They are drawn: samples of a row differ, and so do seeds.
    assert any(len({tuple(each) for each in row}) > 1 for row in together)
    other = [each and replace(each, seed=8) for each in samplings]
    assert _tokens(_drawn(tiny_bundle, requests, other, slots=6)) != together


def test_more_samples_do_not_change_the_first_ones(tiny_bundle, requests):
    few, many = (
        _tokens(_drawn(tiny_bundle, requests[:3], [replace(HOT, samples=count)] * 3, slots=4)) for count in (2, 9)
    )
    assert [row[:2] for row in many] == few


def test_samples_of_a_row_share_its_prefill(tiny_bundle, requests, monkeypatch):
    calls = []
    for name in ("prefill", "prefill_part"):
        plain = getattr(Decoder, name)
        monkeypatch.setattr(
            Decoder,
            name,
            lambda self, *args, name=name, plain=plain: calls.append((name, args[1])) or plain(self, *args),
        )
    _drawn(tiny_bundle, requests, [replace(HOT, samples=4)] * len(requests), slots=8)
    prefilled = [row for name, rows in calls if name == "prefill" and isinstance(rows, list) for row in rows]
    for request in requests:
        assert sum(row is request.row for row in prefilled) == 1
    assert "prefill_part" not in [name for name, _ in calls]


def test_at_a_low_temperature_answers_are_the_most_probable_ones(tiny_bundle, requests):
    greedy = _tokens(_drawn(tiny_bundle, requests, [None] * len(requests), slots=4))
    cold = [Sampling(temperature=1e-3)] * len(requests)
    assert _tokens(_drawn(tiny_bundle, requests, cold, slots=4)) == greedy
    one = [Sampling(temperature=5.0, top_k=1)] * len(requests)
    assert _tokens(_drawn(tiny_bundle, requests, one, slots=4)) == greedy


def test_probabilities_of_drawn_tokens_are_those_of_the_model(tiny_bundle, tiny_checkpoint, questions, requests):
    pytorch = PyTorch(tiny_checkpoint)
    found = _drawn(tiny_bundle, requests[:3], [replace(HOT, samples=2)] * 3, slots=4)
    for row, request, answers in zip(questions, requests, found, strict=False):
        ids = pytorch.input_ids(question(row))
        assert ids == list(request.row.input_ids)
        for answer in answers:
            with torch.inference_mode():
                whole = pytorch.inputs([question(row)], [[*ids, *answer.token_ids]])
                logits = pytorch.model(**whole).logits[0, len(ids) - 1 :].double()
            expected = torch.log_softmax(logits, -1)[range(len(answer.token_ids)), answer.token_ids]
            assert answer.logprobs[: len(answer.token_ids)] == pytest.approx(expected.tolist(), abs=1e-4)


def _expected(scores, sampling):
    """Probabilities of the tokens, (V,), by transformers' own processors."""
    scores = torch.tensor(scores)[None]
    warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize(
    ("spread", "sampling"),
    [
        (4.0, Sampling(temperature=1.0)),  # the candidates have most of the mass, but not all
        (1.0, Sampling(temperature=2.0)),  # they have little of it
        (1.0, Sampling(temperature=0.7, top_p=0.9)),  # they have less than `top_p`
        (4.0, Sampling(temperature=0.7, top_p=0.9)),
        (1.0, Sampling(temperature=2.5, top_k=200)),
        (4.0, Sampling(temperature=1.3, top_k=20, top_p=0.8)),
        (4.0, Sampling(temperature=1.0, min_p=0.02)),
        (1.0, Sampling(temperature=1.8, top_k=100, top_p=0.95, min_p=0.01)),
    ],
    ids=str,
)
def test_what_is_drawn_has_the_distribution_of_transformers(spread, sampling, monkeypatch):
    # Few enough that most tokens are drawn, and more than are sorted or summed at a time.
    count, vocabulary, top = 20_000, 1_500, 64
    monkeypatch.setattr(draws, "SORTED", 300)
    scores = np.random.default_rng(1).normal(scale=spread, size=vocabulary).astype(np.float32)
    order = np.argsort(-scores)[:top]
    total = np.log(np.exp(scores.astype(np.float64) / sampling.temperature).sum())
    uniforms = Draws(sampling, b"a row").uniforms(count)
    drawn = draw(np.tile(scores[order], (count, 1)), np.full(count, total), [sampling] * count, uniforms)
    tokens = np.where(drawn == UNDECIDED, UNDECIDED, order[drawn])
    for at in np.flatnonzero(drawn == UNDECIDED):
        tokens[at] = draw_from_all(scores, sampling, uniforms[at], scores[order[-1]])
    # What the candidates decide is what all scores decide.
    for at in range(200):
        assert tokens[at] == draw_from_all(scores, sampling, uniforms[at], scores[order[-1]])
    expected = _expected(scores, sampling)
    seen = np.bincount(tokens, minlength=vocabulary)
    assert not seen[expected == 0].any()
    # Pearson's chi-square, tokens that are expected fewer than five times taken together.
    often = expected * count >= 5
    bins = [*zip(seen[often], expected[often] * count, strict=True)]
    rare = (seen[~often].sum(), expected[~often].sum() * count)
    bins += [rare] if rare[1] > 0 else []
    square = sum((found - wanted) ** 2 / wanted for found, wanted in bins)
    freedom = len(bins) - 1
    # Wilson and Hilferty: the cube root is nearly normal. Five standard deviations.
    if freedom:
        assert ((square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)) < 5


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("left", [{}, {"top_p": 0.999}, {"top_k": 2_000}], ids=str)
def test_a_token_that_is_not_allowed_is_never_drawn(uniform, left):
    scores = np.random.default_rng(2).normal(size=5_000).astype(np.float32)
    scores[1::2] = -np.inf
    scores[-2::-2][:500] = -1_000  # allowed, and of no probability in float32
    for least in (-math.inf, 2.0):
        token = draw_from_all(scores, Sampling(temperature=1.0, **left), uniform, least)
        assert token % 2 == 0
        assert token < 4_000


def test_answers_of_a_model_have_the_distribution_of_its_first_token(tiny_bundle, tiny_checkpoint, questions, requests):
    sampling = Sampling(temperature=2.0, samples=400)
    (answers,) = _drawn(tiny_bundle, [replace(requests[1], max_new_tokens=1)], [sampling], slots=50)
    eos = tiny_bundle.manifest.generation.eos_token_ids
    first = [each.token_ids[0] if each.token_ids else eos[0] for each in answers]
    pytorch = PyTorch(tiny_checkpoint)
    row = question(questions[1])
    with torch.inference_mode():
        logits = pytorch.model(**pytorch.inputs([row], [pytorch.input_ids(row)])).logits[0, -1].numpy()
    expected = _expected(logits, sampling)
    for token in np.argsort(-expected)[:5]:
        share, wanted = first.count(token) / 400, expected[token]
        assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 400) + 1e-9


def test_random_numbers_are_those_of_row_sample_and_seed_alone():
    numbers = Draws(HOT, b"row", 3).uniforms(100)
    assert np.array_equal(Draws(replace(HOT, temperature=0.1), b"row", 3).uniforms(10), numbers[:10])
    others = [Draws(HOT, b"row", 2), Draws(HOT, b"other", 3), Draws(replace(HOT, seed=8), b"row", 3)]
    for other in others:
        assert not np.intersect1d(other.uniforms(100), numbers).size
    assert 0 <= numbers.min() < 0.1
    assert 0.9 < numbers.max() < 1
    # Pinned: answers must be the same on every machine and in every version.
    assert numbers[:2].tolist() == [0.16357103187039945, 0.4954359560305942]


def test_drawn_answers_are_what_they_must_be(tiny_bundle, questions):
    images, prompts = [row["image"]["bytes"] for row in questions], [row["prompt"] for row in questions]
    hot = {"temperature": 3.0, "samples": 6}
    choices = ["red", "a red circle", "yes", "no", "not sure"]
    with Captioner(tiny_bundle.path, slots=5) as captioner:
        free = captioner.caption(images[:3], prompts[:3], choices=choices, sampling=hot)
    with Captioner(tiny_bundle.path, slots=3, confidence=True) as captioner:
        scored = captioner.caption(images[:3], prompts[:3], choices=choices, sampling=hot)
    for one, other in zip(free, scored, strict=True):
        assert len(one.samples) == 6
        assert {each.answer for each in one.samples} <= set(choices)
        # Walking the tree of choices draws as the decoder draws token by token.
        assert [each.answer for each in one.samples] == [each.answer for each in other.samples]
        assert other.answer == other.samples[0].answer
        assert sum(other.choice_probabilities.values()) == pytest.approx(1)
    assert len({each.answer for answer in free for each in answer.samples}) > 2


def test_masks_and_draws_meet_in_one_batch(tiny_bundle, requests):
    grammars = grammars_of(tiny_bundle, RowLayout(tiny_bundle), threads=2)
    digits = grammars.compile(constraint_of("regex", "[0-9]{3}"))
    asked = [replace(request, grammar=digits if at % 2 else None) for at, request in enumerate(requests)]
    samplings = [replace(HOT, samples=2) if at % 3 else None for at in range(len(asked))]
    found = _drawn(tiny_bundle, asked, samplings, slots=5, grammars=grammars)
    layout = RowLayout(tiny_bundle)
    for at, row in enumerate(found):
        for each in row:
            if at % 2:
                assert layout.text(each.token_ids).isdigit()


def test_an_answer_is_cut_before_the_first_stop_text(tiny_bundle, questions):
    images, prompts = [row["image"]["bytes"] for row in questions], ["Describe the image."] * len(questions)
    with Captioner(tiny_bundle.path, slots=4) as captioner:
        whole = captioner.caption(images, prompts)
    # Texts that begin and end inside tokens, one that is never said, and one that is all of an answer.
    stops = [whole[0].answer[2:7], "never said", whole[1].answer[-3:], whole[2].answer]
    for keep in (False, True):
        with Captioner(tiny_bundle.path, slots=4, stop=stops, include_stop=keep) as captioner:
            found = captioner.caption(images, prompts)
        for before, after in zip(whole, found, strict=True):
            ends = [(at, len(stop)) for stop in stops if (at := before.answer.find(stop)) >= 0]
            at, length = min(ends, default=(len(before.answer), 0))
            assert after.answer == before.answer[: at + length * keep]
            assert after.finish_reason == "stop"
            assert after.answer_tokens <= before.answer_tokens
    assert any(after.answer_tokens < before.answer_tokens for before, after in zip(whole, found, strict=True))


def test_an_answer_cannot_end_before_its_shortest_length(tiny_bundle, tiny_checkpoint, questions):
    images, prompts = [row["image"]["bytes"] for row in questions], [row["prompt"] for row in questions]
    with Captioner(tiny_bundle.path, slots=3, min_new_tokens=12, allow_repetition=True) as captioner:
        found = captioner.caption(images, prompts, max_new_tokens=14)
    pytorch = PyTorch(tiny_checkpoint)
    for row, answer in zip(questions, found, strict=True):
        asked = question(row)
        ids = pytorch.input_ids(asked)
        with torch.inference_mode():
            whole = pytorch.model.generate(
                **pytorch.inputs([asked], [ids]), min_new_tokens=12, max_new_tokens=14, do_sample=False
            )
        assert answer.answer_tokens >= 12
        assert answer.answer == pytorch.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "temperature must be a number from 0 on, not -1"),
        ({"temperature": math.nan}, "temperature must be a number from 0 on, not nan"),
        ({"temperature": math.inf}, "temperature must be a number from 0 on, not inf"),
        ({"temperature": "warm"}, "temperature must be a number, not 'warm'"),
        ({"temperature": True}, "temperature must be a number, not True"),
        ({"temperature": 1, "top_k": 0}, "top_k must be at least 1, not 0"),
        ({"temperature": 1, "top_k": 2.5}, "top_k must be a whole number, not 2.5"),
        ({"temperature": 1, "top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
        ({"temperature": 1, "top_p": 1.01}, "top_p must be a number above 0 and at most 1, not 1.01"),
        ({"temperature": 1, "min_p": -0.1}, "min_p must be a number from 0 to 1, not -0.1"),
        ({"temperature": 1, "samples": 0}, "samples must be from 1 to 1,000, not 0"),
        ({"temperature": 1, "seed": -1}, "seed must be from 0 to"),
        ({"temprature": 1}, "'temprature' is none of min_p, samples, seed, temperature, top_k, top_p"),
        ("[1]", "the values are \\[1\\]; they must be names and values"),
        ("{", "the values are not JSON"),
    ],
)
def test_values_that_cannot_be_used_are_named(values, message):
    with pytest.raises(SamplingError, match=message):
        Sampling().with_values(values)


def test_a_captioner_says_what_cannot_be_used(tiny_bundle):
    for options, message in (
        ({"stop": ""}, "stop must be a list of texts that are not empty"),
        ({"stop": ["a", ""]}, "stop must be a list of texts that are not empty"),
        ({"min_new_tokens": 0}, "min_new_tokens must be at least 1, not 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Captioner(tiny_bundle.path, **options)
    with Captioner(tiny_bundle.path, slots=1, stop=["x"]) as captioner:
        with pytest.raises(ConfigError, match="choices: it says where an answer ends; no `stop` or `min_new_tokens`"):
            captioner.caption([], [], choices=["a"])
        with pytest.raises(ConfigError, match="sampling: top_p must be"):
            captioner.caption([], [], sampling={"temperature": 1, "top_p": 7})
        assert captioner.caption([], [], sampling={"temperature": 0}) == []


def test_a_sampling_survives_its_text():
    for sampling in (Sampling(), replace(HOT, top_k=3, top_p=0.5, min_p=0.1, samples=4)):
        assert Sampling.from_json(sampling.to_json()) == sampling
