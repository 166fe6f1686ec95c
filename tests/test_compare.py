"""A comparison says that a bundle answers like its checkpoint if, and only if, it does."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import threading

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import make_checkpoint
from conftest import QUESTIONS, ROOT, TINY
from faults import (
    assert_points_at,
    merge_groups_in_raster_order,
    positions_of_one_dimension,
    quantize_layer,
    spoil,
    without_normalisation,
)
from image_files import image_file
from PIL import Image
from reference import question

import compare as script
from export.checkpoint import load_checkpoint
from export.comparison import run as comparison_run
from export.comparison.bundle_side import BundleSide
from export.comparison.config import CompareConfig
from export.comparison.layers import depth_names, instrument, state_error
from export.comparison.measures import Measures
from export.comparison.questions import open_questions
from export.comparison.records import record
from export.comparison.reference import PyTorch
from export.comparison.run import compare
from export.comparison.summary import Bounds, difference, summarize
from export.comparison.traces import Trace, first_difference
from export.config import ExportConfig
from export.package import export_bundle
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, DECODER_FULL, VISION
from qvl_batch.config import ImageRules
from qvl_batch.conversation import single_turn
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.distances import cosine, divergence
from qvl_batch.errors import BundleError, ConfigError, DeviceError, InputError, JobError, OutputError
from qvl_batch.images.pixels import seen_or_failure
from qvl_batch.images.view import View
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.resume import Job
from qvl_batch.schema import Failure

COMPARE = [sys.executable, "jobs/compare.py"]
BOUNDS = Bounds(min_agreement=1.0, max_drift=1e-3, tie_margin=1e-3)


def _compare_config(bundle, output, **changes):
    plain = {"bundle": bundle, "checkpoint": TINY, "input": (str(QUESTIONS),), "output": output, "limit": 12}
    return CompareConfig(**plain | changes)


def _compared_rows(output):
    return pq.read_table(output / "comparison.parquet").to_pylist()


def test_an_exact_bundle_passes_and_everything_is_written(tiny_bundle, demo, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    options = ["--bundle", tiny_bundle.path, "--checkpoint", TINY, "--input", QUESTIONS, "--limit", 9]
    monkeypatch.setattr(sys, "argv", [*map(str, ["compare.py", *options, "--output", output])])
    monkeypatch.setattr(script, "stop_as_by_ctrl_c", lambda: None)  # the tests' own signals stay theirs
    assert script.main() == 0
    said = capsys.readouterr()
    assert "equal     9 of 9 answers" in said.out
    assert "9 of 9 rows" in said.err

    rows = _compared_rows(output)
    assert [(row["id"], row["prompt"], row["expected"]) for row in rows] == [
        (row["id"], row["prompt"], row["expected"]) for row in demo[:9]
    ]
    for row in rows:
        assert (row["reference"], row["equal"], row["difference"]) == (row["answer"], True, "equal")
        assert row["answer"]
        assert max(row["vision_error"], row["prefill_error"], row["decode_error"]) < 1e-5
        assert 1 - row["vision_cosine"] < 1e-9
        assert row["first_token_kl"] < 1e-9
        assert row["first_difference"] is row["logits_error"] is row["error_side"] is row["layer_error"] is None
    summary = json.loads((output / "summary.json").read_text())
    assert summary["verdict"] == {"passed": True, "reasons": []}
    assert summary["agreement"]["interval"][0] == pytest.approx(0.7008, abs=1e-3)  # Wilson, 9 of 9
    page = (output / "report.html").read_text()
    assert "answers like" in page
    assert page.count("<article") == 9


@pytest.mark.long
def test_less_agreement_than_asked_for_is_an_error_that_says_how_much(copied_bundle, tmp_path):
    without_normalisation(copied_bundle)
    options = ["--bundle", copied_bundle, "--checkpoint", TINY, "--input", QUESTIONS, "--limit", 4]
    command = [*COMPARE, *map(str, options), "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    share = json.loads((tmp_path / "out" / "summary.json").read_text())["agreement"]["share"]
    assert f"{(1 - share) * 100:.2f} points under --min-agreement 1" in result.stderr
    assert "the bundle's manifest says" not in result.stderr
    lenient, said = {"min_agreement": 0.0, "max_drift": 100.0}, []
    assert compare(_compare_config(copied_bundle, tmp_path / "out", limit=4, **lenient), say=said.append).passed
    assert "resuming  4 are compared already" in said


def _moved_image(monkeypatch):
    plain = Decoder.prefill_inputs

    def moved(self, *asked):
        inputs = plain(self, *asked)
        embeds = inputs["image_embeds"].values
        embeds[...] = np.roll(embeds, 1, axis=1)
        return inputs

    monkeypatch.setattr(Decoder, "prefill_inputs", moved)


@pytest.mark.parametrize(
    ("damage", "begins_at", "own"),
    [
        pytest.param(
            "1-D positions", "decoder.layers.0", {f"decoder.layers.{k}" for k in range(4)}, marks=pytest.mark.long
        ),
        pytest.param(
            "merge groups in raster order", "vision.patch_embed", {"vision.patch_embed"}, marks=pytest.mark.long
        ),
        pytest.param("image moved by one", "decoder.embed", {"decoder.embed"}, marks=pytest.mark.long),
        ("decoder layer at 4 bits", "decoder.layers.2", {"decoder.layers.2"}),
        ("vision block at 4 bits", "vision.blocks.1", {"vision.blocks.1"}),
    ],
)
def test_damage_turns_the_report_red_and_the_layer_plot_points_at_it(
    damage, begins_at, own, copied_bundle, monkeypatch, tmp_path
):
    {
        "1-D positions": lambda: positions_of_one_dimension(monkeypatch),
        "merge groups in raster order": lambda: merge_groups_in_raster_order(copied_bundle),
        "image moved by one": lambda: _moved_image(monkeypatch),
        "decoder layer at 4 bits": lambda: quantize_layer(copied_bundle, DECODER, "decoder.layers.2."),
        "vision block at 4 bits": lambda: quantize_layer(copied_bundle, VISION, "vision.blocks.1."),
    }[damage]()
    outcome = compare(_compare_config(copied_bundle, tmp_path / "out", limit=3, layers=True))
    assert_points_at(outcome, begins_at, own)


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_layers_of_an_exact_bundle_agree_at_every_depth(count, tmp_path):
    # Windows that are cut at the edge, so that the graph orders patches otherwise than transformers.
    vision = {"depth": count, "fullatt_block_indexes": [1], "window_size": 140}
    text = {"num_hidden_layers": count, "layer_types": ["full_attention"] * count}
    path = make_checkpoint(tmp_path / "checkpoint", text=text, vision=vision)
    export_bundle(ExportConfig(checkpoint=path, output=tmp_path / "bundle", skip_parity=True))
    outcome = compare(
        _compare_config(tmp_path / "bundle", tmp_path / "out", checkpoint=path, limit=2, layers=True, max_new_tokens=8)
    )
    depths = outcome.summary["layers"]["depths"]
    assert [depth["name"] for depth in depths] == depth_names(4 + 2 * count, count)
    assert [depth["name"] for depth in depths][: count + 2] == [
        "vision.patch_embed",
        *(f"vision.blocks.{k}" for k in range(count)),
        "vision.merger",
    ]
    assert max(max(depth["total"]["max"], depth["own"]["max"]) for depth in depths) < 1e-4
    assert outcome.summary["layers"]["begins_at"] is None
    assert outcome.passed


@pytest.mark.long
def test_rows_in_a_batch_are_answered_as_alone(tiny_checkpoint, demo):
    pytorch = PyTorch(tiny_checkpoint)
    questions = [question(row) for row in demo[:16]]
    together = pytorch.answer(questions)
    alone = [pytorch.answer([one])[0] for one in questions]
    lengths = [len(trace.input_ids) for trace in together]
    assert max(lengths.count(length) for length in lengths) >= 3
    for a, b in zip(together, alone, strict=True):
        assert a.token_ids == b.token_ids
        assert np.abs(a.logits - b.logits).max() <= 1e-5 * np.abs(b.logits).max()


@pytest.mark.gpu
def test_pytorch_answers_on_a_gpu_as_on_the_cpu(tiny_checkpoint, demo):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU here")
    questions = [question(row) for row in demo[:16]]
    expected = PyTorch(tiny_checkpoint, device="cpu").answer(questions)
    found = PyTorch(load_checkpoint(TINY), device="cuda").answer(questions)
    assert [trace.token_ids for trace in found] == [trace.token_ids for trace in expected]


def test_both_sides_read_a_prompt_alike(tiny_bundle, tiny_checkpoint, demo):
    side = BundleSide(tiny_bundle, 4, 1024, layers=False)
    pytorch = PyTorch(tiny_checkpoint)
    for prompt in (
        "How many?",
        "  two\n\nlines ",
        "é 漢字 🙂",
        "<|im_end|> and <|image_pad|>",
        "<tool_call>",
        "a" * 300,
    ):
        asked = dataclasses.replace(question(demo[0]), conversation=single_turn(prompt, 1))
        assert pytorch.input_ids(asked) == side.shown(asked).input_ids


def test_the_bundle_answers_all_questions_in_one_thread(tiny_bundle, demo, monkeypatch):
    before = set(threading.enumerate())
    side, threads, step = BundleSide(tiny_bundle, 2, 1024, layers=False), set(), Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *asked: threads.add(threading.get_ident()) or step(*asked))
    found = [side.answer([question(row) for row in demo[:3]]) for _ in range(2)]
    assert [trace.token_ids for trace in found[0]] == [trace.token_ids for trace in found[1]]
    (started,) = set(threading.enumerate()) - before
    assert threads == {started.ident}


def test_a_comparison_that_was_stopped_goes_on_where_it_was(tiny_bundle, demo, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_run, "CHUNK", 2)
    asked = []
    plain = PyTorch.answer

    def stops(self, questions):
        if len(asked) >= 4:
            raise KeyboardInterrupt
        asked.extend(q.id for q in questions)
        return plain(self, questions)

    monkeypatch.setattr(PyTorch, "answer", stops)
    config = _compare_config(tiny_bundle.path, tmp_path / "out", limit=5)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    assert not (tmp_path / "out" / "report.html").exists()

    monkeypatch.setattr(
        PyTorch, "answer", lambda self, questions: asked.extend(q.id for q in questions) or plain(self, questions)
    )
    outcome = compare(config)
    assert asked == [row["id"] for row in demo[:5]]
    assert [row["id"] for row in _compared_rows(tmp_path / "out")] == asked
    assert outcome.passed

    whole = compare(dataclasses.replace(config, output=tmp_path / "whole"))
    assert _compared_rows(tmp_path / "whole") == _compared_rows(tmp_path / "out")
    assert whole.summary["drift"] == outcome.summary["drift"]


def test_another_comparison_is_not_mixed_in(tiny_bundle, tmp_path):
    config = _compare_config(tiny_bundle.path, tmp_path / "out", limit=2)
    compare(config)
    with pytest.raises(OutputError, match=r"another max_new_tokens \(64 there, 9 now\)"):
        compare(dataclasses.replace(config, max_new_tokens=9))
    with pytest.raises(OutputError, match=r'another allow_images_from \(\[\] there, \["/"\] now\)'):
        compare(dataclasses.replace(config, allow_images_from=("/",)))
    outcome = compare(dataclasses.replace(config, max_new_tokens=9, overwrite=True))
    assert outcome.summary["settings"]["max_new_tokens"] == 9
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "report.html").write_text("precious")
    with pytest.raises(OutputError, match="holds a report already"):
        compare(dataclasses.replace(config, output=tmp_path / "else"))
    assert (tmp_path / "else" / "report.html").read_text() == "precious"
    Job({}, ()).write(LocalFolder(tmp_path / "else"))
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds the answers of a job"):
            compare(dataclasses.replace(config, output=tmp_path / "else", overwrite=overwrite))


def test_rows_that_cannot_be_asked_are_counted_apart(tiny_bundle, demo, tmp_path):
    rows = [dict(row) for row in demo[:7]]
    rows[0]["image"] = {"bytes": b"<html>", "path": None}
    rows[1]["image"] = None
    rows[2]["prompt"] = None
    rows[3]["prompt"] = "word " * 2000
    rows[4]["prompt"] = "<|im_end|><|image_pad|>"
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(QUESTIONS)), path)
    config = _compare_config(
        tiny_bundle.path, tmp_path / "out", input=(str(path),), fit=("crop", "stretch"), layers=True
    )
    outcome = compare(config)
    found = _compared_rows(tmp_path / "out")
    assert [(row["id"], row["fit"]) for row in found] == list(
        itertools.product([r["id"] for r in rows], ("crop", "stretch"))
    )
    assert [row["difference"] for row in found] == ["not compared"] * 8 + ["equal"] * 6
    assert outcome.summary["not_compared"] == {"input image: ImageError": 4, "input layout: PromptError": 4}
    assert (outcome.passed, outcome.summary["compared"]) == (True, 6)
    assert {group["group"] for group in outcome.summary["groups"]["fit"]} == {"crop", "stretch"}
    for text in (str(outcome), outcome.page.read_text()):
        assert "8 of 14 questions could not be compared" in text
        assert "intervals hold for one fit alone" in text
    said = []
    compare(config, say=said.append)
    assert said[-1] == "resuming  14 are compared already; 8 of them failed (--retry-errors)"


@pytest.mark.long
def test_rows_that_failed_are_asked_again_if_that_is_wanted(tiny_bundle, demo, tmp_path):
    rows = [dict(row) for row in demo[:5]]
    rows[1]["image"] = rows[3]["image"] = {"bytes": None, "path": "late.png"}
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(QUESTIONS)), tmp_path / "questions.parquet")
    options = {"input": (str(tmp_path / "questions.parquet"),), "allow_images_from": (str(tmp_path),)}
    config = _compare_config(tiny_bundle.path, tmp_path / "out", fit=("crop", "stretch"), **options)
    assert compare(config).summary["compared"] == 6
    first = _compared_rows(tmp_path / "out")
    (tmp_path / "late.png").write_bytes(demo[1]["image"]["bytes"])
    assert compare(config).summary["compared"] == 6
    said = []
    outcome = compare(dataclasses.replace(config, retry_errors=True), say=said.append)
    assert said[-1] == "resuming  6 are compared already; 4 that failed are asked again"
    assert (outcome.summary["compared"], outcome.passed) == (10, True)
    again = _compared_rows(tmp_path / "out")
    assert [(row["id"], row["fit"]) for row in again] == [(row["id"], row["fit"]) for row in first]
    assert [row for row in again if row["row"] in (0, 2, 4)] == [row for row in first if row["row"] in (0, 2, 4)]
    compare(dataclasses.replace(config, retry_errors=True), say=said.append)
    assert said[-1] == "resuming  10 are compared already"


TRACE = Trace("yes", [1], [1, 2], np.ones((1, 1), np.float32), np.ones((1, 2), np.float32))
LAYOUT, DECODE = Failure("layout", "PromptError", "no room"), Failure("decode", "NumericError", "not finite")


@pytest.mark.parametrize(
    ("one", "other", "sides"),
    [
        (TRACE, LAYOUT, ("input", "input")),
        (DECODE, LAYOUT, ("input", "input")),
        (None, LAYOUT, ("input", "input")),
        (TRACE, DECODE, ("bundle", "reference")),
    ],
)
def test_what_one_side_cannot_take_counts_alike_in_both_directions(one, other, sides, demo):
    asked = question(demo[0])
    rows = [record(asked, *pair, None, None, (None, None)) for pair in ((one, other), (other, one))]
    assert tuple(row["error_side"] for row in rows) == sides
    for row in rows:
        assert row["error_type"] == other.type
        assert (row["equal"] is None) == (row["error_side"] == "input")
        assert row["error_side"] != "input" or row["reference"] is row["answer"] is None


def _asked(folder, say=lambda _: None, options=(), **columns):
    """Questions over files, each of which has one of the values of each column."""
    plain = {"id": ["a", "b"], "prompt": ["x", "y"], "image": [b"", b""]}
    for at in range(max(map(len, columns.values()))):
        table = pa.table(plain | {name: values[at] for name, values in columns.items()})
        pq.write_table(table, folder / f"{at}.parquet")
    config = _compare_config(TINY, folder / "out", input=(str(folder),), **dict(options))
    questions = open_questions(config, View.square(336).resolution, say)
    return [asked for chunk in questions.chunks(8) for asked in chunk]


def test_both_sides_see_the_images_that_a_job_with_these_options_shows(tmp_path):
    pictures = (Image.new("RGB", (100, 80), "red"), Image.new("RGB", (300, 200), "blue"))
    files = [image_file(picture, "BMP") for picture in pictures]
    images = [[files[0][:-9000], files[1]]]
    refused = _asked(tmp_path, options={"max_image_pixels": 59_999}, image=images)
    assert "--allow-truncated" in refused[0].failure.message
    assert "60,000 pixels; the limit is 59,999" in refused[1].failure.message
    shown = _asked(tmp_path, options={"max_image_pixels": 60_000, "allow_truncated": True}, image=images)
    rules = ImageRules(60_000, allow_truncated=True)
    for asked, file in zip(shown, images[0], strict=True):
        assert np.array_equal(asked.images[0].pixels, seen_or_failure(file, View.square(336), rules).pixels)


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["7", None]),
        pa.array([7, None]),
        pa.array(["7", None]).dictionary_encode(),
        pa.array(["7", None], pa.string_view()),
        pa.array([b"7", None], pa.binary()).view(pa.string()),
    ],
)
def test_answers_may_be_expected_as_text_of_any_type(values, tmp_path):
    asked = _asked(tmp_path, expected=[values, pa.array(["8", None])])
    assert [each.expected for each in asked] == ["7", None, "8", None]


def test_answers_are_expected_under_any_name_or_not_at_all(tmp_path):
    columns = {"expected": [["1", "2"]], "answer": [["3", "4"]]}
    for options, expected in (
        ({}, ["1", "2"]),
        ({"expected_column": "answer"}, ["3", "4"]),
        ({"expected_column": ""}, [None, None]),
    ):
        assert [each.expected for each in _asked(tmp_path, options=options, **columns)] == expected
    with pytest.raises(ConfigError, match="rename the column"):
        _asked(tmp_path, options={"expected_column": "id"}, **columns)


@pytest.mark.parametrize(
    ("expected", "why"),
    [
        ([[1.5, 2.5]], "is double; it must be strings or integers"),
        ([pa.nulls(2), [["a"], ["b"]]], "is list<.*>; it must be strings or integers"),
    ],
)
def test_a_column_that_nobody_named_and_that_holds_no_answers_is_a_note(expected, why, tmp_path):
    said = []
    asked = _asked(tmp_path, said.append, expected=expected)
    assert {each.expected for each in asked} == {None}
    assert re.fullmatch(rf"note      expected answers are not used: .*parquet: column 'expected' .*{why}", said[0])
    with pytest.raises(InputError, match=why):
        _asked(tmp_path, options={"expected_column": "expected"}, expected=expected)


def test_ids_and_expected_answers_that_are_no_text_are_read_all_the_same(tmp_path):
    broken = pa.array([b"\xffa", b"b"], pa.binary()).view(pa.string())
    asked = _asked(tmp_path, id=[broken], expected=[broken])
    assert [(each.id, each.expected) for each in asked] == [("\ufffda", "\ufffda"), ("b", "b")]


@pytest.mark.parametrize(
    ("stage", "graph", "weights"), [("vision", VISION, "vision.mean"), ("decode", DECODER, "decoder.norm")]
)
def test_numbers_that_mean_nothing_are_the_bundles_failure(stage, graph, weights, copied_bundle, tmp_path):
    spoil(copied_bundle, graph, weights, value=np.nan)
    outcome = compare(_compare_config(copied_bundle, tmp_path / "out", limit=3))
    assert not outcome.passed
    assert outcome.summary["agreement"]["failures"] == {f"bundle {stage}: NumericError": 3}
    assert all(row["reference"] and row["answer"] is None for row in _compared_rows(tmp_path / "out"))


def test_two_bundles_can_be_compared_with_each_other(tiny_bundle, copied_bundle, tmp_path):
    quantize_layer(copied_bundle, DECODER, "decoder.layers.1.", bits=3)
    sides = {"checkpoint": None, "against_bundle": tiny_bundle.path}
    config = _compare_config(tiny_bundle.path, tmp_path / "same", **sides, layers=True, limit=3)
    same = compare(config)
    assert same.passed
    assert same.summary["drift"]["decode"]["max"] == 0
    assert all(depth["own"]["max"] < 1e-6 for depth in same.summary["layers"]["depths"])
    other = compare(dataclasses.replace(config, bundle=copied_bundle, output=tmp_path / "other"))
    assert not other.passed
    assert "drift begins at decoder.layers.1, largest error of its own: decoder.layers.1" in str(other)
    assert "differs from the other bundle" in other.page.read_text()


def test_bundles_of_other_numbers_are_refused(tiny_bundle, copied_bundle, tmp_path):
    manifest = json.loads((copied_bundle / "bundle.json").read_text())
    manifest["generation"]["repetition_penalty"] = 1.5
    (copied_bundle / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="differ in generation settings"):
        compare(_compare_config(tiny_bundle.path, tmp_path / "out", checkpoint=None, against_bundle=copied_bundle))


def test_a_graph_without_such_layers_is_named(tiny_bundle):
    plain = onnx.load(tiny_bundle.file(DECODER_FULL), load_external_data=False)
    with pytest.raises(BundleError, match=r"and this graph has 0: .* leave out --layers"):
        instrument(plain, tiny_bundle.file(DECODER_FULL))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"checkpoint": None}, ConfigError, "one of --checkpoint and --against-bundle"),
        ({"against_bundle": TINY}, ConfigError, "one of --checkpoint and --against-bundle"),
        ({"min_agreement": 1.5}, ConfigError, "--min-agreement must be from 0 to 1, not 1.5"),
        ({"max_drift": -1.0}, ConfigError, "--max-drift must be at least 0"),
        ({"tie_margin": math.nan}, ConfigError, "--tie-margin must be at least 0"),
        ({"gallery": -1}, ConfigError, "--gallery must be at least 0"),
        ({"overwrite": True, "retry_errors": True}, ConfigError, "give one of them"),
        ({"fit": ("crop", "crop")}, ConfigError, "--fit names a way"),
        ({"max_new_tokens": 0}, ConfigError, "--max-new-tokens must be at least 1"),
        ({"expected_column": "right"}, InputError, r"no single column 'right' \(--expected-column\)"),
        ({"expected_column": "image"}, InputError, "it must be strings or integers"),
        ({"checkpoint": ROOT / "tests"}, JobError, "is not a checkpoint"),
        ({"device": "cuda"}, DeviceError, "--device cuda: PyTorch finds no usable GPU"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, error, message, tiny_bundle, tmp_path):
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(error, match=message):
        compare(
            _compare_config(
                tiny_bundle.path, tmp_path / "out", limit=1, **{k: v for k, v in changes.items() if k != "limit"}
            )
        )


def test_an_input_without_rows_is_an_error(tiny_bundle, tmp_path):
    pq.write_table(pq.read_table(QUESTIONS).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(JobError, match="the input is empty"):
        compare(_compare_config(tiny_bundle.path, tmp_path / "out", input=(str(tmp_path / "empty.parquet"),)))


def _trace(tokens, logits=None, text="some words"):
    logits = np.eye(8, dtype=np.float32)[tokens] if logits is None else np.array(logits, np.float32)
    return Trace(text, tokens, [1, 2], np.ones((4, 3), np.float32), logits)


def test_a_difference_is_a_tie_only_if_neither_side_is_sure():
    sure, torn = [[0, 5, 0]], [[0, 5, 4.9995]]
    for reference, candidate, kind in ((torn, torn, "tie"), (sure, torn, "real"), (torn, sure, "real")):
        flipped = [row[:1] + row[:0:-1] for row in candidate]
        measures = Measures.of(_trace([1], reference), _trace([2], flipped), 1.0)
        row = {"error_side": None, **dataclasses.asdict(measures)}
        assert (measures.first_difference, difference(row, 1e-3)) == (0, kind)
    assert measures.reference_margin == pytest.approx(5e-4, abs=1e-5)
    assert measures.answer_margin == 5


def test_margins_are_those_after_the_penalty():
    # Token 1 is in the row: its logit 6 counts as 4.
    measures = Measures.of(_trace([3], [[0, 6, 0, 5]]), _trace([1], [[0, 9, 0, 5]]), 1.5)
    assert (measures.reference_margin, measures.answer_margin) == (1, 1)


def test_measures_follow_the_definitions():
    a, b = _trace([3, 4, 5, 7]), _trace([3, 4, 6, 6, 7], text="some word")
    measures = Measures.of(a, b, 1.0)
    assert (measures.equal, measures.first_difference) == (False, 2)
    assert (measures.reference_token, measures.answer_token) == (5, 6)
    assert measures.token_agreement == 2 / 5
    assert measures.edit_similarity == 0.9
    assert measures.logits_error == measures.decode_error == 1
    assert measures.prefill_error == measures.first_token_kl == measures.vision_error == 0
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 2, 3]) == 2
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.5, 0.25])
    assert divergence(p, q) == pytest.approx(0.25 * math.log(2))
    assert math.isnan(divergence(p, q * np.nan))
    assert cosine(np.array([[1.0, 0]]), np.array([[1.0, 1]])) == pytest.approx(2**-0.5)
    assert state_error(np.array([[1.0, 0], [0, 4]]), np.array([[1.0, 0], [0, 2]])) == 0.5
    assert state_error(np.zeros((2, 2)), np.zeros((3, 2))) == math.inf


def _compared_row(**changes):
    plain = {
        "difference": "equal", "error_side": None, "error_stage": None, "error_type": None, "input_equal": True,
        "token_agreement": 1.0, "edit_similarity": 1.0, "reference_tokens": 4, "answer_tokens": 4, "prompt": "What?",
        "image_width": [600], "image_height": [400], "fit": "letterbox", "expected": "yes", "reference": "yes",
        "answer": "yes", "vision_error": 1e-7, "prefill_error": 1e-7, "decode_error": None, "first_token_kl": 0.0,
        "vision_cosine": 1.0, "layer_error": None, "layer_own_error": None,
    }  # fmt: skip
    return plain | changes


def test_expected_answers_are_judged_on_both_sides_with_mcnemars_test():
    rows = [_compared_row() for _ in range(20)] + [_compared_row(answer="no", difference="real") for _ in range(6)]
    rows += [_compared_row(reference="no", difference="real"), _compared_row(expected=None)]
    expected = summarize(rows, (), BOUNDS)["expected"]
    assert (expected["reference"]["count"], expected["bundle"]["count"], expected["bundle"]["of"]) == (26, 21, 27)
    assert (expected["only_reference_right"], expected["only_bundle_right"]) == (6, 1)
    assert expected["mcnemar_p"] == pytest.approx(2 * 8 / 2**7)
    assert expected["bundle"]["interval"] == pytest.approx([0.592, 0.894], abs=2e-3)
    assert summarize([_compared_row(expected=None)], (), BOUNDS)["expected"] is None


def test_systematic_differences_are_found_by_their_group():
    rows = [_compared_row(prompt=f"prompt {i % 3}", image_width=[400 + i]) for i in range(90)]
    rows += [_compared_row(prompt="odd one", difference="real") for _ in range(10)]
    summary = summarize(rows, (), BOUNDS)
    assert [group["group"] for group in summary["groups"]["prompt"] if group["systematic"]] == ["odd one"]
    assert summary["groups"]["prompt"][0]["share"] == 1
    assert summary["groups"]["fit"] == [
        {"group": "letterbox", "rows": 100, "different": 10, "share": 0.1, "p": 1.0, "systematic": False}
    ]
    assert {group["group"] for group in summary["groups"]["image_size"]} == {
        "square, 257 to 512 px",
        "wide, 257 to 512 px",
        "wide, 513 to 1024 px",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"difference": "real"},
            "1 of 2 answers are equal (50.00%), 50.00 points under --min-agreement 1; 1 really differ",
        ),
        ({"difference": "tie"}, "1 tied within noise"),
        ({"difference": "failed", "error_side": "bundle", "error_stage": "vision", "error_type": "E"}, "1 failed"),
        ({"vision_error": 2e-3}, "vision drifts by 2.0e-03, over --max-drift 0.001"),
        ({"prefill_error": math.nan}, "prefill drifts by nan"),
        ({"decode_error": math.inf}, "decode drifts by inf"),
        ({"input_equal": False}, "1 rows have different token ids"),
    ],
)
def test_every_way_to_fail_is_a_reason(changes, reason):
    verdict = summarize([_compared_row(), _compared_row(**changes)], (), BOUNDS)["verdict"]
    assert not verdict["passed"]
    assert reason in verdict["reasons"][0]
    assert summarize([_compared_row(), _compared_row()], (), BOUNDS)["verdict"]["passed"]


def test_a_median_is_the_mean_of_the_middle_two():
    rows = [_compared_row(vision_error=error, layer_error=[error], layer_own_error=[error]) for error in (1e-7, 3e-7)]
    summary = summarize(rows, ("a",), BOUNDS)
    assert summary["drift"]["vision"]["median"] == summary["layers"]["depths"][0]["own"]["median"] == 2e-7
    endless = summarize([_compared_row(vision_error=error) for error in (1.0, math.nan, math.nan)], (), BOUNDS)
    assert endless["drift"]["vision"] == {"rows": 3, "min": 1.0, "median": "inf", "max": "nan"}


def test_a_layer_that_gives_no_numbers_is_the_worst():
    rows = [_compared_row(layer_error=[0.0, math.nan, 2.0], layer_own_error=[0.0, math.nan, 1e-9])]
    layers = summarize(rows, ("a", "b", "c"), BOUNDS)["layers"]
    assert (layers["begins_at"], layers["largest_own_error"]) == ("b", "b")
    json.dumps(layers, allow_nan=False)


def test_the_checkpoint_may_be_another_than_the_bundles(tiny_bundle, tmp_path):
    other = make_checkpoint(tmp_path / "other", text={}, vision={})
    said = []
    outcome = compare(_compare_config(tiny_bundle.path, tmp_path / "out", checkpoint=other, limit=2), say=said.append)
    assert not outcome.passed
    assert any("exported from another checkpoint" in line for line in said)
    assert (
        load_checkpoint(other).source.sha256
        == outcome.summary["reference"]["sha256"]
        != Bundle.load(tiny_bundle.path).manifest.source.sha256
    )
