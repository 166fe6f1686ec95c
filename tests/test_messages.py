"""Whatever a row may be, it is read as the conversation and the images that it is, or fails alone and says why."""

import base64
import json
import logging
import random
import time
from contextlib import suppress
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz import forget_peak, peak_memory
from reading import caption_config, images_of, read_rows

from qvl_batch.columns import FAILURE, IMAGES, MESSAGES
from qvl_batch.conversation import Message, from_json, single_turn, to_json
from qvl_batch.conversation import images_of as indices_of
from qvl_batch.errors import ConfigError, InputError, RecordError
from qvl_batch.input import cells, reader
from qvl_batch.input import messages as messages_module
from qvl_batch.input.messages import MOST_CHARACTERS, MOST_IMAGES, MOST_PARTS, MOST_VALUES, read_messages
from qvl_batch.input.source import open_source
from qvl_batch.input.units import Lost

STAGE, KIND, MESSAGE = FAILURE
A, B, C = b"image a", b"image b", b"image c"
#: The address of an image that is in it.
DATA = f"data:image/png;base64,{base64.b64encode(A).decode()}"


def _user(content, *more):
    """A message of the user: its content, or several parts."""
    return {"role": "user", "content": [content, *more] if more else content}


def _text(text):
    return {"type": "text", "text": text}


def _human(value):
    return {"from": "human", "value": value}


IMAGE = {"type": "image"}
GPT = {"from": "gpt", "value": "a\n<image>"}

