"""An output folder holds the answers of one job, each once, and a job knows what is left to do."""

import json
import multiprocessing
import os
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from output_folders import FILES, JOB_OF_FILES, SCHEMA, answers_to, read_answers

from qvl_batch.columns import FILE, ROW, with_columns
from qvl_batch.errors import OutputError
from qvl_batch.output.local_folder import PARTIAL, LocalFolder
from qvl_batch.output.locks import LOCK
from qvl_batch.output.parts import PartRecord, read_part
from qvl_batch.output.resume import JOB, REPORT, RUN, Job, OutputFolder
from qvl_batch.output.writer import AnswerWriter
from qvl_batch.rows import InputFile
from qvl_batch.schema import ID


def _open(path, job=JOB_OF_FILES, *, overwrite=False, retry=None):
    return OutputFolder(LocalFolder(path), job, SCHEMA, overwrite=overwrite, retry=retry)


def _write_answers(folder, *tables):
    with AnswerWriter(folder.folder, SCHEMA) as writer:
        for table in tables:
            writer.add(table)


def _left(folder):
    return [(file, span) for file, rows in enumerate((6, 5)) for span in folder.done.missing(file, 0, rows)]


@pytest.mark.parametrize("limit", ["ROWS_PER_FILE", "BYTES_PER_FILE"])
def test_answers_that_are_enough_for_a_file_are_written_at_once(limit, tmp_path, monkeypatch):
    enough = {"ROWS_PER_FILE": 3, "BYTES_PER_FILE": answers_to((0, 0), (0, 1)).nbytes + 1}
    monkeypatch.setattr(f"qvl_batch.output.writer.{limit}", enough[limit])
    with _open(tmp_path) as folder, AnswerWriter(folder.folder, SCHEMA) as writer:
        writer.add(answers_to((0, 0), (0, 1)))
        assert not list(tmp_path.glob("part-*"))
        writer.add(answers_to((0, 2), (0, 3)))
        assert len(_finish_reasons(tmp_path)) == 4


def test_answers_are_written_in_time_when_no_other_comes(tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_batch.output.writer.SECONDS_PER_FILE", 0.01)
    with _open(tmp_path) as folder, AnswerWriter(folder.folder, SCHEMA) as writer:
        for row in range(2):
            writer.add(answers_to((0, row)))
            while len(list(tmp_path.glob("part-*"))) == row:
                time.sleep(0.001)
        assert len(_finish_reasons(tmp_path)) == 2


def test_what_could_not_be_written_in_time_ends_the_job_at_the_next_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_batch.output.writer.SECONDS_PER_FILE", 0.01)
    before = set(threading.enumerate())
    with _open(tmp_path) as folder, AnswerWriter(folder.folder, SCHEMA) as writer:
        monkeypatch.setattr("qvl_batch.output.local_folder.os.fsync", _full)
        writer.add(answers_to((0, 1)))
        for thread in set(threading.enumerate()) - before:
            thread.join()
        monkeypatch.undo()
        with pytest.raises(OutputError, match="No space left"):
            writer.add(answers_to((0, 2)))
    assert len(_finish_reasons(tmp_path)) == 2  # there is room again


def test_a_file_that_arrow_cannot_make_is_named(tmp_path):
    other = answers_to((0, 3)).set_column(2, ID, pa.array(["x"]))
    for tables in ([answers_to((1, 0)), other], [other]):  # that cannot be joined, or are of another type
        with pytest.raises(OutputError, match=r"/part-000000-000000000003.parquet cannot be made: .*--keep-columns"):
            _write_answers(_open(tmp_path), *tables)


def test_what_was_answered_is_known_when_a_job_goes_on(tmp_path):
    with _open(tmp_path / "out") as folder:
        assert (folder.done.count, folder.tally.rows) == (0, 0)
        _write_answers(folder, answers_to((1, 0), (0, 3), (0, 1)), answers_to((0, 2)))
    with _open(tmp_path / "out") as folder:
        assert _left(folder) == [(0, (0, 1)), (0, (4, 6)), (1, (1, 5))]
        assert folder.tally.rows == folder.done.count == 4
        assert folder.tally.finish_reasons == {"stop": 2, "error": 2}
        assert folder.tally.errors == {"image: E": 2}
        assert folder.tally.answer_tokens == 4
        _write_answers(folder, answers_to((0, 0)))
        _write_answers(folder, answers_to((0, 4), (0, 5), *((1, row) for row in range(1, 5))))
    with _open(tmp_path / "out") as folder:
        assert (_left(folder), folder.tally.rows) == ([], 11)
    names = sorted(path.name for path in (tmp_path / "out").glob("part-*"))
    assert names == [f"part-000000-{row:012d}.parquet" for row in (0, 1, 4)]
    table = read_answers(tmp_path / "out")
    assert table.schema.names == SCHEMA.names
    assert table.num_rows == 11


def test_files_that_were_added_are_work_left(tmp_path):
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to((1, 4)))
    more = Job(JOB_OF_FILES.settings, (*FILES, InputFile("/in/0.parquet", 5, 2, "0")))
    with _open(tmp_path, more) as folder:
        assert folder.done.missing(2, 0, 2) == [(0, 2)]
        assert folder.done.missing(1, 0, 5) == [(0, 4)]
    assert Job.of(LocalFolder(tmp_path)) == more


