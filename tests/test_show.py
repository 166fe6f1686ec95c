"""Answers are printed as they are, whatever they hold, and counted right."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import show

PROMPTS = ("Is this [/INST] ok?", "Answer with [yes] or [no]", ":fire:", "\x1b[31mred\x00")


def _text(*values):
    """Strings of which nothing says that they are UTF-8."""
    return pa.array(values, pa.binary()).view(pa.string())


def _print(monkeypatch, capsys, answers, *options):
    monkeypatch.setattr(sys, "argv", ["show.py", str(answers), *options])
    monkeypatch.setenv("COLUMNS", "200")
    status = show.main()
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def _write_part(folder, **columns):
    rows = len(columns["answer"])
    plain = {"id": [f"row-{at}" for at in range(rows)], "error_type": pa.nulls(rows), "error_message": pa.nulls(rows)}
    pq.write_table(pa.table(plain | columns), folder / "part-000000-000000000000.parquet")


def test_cells_are_text_and_no_markup(tmp_path, monkeypatch, capsys):
    far = pa.array([2**50] * 4, pa.timestamp("ms"))
    _write_part(
        tmp_path,
        id=_text(b"[a]", b"b", b"\xff", b"d"),
        prompt=PROMPTS,
        answer=_text(b"[b]", b"\xff!", b"", b":x:"),
        at=far,
    )
    status, out, _ = _print(monkeypatch, capsys, tmp_path)
    assert status == 0
    shown = [*PROMPTS[:3], "\u241b[31mred\u2400", "[a]", "[b]", "\ufffd!"]
    assert [text for text in shown if text not in out] == []
    assert "\x1b" not in out
    assert "expected" not in out


@pytest.mark.parametrize(
    "expected",
    [
        pa.array([2, None, 3]),
        pa.array(["2", None, "3"]),
        pa.array(["2", None, "3"]).dictionary_encode(),
        pa.array(["2", None, "3"], pa.string_view()),
    ],
)
def test_only_rows_with_an_expected_answer_are_judged_and_as_text(expected, tmp_path, monkeypatch, capsys):
    _write_part(tmp_path, answer=["2", "5", "4"], expected=expected)
    _, out, _ = _print(monkeypatch, capsys, tmp_path)
    assert "1 of 2 answers match what was expected (50.0%)" in out
    assert (out.count("✓"), out.count("✗"), out.count("None")) == (1, 1, 0)


def test_answers_that_abstain_say_so_and_are_counted_apart(tmp_path, monkeypatch, capsys):
    reasons = ["stop", "abstain", "abstain", "stop"]
    columns = {"answer": ["2", "5", "4", "7"], "expected": ["2", "5", "3", None], "finish_reason": reasons}
    _write_part(tmp_path, **columns)
    _, out, _ = _print(monkeypatch, capsys, tmp_path)
    assert "2 of 3 answers match what was expected (66.7%)" in out
    assert "2 abstain; of the others, 1 of 1 match (100.0%)" in out
    assert "5 (abstains)" in out
    _write_part(tmp_path, **columns | {"finish_reason": ["abstain"] * 4})
    assert "3 abstain; of the others, 0 of 0 match\n" in _print(monkeypatch, capsys, tmp_path)[1]
    _write_part(tmp_path, **columns | {"finish_reason": ["stop"] * 4})
    assert "abstain;" not in _print(monkeypatch, capsys, tmp_path)[1]


def test_a_column_of_the_name_that_holds_no_text_is_not_shown(tmp_path, monkeypatch, capsys):
    _write_part(tmp_path, answer=["2", None], expected=[["2", "two"], ["3"]], error_type=[None, "ImageError"])
    status, out, _ = _print(monkeypatch, capsys, tmp_path)
    assert status == 0
    assert "expected" not in out
    assert "(ImageError: None)" in out


def test_what_cannot_be_shown_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    assert _print(monkeypatch, capsys, tmp_path, "--rows", "-1")[2] == "show: --rows must be at least 0, not -1\n"
    assert _print(monkeypatch, capsys, tmp_path) == (1, "", f"show: {tmp_path} holds no answers\n")
    (tmp_path / "part-000000-000000000000.parquet").write_bytes(b"PAR1")
    status, _, err = _print(monkeypatch, capsys, tmp_path)
    assert status == 1
    assert err.startswith(f"show: {tmp_path} cannot be read: ")


def test_fields_of_json_are_columns_and_wrong_ones_say_what_was_expected(tmp_path, monkeypatch, capsys):
    right, other = '{"kind":"star","on":["a","b"],"n":1}', '{"kind":"[b]","on":[],"n":1}'
    _write_part(
        tmp_path,
        prompt=["Say: [a]"] * 4,
        answer=[right, other, right, None],
        parsed=[*map(json.loads, (right, other, right)), None],
        # To the letter; another; the same in another order.
        expected=[right, '{"n": 1, "kind": "cross", "on": []}', '{"n": 1, "on": ["a", "b"], "kind": "star"}', None],
        confidence=[0.987, 0.5, 1.0, None],
        error_type=[None] * 3 + ["ImageError"],
    )
    status, out, _ = _print(monkeypatch, capsys, tmp_path)
    assert status == 0
    assert out.startswith("Say: [a]\n┏")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│ row")]
    assert cells == [
        ["row-0", "star", "a, b", "1", "0.99", "✓"],
        ["row-1", "[b], not cross", "", "1", "0.50", "✗"],
        ["row-2", "star", "a, b", "1", "1.00", "✓"],
        ["row-3", "(ImageError: None)", "", "", "", ""],
    ]
    assert "2 of 3 answers match what was expected (66.7%)\nof 3, right in kind 2, on 3, n 3\n" in out


def test_expected_text_stays_a_column_beside_fields(tmp_path, monkeypatch, capsys):
    answer = '{"kind":"star"}'
    _write_part(tmp_path, answer=[answer] * 2, parsed=[{"kind": "star"}] * 2, expected=["star", answer])
    _, out, _ = _print(monkeypatch, capsys, tmp_path)
    (header,) = (line for line in out.splitlines() if line.startswith("┃"))
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == ["id", "prompt", "kind", "expected", ""]
    assert "1 of 2 answers match" in out
    assert "of 1, right in kind 1" in out