#: Messages, values of the image column, the conversation, and the values of its images.
GOOD = {
    "text": ([_user("Hello.")], [], [("user", "Hello.")], []),
    "text as a part": ([_user([_text("Hello.")])], [], [("user", ("Hello.",))], []),
    "parts that are strings": ([_user(["a", "b"])], [], [("user", ("a", "b"))], []),
    "turns": (
        [{"role": "system", "content": "S"}, _user("a"), {"role": "assistant", "content": "b"}, _user("c")],
        [],
        [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")],
        [],
    ),
    "two turns of the user": ([_user("a"), _user("b")], [], [("user", "a"), ("user", "b")], []),
    "a first turn of the assistant": (
        [{"role": "assistant", "content": "Hi."}, _user("a")],
        [],
        [("assistant", "Hi."), ("user", "a")],
        [],
    ),
    "no parts": ([_user([])], [], [("user", ())], []),
    "an image of its own": (
        [_user({"type": "image", "image": A}, _text("What?"))],
        [],
        [("user", (0, "What?"))],
        [A],
    ),
    "images of their own beside a column that is not needed": (
        [_user([{"type": "image", "image": A}])],
        [B],
        [("user", (0,))],
        [A],
    ),
    "images of their own and of the column": (
        [_user(IMAGE, {"type": "image", "image": A}, IMAGE)],
        [B, C],
        [("user", (0, 1, 2))],
        [B, A, C],
    ),
    "OpenAI's address": (
        [_user(_text("What?"), {"type": "image_url", "image_url": {"url": "https://host/a", "detail": "low"}})],
        [],
        [("user", ("What?", 0))],
        ["https://host/a"],
    ),
    "an address without a record": (
        [_user([{"type": "image_url", "image_url": "a.png"}])],
        [],
        [("user", (0,))],
        ["a.png"],
    ),
    "transformers' keys": (
        [
            _user(
                {"type": "image", "url": "u"},
                {"type": "image", "path": "p"},
                {"type": "image", "path": "p", "bytes": A},
            )
        ],
        [],
        [("user", (0, 1, 2))],
        ["u", "p", A],
    ),
    "the next images": (
        [_user(IMAGE, IMAGE), _user(IMAGE, _text("x"))],
        [A, B, C],
        [("user", (0, 1)), ("user", (2, "x"))],
        [A, B, C],
    ),
    "images by index": (
        [_user({"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "image", "index": 1})],
        [A, B],
        [("user", (0, 1, 2))],
        [B, A, B],
    ),
    "without types": ([_user({"image": A}, {"text": "x"}, {"index": 0})], [B], [("user", (0, "x", 1))], [A, B]),
    "nulls are absent": (
        [
            {
                "role": "user",
                "from": None,
                "value": None,
                "content": [
                    {"type": "text", "text": "x", "image": None, "index": None},
                    {"type": "image", "text": None, "image": None, "image_url": None, "index": 0},
                    {"type": "image", "text": None, "image": {"bytes": None, "path": None}},
                    {"type": None, "text": None, "image": {"bytes": A, "path": None}},
                ],
            }
        ],
        [B],
        [("user", ("x", 0, 1, 2))],
        [B, B, {"bytes": A}],  # by index, the next, its own
    ),
    "an image in another's turn": (
        [{"role": "system", "content": [IMAGE]}, {"role": "assistant", "content": [_text("Here."), IMAGE]}, _user("x")],
        [A, B],
        [("system", (0,)), ("assistant", ("Here.", 1)), ("user", "x")],
        [A, B],
    ),
    "an address in a map": (
        [_user([{"type": "image_url", "image_url": [("url", "u"), ("detail", None)]}, {"image": [("path", "p")]}])],
        [],
        [("user", (0, 1))],
        ["u", {"path": "p"}],
    ),
    "a map without an image": ([_user([{"type": "image", "image": []}])], [A], [("user", (0,))], [A]),
    "pairs of a map": ([[("role", "user"), ("content", "x")]], [], [("user", "x")], []),
    "LLaVA's": (
        [_human("Hello."), GPT, _human("More.")],
        [],
        [("user", "Hello."), ("assistant", "a\n<image>"), ("user", "More.")],
        [],
    ),
    "a mark at the start": ([_human("<image>\nWhat?")], [A], [("user", (0, "What?"))], [A]),
    "a mark at the end": ([_human("What?\n<image>")], [A], [("user", ("What?", 0))], [A]),
    "a mark in the middle": ([_human("Look\n<image>\nat it.")], [A], [("user", ("Look", 0, "at it."))], [A]),
    "marks in a line": ([_human("Is <image> like <image>?")], [A, B], [("user", ("Is ", 0, " like ", 1, "?"))], [A, B]),
    "two marks": ([_human("<image>\n<image>\nWhat?")], [A, B], [("user", (0, 1, "What?"))], [A, B]),
    "two marks side by side": ([_human("<image><image>What?")], [A, B], [("user", (0, 1, "What?"))], [A, B]),
    "only one line break": ([_human("\n\n<image>\n\nWhat?\n")], [A], [("user", ("\n", 0, "\nWhat?\n"))], [A]),
    "three line breaks between": ([_human("<image>\n\n\n<image>")], [A, B], [("user", (0, "\n", 1))], [A, B]),
    "line breaks of Windows": ([_human("a\r\n<image>\r\nb")], [A], [("user", ("a", 0, "b"))], [A]),
    "only a mark": ([_human("<image>\n")], [A], [("user", (0,))], [A]),
    "marks of several turns": (
        [_human("<image>\na"), GPT, _human("b <image>")],
        [A, B],
        [("user", (0, "a")), ("assistant", "a\n<image>"), ("user", ("b ", 1))],
        [A, B],
    ),
    "marks in content": ([_user("<image>Describe it.")], [A], [("user", (0, "Describe it."))], [A]),
    "no mark": (
        [_user("<image >, <img>, <IMAGE>, < image>")],
        [],
        [("user", "<image >, <img>, <IMAGE>, < image>")],
        [],
    ),
    "marks in parts are text": ([_user(_text("<image>\n"), IMAGE)], [A], [("user", ("<image>\n", 0))], [A]),
    "marks of others are text": (
        [{"from": "system", "value": "<image> is a tag."}, _human("<image>")],
        [A],
        [("system", "<image> is a tag."), ("user", (0,))],
        [A],
    ),
}


def _conversation(pairs):
    return tuple(Message(role, content) for role, content in pairs)


@pytest.mark.parametrize("name", GOOD)
def test_messages_are_read_as_what_they_are(name):
    messages, column, conversation, images = GOOD[name]
    asked = read_messages(messages, column)
    assert asked.conversation == _conversation(conversation)
    assert list(asked.images) == images
    assert list(indices_of(asked.conversation)) == list(range(len(images)))
    assert asked.expected is None
    assert from_json(to_json(asked.conversation)) == asked.conversation
    with suppress(TypeError):  # of bytes
        text = json.dumps(messages)
        if json.loads(text) == messages:  # not of pairs
            assert read_messages(text, column) == asked


def _role(role, content="x"):
    return {"role": role, "content": content}


#: Messages, values of the image column, and what is wrong.
BAD = {
    "null": (None, [], "the messages are null"),
    "nothing": ([], [], "there are no messages"),
    "nothing in JSON": ("[]", [], "there are no messages"),
    "a number": (7, [], "the messages are of type int, not a list"),
    "a record": (_user("x"), [], "the messages are of type dict, not a list"),
    "null in JSON": ("null", [], "the messages are of type NoneType, not a list"),
    "a record in JSON": ('{"role": "user"}', [], "the messages are of type dict, not a list"),
    "no JSON": ("Hello.", [], r"the messages are not valid JSON: Expecting value: line 1 column 1 \(char 0\)"),
    "empty": ("", [], "the messages are not valid JSON: Expecting value"),
    "JSON of Python": ("[{'role': 'user'}]", [], "the messages are not valid JSON: Expecting property name"),
    "JSON cut off": ('[{"role": "user", "content": "x', [], "the messages are not valid JSON: Unterminated string"),
    "a long number": ("[" + "9" * 5000 + "]", [], "the messages are not valid JSON: Exceeds the limit"),
    "deep": ("[" * 100_000 + "]" * 100_000, [], "the messages are not valid JSON: nested too deeply"),
    "a key that occurs twice": (
        '[{"role": "user", "content": "x", "content": "y"}]',
        [],
        "the messages are not valid JSON: the key 'content' occurs twice in one object",
    ),
    "a key of a map that occurs twice": (
        [[("role", "user"), ("content", "x"), ("content", "x")]],
        [],
        "message 1: the key 'content' occurs twice in one object",
    ),
    "a map without names": ([[({"a": 1}, "user")]], [], "message 1 is of type list, not a record"),
    "deep records": ('{"a":' * 100_000 + "0" + "}" * 100_000, [], "the messages are not valid JSON: nested too deeply"),
    "a message that is null": ([None], [], "message 1 is missing, not a record"),
    "a message that is text": ([_user("x"), "Hello."], [], "message 2 is 'Hello.', not a record"),
    "a message that is long text": (["x" * 10**6], [], rf"message 1 is '{'x' * 79}…, not a record"),
    "a message that is a list": ([["role", "user"]], [], "message 1 is of type list, not a record"),
    "no role": (
        [{"content": "x"}],
        [],
        "message 1: its role is missing; known are system, user, assistant, human, gpt",
    ),
    "nulls everywhere": ([{"role": None, "content": None}], [], "message 1: its role is missing"),
    "another role": ([_role("tool")], [], "message 1: its role is 'tool'; known are system"),
    "a role in capitals": ([_role("User")], [], "message 1: its role is 'User'"),
    "a role that is no text": ([_role(1)], [], "message 1: its role is 1;"),
    "a role that is a list": ([_role(["user"])], [], "message 1: its role is of type list"),
    "a role that is no Unicode": ([_role("\ud800")], [], r"message 1: its role is '\\ud800'"),
    "no content": ([{"role": "user"}], [], r"message 1 \(user\) has no content"),
    "no value": ([_human(None)], [], r"message 1 \(human\) has no content"),
    "content that is a number": ([_user(7)], [], "message 1: its content is 7, not text or a list of parts"),
    "content that is a record": ([_user(_text("x"))], [], "message 1: its content is of type dict, not text or a list"),
    "content that is bytes": ([_user(b"x")], [], "message 1: its content is of type bytes"),
    "text that is no Unicode": ([_user("x\udc80")], [], "message 1: its text is not valid Unicode: 'utf-8' codec"),
    "JSON text that is no Unicode": (
        r'[{"role": "user", "content": "\ud83d"}]',
        [],
        "message 1: its text is not valid U",
    ),
    "a part that is no Unicode": ([_user([_text("\ud800")])], [], "message 1, part 1: its text is not valid Unicode"),
    "a part that is null": ([_user(["a", None])], [], "message 1, part 2 is missing, not a record"),
    "a part that is a number": ([_user([1.5])], [], "message 1, part 1 is 1.5, not a record"),
    "a part without text": ([_user([{"type": "text"}])], [], "message 1, part 1: its text is missing"),
    "a part whose text is a number": ([_user([_text(12)])], [], "message 1, part 1: its text is 12"),
    "a part whose text is a list": ([_user([_text(["x"])])], [], "message 1, part 1: its text is of type list"),
    "a part of nulls": (
        [_user([{"type": None, "text": None}])],
        [A],
        "message 1, part 1: its type is missing; known are",
    ),
    "text and an image": (
        [_user([{"text": "x", "image": A}])],
        [],
        "message 1, part 1 has both text and an image, and no type: make it two parts",
    ),
    "text and an index": ([_user(["x", {"text": "x", "index": 0}])], [A], "message 1, part 2 has both text and an im"),
    "a video": (
        [_user([{"type": "video", "video": "v"}])],
        [],
        "message 1, part 1: its type is 'video'; known are text, image and image_url",
    ),
    "a type that is a record": ([_user([{"type": {}}])], [], "message 1, part 1: its type is of type dict"),
    "no address": ([_user([{"type": "image_url"}])], [], "message 1, part 1 has no image_url"),
    "an address without any": (
        [_user([{"type": "image_url", "image_url": {"url": None}}])],
        [],
        "message 1, part 1 has no image_url",
    ),
    "too many marks": (
        [_human("<image><image>")],
        [A],
        r"the messages show 2 images of the image column \(--image-column\), which has 1",
    ),
    "a mark without an image": (
        [_human("<image>\nx")],
        [],
        r"the messages show 1 images of the image column \(--image-column\), which has 0",
    ),
    "too many parts": (
        [_user(IMAGE, IMAGE, IMAGE)],
        [A, B],
        r"the messages show 3 images of the image column \(--image-column\), which has 2",
    ),
    "an image that is left over": (
        [_human("<image>")],
        [A, B],
        "the messages show 1 of the 2 images of the image column: put",
    ),
    "all images left over": (
        [_user("x")],
        [A],
        "the messages show 0 of the 1 images of the image column: put <image> into",
    ),
    "one shown twice and one not": (
        [_user([{"type": "image", "index": 1}] * 2)],
        [A, B],
        "the messages show 1 of the 2 im",
    ),
    "an index that is none": (
        [_user([{"type": "image", "index": 2}])],
        [A, B],
        "message 1, part 1: its index is 2; the image column has 2 images, from 0 on",
    ),
    "a negative index": ([_user([{"type": "image", "index": -1}])], [A], "message 1, part 1: its index is -1"),
    "an index that is no number": (
        [_user([{"type": "image", "index": "0"}])],
        [A],
        "message 1, part 1: its index is '0'",
    ),
    "an index that is true": (
        [_user([{"type": "image", "index": True}])],
        [A, B],
        "message 1, part 1: its index is True",
    ),
    "a system message in between": (
        [_user("x"), _role("system"), _user("y")],
        [],
        "a system message must be the first",
    ),
    "two system messages": ([_role("system"), _role("system"), _user("y")], [], "a system message must be the first"),
    "only a system message": (
        [_role("system")],
        [],
        "the messages end with a system message: there is nothing to answer",
    ),
    "an answer at the end": (
        [_user("x"), _role("assistant")],
        [],
        "the messages end with an assistant's turn: give --answer-last-turn-again to answer them without it",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_are_no_messages_fails_and_says_where(name):
    messages, column, wrong = BAD[name]
    with pytest.raises(RecordError, match=f"^{wrong}") as error:
        read_messages(messages, column)
    assert len(str(error.value)) < 300
    str(error.value).encode()


@pytest.mark.parametrize(
    ("messages", "asked", "expected"),
    [
        ([_user("x"), _role("assistant", "y")], [("user", "x")], "y"),
        ([_human("x"), {"from": "gpt", "value": "<image>\n"}], [("user", "x")], "<image>\n"),
        ([_user("x"), _role("assistant", [_text("y"), "z"])], [("user", "x")], "yz"),
        ([_user("x"), _role("assistant", "")], [("user", "x")], ""),
        ([_user("x"), _role("assistant", "y"), _user("z")], [("user", "x"), ("assistant", "y"), ("user", "z")], None),
    ],
)
def test_an_answer_at_the_end_is_cut_off_if_asked_for(messages, asked, expected):
    found = read_messages(messages, [], answer_last_turn_again=True)
    assert (found.conversation, found.expected) == (_conversation(asked), expected)


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([_role("assistant")], "without the assistant's turn at the end, the messages do not end with a user's"),
        (
            [_role("system"), _role("assistant")],
            "without the assistant's turn at the end, the messages do not end with",
        ),
        ([_user("x"), _role("assistant"), _role("assistant")], "without the assistant's turn at the end"),
        ([_user("x"), _role("assistant", [IMAGE])], "the assistant's turn at the end has an image"),
    ],
)
def test_an_answer_that_is_not_one_to_a_question_is_not_cut_off(messages, wrong):
    with pytest.raises(RecordError, match=f"^{wrong}"):
        read_messages(messages, [A] if "image" in wrong else [], answer_last_turn_again=True)


# Rows of parquet files.


def _rows(tmp_path, table, name="a", **options):
    """All rows that a job would read of a table, and perhaps of files that are there already."""
    pq.write_table(table, tmp_path / f"{name}.parquet")
    config = caption_config(tmp_path, **options)
    return read_rows(open_source(config), config.prompt, allowed=config.allow_images_from)


def _table(**columns):
    count = len(next(iter(columns.values())))
    return pa.table({"id": range(count)} | columns)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
#: As `datasets` writes a list of images.
HUGGING_FACE = [[{"bytes": A, "path": "a.png"}, {"bytes": B, "path": None}], [], None, [{"bytes": C, "path": None}]]
LISTS = {
    "images of datasets": (HUGGING_FACE, pa.list_(STRUCT)),
    "bytes": ([[A, B], [], None, [C]], pa.list_(pa.binary())),
    "large list": (HUGGING_FACE, pa.large_list(STRUCT)),
    "large bytes": ([[A, B], [], None, [C]], pa.large_list(pa.large_binary())),
    "list view": ([[A, B], [], None, [C]], pa.list_view(pa.binary_view())),
    "large list view": ([[A, B], [], None, [C]], pa.large_list_view(pa.binary())),
    "paths": ([["a", "sub/b"], [], None, ["c"]], pa.list_(pa.string())),
    "views of paths": ([["a", "sub/b"], [], None, ["c"]], pa.list_(pa.string_view())),
    "dictionary of paths": ([["a", "sub/b"], [], None, ["c"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "bytes or paths": (
        [[{"bytes": None, "path": "a"}, {"bytes": B, "path": "missing"}], [], None, [{"bytes": None, "path": "c"}]],
        pa.list_(STRUCT),
    ),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("rows_per_group", [1, 3, 4])
def test_a_row_may_have_several_images(name, rows_per_group, tmp_path):
    for file, data in (("a", A), ("sub/b", B), ("c", C)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    values, kind = LISTS[name]
    table = _table(image=pa.array(values, kind), prompt=["p", "q", "r", "s"])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_per_group)
    source = open_source(caption_config(tmp_path, allow_images_from=(str(tmp_path),)))
    rows = read_rows(source, allowed=(str(tmp_path),))
    assert rows[IMAGES].to_pylist() == [[A, B], None, None, [C]]
    assert rows[MESSAGE].to_pylist() == [None, "the list of images is empty", "the image is null", None]
    conversations = [None if text is None else from_json(text) for text in rows[MESSAGES].to_pylist()]
    assert (conversations[0], conversations[3]) == (single_turn("p", 2), single_turn("s", 1))
    assert source.columns.has_lists
    assert source.columns.output_schema().field("seen_width").type == pa.list_(pa.int32())


def test_lists_may_have_a_fixed_size(tmp_path):
    image = pa.array([[A, B], None, [B, C]], pa.list_(pa.binary(), 2))
    rows = _rows(tmp_path, _table(image=image, prompt=["x"] * 3))
    assert rows[IMAGES].to_pylist() == [[A, B], None, [B, C]]
    rows = _rows(tmp_path, _table(image=image.slice(1), prompt=["x"] * 2))
    assert rows[IMAGES].to_pylist() == [None, [B, C]]


def test_one_image_of_several_that_is_none_fails_its_row(tmp_path):
    (tmp_path / "a").write_bytes(A)
    paths = pa.array([None, b"\xff", b"a", b"missing"], pa.binary()).view(pa.string())
    items = pa.StructArray.from_arrays([pa.array([A, B, None, None]), paths], names=["bytes", "path"])
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 3, 4]), items)
    image = pa.concat_arrays([lists, pa.array([[{"bytes": A, "path": None}, None]], lists.type)])
    rows = _rows(tmp_path, _table(image=image), prompt="x", allow_images_from=(str(tmp_path),))
    # A path that is no text beside bytes is not looked at.
    assert rows[IMAGES].to_pylist() == [[A, B], [A], None, None]
    assert rows[STAGE].to_pylist() == [None, None, "image", "image"]
    assert rows[MESSAGE][2].as_py().startswith("missing cannot be read: FileNotFoundError")
    assert rows[MESSAGE][3].as_py() == "image 2 of 2: the image is null"
    rows = _rows(tmp_path, _table(image=[["a", "b", "../c"]]), prompt="x", allow_images_from=(str(tmp_path),))
    assert rows[MESSAGE][0].as_py().startswith("image 2 of 3: b cannot be read: FileNotFoundError")


def test_one_image_is_a_row_of_one_image(tmp_path):
    table = _table(
        image=pa.array([{"bytes": A, "path": "a.png"}, {"bytes": B, "path": None}], STRUCT), prompt=["p", "q"]
    )
    rows = _rows(tmp_path, table)
    assert images_of(rows) == [A, B]
    assert list(map(from_json, rows[MESSAGES].to_pylist())) == [single_turn("p", 1), single_turn("q", 1)]
    columns = open_source(caption_config(tmp_path)).columns
    assert not columns.has_lists
    assert columns.output_schema().field("seen_width").type == pa.int32()


PART = pa.struct(
    [
        ("type", pa.string()),
        ("text", pa.string()),
        ("image", STRUCT),
        ("image_url", pa.struct([("url", pa.string())])),
        ("index", pa.int64()),
    ]
)


def _of_parts(part=PART, make=pa.list_):
    return make(pa.struct([("role", pa.string()), ("content", make(part))]))


def _json(text):
    """Parquet's own type for JSON, as DuckDB writes it."""
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array([text]))


#: One row: its messages as a column, its images as a value of the image column, its conversation, its images.
ONE_ROW = {
    "strings": (
        pa.array(
            [[_role("system", "S"), _user("x")]], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        ),
        [],
        [("system", "S"), ("user", "x")],
        [],
    ),
    "large list": (
        pa.array([[_user("x")]], pa.large_list(pa.struct([("role", pa.string()), ("content", pa.large_string())]))),
        [],
        [("user", "x")],
        [],
    ),
    "list view": (
        pa.array([[_user("<image>x")]], pa.list_view(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        [A],
        [("user", (0, "x"))],
        [A],
    ),
    "dictionaries": (
        pa.array(
            [[_user("x")]],
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.dictionary(pa.int8(), pa.string())),
                        ("content", pa.dictionary(pa.int8(), pa.string())),
                    ]
                )
            ),
        ),
        [],
        [("user", "x")],
        [],
    ),
    "more fields than are read": (
        pa.array(
            [[_user("x") | {"name": "Ann", "tokens": [1, 2], "at": 2**61}]],
            pa.list_(
                pa.struct(
                    [
                        ("role", pa.string()),
                        ("content", pa.string()),
                        ("name", pa.string()),
                        ("tokens", pa.list_(pa.int64())),
                        ("at", pa.int64()),
                    ]
                )
            ),
        ),
        [],
        [("user", "x")],
        [],
    ),
    "both forms' fields": (
        pa.array(
            [[_human("<image>\nx") | {"role": None, "content": None}]],
            pa.list_(pa.struct([(name, pa.string()) for name in ("role", "content", "from", "value")])),
        ),
        [A],
        [("user", (0, "x"))],
        [A],
    ),
    "parts": (
        pa.array([[_user({"type": "image", "image": {"bytes": A}}, _text("x"), IMAGE)]], _of_parts()),
        [B],
        [("user", (0, "x", 1))],
        [A, B],
    ),
    "large parts": (
        pa.array([[_user(IMAGE, _text("x"))]], _of_parts(make=pa.large_list)),
        [B],
        [("user", (0, "x"))],
        [B],
    ),
    "parts by index": (
        pa.array([[_user(_text("x"), {"type": "image", "index": 1}, {"type": "image", "index": 0})]], _of_parts()),
        [A, B],
        [("user", ("x", 0, 1))],
        [B, A],
    ),
    "a data: address": (
        pa.array([[_user(_text("x"), {"type": "image_url", "image_url": {"url": DATA}})]], _of_parts()),
        [],
        [("user", ("x", 0))],
        [A],
    ),
    "maps": (
        pa.array([[[("role", "user"), ("content", "<image>\nx")]]], pa.list_(pa.map_(pa.string(), pa.string()))),
        [A],
        [("user", (0, "x"))],
        [A],
    ),
    "parts that are maps": (
        pa.array(
            [[{"role": "user", "content": [[("type", "text"), ("text", "x")], [("type", "image")]]}]],
            _of_parts(pa.map_(pa.string(), pa.string())),
        ),
        [A],
        [("user", ("x", 0))],
        [A],
    ),
    "JSON": (pa.array([json.dumps([_human("<image>\nx")])]), [A], [("user", (0, "x"))], [A]),
    "addresses in maps": (
        pa.array(
            [[_user({"type": "image_url", "image_url": [("url", DATA), ("detail", "low")]}, _text("x"))]],
            _of_parts(
                pa.struct(
                    [("type", pa.string()), ("text", pa.string()), ("image_url", pa.map_(pa.string(), pa.string()))]
                )
            ),
        ),
        [],
        [("user", (0, "x"))],
        [A],
    ),
    "parquet's JSON": (_json(json.dumps([_human("<image>\nx")])), [A], [("user", (0, "x"))], [A]),
    "large JSON": (pa.array([json.dumps([_human("x")])], pa.large_string()), [], [("user", "x")], []),
    "a view of JSON": (pa.array([json.dumps([_human("x")])], pa.string_view()), [], [("user", "x")], []),
    "a dictionary of JSON": (
        pa.array([json.dumps([_human("<image>x")])]).dictionary_encode(),
        [A],
        [("user", (0, "x"))],
        [A],
    ),
    "JSON with images": (
        pa.array(
            [json.dumps([_user({"type": "image_url", "image_url": {"url": DATA}}, {"type": "image", "image": DATA})])]
        ),
        [],
        [("user", (0, 1))],
        [A, A],
    ),
    "JSON with records of images": (
        pa.array([json.dumps([_user({"type": "image", "image": {"path": DATA, "bytes": None}}, "x")])]),
        [],
        [("user", (0, "x"))],
        [A],
    ),
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_messages_of_every_type_are_read_from_files(name, tmp_path):
    column, images, conversation, shown = ONE_ROW[name]
    column = pa.array([*column.to_pylist(), None, *column.to_pylist()], column.type)
    table = _table(messages=column, image=pa.array([images, [], images], pa.list_(pa.binary())))
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(caption_config(tmp_path, messages_column="messages"))
    for rows_per_table in (1, 2, 8):
        rows = read_rows(source, rows_per_table=rows_per_table)
        assert rows[MESSAGE].to_pylist() == [None, "the messages are null", None]
        for row in (0, 2):
            assert from_json(rows[MESSAGES][row].as_py()) == _conversation(conversation)
            assert rows[IMAGES][row].as_py() == shown
        assert (rows[MESSAGES][1].as_py(), rows[IMAGES][1].as_py()) == (None, None)
    assert source.columns.output_schema().field("image_width").type == pa.list_(pa.int32())


@pytest.mark.parametrize("as_json", [False, True])
def test_bad_messages_of_a_file_fail_alone(as_json, tmp_path):
    good = [_user("x")]
    bad = [[_role("tool")], [], [_role(None)], [_role("user", None)], [None], [_role("assistant")]]
    values = [each for messages in bad for each in (messages, good)]
    kind = pa.string() if as_json else pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    column = pa.array([json.dumps(each) if as_json else each for each in values], kind)
    rows = _rows(tmp_path, _table(messages=column), messages_column="messages")
    failed = rows[MESSAGE].to_pylist()
    assert failed[1::2] == [None] * len(bad)
    said = [
        "message 1: its role is 'tool'",
        "there are no",
        "message 1: its role is missing",
        "message 1 (user) has no",
    ]
    said += ["message 1 is missing, not a record", "the messages end with an assistant's"]
    assert [text[: len(start)] for text, start in zip(failed[::2], said, strict=True)] == said
    assert set(rows[KIND].to_pylist()[::2]) == {"RecordError"}
    assert rows[MESSAGES].null_count == rows[IMAGES].null_count == len(bad)
    assert rows[IMAGES].to_pylist()[1::2] == [[]] * len(bad)


def test_messages_that_are_no_text_fail_alone(tmp_path):
    text = pa.array([b"x", b"\xff\xfe", b"y"], pa.binary()).view(pa.string())
    items = pa.StructArray.from_arrays([pa.array(["user"] * 3), text], names=["role", "content"])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), items)
    rows = _rows(tmp_path, _table(messages=lists), messages_column="messages")
    assert [text and from_json(text)[0].content for text in rows[MESSAGES].to_pylist()] == ["x", None, "y"]
    assert rows[MESSAGE][1].as_py().startswith("a string is not valid Unicode text: ")
    text = pa.array([b'[{"from": "human", "value": "x"}]', b"[\xff]"], pa.binary()).view(pa.string())
    rows = _rows(tmp_path, _table(messages=text), messages_column="messages")
    assert rows[KIND].to_pylist() == [None, "RecordError"]


def test_a_value_that_python_has_none_for_fails_alone(tmp_path):
    at = pa.array([0, 2**61], pa.timestamp("ms"))
    items = pa.StructArray.from_arrays(
        [pa.array(["user"] * 2), pa.array(["x", "y"]), at], names=["role", "content", "at"]
    )
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2]), items)
    rows = _rows(tmp_path, _table(messages=lists), messages_column="messages")
    assert rows[KIND].to_pylist() == [None, "RecordError"]
    assert "cannot be read: " in rows[MESSAGE][1].as_py()