def _finish_reasons(path):
    folder = LocalFolder(path)
    tables = [
        with_columns(read_part(folder, name), PartRecord.read(folder, name).places()) for name in folder.names("part-*")
    ]
    return {(row[FILE], row[ROW]): row["finish_reason"] for table in tables for row in table.to_pylist()}


def test_rows_that_failed_are_answered_again_in_their_place(tmp_path):
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to(*((0, row) for row in range(6)), (1, 1), (1, 2)))
        _write_answers(folder, answers_to((1, 3), (1, 4)))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("part-*")}
    with _open(tmp_path, retry=(6, 5)) as folder:
        assert _left(folder) == [(0, (0, 1)), (0, (2, 3)), (0, (4, 5)), (1, (0, 1)), (1, (2, 3)), (1, (4, 5))]
        assert folder.tally.finish_reasons == {"stop": 5}
        assert folder.tally.rows == folder.done.count == 5
        with AnswerWriter(folder.folder, SCHEMA, folder.failed) as writer:
            again = answers_to((0, 2), (1, 2), (0, 0), (1, 0))
            right = pa.array(["yes", None, "yes", None]), pa.array(["stop", "error", "stop", "error"])
            for name, column in zip(("answer", "finish_reason"), right, strict=True):
                again = again.set_column(again.schema.get_field_index(name), name, column)
            writer.add(again)
    found = _finish_reasons(tmp_path)
    assert len(found) == 11
    assert {place for place, reason in found.items() if reason == "error"} == {(0, 4), (1, 0), (1, 2), (1, 4)}
    names = {path.name for path in tmp_path.glob("part-*")}
    assert names == {*before, "part-000001-000000000000.parquet"}
    (untouched,) = (name for name, data in before.items() if (tmp_path / name).read_bytes() == data)
    assert untouched == "part-000001-000000000003.parquet"
    with _open(tmp_path) as folder:
        assert (_left(folder), folder.tally.rows) == ([], 11)
        assert folder.tally.finish_reasons == {"stop": 7, "error": 4}
        assert folder.failed == {}
    for path in tmp_path.glob("part-*"):
        table = pq.read_table(path)
        assert table["id"].to_pylist() == PartRecord.read(LocalFolder(path.parent), path.name).places()[ROW].to_pylist()


