"""Numbers that mean nothing and answers that run away are found row by row, and run again in fp32 if it is there."""

import dataclasses
import re

import numpy as np
import pytest
from answers import demo_rows, square
from faults import add_fp32, forget_known_answers, spoil
from reference import letterboxed

from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, VISION
from qvl_batch.conversation import single_turn
from qvl_batch.decoder.answerer import Answerer, EncodedImage, EncodedRow
from qvl_batch.decoder.endings import Endings
from qvl_batch.errors import NumericError
from qvl_batch.vision.encoder import VisionEncoder

ROWS = demo_rows(6)


@pytest.fixture(scope="module")
def encoded_rows(tiny_bundle):
    vision, grid = VisionEncoder(tiny_bundle, threads=2), square(tiny_bundle.manifest.layout)
    images = [EncodedImage(vision.encode(letterboxed(row["image"]["bytes"])), *grid) for row in ROWS]
    return [EncodedRow(single_turn(row["prompt"], 1), (image,)) for row, image in zip(ROWS, images, strict=True)]


def _answer_all(bundle, encoded_rows, max_new_tokens=64, **options):
    answerer = Answerer(bundle, 4, 2, **options)
    answers = answerer.answer(encoded_rows, max_new_tokens)
    answerer.close()
    return answers


@pytest.fixture(scope="module")
def expected(tiny_bundle, encoded_rows):
    answers = _answer_all(tiny_bundle, encoded_rows)
    assert {answer.finish_reason for answer in answers} == {"stop"}
    return answers


def _says_the_same_again(bundle):
    """Make a bundle's decoder answer each token with itself: its layers add nothing to the embedding."""
    for layer in ("attention.out", "mlp.down"):
        for number in range(4):
            spoil(bundle, DECODER, f"decoder.layers.{number}.{layer}", 0)
    forget_known_answers(bundle)  # with them, it would be refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_whose_logits_are_not_finite_fails_alone(value, tiny_bundle, encoded_rows):
    whole = _answer_all(tiny_bundle, encoded_rows)
    (image,) = encoded_rows[2].images
    features = image.features.copy()
    features[100, 5] = value
    broken = dataclasses.replace(encoded_rows[2], images=(dataclasses.replace(image, features=features),))
    found = _answer_all(tiny_bundle, [*encoded_rows[:2], broken, *encoded_rows[3:]])
    failure = found[2].failure
    assert (found[2].finish_reason, failure.stage, failure.type) == ("error", "decode", "NumericError")
    assert failure.message == "logits or hidden states are not finite at answer token 1"
    assert [*found[:2], *found[3:]] == [*whole[:2], *whole[3:]]


def test_rows_that_fail_in_the_decoder_are_run_again_in_fp32(copied_bundle, tiny_bundle, encoded_rows, expected):
    spoil(copied_bundle, DECODER, "decoder.layers.1.mlp.down")
    forget_known_answers(copied_bundle)  # with them, it would be refused
    damaged = _answer_all(Bundle.load(copied_bundle), encoded_rows)
    assert {answer.failure.type for answer in damaged} == {"NumericError"}
    assert _answer_all(add_fp32(copied_bundle, tiny_bundle), encoded_rows) == expected


def test_images_that_fail_in_the_vision_graph_are_encoded_again_in_fp32(copied_bundle, tiny_bundle, encoded_rows):
    spoil(copied_bundle, VISION, "vision.blocks.1.mlp.down")
    forget_known_answers(copied_bundle)  # with them, it would be refused
    image = letterboxed(ROWS[0]["image"]["bytes"])
    with pytest.raises(NumericError, match="the image features are not finite") as failure:
        VisionEncoder(Bundle.load(copied_bundle), threads=2).encode(image)
    assert failure.value.stage == "vision"
    vision = VisionEncoder(add_fp32(copied_bundle, tiny_bundle), threads=2)
    assert np.array_equal(vision.encode(image), encoded_rows[0].images[0].features)


def test_an_image_that_fails_in_fp32_too_has_failed(copied_bundle):
    spoil(copied_bundle, VISION, "vision.blocks.1.mlp.down")
    forget_known_answers(copied_bundle)  # with them, it would be refused
    bundle = add_fp32(copied_bundle, Bundle.load(copied_bundle))
    with pytest.raises(NumericError, match="not finite"):
        VisionEncoder(bundle, threads=2).encode(letterboxed(ROWS[0]["image"]["bytes"]))


def test_features_that_are_all_the_same_mean_nothing(copied_bundle):
    spoil(copied_bundle, VISION, "vision.merger.fc2", value=0.0)
    forget_known_answers(copied_bundle)  # with them, it would be refused
    with pytest.raises(NumericError, match="the image features are all the same"):
        VisionEncoder(Bundle.load(copied_bundle), threads=2).encode(letterboxed(ROWS[0]["image"]["bytes"]))


def test_an_answer_that_runs_away_fails_unless_that_is_allowed(copied_bundle, encoded_rows):
    _says_the_same_again(copied_bundle)
    bundle = Bundle.load(copied_bundle)
    kept = _answer_all(bundle, encoded_rows, 60, allow_repetition=True)
    assert {answer.finish_reason for answer in kept} == {"length"}
    found = _answer_all(bundle, encoded_rows, 60)
    assert {answer.finish_reason for answer in found} == {"error"}
    for answer in found:
        assert (answer.failure.stage, answer.failure.type) == ("decode", "RepetitionError")
        assert answer.failure.message.startswith("the answer was cut off at 60 tokens and ends in ")


def test_an_answer_that_runs_away_is_ended_while_it_does(copied_bundle, encoded_rows):
    _says_the_same_again(copied_bundle)
    found = _answer_all(Bundle.load(copied_bundle), encoded_rows, 300)
    for answer in found:
        assert answer.failure.type == "RepetitionError"
        # Twice as much as an answer that was cut off may repeat, and looked at every 16 tokens.
        said = re.match(r"the answer was ended at (\d+) tokens and ends in \d+ repetitions of ", answer.failure.message)
        assert 64 <= int(said[1]) <= 160


def test_an_answer_that_runs_away_is_run_again_in_fp32(copied_bundle, tiny_bundle, encoded_rows, expected):
    _says_the_same_again(copied_bundle)
    assert _answer_all(add_fp32(copied_bundle, tiny_bundle), encoded_rows, 60) == expected


@pytest.mark.parametrize(
    ("tokens", "phrase", "times"),
    [
        ([*range(50), *[7] * 32], [7], 32),
        ([1, 2, *[3, 4, 5] * 11], [3, 4, 5], 11),
        ([*[1, 2, 3, 4] * 8, 1, 2], [3, 4, 1, 2], 8),
        (list(range(16)) * 4, list(range(16)), 4),
    ],
)
def test_a_phrase_that_comes_again_and_again_at_the_end_is_found(tokens, phrase, times):
    assert Endings(str).repetition(tokens) == (phrase, times)


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        list(range(200)),
        [7] * 31,
        [*[7] * 200, 8],  # it went on to something else
        [*list(range(16)) * 3, *range(15)],  # not four times yet
        list(range(17)) * 10,  # longer than a phrase
    ],
)
def test_what_does_not_end_in_a_phrase_again_and_again_is_left_alone(tokens):
    assert Endings(str).repetition(tokens) is None