def test_images_of_messages_are_read_only_from_where_that_is_allowed(tmp_path):
    for name, data in (("in/a", A), ("out/b", B)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
    places = [
        "in/a",
        f"file://{tmp_path}/in/a",
        "out/b",
        "in/../out/b",
        "https://host/a",
        "s3://bucket/a",
        "",
        "/etc/passwd",
    ]
    messages = [json.dumps([_user([{"type": "image_url", "image_url": {"url": place}}])]) for place in places]
    messages.append(json.dumps([_user({"type": "image", "image": "in/a"}, {"type": "image", "image": "out/b"})]))
    options = {"messages_column": "messages"}
    rows = _rows(tmp_path, _table(messages=messages), allow_images_from=(str(tmp_path / "in"),), **options)
    assert rows[IMAGES].to_pylist() == [[A], [A], *[None] * 7]
    said = rows[MESSAGE].to_pylist()
    assert [text.split(" is ")[-1] for text in said[2:6]] == [
        *["not inside any folder of --allow-images-from"] * 2, *["not inside any address of --allow-images-from"] * 2,
    ]  # fmt: skip
    assert said[6] == "the path of the image is empty"
    assert said[8] == "image 2 of 2: out/b is not inside any folder of --allow-images-from"
    assert rows[STAGE].to_pylist() == [None, None, *["image"] * 7]
    # Of rows whose images fail, it is still known what they ask.
    assert rows[MESSAGES].null_count == 0
    rows = _rows(tmp_path, _table(messages=messages), **options)
    assert rows[IMAGES].to_pylist() == [None] * 9


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (DATA, A),
        (DATA.replace("data:image/png;base64", "DATA:;BASE64"), A),
        (DATA.replace("data:image/png", "data:image"), A),
        (DATA.replace(",", ",\n ") + "\n", A),
        ("data:image/png;base64,", b""),
        ("data:image/png,abc", "a data: address of an image must be in base64"),
        ("data:image/png;base64", "a data: address of an image must be in base64"),
        ("data:image/svg+xml;utf8,<svg/>", "a data: address of an image must be in base64"),
        ("data:image/png;base64,abcde", "a data: address has invalid base64: "),
        (DATA.rstrip("="), A),
        (DATA.replace("+", "%2B").replace("=", "%3D"), A),
        ("data:image/png;base64,a*bc", "a data: address has invalid base64: "),
        ("data:image/png;base64,ü", "a data: address has invalid base64: "),
    ],
)
def test_data_addresses_are_the_image_or_an_error_of_the_row(address, found, tmp_path):
    part = {"type": "image_url", "image_url": {"url": address}}
    options = {"messages_column": "messages", "allow_images_from": (str(tmp_path),)}
    asked = _rows(tmp_path, _table(messages=[json.dumps([_user(part, "x")])], image=[address]), **options)
    prompted = _rows(tmp_path, _table(image=[address]), prompt="x", allow_images_from=(str(tmp_path),))
    for rows in (asked, prompted):
        if isinstance(found, bytes):
            assert images_of(rows) == [found]
        else:
            assert rows[KIND].to_pylist() == ["ImageError"]
            assert rows[MESSAGE][0].as_py().startswith(found)


