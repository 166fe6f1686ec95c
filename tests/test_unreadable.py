"""What could not be read is listed, all of it and nothing else, over all runs of a job."""

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from output_folders import FILES, JOB_OF_FILES, SCHEMA, answers_to
from reading import caption_config, read_rows
from test_compaction import Failing, KilledError
from test_storage import _store

from qvl_batch.columns import COLUMNS, LOCATIONS, located
from qvl_batch.errors import OutputError
from qvl_batch.input.addresses import without_access
from qvl_batch.input.source import open_source
from qvl_batch.output import unreadable
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.resume import JOB, REPORT, Job, OutputFolder
from qvl_batch.output.unreadable import SHOWN, UNREADABLE
from qvl_batch.output.writer import AnswerWriter
from qvl_batch.rows import InputFile
from qvl_batch.schema import LOCATION_FIELD

NAMES = ["id", "file", "row", "error_location", "error_stage", "error_type", "error_message"]


@pytest.fixture(params=["local", "store"])
def place(request, tmp_path):
    name = tmp_path.name
    return (
        (lambda: LocalFolder(tmp_path / "out"))
        if request.param == "local"
        else (lambda: _store(f"memory://{name}/out", renewal=10.0))
    )


def _open(folder, job=JOB_OF_FILES, *, overwrite=False, retry=None):
    return OutputFolder(folder, job, SCHEMA, overwrite=overwrite, retry=retry)


def _write(output, *tables):
    with AnswerWriter(output.folder, SCHEMA, output.failed, output.notes) as writer:
        for table in tables:
            writer.add(table)
            writer.flush()


def _with(table, **columns):
    """A table of answers with other values of some columns."""
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.field(at), pa.array(values, table.field(at).type))
    return table


def _listed(folder):
    """The list, None if there is none."""
    try:
        with folder.open(UNREADABLE) as file:
            table = pq.read_table(file)
    except FileNotFoundError:
        return None
    assert table.column_names == NAMES
    return table.to_pylist()


def _mended(*rows):
    nothing = [None] * len(rows)
    table = _with(answers_to(*rows), answer=["yes"] * len(rows), finish_reason=["stop"] * len(rows))
    return _with(table, error_stage=nothing, error_type=nothing, error_message=nothing, error_location=nothing)


def test_rows_that_could_not_be_read_are_listed_with_their_place_and_image(place):
    with _open(place()) as output:
        stages = ["image", "read", None, "vision", None, "layout"]
        rows = answers_to(*((0, row) for row in range(6)))
        failed = {"finish_reason": "error", "error_type": "E", "error_message": "m"}
        failed = {name: [value if stage else None for stage in stages] for name, value in failed.items()}
        _write(output, _with(rows, error_stage=stages, **failed), answers_to((1, 3), (1, 4)))
        found = output.write_list()
        assert output.listed()
    assert _listed(place()) == [
        {
            "id": row, "file": f"/in/{name}.parquet", "row": row, "error_location": location,
            "error_stage": stage, "error_type": "E", "error_message": "m",
        }
        for name, row, location, stage in [
            ("a", 0, "/images/0.jpg", "image"),
            ("a", 1, None, "read"),
            ("b", 4, "/images/4.jpg", "image"),
        ]
    ]  # fmt: skip
    assert (found.rows, list(found.first)) == (3, _listed(place()))
    assert found.record() == {"rows": 3, "list": UNREADABLE, "first": _listed(place())}


def test_the_list_is_of_all_runs_and_mended_rows_leave_it(place):
    with _open(place()) as output:
        output.begin()
        _write(output, answers_to((0, 0), (0, 1)), answers_to((0, 2), (1, 0)))
        output.write_list()
        assert [(row["file"], row["row"]) for row in _listed(place())] == [
            ("/in/a.parquet", 0), ("/in/a.parquet", 2), ("/in/b.parquet", 0)
        ]  # fmt: skip
    added = Job(JOB_OF_FILES.settings, (*FILES, InputFile("/in/0.parquet", 5, 3, "0")))
    with _open(place(), added) as output:
        output.begin()
        assert _listed(place()) is None  # while a job runs, none could be right
        _write(output, answers_to((2, 0), (2, 1)), answers_to((0, 4)))
        output.write_list()
    rows = [(FILES[0].path, 0), (FILES[0].path, 2), (FILES[0].path, 4), (FILES[1].path, 0), ("/in/0.parquet", 0)]
    assert sorted((row["file"], row["row"]) for row in _listed(place())) == sorted(rows)
    with _open(place(), added, retry=(6, 5, 3)) as output:
        output.begin()
        _write(output, _mended((0, 0), (2, 0)), answers_to((0, 2)))
        output.write_list()
    assert sorted((row["file"], row["row"]) for row in _listed(place())) == sorted(rows[1:4])
    with _open(place(), added, retry=(6, 5, 3)) as output:
        output.begin()
        _write(output, _mended((0, 2), (0, 4), (1, 0)))
        assert output.write_list().record() == {"rows": 0, "list": None, "first": []}
        assert output.listed()
    assert _listed(place()) is None


