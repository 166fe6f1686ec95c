"""What tools that quantize are fed: a user's own rows, as the job lays them out."""

import json

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answers import complete, demo_rows, requests_of
from conftest import CONVERSATIONS, QUESTIONS

from export import calibration
from export.calibration import CalibrationConfig, CalibrationReader, calibrate
from qvl_batch.bundle.manifest import DECODER_FULL
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.errors import ConfigError, InputError, JobError


def _config(bundle, output, source=QUESTIONS, **options):
    return CalibrationConfig(bundle=bundle.path, input=(str(source),), output=str(output), **options)


def _feeds(folder, graph="decoder"):
    return list(iter(CalibrationReader(folder, graph).get_next, None))


def test_the_plain_graph_answers_the_files_as_the_job_answers_the_rows(tiny_bundle, tmp_path):
    assert calibrate(_config(tiny_bundle, tmp_path, limit=4)) == 4
    session = ort.InferenceSession(tiny_bundle.file(DECODER_FULL))
    found = [int(session.run(None, feeds)[0][0, -1].argmax()) for feeds in _feeds(tmp_path)]
    decoder = Decoder(tiny_bundle, slots=4, threads=2)
    expected = complete(decoder, tiny_bundle, requests_of(tiny_bundle, demo_rows(4), 1))
    assert found == [each.token_ids[0] for each in expected]
    assert [feeds["pixels"].shape for feeds in _feeds(tmp_path, "vision")] == [(1, 672, 672, 3)] * 4


def test_conversations_have_the_positions_of_their_images(native_bundle, tmp_path):
    options = {"messages_column": "messages", "source": CONVERSATIONS}
    assert calibrate(_config(native_bundle, tmp_path, limit=10, **options)) == 10
    index = json.loads((tmp_path / "calibration.json").read_text())
    session = ort.InferenceSession(native_bundle.file(DECODER_FULL))
    for row, feeds in zip(index["rows"], _feeds(tmp_path), strict=True):
        tokens = sum(np.load(tmp_path / name)["pixels"][0, ..., 0].size for name in row["vision"]) // 28**2
        assert np.abs(feeds["image_embeds"]).any(-1).sum() == tokens
        assert feeds["position_ids"].shape == (3, *feeds["input_ids"].shape)
        assert np.isfinite(session.run(None, feeds)[0]).all()
    assert sum(len(row["vision"]) for row in index["rows"]) == len(_feeds(tmp_path, "vision")) > 10


def test_rows_come_in_order_and_those_that_fail_are_left_out_and_named(tiny_bundle, demo, tmp_path):
    rows = [demo[0], demo[1] | {"image": {"bytes": b"no image", "path": None}}, demo[2] | {"prompt": " "}, demo[3]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    said = []
    assert calibrate(_config(tiny_bundle, tmp_path / "out", tmp_path / "rows.parquet"), said.append) == 2
    index = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert index["bundle"] == tiny_bundle.sha256
    assert [(row["id"], row["row"], row["decoder"]) for row in index["rows"]] == [
        (demo[0]["id"], 0, "decoder/000000.npz"), (demo[3]["id"], 3, "decoder/000001.npz")
    ]  # fmt: skip
    assert [(row["id"], row["stage"]) for row in index["left_out"]] == [
        (demo[1]["id"], "image"),
        (demo[2]["id"], "layout"),
    ]
    assert said[0].startswith(f"left out  2 rows; the first, {demo[1]['id']}: ImageError: ")


def test_rows_can_be_padded_to_one_length(tiny_bundle, tmp_path):
    assert calibrate(_config(tiny_bundle, tmp_path / "own", limit=6)) == 6
    lengths = [feeds["input_ids"].shape[1] for feeds in _feeds(tmp_path / "own")]
    most = sorted(lengths)[-2]
    longer = sum(length > most for length in lengths)
    assert longer
    assert calibrate(_config(tiny_bundle, tmp_path / "padded", limit=6, pad_to=most)) == 6 - longer
    session = ort.InferenceSession(tiny_bundle.file(DECODER_FULL))
    own = [feeds for feeds in _feeds(tmp_path / "own") if feeds["input_ids"].shape[1] <= most]
    for feeds, padded in zip(own, _feeds(tmp_path / "padded"), strict=True):
        length = feeds["input_ids"].shape[1]
        assert padded["input_ids"].shape == (1, most)
        assert padded["attention_mask"].sum() == length
        expected, found = session.run(None, feeds)[0], session.run(None, padded)[0][:, :length]
        assert np.abs(found - expected).max() < 1e-4


def test_a_reader_can_begin_again(tiny_bundle, tmp_path):
    calibrate(_config(tiny_bundle, tmp_path, limit=3))
    reader = CalibrationReader(tmp_path, rows=2)
    assert len(reader) == 2
    first = reader.get_next()
    assert reader.get_next() is not None
    assert reader.get_next() is None
    reader.rewind()
    assert np.array_equal(reader.get_next()["input_ids"], first["input_ids"])


def test_what_cannot_be_used_is_one_line(tiny_bundle, demo, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["calibration", str(tiny_bundle.path), "--input", "nowhere", "--output", str(output)]
    )
    assert calibration.main() == 1
    assert capsys.readouterr().err.startswith("calibration: --input nowhere: no file found that ends in .parquet, ")
    assert not output.exists()
    calibrate(_config(tiny_bundle, output, limit=1))
    with pytest.raises(ConfigError, match=r"holds a calibration already: give another one, or --overwrite"):
        calibrate(_config(tiny_bundle, output, limit=1))
    (output / "mine.txt").write_text("stays")
    assert calibrate(_config(tiny_bundle, output, limit=2, overwrite=True)) == 2
    assert (output / "mine.txt").exists()
    with pytest.raises(ConfigError, match="--pad-to must be at least 1, not 0"):
        _config(tiny_bundle, output, pad_to=0)
    pq.write_table(pa.Table.from_pylist([demo[0] | {"prompt": ""}]), tmp_path / "rows.parquet")
    with pytest.raises(JobError, match="none of the 1 rows can be used: there is nothing to calibrate on"):
        calibrate(_config(tiny_bundle, tmp_path / "other", tmp_path / "rows.parquet"))
    with pytest.raises(InputError, match=r"has no calibration.json: make one with `python -m export.calibration`"):
        CalibrationReader(tmp_path)