@pytest.mark.parametrize("value", [5, 1.5, True, [1], {"detail": "low"}, {"url": 5}, [A.decode()]])
def test_an_image_that_is_neither_bytes_nor_a_path_fails_its_row(value, tmp_path):
    messages = [json.dumps([_user({"type": "image", "image": value}, "x")]), json.dumps([_user("x")])]
    rows = _rows(tmp_path, _table(messages=messages), messages_column="messages")
    assert rows[IMAGES].to_pylist() == [None, []]
    assert rows[MESSAGE][0].as_py().startswith("the image is ")


#: Messages that show one image of the column or none, and the values of the image column that they fit.
WITH, WITHOUT = json.dumps([_human("<image>\nx")]), json.dumps([_human("x")])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([A, None], pa.binary()),
        pa.array([{"bytes": A, "path": None}, None], STRUCT),
        pa.array([{"bytes": A, "path": None}, {"bytes": None, "path": None}], STRUCT),
        pa.array([[A], None], pa.list_(pa.binary())),
        pa.array([[A], []], pa.list_(pa.binary())),
        pa.array([[{"bytes": A, "path": None}], []], pa.list_(STRUCT)),
    ],
)
def test_a_null_in_the_image_column_is_no_image_beside_messages(column, tmp_path):
    rows = _rows(tmp_path, _table(messages=[WITH, WITHOUT], image=column), messages_column="messages")
    assert rows[IMAGES].to_pylist() == [[A], []]
    rows = _rows(tmp_path, _table(messages=[WITHOUT, WITH], image=column), messages_column="messages")
    assert rows[IMAGES].to_pylist() == [None, None]
    assert [text.split(":")[0] for text in rows[MESSAGE].to_pylist()] == [
        "the messages show 0 of the 1 images of the image column",
        "the messages show 1 images of the image column (--image-column), which has 0",
    ]