def test_errors_of_rows_that_a_limit_leaves_out_stay(tmp_path):
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to(*((0, row) for row in range(6)), *((1, row) for row in range(5))))
    with _open(tmp_path, retry=(6, 1)) as folder:
        assert _left(folder) == [(0, (0, 1)), (0, (2, 3)), (0, (4, 5)), (1, (0, 1))]
        assert sorted(folder.failed) == [(0, 0), (0, 2), (0, 4), (1, 0)]
        assert folder.tally.finish_reasons == {"stop": 5, "error": 2}
        assert folder.tally.rows == folder.done.count == 7
    with _open(tmp_path, retry=(0, 0)) as folder:
        assert (_left(folder), folder.failed, folder.tally.rows) == ([], {}, 11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bundle": "xyz"}, 'with another bundle ("abc" there, "xyz" now)'),
        ({"--fit": "stretch"}, 'with another --fit ("crop" there, "stretch" now)'),
        ({"--keep-columns": []}, 'with another --keep-columns (["x"] there, [] now)'),
        ({"--new": 1}, "with another --new (null there, 1 now)"),
    ],
)
def test_answers_of_another_job_are_not_added_to(settings, message, tmp_path):
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to((1, 4)))
    other = Job(JOB_OF_FILES.settings | settings, FILES)
    with pytest.raises(OutputError) as refused, _open(tmp_path, other):
        pass
    assert message in str(refused.value)
    assert "--overwrite" in str(refused.value)
    with _open(tmp_path) as folder:
        assert folder.done.count == 1
    with _open(tmp_path, other, overwrite=True) as folder:
        assert folder.done.count == 0
    assert not list(tmp_path.glob("part-*"))


def test_answers_without_a_job_are_refused_and_kept(tmp_path):
    (tmp_path / "part-000000-000000000000.parquet").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"no _job.json that says which job they belong to: give another --output$"):
        Job.of(LocalFolder(tmp_path))
    with pytest.raises(OutputError, match="no _job"), _open(tmp_path):
        pass
    assert (tmp_path / "part-000000-000000000000.parquet").read_bytes() == b"precious"


@pytest.mark.parametrize("text", ["", "{}", '{"format": 4}', '{"format": 4, "settings": {}, "files": [1]}', "[]"])
def test_a_job_that_cannot_be_read_is_named(text, tmp_path):
    (tmp_path / JOB).write_text(text)
    with pytest.raises(OutputError, match=r"_job.json cannot be read: .*--overwrite"):
        Job.of(LocalFolder(tmp_path))


def test_a_job_of_another_version_is_named(tmp_path):
    (tmp_path / JOB).write_text('{"format": 1}')
    with pytest.raises(OutputError, match="was written by another version"):
        Job.of(LocalFolder(tmp_path))


def test_what_a_killed_job_left_is_swept_up(tmp_path):
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to((1, 4)))
    (tmp_path / f"{PARTIAL}123-part-000000-000000000001.parquet").write_bytes(b"half")
    with _open(tmp_path) as folder:
        assert folder.done.count == 1
    assert not list(tmp_path.glob(f"{PARTIAL}*"))


def _damage(path):
    data = bytearray(path.read_bytes())
    data[-20:] = bytes(20)
    path.write_bytes(data)


def _foreign(path):
    pq.write_table(pa.table({"a": [1]}), path)


def _twice(path):
    path.with_name("part-copy.parquet").write_bytes(path.read_bytes())


def _rows_beyond(path):
    table = pq.read_table(path)
    record = PartRecord({1: [(3, 9)]}, PartRecord.read(LocalFolder(path.parent), path.name).tally)
    pq.write_table(table.replace_schema_metadata({b"qvl_batch": record.footer()}), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_damage, "is damaged, or not a file of answers"),
        (_foreign, "is damaged, or not a file of answers"),
        (_twice, "answers 1 rows that another file answers too"),
        (_rows_beyond, "which the input does not have"),
    ],
)
def test_answers_that_cannot_be_right_are_named(damage, message, tmp_path):
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to((1, 4)))
    (part,) = tmp_path.glob("part-*")
    damage(part)
    with pytest.raises(OutputError, match=message) as refused, _open(tmp_path):
        pass
    assert "part-" in str(refused.value)


@pytest.mark.parametrize("damage", [_damage, _foreign])
def test_what_are_no_answers_is_not_overwritten(damage, tmp_path):
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to((1, 3)))
        _write_answers(folder, answers_to((1, 4)))
    damage(tmp_path / "part-000001-000000000004.parquet")
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"part-000001-0{11}4.parquet is damaged, or not a file of answers, and"):
        _open(tmp_path, overwrite=True).__enter__()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    (tmp_path / "part-000001-000000000004.parquet").unlink()
    with _open(tmp_path, overwrite=True):
        assert {path.name for path in tmp_path.iterdir()} == {JOB, LOCK}


def _hold(path, ready, done):
    with _open(path):
        ready.set()
        done.wait(30)
        os.kill(os.getpid(), 9)


