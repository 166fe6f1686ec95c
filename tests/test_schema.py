"""The columns of an answer, for rows of one image and of any number."""

from dataclasses import asdict, replace

import pyarrow as pa
import pytest

from qvl_batch.grounding import Box, complete
from qvl_batch.schema import ANSWER_FIELDS, BOXES_FIELD, SIZE_NAMES, Answer, Failure, answer_fields

ONE, TWO = (640, 480, 672, 672, 1), (30, 20, 28, 56, 6)
FAILURE = Failure("image", "ImageError", "no image")
NAMES = [
    "answer", "finish_reason", "prompt_tokens", "answer_tokens", "image_width", "image_height", "seen_width",
    "seen_height", "error_stage", "error_type", "error_message",
]  # fmt: skip


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("boxes", [False, True])
def test_sizes_are_numbers_or_lists_and_boxes_come_if_asked_for(lists, boxes):
    schema = pa.schema(answer_fields(lists=lists, boxes=boxes))
    assert schema.names == ([NAMES[0], "boxes", *NAMES[1:]] if boxes else NAMES)
    size = pa.list_(pa.int32()) if lists else pa.int32()
    assert {schema.field(name).type for name in SIZE_NAMES} == {size}
    assert [field.name for field in schema if field.type == size] == (
        list(SIZE_NAMES) if lists else ["prompt_tokens", "answer_tokens", *SIZE_NAMES]
    )
    assert answer_fields(lists=False, boxes=False) == ANSWER_FIELDS


@pytest.mark.parametrize(
    ("answer", "lists", "sizes"),
    [
        (Answer("yes", "stop", 9, 2, image_sizes=(ONE,)), False, [640, 480, 672, 672]),
        (Answer("yes", "stop", 9, 2, image_sizes=(ONE,)), True, [[640], [480], [672], [672]]),
        (Answer("yes", "length", 9, 2, image_sizes=(ONE, TWO)), True, [[640, 30], [480, 20], [672, 28], [672, 56]]),
        (Answer("yes", "stop", 9, 2), True, [[], [], [], []]),
        (Answer.failed(FAILURE), False, [None] * 4),
        (Answer.failed(FAILURE), True, [None] * 4),
        (Answer(None, "error", failure=FAILURE, image_sizes=(ONE,)), False, [640, 480, 672, 672]),
        (
            Answer(None, "error", failure=FAILURE, image_sizes=(TWO, ONE)),
            True,
            [[30, 640], [20, 480], [28, 672], [56, 672]],
        ),
    ],
)
def test_the_record_of_an_answer_fits_its_fields(answer, lists, sizes):
    record = answer.record(lists=lists)
    assert list(record) == NAMES
    assert [record[name] for name in SIZE_NAMES] == sizes
    assert record["finish_reason"] == answer.finish_reason
    assert record["error_message"] == ("no image" if answer.failure else None)
    table = pa.Table.from_pylist([record], pa.schema(answer_fields(lists=lists)))
    assert table.to_pylist() == [record]


@pytest.mark.parametrize(
    ("answer", "least", "reason"),
    [
        (Answer("yes", "stop", 9, 2, logprobs=(-0.5, -0.5)), 0.4, "abstain"),
        (Answer("yes", "stop", 9, 2, logprobs=(-0.5, -0.5)), 0.3, "stop"),
        (Answer("yes", "stop", 9, 2, logprobs=(0.0,)), 1.0, "stop"),
        (Answer("yes", "stop", 9, 2, logprobs=(-0.5, -0.5)), None, "stop"),
        (Answer("yes", "length", 9, 2, logprobs=(-9.0,)), 0.9, "length"),
        (Answer("yes", "stop", 9, 2), 0.9, "stop"),
        (Answer.failed(FAILURE), 0.9, "error"),
    ],
)
def test_a_whole_answer_of_too_little_confidence_abstains_and_keeps_all_else(answer, least, reason):
    held = answer.held_to(least)
    assert held == replace(answer, finish_reason=reason)
    assert complete(held) == (answer.answer if answer.finish_reason == "stop" else None)


def test_boxes_fit_their_column():
    found = [[Box(0, "cat", 0.5, 1.0, 2.0, 3.25), Box(None, None, None, None, None, None)], [], None]
    column = pa.array([None if each is None else [asdict(box) for box in each] for each in found], BOXES_FIELD.type)
    assert [each and [Box(**box) for box in each] for each in column.to_pylist()] == found