def test_a_null_in_a_list_of_images_is_one_that_cannot_be_read(tmp_path):
    both = json.dumps([_human("<image><image>x")])
    rows = _rows(tmp_path, _table(messages=[both], image=[[A, None]]), messages_column="messages")
    assert rows[MESSAGE].to_pylist() == ["image 2 of 2: the image is null"]


def test_a_row_shows_so_many_images_and_no_more(tmp_path):
    (tmp_path / "a").write_bytes(A)
    counts = [MOST_IMAGES, MOST_IMAGES + 1]
    parts = [json.dumps([_user([{"index": 0}] * count)]) for count in counts]
    rows = _rows(tmp_path, _table(messages=parts, image=[A] * 2), messages_column="messages")
    assert [images and len(images) for images in rows[IMAGES].to_pylist()] == [MOST_IMAGES, None]
    assert rows[MESSAGE].to_pylist() == [None, f"the messages show more than {MOST_IMAGES:,} images"]
    options = {"prompt": "x", "allow_images_from": (str(tmp_path),)}
    rows = _rows(tmp_path, _table(image=[["a"] * count for count in counts]), **options)
    assert rows[IMAGES].to_pylist() == [[A] * MOST_IMAGES, None]
    assert rows[MESSAGE].to_pylist() == [None, f"the list of images has {counts[1]:,}; the limit is {MOST_IMAGES:,}"]