def _retry(folder):
    with _open(folder, retry=(6, 5)) as output:
        output.begin()
        _write(output, _mended((0, 0)), answers_to((0, 4)))
        output.write_list()
        output.folder.write("the report", b"")


@pytest.mark.parametrize("happens", [False, True])
@pytest.mark.parametrize("at", range(1, 6))
def test_after_a_crash_there_is_no_list_or_the_right_one(at, happens, place):
    with _open(place()) as output:
        _write(output, answers_to((0, 0), (0, 2)))
        output.write_list()
    with pytest.raises(KilledError):
        _retry(Failing(place(), at, KilledError(), happens=happens))
    is_right = None
    with _open(place()) as output:
        if _listed(place()) is not None:
            is_right = _listed(place())
            assert output.listed()
        else:
            assert not output.listed()
        output.write_list()
    assert is_right in (None, _listed(place()))


def test_without_such_rows_there_is_no_list(place):
    with _open(place()) as output:
        _write(output, answers_to((0, 1), (0, 3)))
        assert output.listed()
        assert output.write_list().rows == 0
        assert output.listed()
    assert _listed(place()) is None


def test_a_folder_that_can_only_be_added_to_is_not_asked_to_remove_what_is_not_there(place, monkeypatch):
    with _open(place()) as output:
        monkeypatch.setattr(type(output.folder), "remove", None)
        output.begin()
        _write(output, answers_to((0, 1)))
        output.write_list()
        _write(output, answers_to((0, 0)))
        assert output.write_list().rows == 1
        monkeypatch.undo()
    assert len(_listed(place())) == 1


def test_overwriting_removes_the_list_and_another_file_of_its_name_is_kept(place):
    with _open(place()) as output:
        _write(output, answers_to((0, 0)))
        output.write_list()
    with _open(place(), overwrite=True) as output:
        assert _listed(place()) is None
        assert output.folder.names(JOB) == [JOB]
        output.folder.remove(JOB)
        output.folder.write(UNREADABLE, b"precious")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"_unreadable.parquet belongs to no job"):
            _open(place(), overwrite=overwrite).__enter__()
    assert place().read(UNREADABLE) == b"precious"
    assert place().names(REPORT) == []


def test_only_parts_with_such_rows_are_read_and_only_the_columns_that_are_needed(tmp_path, monkeypatch):
    asked = []
    opened = LocalFolder.open
    monkeypatch.setattr(LocalFolder, "open", lambda folder, name: asked.append(name) or opened(folder, name))
    with _open(LocalFolder(tmp_path)) as output:
        _write(output, answers_to((0, 1)), answers_to((0, 2)), answers_to((0, 3)))
        asked.clear()
        monkeypatch.setattr(LocalFolder, "read", None)
        output.write_list()
    assert asked == ["part-000000-000000000002.parquet"]


def test_a_long_list_is_whole_and_its_report_short(tmp_path, monkeypatch):
    monkeypatch.setattr(unreadable, "GROUP_ROWS", 64)
    job = Job({}, (InputFile("/in/a.parquet", 1, 1_000, "a"),))
    long = "/images/" + "x" * 3_000
    with _open(LocalFolder(tmp_path), job) as output:
        for start in range(0, 1_000, 50):
            rows = answers_to(*((0, row) for row in range(start, start + 50)))
            _write(output, _with(rows, error_location=[long] * 50))
        found = output.write_list()
    assert [row["row"] for row in _listed(LocalFolder(tmp_path))] == list(range(0, 1_000, 2))
    assert {row["error_location"] for row in _listed(LocalFolder(tmp_path))} == {long}
    assert (found.rows, len(found.first)) == (500, SHOWN)
    assert {row["error_location"] for row in found.first} == {f"{long[:300]}… (3,008 characters)"}
    assert pq.ParquetFile(tmp_path / UNREADABLE).num_row_groups > 5


def test_paths_of_any_bytes_are_listed(tmp_path):
    job = Job({}, (InputFile("/in/\udcff.parquet", 1, 3, "a"),))
    with _open(LocalFolder(tmp_path), job) as output:
        _write(output, answers_to((0, 0)))
        output.write_list()
    assert _listed(LocalFolder(tmp_path))[0]["file"] == "/in/\\udcff.parquet"


def test_a_part_that_is_damaged_is_named(tmp_path):
    with _open(LocalFolder(tmp_path)) as output:
        _write(output, answers_to((0, 0)))
        (part,) = tmp_path.glob("part-*")
        part.write_bytes(part.read_bytes()[:-20] + bytes(20))
        with pytest.raises(OutputError, match=rf"{part.name} cannot be read, is damaged"):
            output.write_list()
    assert _listed(LocalFolder(tmp_path)) is None