def test_a_folder_is_one_jobs_until_it_ends_however_it_ends(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, done))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(OutputError, match=rf"another job is writing to .* \(process {holder.pid} on "), _open(tmp_path):
        pass
    with pytest.raises(OutputError, match="another job"), _open(tmp_path, overwrite=True):
        pass
    done.set()
    holder.join(30)
    assert holder.exitcode == -9
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to((1, 4)))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        assert Job.of(LocalFolder(path)) is None
        with pytest.raises(OutputError, match=r"file.* cannot be written"), _open(path):
            pass


def test_an_input_without_rows_has_a_table_without_rows(tmp_path):
    empty = Job({}, (InputFile("/in/a.parquet", 1, 0, "a"),))
    for _ in range(2):
        with _open(tmp_path, empty) as folder:
            assert folder.done.count == 0
            folder.write_none()
            folder.write_report({"rows": np.int64(0).item()}, "<p>none</p>")
    (part,) = tmp_path.glob("part-*")
    assert pq.read_table(part).schema.names == SCHEMA.names
    assert json.loads((tmp_path / RUN).read_text()) == {"rows": 0}
    assert {path.name for path in tmp_path.iterdir()} == {part.name, JOB, RUN, REPORT, LOCK}
    assert pq.read_table(tmp_path).schema.names == SCHEMA.names  # all else in the folder is passed over


#: Of a run that answered one row, with an error.
COUNTS = {"rows": 1, "finish_reasons": {"error": 1}, "errors": {"image: E": 1}}


@pytest.mark.parametrize("other", [{"rows": 2}, {"finish_reasons": {"stop": 1}}, {"errors": {"read: E": 1}}, {}])
def test_a_report_of_other_answers_is_none(other, tmp_path):
    with _open(tmp_path) as folder:
        _write_answers(folder, answers_to((1, 4)))
    with _open(tmp_path) as folder:
        folder.write_report(COUNTS | other, "")
        assert folder.reported() == (not other)


def test_a_report_is_of_the_answers_that_are_there_and_goes_with_them(tmp_path):
    with _open(tmp_path) as folder:
        assert not folder.reported()
        _write_answers(folder, answers_to((1, 4)))
    bins = {"seconds_per_bin": 0.25, "rows": [0, 1, 20], "shares": [0.5, -1e-3], "none": []}
    record = COUNTS | {"timeline": bins, "text": "[\n 1,\n 2\n]", "names": ["a", "b"]}
    with _open(tmp_path) as folder:
        assert not folder.reported()
        # A folder whose name is no UTF-8 can be told all the same.
        folder.write_report(record, "of /data/\udcff")
        assert folder.reported()
    assert (tmp_path / REPORT).read_bytes() == b"of /data/?"
    assert json.loads((tmp_path / RUN).read_text()) == record
    assert '"rows": [0, 1, 20],\n' in (tmp_path / RUN).read_text()
    with _open(tmp_path) as folder:
        assert folder.reported()
        _write_answers(folder, answers_to((1, 3)))
    # Its run was killed before it could write another.
    with _open(tmp_path) as folder:
        assert not folder.reported()
    with _open(tmp_path, overwrite=True):
        assert {path.name for path in tmp_path.iterdir()} == {JOB, LOCK}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_report_of_something_else_is_refused_and_kept(overwrite, tmp_path):
    (tmp_path / REPORT).write_text("precious")
    with pytest.raises(OutputError, match=r"report.html belongs to no job"), _open(tmp_path, overwrite=overwrite):
        pass
    assert (tmp_path / REPORT).read_text() == "precious"


def _full(*_):
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_stops_the_job_with_a_line(tmp_path, monkeypatch):
    with _open(tmp_path) as folder:
        monkeypatch.setattr("qvl_batch.output.local_folder.os.fsync", _full)
        with pytest.raises(OutputError, match="cannot be written: No space left on device"):
            _write_answers(folder, answers_to((1, 4)))
        with pytest.raises(OutputError, match="cannot be written: No space left on device"):
            folder.write_report({"rows": 0}, "")
    assert {path.name for path in tmp_path.iterdir()} == {JOB, LOCK}
    monkeypatch.undo()
    with _open(tmp_path) as folder:
        assert folder.done.count == 0