def test_several_images_of_a_row_have_so_many_bytes_and_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MOST_BYTES", 2 * len(A))
    # The same image counts as often as it is shown, since the table holds it as often. One image has no such limit.
    images = [[A, A], [A, A, b"x"], [A * 3], [A, b""]]
    rows = _rows(tmp_path, _table(image=images), prompt="x")
    assert rows[IMAGES].to_pylist() == [images[0], None, *images[2:]]
    assert rows[MESSAGE][1].as_py() == f"the 3 images have {2 * len(A) + 1} bytes; the limit is {2 * len(A)}"
    assert rows[KIND][1].as_py() == "ImageError"


def test_an_image_that_several_rows_show_is_fetched_once(tmp_path, monkeypatch):
    for name, data in (("a", A), ("b", B)):
        (tmp_path / name).write_bytes(data)
    fetched = []
    fetch = reader.Fetcher.fetch_all
    monkeypatch.setattr(
        reader.Fetcher, "fetch_all", lambda self, places, at: fetched.append(list(places)) or fetch(self, places, at)
    )
    options = {"prompt": "x", "allow_images_from": (str(tmp_path),)}
    rows = _rows(tmp_path, _table(image=[["a", "b"], ["missing", "a"], ["b"], ["missing"]]), **options)
    assert fetched == [["a", "b", "missing"]]
    assert rows[IMAGES].to_pylist() == [[A, B], None, [B], None]
    assert [text and text.split(" cannot")[0] for text in rows[MESSAGE].to_pylist()] == [
        *[None, "image 1 of 2: missing"], *[None, "missing"],
    ]  # fmt: skip


def test_a_path_that_is_no_unicode_fails_its_row(tmp_path):
    places = ["\ud800", "a\udcff.png", "https://host/\ud800", "s3://bucket/\ud800", "file:///\ud800"]
    messages = [json.dumps([_user({"type": "image", "image": place}, "x")]) for place in places]
    rows = _rows(tmp_path, _table(messages=[*messages, WITHOUT]), messages_column="messages")
    assert rows[KIND].to_pylist() == [*["ImageError"] * len(places), None]
    for text in rows[MESSAGE].to_pylist()[:-1]:
        assert text.startswith("the path of the image is not valid Unicode: ")