def test_a_failed_row_has_the_place_of_the_image_that_failed():
    rows = [
        (["a.png"], "image", "a.png cannot be read", "a.png"),
        (["a.png", None, "c.png"], "image", "image 3 of 3: c.png cannot be read", "c.png"),
        (["a.png", None, "c.png"], "image", "image 2 of 3: it is damaged", None),
        (["a.png", "b.png"], "image", "the 2 images have 9 bytes; the limit is 8", None),
        (["a.png"], "image", "crashed its worker 4 times", "a.png"),
        (["a.png"], "vision", "all features are the same", None),
        (["a.png"], None, None, None),
        ([], "image", "the list of images is empty", None),
        (None, "read", "damaged", None),
    ]
    locations, stages, messages, expected = zip(*rows, strict=True)
    text = {"error_stage": pa.array(stages, pa.string()), "error_message": pa.array(messages, pa.string())}
    table = located(pa.table({LOCATIONS: pa.array(locations, COLUMNS[LOCATIONS].type), **text}))
    assert table[LOCATION_FIELD.name].to_pylist() == list(expected)


def test_rows_say_where_their_images_come_from_as_columns_have_it(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in (b"a.jpg", b"\xff.jpg", b"gone.jpg"):
        Path(os.fsdecode(bytes(tmp_path) + b"/photos/" + name)).write_bytes(b"image")
    source = open_source(caption_config(tmp_path, tmp_path / "photos", prompt="What?"))
    (tmp_path / "photos" / "gone.jpg").unlink()
    rows = read_rows(source, "What?", 2)
    photos = f"{tmp_path}/photos/"
    assert sorted(rows[LOCATIONS].to_pylist()) == [[f"{photos}\\xff.jpg"], [f"{photos}a.jpg"], [f"{photos}gone.jpg"]]
    assert rows["__qvl_error_stage"].to_pylist().count("image") == 1

    far = "https://host.example/" + "x" * 5_000 + "?sig=SECRET"
    images = ["a/b?.jpg", far, "/x." * 700, "data:image/png;base64,aaaa", None, "https://u:SECRET@host/b.png?SECRET"]
    pq.write_table(pa.table({"image": images}), tmp_path / "rows.parquet")
    rows = read_rows(open_source(caption_config(tmp_path, tmp_path / "rows.parquet", prompt="What?")), "What?")
    assert rows[LOCATIONS].to_pylist() == [
        ["a/b?.jpg"], [f"{far[:300]}… (5,032 characters)"], ["/x." * 700], [None], [None], ["https://host/b.png?…"]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/images/what?.jpg", "/images/what?.jpg"),
        ("images/#1.jpg", "images/#1.jpg"),
        ("s3://bucket/what?#1.jpg", "s3://bucket/what?#1.jpg"),
        ("gs://bucket/a.jpg", "gs://bucket/a.jpg"),
        ("https://host/a.jpg", "https://host/a.jpg"),
        ("https://host:8080/@user/a.jpg", "https://host:8080/@user/a.jpg"),
        ("https://host/a.jpg?X-Amz-Signature=SECRET&b=SECRET", "https://host/a.jpg?…"),
        ("HTTPS://host/a.jpg#token=SECRET", "HTTPS://host/a.jpg#…"),
        ("https://user:SECRET@host/a.jpg", "https://host/a.jpg"),
        ("https://SECRET@host/a.jpg?SECRET", "https://host/a.jpg?…"),
        ("https://user:SEC/RET@host/a.jpg", "https://host/a.jpg"),
        ("https://user:SECR@ET@host/a.jpg", "https://host/a.jpg"),
        ("s3://key:SECRET@bucket/a.jpg", "s3://bucket/a.jpg"),
        ("abfss://images@host/a.jpg?sig=SECRET", "abfss://host/a.jpg?…"),
        (
            "image 2 of 2: https://host/a b.jpg?sig=SECRET is not inside any address of --allow-images-from",
            "image 2 of 2: https://host/a b.jpg?… is not inside any address of --allow-images-from",
        ),
        (
            "https://host/a?k=SECRET is redirected to https://SECRET@other/b?SECRET, which cannot be read: 404",
            "https://host/a?… is redirected to https://other/b?… which cannot be read: 404",
        ),
        (f"https://host/a?{'SECRET' * 100}… (600 characters) is no", "https://host/a?… (600 characters) is no"),
    ],
)
def test_addresses_are_shown_without_what_gives_access(text, expected):
    assert without_access(text) == expected
    assert not re.search("SEC|RET", without_access(text))


def test_messages_of_the_list_have_nothing_that_gives_access(tmp_path):
    message = "https://host/a.jpg?sig=SECRET cannot be read: 403 Forbidden"
    with _open(LocalFolder(tmp_path)) as output:
        _write(output, _with(answers_to((0, 0)), error_message=[message]))
        found = output.write_list()
    assert _listed(LocalFolder(tmp_path))[0]["error_message"] == "https://host/a.jpg?… cannot be read: 403 Forbidden"
    assert "SECRET" not in str(found.record())
