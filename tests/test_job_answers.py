"""What the answers of a job must be and what it says of them: constraints, JSON, confidence, draws."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SCENE, SCENES
from output_folders import ANSWER_COLUMNS, read_answers, rows_by_id, shown_page

from qvl_batch import Captioner


def test_answers_are_json_of_a_schema_and_a_column_of_its_type(tiny_bundle, demo, job, tmp_path):
    schema = {
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
            "note": {"type": "string", "maxLength": 3},
        },
        "required": ["color", "count"],
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    pq.write_table(pa.Table.from_pylist([*demo[:6], demo[6] | {"image": None}]), tmp_path / "rows.parquet")
    options = (
        "--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", tmp_path / "out",
        "--json-schema", tmp_path / "schema.json",
    )  # fmt: skip
    job(*options)
    answers = read_answers(tmp_path / "out")
    fields = pa.struct({"color": pa.string(), "count": pa.int64(), "note": pa.string()})
    assert answers.schema.names == ["id", "answer", "parsed", *ANSWER_COLUMNS[1:]]
    assert answers.schema.field("parsed").type == fields
    rows = sorted(answers.to_pylist(), key=lambda row: row["id"])
    for row in rows[:6]:
        assert row["parsed"] == {"note": None} | json.loads(row["answer"])
        assert row["parsed"]["color"] in ("red", "green", "blue")
        assert row["finish_reason"] == "stop"
    assert (rows[6]["answer"], rows[6]["parsed"], rows[6]["error_type"]) == (None, None, "ImageError")
    assert job(*options).stdout.startswith("rows      7 (")  # nothing is left
    (tmp_path / "schema.json").write_text(json.dumps(schema | {"required": ["color"]}))
    assert "--json-schema" in job(*options, status=1).stderr


@pytest.mark.long
def test_scenes_of_the_demo_are_described_in_json(native_bundle, job, tmp_path):
    job(
        "--bundle", native_bundle.path, "--input", SCENES, "--output", tmp_path / "out", "--json-schema", SCENE,
        "--keep-columns", "expected", "--confidence",
    )  # fmt: skip
    rows = rows_by_id(tmp_path / "out")
    assert len(rows) == 24
    wanted = [json.loads(row["expected"]) for row in rows]
    for name in wanted[0]:
        assert sum(row["parsed"][name] == each[name] for row, each in zip(rows, wanted, strict=True)) >= 0.8 * len(rows)
    assert sum(row["answer"] == row["expected"] for row in rows) >= 0.8 * len(rows)
    assert all(0 < row["confidence"] <= 1 for row in rows)


@pytest.mark.long
def test_answers_say_how_sure_the_model_is(tiny_bundle, demo, job, tmp_path):
    pq.write_table(pa.Table.from_pylist([*demo[:8], demo[8] | {"image": None}]), tmp_path / "rows.parquet")
    options = ("--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet")
    job(*options, "--output", tmp_path / "plain")
    job(*options, "--output", tmp_path / "sure", "--confidence")
    plain, sure = rows_by_id(tmp_path / "plain"), rows_by_id(tmp_path / "sure")
    names = ("confidence", "mean_logprob", "min_token_probability")
    assert list(sure[0]) == ["id", "answer", *names, *ANSWER_COLUMNS[1:]]
    assert [{name: row[name] for name in plain[0]} for row in sure] == plain
    for row in sure[:8]:
        assert 0 < row["confidence"] <= row["min_token_probability"] <= 1
        steps = row["answer_tokens"] + 1  # with the end token
        assert row["confidence"] == pytest.approx(np.exp(steps * row["mean_logprob"]))
    assert [sure[8][name] for name in names] == [None] * 3


@pytest.mark.long
def test_values_of_json_say_how_sure_the_model_is_and_rows_abstain(tiny_bundle, demo, job, tmp_path):
    schema = {
        "type": "object",
        "properties": {"note": {"type": "string", "maxLength": 2}, "color": {"enum": ["red", "green", "blue"]}},
        "required": ["color"],
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    rows = [{**row, "id": f"row-{at:02}"} for at, row in enumerate(demo[:30])]
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | {"id": "row-99", "image": None}]), tmp_path / "rows.parquet")
    options = (
        "--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--json-schema", tmp_path / "schema.json",
        "--vision-cache", tmp_path / "features",
    )  # fmt: skip
    job(*options, "--output", tmp_path / "sure", "--confidence")
    answers = read_answers(tmp_path / "sure")
    sure = ("confidence", "mean_logprob", "min_token_probability")
    names = ["id", "answer", "parsed", "parsed_confidence", *sure, *ANSWER_COLUMNS[1:]]
    assert answers.schema.names == names
    assert answers.schema.field("parsed_confidence").type == pa.struct({"color": pa.float64()})
    found = rows_by_id(tmp_path / "sure")
    for row in found[:30]:
        assert 0 < row["confidence"] <= row["parsed_confidence"]["color"] + 1e-9 <= 1 + 2e-9
        assert row["finish_reason"] == "stop"
    assert (found[30]["parsed_confidence"], found[30]["finish_reason"]) == (None, "error")

    # Between two of them: the same answer's confidence differs by rounding from run to run.
    least = sum(sorted(row["confidence"] for row in found[:30])[11:13]) / 2
    result = job(*options, "--output", tmp_path / "held", "--abstain-below", least)
    held = rows_by_id(tmp_path / "held")
    for row, other in zip(found, held, strict=True):
        assert (row["id"], row["answer"]) == (other["id"], other["answer"])
        abstains = row["confidence"] is not None and row["confidence"] < least
        assert other["finish_reason"] == ("abstain" if abstains else row["finish_reason"])
    assert "rows      31 (12 abstain, 1 error, 18 stop)" in result.stdout
    assert "sure      median confidence " in result.stdout
    run, page, shown = shown_page(tmp_path / "held")
    assert sum(run["confidence"]["histogram"]) == 30
    assert "12 of 30 answers abstain" in page
    by_confidence = sorted(held[:30], key=lambda row: row["confidence"])
    assert [row[0] for row in shown[:24]] == [row["id"] for row in by_confidence[:24]]
    assert [row[1:] for row in shown[:24]] == [
        (demo[int(row["id"][4:])]["prompt"], row["answer"], True) for row in by_confidence[:24]
    ]
    assert "--abstain-below" in job(*options, "--output", tmp_path / "held", "--confidence", status=1).stderr
    # Nothing is left, and answers that abstain are no errors.
    again = job(*options, "--output", tmp_path / "held", "--abstain-below", least, "--retry-errors", "--limit", 30)
    assert "12 abstain" in again.stdout
    assert rows_by_id(tmp_path / "held") == held


@pytest.mark.parametrize("as_text", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_column_says_what_each_answer_must_be(as_text, tiny_bundle, demo, job, tmp_path):
    choices = [["yes", "no"], None, ["a", "b"], [], ["x", "x"], ["red", None], ["blue"]]
    labels = [each and json.dumps(each) for each in choices] if as_text else choices
    labels[3] = "[]" if as_text else []
    pq.write_table(pa.Table.from_pylist(demo[:7]).append_column("labels", pa.array(labels)), tmp_path / "rows.parquet")
    output = tmp_path / "out"
    job(
        "--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", output,
        "--choices-column", "labels",
    )  # fmt: skip
    rows = rows_by_id(output)
    for at in (0, 2, 6):
        assert rows[at]["answer"] in choices[at]
    assert [row["answer"] for row in rows[3:6]] == [None] * 3
    with Captioner(tiny_bundle.path, slots=1) as captioner:
        (free,) = captioner.caption([demo[1]["image"]["bytes"]], [demo[1]["prompt"]])
    assert rows[1]["answer"] == free.answer
    assert [row["error_message"] for row in rows[3:6]] == [
        "the choices are []; they must be a list of at least one text",
        "choice 2, 'x', occurs twice",
        "choice 2 is null; it must be text",
    ]
    assert {(row["error_stage"], row["error_type"]) for row in rows[3:6]} == {("layout", "ConstraintError")}


@pytest.mark.long
def test_columns_of_patterns_and_schemas_are_per_row_too(tiny_bundle, demo, job, tmp_path):
    patterns = ["[0-9]{2}", "[", None, "[0-9]{999}"]
    schemas = [json.dumps({"type": "boolean"}), "{", None, json.dumps({"$ref": "#/x"})]
    table = pa.Table.from_pylist(demo[:4])
    table = table.append_column("pattern", pa.array(patterns)).append_column("schema", pa.array(schemas))
    pq.write_table(table, tmp_path / "rows.parquet")
    for option, column, first, reasons in (
        (
            "--regex-column",
            "pattern",
            r"\d\d",
            ("unclosed character class", "takes 999 tokens, and there is room for 128"),
        ),
        ("--json-schema-column", "schema", "true|false", ("the schema is not JSON", "cannot be followed")),
    ):
        output = tmp_path / column
        job(
            "--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", output, option, column,
        )  # fmt: skip
        rows = rows_by_id(output)
        assert re.fullmatch(first, rows[0]["answer"])
        assert rows[2]["finish_reason"] == "stop"
        for row, reason in zip((rows[1], rows[3]), reasons, strict=True):
            assert reason in row["error_message"]
            assert row["error_type"] == "ConstraintError"
        assert "parsed" not in rows[0]


def _said(row):
    """What a row says, without how sure the model is of it, which is rounded."""
    return {name: row[name] for name in ("answer", "finish_reason", "answer_tokens", "error_message")}


@pytest.mark.long
def test_drawn_answers_are_the_same_whatever_rows_come_with_them(tiny_bundle, demo, job, tmp_path):
    said = [None, {"temperature": 2.0, "samples": 3}, {"temperature": 0}, {"seed": 6}, "{", {"top_p": 2}]
    table = pa.Table.from_pylist(demo[:6])
    said_as_text = [each if each is None or isinstance(each, str) else json.dumps(each) for each in said]
    table = table.append_column("draw", pa.array(said_as_text))
    # The last row asks what the first one asks, under another id.
    table = pa.concat_tables([table, table.slice(0, 1).set_column(0, "id", pa.array(["another"]))])
    pq.write_table(table, tmp_path / "rows.parquet")
    pq.write_table(table.take([6, 5, 3, 2, 1, 0]), tmp_path / "others.parquet")
    options = ("--sampling-column", "draw", "--temperature", 1.6, "--seed", 5, "--samples", 8, "--confidence")
    found = {}
    for name, slots in (("rows", 5), ("others", 9)):
        output = tmp_path / f"{name}-out"
        job(
            "--bundle", tiny_bundle.path, "--input", tmp_path / f"{name}.parquet", "--output", output, *options,
            "--slots", slots, "--stop", ".", "--max-new-tokens", 32,
        )  # fmt: skip
        found[name] = {row["id"]: row for row in rows_by_id(output)}
    rows = found["rows"]
    for each, row in found["others"].items():
        assert list(map(_said, rows[each]["samples"] or ())) == list(map(_said, row["samples"] or ()))
        assert _said(rows[each]) == _said(row)
    first, three, greedy, seed, broken, wrong = (rows[row["id"]] for row in demo[:6])
    assert [len(each["samples"]) for each in (first, three, greedy, seed)] == [8, 3, 1, 8]
    for row in (first, three, greedy, seed):
        sample = row["samples"][0]
        assert {name: row[name] for name in ("answer", "finish_reason", "answer_tokens", "confidence")} == {
            name: sample[name] for name in ("answer", "finish_reason", "answer_tokens", "confidence")
        }
        assert not any("." in each["answer"] for each in row["samples"])
    texts = [[each["answer"] for each in row["samples"]] for row in (first, rows["another"])]
    assert texts[0] != texts[1]
    assert len(set(texts[0])) > 1
    assert (broken["error_type"], wrong["error_type"]) == ("SamplingError", "SamplingError")
    assert broken["samples"] is None
    assert broken["error_message"].startswith("the values are not JSON")
    assert wrong["error_message"] == "top_p must be a number above 0 and at most 1, not 2.0"
    plain = tmp_path / "plain"
    job("--bundle", tiny_bundle.path, "--input", tmp_path / "rows.parquet", "--output", plain)
    whole = {row["id"]: row for row in rows_by_id(plain)}[greedy["id"]]["answer"]
    assert greedy["answer"] == whole.split(".")[0]