def test_an_empty_name_is_no_way_to_read_prompts_in_place_of_messages(tmp_path):
    pq.write_table(_table(image=[A], prompt=["x"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no single column '' \(--messages-column\)"):
        open_source(caption_config(tmp_path, messages_column=""))


def test_messages_need_no_image_column(tmp_path):
    rows = _rows(tmp_path, _table(messages=[WITHOUT, WITH]), messages_column="messages")
    assert rows[IMAGES].to_pylist() == [[], None]
    assert rows[MESSAGE][1].as_py() == "the messages show 1 images of the image column (--image-column), which has 0"
    source = open_source(caption_config(tmp_path, messages_column="messages"))
    assert source.columns.has_lists
    # Other files may have the column.
    rows = _rows(tmp_path, _table(messages=[WITH], image=[A]), "b", messages_column="messages")
    assert rows[IMAGES].to_pylist() == [[], None, [A]]
    with pytest.raises(InputError, match=r"no single column 'image' \(--image-column\)"):
        open_source(caption_config(tmp_path, prompt="x"))


@pytest.mark.parametrize("lists_first", [False, True])
def test_of_files_with_single_images_and_with_lists_all_are_read(lists_first, tmp_path):
    single, lists = _table(image=[A, None], prompt=["p", "q"]), _table(image=[[B, C], [A]], prompt=["r", "s"])
    pq.write_table(lists if lists_first else single, tmp_path / "0.parquet")
    rows = _rows(tmp_path, single if lists_first else lists, "1")
    found = [[A], None, [B, C], [A]]
    assert rows[IMAGES].to_pylist() == (found[2:] + found[:2] if lists_first else found)
    columns = open_source(caption_config(tmp_path)).columns
    assert columns.has_lists
    assert columns.output_schema().field("seen_height").type == pa.list_(pa.int32())
    # Answers that are there already have sizes of one kind.
    known = open_source(caption_config(tmp_path, tmp_path / "0.parquet")).files
    if lists_first:
        assert open_source(caption_config(tmp_path), known).columns.has_lists
    else:
        with pytest.raises(InputError, match=r"1.parquet has lists of images, .* another --output"):
            open_source(caption_config(tmp_path), known)


def test_every_column_is_read_once(tmp_path):
    table = _table(messages=[WITH], image=[A], prompt=["p"], more=[1])
    pq.write_table(table, tmp_path / "a.parquet")
    options = {"keep_columns": ("messages", "more", "id2", "prompt")}
    with pytest.raises(InputError, match="id2"):
        open_source(caption_config(tmp_path, messages_column="messages", **options))
    pq.write_table(table.append_column("id2", table["id"]), tmp_path / "a.parquet")
    columns = open_source(caption_config(tmp_path, messages_column="messages", id_column="id2", **options)).columns
    assert sorted(columns.names) == ["id2", "image", "messages", "more", "prompt"]
    columns = open_source(caption_config(tmp_path, id_column="prompt", **options)).columns
    assert sorted(columns.names) == ["id2", "image", "messages", "more", "prompt"]
    rows = _rows(
        tmp_path, table.append_column("id2", table["id"]), messages_column="messages", id_column="id2", **options
    )
    assert (rows["messages"].to_pylist(), rows["prompt"].to_pylist(), images_of(rows)) == ([WITH], ["p"], [A])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1]),
        pa.array([b"[]"]),
        pa.array([["x"]]),
        pa.array([_user("x")]),
        pa.array([[[_user("x")]]]),
        pa.array([{"role": ["user"], "content": ["x"]}]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_that_cannot_be_messages_is_refused(column, tmp_path):
    pq.write_table(_table(messages=column), tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"a.parquet: column 'messages' \(--messages-column\) is .*; it must be lists of"
    ):
        open_source(caption_config(tmp_path, messages_column="messages"))


@pytest.mark.parametrize(
    "column", [pa.nulls(1), pa.array([[]]), pa.array([[None]])], ids=lambda column: str(column.type)
)
def test_a_file_whose_messages_are_all_empty_fails_row_by_row(column, tmp_path):
    rows = _rows(tmp_path, _table(messages=column), messages_column="messages")
    assert rows[KIND].to_pylist() == ["RecordError"]


def test_paths_in_lists_need_a_place(tmp_path):
    pq.write_table(_table(image=[["a"]], prompt=["x"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"column 'image' has paths or addresses .* --allow-images-from: a is not"):
        reader.refuse_paths(open_source(caption_config(tmp_path)), ())


def test_what_an_answer_was_is_a_column_of_the_output_if_it_is_cut_off(tmp_path):
    messages = [
        json.dumps([_human("x"), {"from": "gpt", "value": "y"}]), WITHOUT, "no JSON",
        json.dumps([_human("<image>"), {"from": "gpt", "value": "lost"}]),
    ]  # fmt: skip
    options = {"messages_column": "messages", "answer_last_turn_again": True}
    rows = _rows(tmp_path, _table(messages=messages, image=[None, None, None, A]), **options)
    assert rows["expected"].to_pylist() == ["y", None, None, "lost"]
    assert [text and from_json(text)[-1].role for text in rows[MESSAGES].to_pylist()] == ["user", "user", None, "user"]
    schema = open_source(caption_config(tmp_path, **options)).columns.output_schema()
    assert schema.names[:3] == ["id", "expected", "answer"]
    table = _table(messages=messages, image=[None] * 4, expected=["e"] * 4)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="--keep-columns expected: the output has a column of this name"):
        open_source(caption_config(tmp_path, keep_columns=("expected",), **options))
    options.pop("answer_last_turn_again")
    columns = open_source(caption_config(tmp_path, keep_columns=("expected",), **options)).columns
    assert columns.output_schema().names[:3] == ["id", "expected", "answer"]
    rows = read_rows(open_source(caption_config(tmp_path, keep_columns=("expected",), **options)))
    assert rows["expected"].to_pylist() == ["e"] * 4
    assert rows[MESSAGE][0].as_py().endswith("give --answer-last-turn-again to answer them without it")


def test_rows_that_cannot_be_read_have_no_messages(tmp_path):
    options = {"messages_column": "messages", "answer_last_turn_again": True}
    pq.write_table(_table(messages=[WITHOUT] * 2), tmp_path / "a.parquet")
    source = open_source(caption_config(tmp_path, **options))
    lost = Lost(ValueError("gone"))
    (table,) = reader.read_unit(next(source.units()), source.columns, None, 8, reader.Fetcher(()), lost)
    assert table["id"].to_pylist() == [0, 1]
    for name in (MESSAGES, IMAGES, "expected"):
        assert table[name].null_count == 2
    assert table[MESSAGE][1].as_py() == f"row 1 of {tmp_path}/a.parquet cannot be read: gone"


def test_marks_in_prompts_are_noted_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(reader, "_noted_marks", False)
    with caplog.at_level(logging.WARNING, "qvl_batch"):
        rows = _rows(tmp_path, _table(image=[A] * 3, prompt=["plain", None, "<img>"]))
        assert not caplog.records
        rows = _rows(tmp_path, _table(image=[A, B], prompt=["<image>\nWhat?", "plain"]))
        _rows(tmp_path, _table(image=[A]), prompt="<image>")
    (record,) = caplog.records
    assert "contain <image>, which the model reads as text" in record.getMessage()
    assert "--messages-column" in record.getMessage()
    # It is only noted: a prompt is what it is.
    assert from_json(rows[MESSAGES][0].as_py()) == single_turn("<image>\nWhat?", 1)
    monkeypatch.setattr(reader, "_noted_marks", False)
    caplog.clear()
    taken = [json.dumps([GPT, _human("<image>\nx")]), json.dumps([_user("<image>"), GPT, _user("x")])]
    _rows(tmp_path, _table(messages=taken, image=[A] * 2), messages_column="messages")
    assert not caplog.records
    # Beside parts nothing takes a mark out.
    with caplog.at_level(logging.WARNING, "qvl_batch"):
        part = json.dumps([_user(IMAGE, _text("<image>\nx"))])
        _rows(tmp_path, _table(messages=[part, part], image=[A] * 2), messages_column="messages")
    assert len(caplog.records) == 1


# What nobody would write.


def _tree(chance, depth):
    """Some JSON-like value, often with the keys and values of messages."""
    leaves = [
        None,
        True,
        0,
        -1,
        2**70,
        1.5,
        float("nan"),
        "",
        "x",
        "user",
        "human",
        "assistant",
        "gpt",
        "system",
        "text",
        "image",
        "image_url",
        "video",
        "<image>",
        "a\n<image>\n<image>",
        "\ud800",
        "\0",
        DATA,
        A,
        ("role", "user"),
        (),
    ]
    if depth == 0 or chance.random() < 0.3:
        return chance.choice(leaves)
    if chance.random() < 0.5:
        return [_tree(chance, depth - 1) for _ in range(chance.choice([0, 1, 1, 2, 3]))]
    keys = [
        "role",
        "content",
        "from",
        "value",
        "type",
        "text",
        "image",
        "image_url",
        "url",
        "bytes",
        "path",
        "index",
        1,
    ]
    return {chance.choice(keys): _tree(chance, depth - 1) for _ in range(chance.choice([0, 1, 2, 3, 4]))}


def _damaged(chance, value):
    """The value with one part of it replaced, taken out or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        return value | {key: _damaged(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        if chance.random() < 0.15:
            return [*value[:at], *value[at + 1 :], *chance.choice([[], value])]
        return [*value[:at], _damaged(chance, value[at]), *value[at + 1 :]]
    if isinstance(value, str) and chance.random() < 0.7:
        return "".join(
            chance.choices([value, "<image>", "\n", "\r\n", " ", "<", "é", "\0", "[", '"', "\\"], k=chance.randrange(5))
        )
    return _tree(chance, 2)


def _cut(chance, text):
    at, end = sorted(chance.choices(range(len(text) + 1), k=2))
    return chance.choice(
        [text[:at], text[:at] + text[end:], text[:at] + chance.choice('[]{}",:\\u\0\ud800x0') + text[at:]]
    )


def _wrong(value, column, again):
    """What is wrong with a row, None if it is read; anything but a `RecordError` leaves this function."""
    try:
        asked = read_messages(value, column, answer_last_turn_again=again)
    except RecordError as error:
        return str(error)
    assert asked.conversation[-1].role == "user"
    assert list(indices_of(asked.conversation)) == list(range(len(asked.images)))
    assert from_json(to_json(asked.conversation)) == asked.conversation
    assert all(message.text.encode(errors="replace").decode() == message.text for message in asked.conversation)
    return None


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_row_has_it_is_read_or_fails(seed):
    chance = random.Random(seed)  # noqa: S311
    good = list(GOOD.values())
    began, read = time.monotonic(), 0
    for _ in range(5_000):
        value, column, *_ = chance.choice(good)
        value = _damaged(chance, value) if chance.random() < 0.8 else _tree(chance, 5)
        if chance.random() < 0.2:
            column = [A, None, "p"][: chance.randrange(4)]
        again = chance.random() < 0.5
        text = json.dumps(value, default=str)
        for row in (value, text, _cut(chance, text)):
            wrong = _wrong(row, column, again)
            assert wrong is None or len(wrong.encode()) < 400
            read += wrong is None
    assert 1_000 < read < 14_000
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("seed", range(2))
def test_whatever_a_file_has_its_rows_are_read_or_fail_alone(seed, tmp_path):
    chance = random.Random(seed)  # noqa: S311
    good = [value for value, column, *_ in GOOD.values() if not column]
    messages = []
    for _ in range(500):
        value = _damaged(chance, chance.choice(good)) if chance.random() < 0.9 else _tree(chance, 5)
        place = chance.choice([DATA, "a", "\ud800", "https://host/\udc80", "\0", "http://[", ""])
        value = chance.choice([value, [_user([{"type": chance.choice(["image", "image_url"]), "image_url": place}])]])
        messages += [json.dumps(value, default=str), WITHOUT]
    (tmp_path / "a").write_bytes(B)
    rows = _rows(tmp_path, _table(messages=messages), messages_column="messages", allow_images_from=(str(tmp_path),))
    assert rows["id"].to_pylist() == list(range(len(messages)))
    wrong = rows[KIND].to_pylist()
    assert set(wrong[1::2]) == {None}
    assert set(wrong[::2]) == {None, "RecordError", "ImageError"}
    for conversation, images, kind in zip(rows[MESSAGES].to_pylist(), rows[IMAGES].to_pylist(), wrong, strict=True):
        assert (images is None) == (kind is not None)
        assert kind or len(list(indices_of(from_json(conversation)))) == len(images)


#: What a message may have as fields beside those that are read: types that Python has no value for, or that Arrow's own
#: functions stumble over.
ODD = {
    "nulls in maps": pa.map_(pa.string(), pa.list_(pa.struct([("path", pa.bool_()), ("image", pa.null())]))),
    "keys that are records": pa.map_(pa.struct([("a", pa.int8())]), pa.struct([("text", pa.null())])),
    "an unknown time zone": pa.timestamp("us", "Foo/Bar"),
}
VALUES = {
    "nulls in maps": [("x", [{"path": True, "image": None}]), ("y", [{"path": None, "image": None}] * 2)],
    "keys that are records": [({"a": 1}, {"text": None}), ({"a": 2}, None)],
    "an unknown time zone": 0,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_fields_end_no_process(name, tmp_path):
    counts = [1, 0, 2, 1, 3]
    odd = pa.array([VALUES[name]] * sum(counts), ODD[name])
    count = sum(counts)
    items = pa.StructArray.from_arrays(
        [pa.array(["user"] * count), pa.array(["x"] * count), odd], names=["role", "content", "odd"]
    )
    lists = pa.ListArray.from_arrays(pa.array([0, *accumulate(counts)], pa.int32()), items)
    rows = _rows(tmp_path, _table(messages=lists), messages_column="messages")
    is_read = name != "an unknown time zone"
    assert [kind is None for kind in rows[KIND].to_pylist()] == [is_read and count > 0 for count in counts]


#: Rows that would take gigabytes or minutes, and what is said of them.
LARGE = {
    "a million messages": (lambda: [_user("x")] * 1_000_000, "there are more than 100,000 messages and parts"),
    "a million parts": (lambda: [_user(["x"] * 1_000_000)], "there are more than 100,000 messages and parts"),
    "a million marks": (lambda: [_human("<image>" * 1_000_000)], "there are more than 100,000 messages and parts"),
    "many of both": (lambda: [_user(["x"] * 1_000)] * 1_000, "there are more than 100,000 messages and parts"),
    "JSON of records": (
        lambda: "[" + "{}," * 33_000_000 + "{}]",
        "the messages are JSON of more than 1,000,000 values",
    ),
    "JSON of lists": (lambda: "[" * 100_000_000, "the messages are JSON of more than 1,000,000 values"),
    "JSON of numbers": (lambda: "[" + "0," * 50_000_000 + "0]", "the messages are JSON of more than 1,000,000 values"),
    "JSON of keys": (
        lambda: "{" + '"a":0,' * 16_000_000 + '"b":0}',
        "the messages are JSON of more than 1,000,000 values",
    ),
    "the same image again and again": (
        lambda: [_user([{"type": "image", "image": "a"}] * 50_000)],
        "the messages show more than 1,000 images",
    ),
    "long JSON": (
        lambda: " " * (MOST_CHARACTERS + 1),
        "the messages are JSON of 268,435,457 characters; the limit is 268",
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_row_that_is_too_large_is_refused_before_it_takes_time_and_memory(name):
    make, wrong = LARGE[name]
    value = make()
    forget_peak()
    before, began = peak_memory(), time.monotonic()
    with pytest.raises(RecordError, match=f"^{wrong}"):
        read_messages(value, [])
    assert time.monotonic() - began < 10
    assert peak_memory() - before < 150_000_000


def test_what_is_as_large_as_may_be_is_read():
    messages = [_user(["x"] * (MOST_PARTS - 1))]
    assert len(read_messages(messages, []).conversation[0].parts) == MOST_PARTS - 1
    long = "x, [y] {z}\n" * (MOST_VALUES // 5)
    assert read_messages(json.dumps([_user(long)]), []).conversation == (Message("user", long),)
    image = "data:image/png;base64," + "A" * 100_000_000
    text = json.dumps([_user([{"type": "image_url", "image_url": {"url": image}}])])
    forget_peak()
    before, began = peak_memory(), time.monotonic()
    assert read_messages(text, []).images == (image,)
    assert time.monotonic() - began < 10
    assert peak_memory() - before < 250_000_000


MANY = {
    "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "parts": pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(pa.string()))])),
    "maps": pa.list_(pa.map_(pa.string(), pa.string())),
}


@pytest.mark.parametrize("name", MANY)
def test_a_row_of_a_file_with_millions_of_values_fails_alone(name, tmp_path, monkeypatch):
    many = MOST_VALUES + 1
    if name == "parts":
        content = pa.ListArray.from_arrays(pa.array([0, 1, many + 1, many + 2]), pa.array(["x"] * (many + 2)))
        items = pa.StructArray.from_arrays([pa.array(["user"] * 3), content], names=["role", "content"])
        lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3]), items)
    else:
        text = pa.array(["x"]).take(pa.array([0] * (many + 2)))
        users = pa.array(["user"]).take(pa.array([0] * (many + 2)))
        items = pa.StructArray.from_arrays([users, text], names=["role", "content"])
        if name == "maps":
            pairs = pa.array(["role", "content"]).take(pa.array([0, 1] * (many + 2)))
            values = pa.array(["user", "x"]).take(pa.array([0, 1] * (many + 2)))
            items = pa.MapArray.from_arrays(pa.array(range(0, 2 * many + 5, 2), pa.int32()), pairs, values)
        lists = pa.ListArray.from_arrays(pa.array([0, 1, many + 1, many + 2]), items)
    assert lists.type == MANY[name]
    table = _table(messages=pa.concat_arrays([lists, lists, lists]))
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(caption_config(tmp_path, messages_column="messages"))
    made = []
    value = cells.value_of
    monkeypatch.setattr(cells, "value_of", lambda scalar: made.append(scalar) or value(scalar))
    rows = read_rows(source, rows_per_table=16)
    assert rows[MESSAGE].to_pylist() == [None, f"the messages have more than {many - 1:,} values", None] * 3
    assert len(made) == 6


def test_rows_of_many_messages_are_made_one_after_the_other(tmp_path, monkeypatch):
    order = []
    value, read = cells.value_of, messages_module.read_messages
    monkeypatch.setattr(cells, "value_of", lambda scalar: order.append("made") or value(scalar))
    monkeypatch.setattr(reader, "read_messages", lambda *args, **more: order.append("read") or read(*args, **more))
    _rows(tmp_path, _table(messages=[WITHOUT] * 3), messages_column="messages")
    assert order == ["made", "read"] * 3
