"""Rows are the same rows whatever kind of file they are in; a bad one costs itself, and no other."""

import gzip
import json
import os
import re
import tarfile
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import (
    FILES,
    KINDS,
    arrow,
    config_of,
    delimited,
    jsonl,
    member,
    rows_of,
    table_of,
    tar,
    with_paths,
)  # fmt: skip
from fuzz import forget_peak, peak_memory
from reading import caption_config, images_of, prompts_of, read_rows
from s3 import Mirror, serving

from qvl_batch.columns import FAILURE, FILE, ROW
from qvl_batch.errors import InputError, OutputError
from qvl_batch.input import source as source_module
from qvl_batch.input.containers import delimited as delimited_module
from qvl_batch.input.containers import images, lines, values
from qvl_batch.input.containers import tar as tar_module
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit
from qvl_batch.input.source import open_source as open_here
from qvl_batch.input.units import Lost
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.resume import Job, OutputFolder, read_listing
from qvl_batch.rows import RowSet

STAGE, KIND, MESSAGE = FAILURE


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of few rows, so that small files have several."""
    for module in (lines, images, tar_module):
        monkeypatch.setattr(module, "GROUP_ROWS", 5)


@pytest.fixture(scope="module")
def store():
    """A store of S3."""
    with serving() as files:
        yield files


#: Of the running test, the copy of its folder that is read in place of it; None to read the folder.
_mirror = None


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.long)])
def where(request, tmp_path):
    """Whether the test's files are read from its folder, or from a store that holds the same: where that is."""
    global _mirror  # noqa: PLW0603
    _mirror = Mirror(request.getfixturevalue("store"), tmp_path) if request.param == "s3" else None
    yield str(tmp_path) if _mirror is None else _mirror.address
    _mirror = None


def open_source(config, *known, **options):
    return open_here(config if _mirror is None else _mirror.config(config), *known, **options)


def _read(source, config, rows_per_table=4):
    if _mirror is not None:
        config = _mirror.config(config)
    return read_rows(source, config.prompt, rows_per_table, config.allow_images_from)


def _rows(config, rows_per_table=4):
    return _read(open_source(config), config, rows_per_table)


def _ids(table):
    """Ids as they were given, of a folder of images too."""
    return [id_ and Path(id_).name.removesuffix(".jpg") for id_ in table["id"].to_pylist()]


def _by_id(table):
    return sorted(zip(_ids(table), prompts_of(table), images_of(table), strict=True))


def _expected(rows):
    return [(row["id"], row["prompt"], row["image"]) for row in rows]


def _write(folder, data, name):
    (folder / name).write_bytes(data)
    return config_of(folder, name)


def _failures(table):
    """Of rows that failed, their index and message."""
    return {at: text for at, text in enumerate(table[MESSAGE].to_pylist()) if text is not None}


@pytest.mark.usefixtures("where")
@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("name", KINDS)
def test_rows_of_every_kind_are_read_as_what_they_are(name, tmp_path):
    KINDS[name](tmp_path, name, rows_of(23))
    config = config_of(tmp_path, name)
    source = open_source(config)
    table = _read(source, config)
    assert source.rows == source.files[0].rows == 23
    batches = name.endswith((".parquet", ".arrow", ".feather", ".ipc"))
    assert len(list(source.units())) == (1 if name.endswith((".gz", ".zst")) else 4 if batches else 5)
    assert table[ROW].to_pylist() == list(range(23))
    assert table[STAGE].null_count == 23
    assert _by_id(table) == _expected(rows_of(23))
    if name != "photos":  # whose rows are in the order of their paths
        assert _ids(table) == [row["id"] for row in rows_of(23)]


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("name", FILES)
def test_columns_are_kept(name, tmp_path):
    KINDS[name](tmp_path, name, rows_of(9))
    config = config_of(tmp_path, name, keep_columns=("note", "prompt"))
    table = _rows(config)
    for column in ("note", "prompt"):
        assert table[column].to_pylist() == [row[column] for row in rows_of(9)]
        assert table[column].type == open_source(config).columns.output_schema().field(column).type == pa.string()


@pytest.mark.usefixtures("where")
@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("name", KINDS)
def test_what_is_left_is_read_and_no_more(name, tmp_path):
    KINDS[name](tmp_path, name, rows_of(23))
    config = config_of(tmp_path, name)
    whole = _rows(config)
    done = RowSet([23])
    for span in ((0, 3), (4, 11), (15, 16), (22, 23)):
        done.add(0, *span)
    left = [3, 11, 12, 13, 14, *range(16, 22)]
    source = open_source(config, open_source(config).files, _listings(config)).without(done)
    table = _read(source, config)
    assert (source.rows, table[ROW].to_pylist()) == (len(left), left)
    assert table.drop_columns(FILE) == whole.take(left).drop_columns(FILE)
    limited = replace(config, limit=8)
    assert _rows(limited)[ROW].to_pylist() == list(range(8))


def _listings(config):
    """What the output folder of a job would keep of its folders of images."""
    source = open_source(config)
    kept = {source.files[number].fingerprint: listing for number, listing in source.listings.items()}
    return lambda file: kept[file.fingerprint]


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_cut_into_the_same_tables_by_every_attempt(name, tmp_path):
    KINDS[name](tmp_path, name, rows_of(23))
    config = config_of(tmp_path, name)
    source = open_source(config)
    fetcher = Fetcher(config.allow_images_from)
    unit = replace(next(source.units()), spans=[(1, 6)])
    ids = _ids(_read(source, config))[1:6]
    for lost, known in (
        (None, ids),
        (Lost(ValueError("gone")), ids),
        (Lost(ValueError("gone"), known=False), [None] * 5),
    ):
        tables = list(read_unit(unit, source.columns, None, 4, fetcher, lost))
        assert [table[ROW].to_pylist() for table in tables] == [[1, 2, 3], [4, 5]]
        table = pa.concat_tables(tables)
        assert _ids(table) == known
        said = {at: f"row {at + 1} of {unit.file} cannot be read: gone" for at in range(5)} if lost else {}
        assert _failures(table) == said


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changed_is_noticed(name, tmp_path):
    KINDS[name](tmp_path, name, rows_of(9))
    config = config_of(tmp_path, name)
    source = open_source(config)
    KINDS[name](tmp_path, name, rows_of(9, first=1))
    with pytest.raises(InputError, match=rf"{name} has changed since this job began: .* 9 rows now, .* 9 rows then"):
        open_source(config, source.files)
    with pytest.raises(InputError, match=rf"{name} has changed while this job ran: put it back"):
        _read(source, config)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{name}.*(cannot be read|No such file)"):
        _read(source, config)
    with pytest.raises(InputError, match=f"--input .*{name}"):
        open_source(config, source.files)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.NDJSON.gz"])
def test_text_that_changes_in_its_middle_is_noticed_whatever_its_size_and_ends(name, tmp_path):
    rows = rows_of(6_000)
    KINDS[name](tmp_path, name, rows)
    config = config_of(tmp_path, name)
    known = open_source(config).files
    rows[3_000]["prompt"] = rows[3_000]["prompt"].replace("3", "4")
    KINDS[name](tmp_path, name, rows)
    if not name.endswith(".gz"):
        assert (tmp_path / name).stat().st_size == known[0].size
    with pytest.raises(InputError, match="has changed since this job began"):
        open_source(config, known)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_added_follow_and_keep_the_types_that_answers_have(name, tmp_path):
    (tmp_path / "in").mkdir()
    KINDS[name](tmp_path / "in", f"b-{name}", rows_of(5))
    config = config_of(tmp_path, f"in/*{name}")
    known, listing_of = open_source(config).files, _listings(config)
    KINDS[name](tmp_path / "in", f"a-{name}", rows_of(4, first=5))
    source = open_source(config, known, listing_of)
    assert [file.rows for file in source.files] == [5, 4]
    assert source.files[0] == known[0]
    assert _by_id(_read(source, config)) == _expected(rows_of(9))


def _steps():
    """Places of a file at which it is cut off or damaged."""
    return 60 if _mirror is None else 9


def _rows_or_refusal(config):
    """Rows of a file that may be damaged, or one line that names it."""
    try:
        source = open_source(config)
        return _read(source, config) if source.rows else None
    except InputError as error:
        return str(error)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere_gives_its_rows_or_an_error_that_names_it(name, tmp_path):
    KINDS[name](tmp_path, name, rows_of(11))
    data = (tmp_path / name).read_bytes()
    config = config_of(tmp_path, name)
    for size in sorted({0, 1, 7, 100, *range(0, len(data), max(1, len(data) // _steps())), len(data) - 1}):
        (tmp_path / name).write_bytes(data[:size])
        table = _rows_or_refusal(config)
        if isinstance(table, str):
            assert name in table
            assert len(table.splitlines()) == 1
        elif table is not None:
            good = [index for index, stage in enumerate(table[STAGE].to_pylist()) if stage is None]
            assert _by_id(table.take(pa.array(good, pa.int64()))) == _expected(rows_of(len(good)))
            # Where the file ends in the middle of something, the rows there say so.
            assert set(range(len(table))) - set(good) <= {len(table) - 1, len(table) - 2}


@pytest.mark.parametrize("name", FILES)
def test_bytes_that_are_damaged_anywhere_cost_rows_or_the_file_and_never_the_process(name, tmp_path, where):
    KINDS[name](tmp_path, name, rows_of(11))
    data = (tmp_path / name).read_bytes()
    config = config_of(tmp_path, name)
    for start in range(0, len(data), max(1, len(data) // _steps())):
        damaged = bytes(each ^ 0xA5 for each in data[start : start + 9])
        (tmp_path / name).write_bytes(data[:start] + damaged + data[start + 9 :])
        table = _rows_or_refusal(config)
        if isinstance(table, str):
            assert where in table
        elif table is not None:
            assert table[ROW].to_pylist() == list(range(len(table)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", ["rows.parquet", "rows.arrow", "rows.NDJSON.gz", "rows.jsonl.zst", "rows.tar"])
def test_a_file_with_a_wrong_name_is_refused(name, other, tmp_path):
    same = {("rows.arrow", "rows.feather"), ("rows.arrow", "stream.arrow"), ("rows.arrow", "packed.ipc")}
    if name == other or (other, name) in same or {name, other} <= {"rows.NDJSON.gz", "rows.tsv.gz"}:
        pytest.skip("the name is right")
    KINDS[other](tmp_path, name, rows_of(5))
    with pytest.raises(InputError, match=rf"{name} .*(is not a readable|has no single column)"):
        _rows(config_of(tmp_path, name))


@pytest.mark.usefixtures("where")
def test_a_name_that_says_nothing_is_taken_for_parquet(tmp_path):
    pq.write_table(table_of(rows_of(3)), tmp_path / "blob")
    assert _ids(_rows(config_of(tmp_path, "blob"))) == [row["id"] for row in rows_of(3)]
    (tmp_path / "rows.json").write_bytes(b"[]")
    with pytest.raises(
        InputError, match=r"rows.json is not a readable parquet file: .*; if it is another kind of file, .*jsonl"
    ):
        open_source(config_of(tmp_path, "rows.json"))


# Text.


def test_json_lines_are_each_an_object_or_an_error_that_names_its_line(tmp_path, where):
    deep = b"[" * 100_000 + b"]" * 100_000
    bad = [
        b'{"id": "a"', b"[1]", b'"text"', b"null", b'{"a": 1, "a": 2}', b'{"x": {"a": 1, "a": 2}}',
        b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"x": ' + deep + b"}", b"}", b"{\"id\": 'a'}",
        b'{"x": [' + b"1," * values.MOST_VALUES + b"1]}",
    ]  # fmt: skip
    good = jsonl(with_paths(tmp_path, rows_of(2))).splitlines()
    lines_of_file = [good[0], b"", *bad, b"   ", good[1]]
    table = _rows(_write(tmp_path, b"\n".join(lines_of_file), "a.jsonl"))
    assert _ids(table) == ["row-00000", *[None] * len(bad), "row-00001"]
    failures = _failures(table)
    assert list(failures) == list(range(1, len(bad) + 1))
    for row, text in failures.items():
        assert text.startswith(f"row {row} of {where}/a.jsonl (line {row + 2}) cannot be read: ")
        assert len(text) < 300
    assert set(table.slice(1, len(bad))[KIND].to_pylist()) == {"RecordError"}


@pytest.mark.parametrize(
    ("found", "kept", "kind"),
    [
        ([1, 2, None], [1, 2, None], pa.int64()),
        ([1, 2.5], [1.0, 2.5], pa.float64()),
        ([True, None], [True, None], pa.bool_()),
        ([1, "a"], ["1", "a"], pa.string()),
        ([1.0, "a", 0.1], ["1", "a", "0.1"], pa.string()),
        ([1 << 70], [str(1 << 70)], pa.string()),
        ([["a", None], [], None], [["a", None], [], None], pa.list_(pa.string())),
        ([["a"], "b"], [["a"], ["b"]], pa.list_(pa.string())),
        ([[], [{"a": 1}]], ["[]", '[{"a":1}]'], pa.string()),
        ([{"a": [1, "ö"]}, None], ['{"a":[1,"ö"]}', None], pa.string()),
        ([True, 1], ["true", "1"], pa.string()),
        ([None, None], [None, None], pa.null()),
    ],
    ids=str,
)
def test_a_field_of_json_has_a_type_that_holds_all_its_values(found, kept, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "GROUP_ROWS", 1)  # a group knows its own values alone
    rows = [row | {"x": value} for row, value in zip(with_paths(tmp_path, rows_of(len(found))), found, strict=True)]
    for split in (False, True):
        (tmp_path / "a.jsonl").write_bytes(jsonl(rows[:1] if split else rows))
        (tmp_path / "b.jsonl").write_bytes(jsonl(rows[1:] if split else []))
        config = config_of(tmp_path, "a.jsonl", "b.jsonl", keep_columns=("x",))
        assert open_source(config).columns.output_schema().field("x").type == kind
        assert _rows(config)["x"].to_pylist() == kept
    # Answers that are there have the types of the first file.
    known = open_source(config_of(tmp_path, "a.jsonl", keep_columns=("x",)))
    if known.columns.kept[0].field.type != kind:
        with pytest.raises(InputError, match="differ in the type of the id or of a kept column"):
            open_source(config, known.files)


def test_not_a_number_is_a_number(tmp_path):
    rows = [row | {"x": value} for row, value in zip(with_paths(tmp_path, rows_of(2)), (float("nan"), 1), strict=True)]
    table = _rows(replace(_write(tmp_path, jsonl(rows), "a.jsonl"), keep_columns=("x",)))
    assert str(table["x"].to_pylist()) == "[nan, 1.0]"


@pytest.mark.parametrize(
    ("ids", "expected", "kind"),
    [
        ([1, 2], [1, 2], pa.int64()), ([1.0, 2.5], ["1", "2.5"], pa.string()), ([1, "a"], ["1", "a"], pa.string()),
        ([{"a": 1}, None], ['{"a":1}', None], pa.string()),
    ],
)  # fmt: skip
def test_ids_of_json_are_as_those_of_parquet(ids, expected, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "GROUP_ROWS", 1)
    rows = [row | {"id": id_} for row, id_ in zip(with_paths(tmp_path, rows_of(2)), ids, strict=True)]
    table = _rows(_write(tmp_path, jsonl(rows), "a.jsonl"))
    assert (table["id"].to_pylist(), table["id"].type) == (expected, kind)


def test_fields_that_some_lines_lack_are_null_there(tmp_path):
    rows = with_paths(tmp_path, rows_of(3))
    del rows[1]["prompt"], rows[2]["id"]
    table = _rows(_write(tmp_path, jsonl(rows), "a.jsonl"))
    assert _ids(table) == ["row-00000", "row-00001", None]
    assert _failures(table) == {1: "the prompt is null"}


def test_lists_of_images_and_conversations_are_read_from_json_lines(tmp_path, where):
    rows = with_paths(tmp_path, rows_of(3))
    one, two, three = (row["image"] for row in rows)
    talk = [{"from": "human", "value": "<image>\n<image>\nWhat?"}]
    lists = [{"images": [one, two], "messages": talk}, {"images": [three] * 2, "messages": json.dumps(talk)}]
    config = replace(
        _write(tmp_path, jsonl([*lists, {"messages": [{"role": "user", "content": "Hello."}]}]), "a.jsonl"),
        image_column="images", messages_column="messages",
    )  # fmt: skip
    table = _rows(config)
    assert table[STAGE].null_count == 3
    assert table["__qvl_images"].to_pylist() == [[b"image 0", b"image 1"], [b"image 2"] * 2, []]
    assert table["id"].to_pylist() == [f"{where}/a.jsonl:{row}" for row in range(3)]
    asked = _write(tmp_path, jsonl([{"image": [one, two], "prompt": "x"}, {"image": three, "prompt": "y"}]), "b.jsonl")
    assert _rows(asked)["__qvl_images"].to_pylist() == [[b"image 0", b"image 1"], [b"image 2"]]
    assert open_source(asked).columns.has_lists


def test_conversations_in_json_lines_name_images_by_path(tmp_path):
    image = with_paths(tmp_path, rows_of(1))[0]["image"]
    part = {"type": "image", "image": image}
    rows = [{"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]}]
    table = _rows(replace(_write(tmp_path, jsonl(rows), "a.jsonl"), messages_column="messages"))
    assert table["__qvl_images"].to_pylist() == [[b"image 0"]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_text_may_begin_with_a_mark_and_have_lines_of_any_end(name, tmp_path):
    rows = with_paths(tmp_path, rows_of(3))
    data = jsonl(rows) if name == "a.jsonl" else delimited(rows)
    for changed in (
        b"\xef\xbb\xbf" + data, data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"), data.rstrip(),
        data.replace(b"\n", b"\n\n"),
    ):  # fmt: skip
        assert _by_id(_rows(_write(tmp_path, changed, name))) == _expected(rows_of(3))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_text_in_another_encoding_is_refused(name, encoding, tmp_path):
    rows = with_paths(tmp_path, rows_of(3))
    data = (jsonl(rows) if name == "a.jsonl" else delimited(rows)).decode().encode(encoding)
    with pytest.raises(InputError, match=rf"{name} (is not a readable .*: |has no single column)"):
        open_source(_write(tmp_path, data, name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_of_a_hundred_megabytes_is_read_and_a_longer_one_is_not_kept_in_memory(name, tmp_path, monkeypatch):
    rows = with_paths(tmp_path, rows_of(3))
    rows[1]["note"] = "x" * 100_000_000
    data = jsonl(rows) if name == "a.jsonl" else delimited(rows)
    config = _write(tmp_path, data, name)
    if name == "a.jsonl":
        assert _rows(config)[STAGE].null_count == 3
    monkeypatch.setattr(lines, "MOST_BYTES", 1_000_000)
    forget_peak()
    before = peak_memory()
    table = _rows(config)
    assert peak_memory() - before < 50_000_000
    (message,) = _failures(table).values()
    assert message.endswith("bytes; the limit is 1,000,000")
    assert _ids(table) == ["row-00000", None, "row-00002"]


EMPTY = {"empty.jsonl": b"", "blank.jsonl": b"\n \n", "empty.csv": b"", "header.csv": b"id,image,prompt\n"}


@pytest.mark.usefixtures("where")
def test_a_file_of_text_without_rows_adds_none(tmp_path):
    KINDS["rows.jsonl"](tmp_path, "a.jsonl", rows_of(3))
    for name, data in EMPTY.items():
        (tmp_path / name).write_bytes(data)
        assert _ids(_rows(config_of(tmp_path, name, "a.jsonl"))) == [row["id"] for row in rows_of(3)]
    with pytest.raises(InputError, match=r"empty.jsonl is empty, and so is all other input"):
        open_source(config_of(tmp_path, "empty.jsonl", "blank.jsonl"))
    assert open_source(config_of(tmp_path, "header.csv")).rows == 0


@pytest.mark.usefixtures("where")
def test_a_file_without_an_object_is_no_json_lines(tmp_path):
    with pytest.raises(
        InputError, match=r"a.jsonl is not a readable JSON Lines file: none of its lines .*; line 1: it is not JSON"
    ):
        open_source(_write(tmp_path, b"<html>\nnot found\n", "a.jsonl"))


def test_more_fields_than_a_table_has_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "MOST_FIELDS", 3)
    with pytest.raises(InputError, match=r"a.jsonl .*its objects have more than 3 different fields"):
        open_source(_write(tmp_path, jsonl([{f"field {at}": 1} for at in range(5)]), "a.jsonl"))


def test_compressed_lines_that_are_cut_off_end_with_a_row_that_says_so(tmp_path):
    for name in ("rows.NDJSON.gz", "rows.jsonl.zst", "rows.tsv.gz"):
        KINDS[name](tmp_path, name, rows_of(2_000))
        whole = _rows(config_of(tmp_path, name))
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
        table = _rows(config_of(tmp_path, name))
        ((row, text),) = _failures(table).items()
        assert row == len(table) - 1
        assert re.search(r"\(line \d+\) .* the compressed file is damaged or cut off here, and its further lines", text)
        assert _ids(table)[:-1] == _ids(whole)[: len(table) - 1]


@pytest.mark.usefixtures("where")
def test_several_streams_in_a_compressed_file_are_one(tmp_path):
    data = jsonl(with_paths(tmp_path, rows_of(6))).splitlines(keepends=True)
    packed = b"".join(gzip.compress(b"".join(some)) for some in (data[:2], data[2:]))
    assert _by_id(_rows(_write(tmp_path, packed, "a.jsonl.gz"))) == _expected(rows_of(6))
    zst = b"".join(pa.compress(b"".join(some), "zstd", asbytes=True) for some in (data[:2], data[2:]))
    assert _by_id(_rows(_write(tmp_path, zst, "b.jsonl.zst"))) == _expected(rows_of(6))


# CSV.

HEADER = b"id,image,prompt\n"


def _csv(tmp_path, text, name="a.csv", **options):
    """Rows of CSV: ids, prompts, failures."""
    (tmp_path / "i").write_bytes(b"i")
    table = _rows(replace(_write(tmp_path, text, name), **options))
    return table["id"].to_pylist(), prompts_of(table), _failures(table)


def test_fields_of_csv_may_have_quotes_separators_and_lines(tmp_path):
    text = HEADER + b'a,i,"x, ""y""\nz"\r\n"b",i,"\n\n"\nc,i,"d"\n'
    assert _csv(tmp_path, text) == (["a", "b", "c"], ['x, "y"\nz', "\n\n", "d"], {})
    tabs = (HEADER + b"a,i,x\n").replace(b",", b"\t")
    assert _csv(tmp_path, tabs + b'b\ti\t"a\tb"\n', "a.tsv") == (["a", "b"], ["x", "a\tb"], {})


def test_values_of_csv_are_text_and_empty_ones_are_null(tmp_path):
    text = b'id,image,prompt,note,choices\n007,i,1.0,,\n,i,true,NA,"[""a""]"\n'
    config = replace(_write(tmp_path, text, "a.csv"), keep_columns=("note",), choices_column="choices")
    (tmp_path / "i").write_bytes(b"i")
    table = _rows(config)
    assert table["id"].to_pylist() == ["007", None]
    assert prompts_of(table) == ["1.0", "true"]
    assert table["note"].to_pylist() == [None, "NA"]
    assert table[STAGE].null_count == 2


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"x,i\n", "it has 2 fields, and the header 3"),
        (b"x,i,a,b\n", "it has 4 fields, and the header 3"),
        (b'x,i,"y"z\n', "it is no record of CSV: ',' expected after '\"'"),
        (b'x,i,"never closed\n', "a quote begins in it, and by line 25 it is not closed"),
        (b"x,i,\xff\n", "it is not UTF-8"),
        (b'x,i,"a\nb",c\n', "it has 4 fields, and the header 3"),
    ],
)
def test_a_bad_record_of_csv_costs_itself(bad, why, tmp_path, where):
    good = [b"%d,i,p%d\n" % (at, at) for at in range(23)]
    ids, prompts, failures = _csv(tmp_path, HEADER + b"".join([*good[:9], bad, *good[9:]]))
    assert ids == [*map(str, range(9)), None, *map(str, range(9, 23))]
    assert prompts == [*(f"p{at}" for at in range(9)), None, *(f"p{at}" for at in range(9, 23))]
    assert list(failures) == [9]
    assert failures[9].startswith(f"row 9 of {where}/a.csv (line 11) cannot be read: {why}")


@pytest.mark.usefixtures("small_groups")
def test_text_full_of_quotes_that_do_not_close_is_read_in_time_that_grows_as_it_does(tmp_path):
    text = HEADER + b'x","y\n' * 200_000
    ids, _, failures = _csv(tmp_path, text)
    assert len(ids) == len(failures) == 2
    assert "(line 2)" in failures[0]
    assert "(line 3)" in failures[1]


@pytest.mark.usefixtures("small_groups")
def test_groups_of_csv_are_read_as_the_whole_is(tmp_path):
    pieces = [b'a,i,"x\n', b"b,i,p\n", b'c,i,"q""\nr"\n', b'"d,i,p\n', b"e,i\n", b'f,i,"g"\n', b'x","y\n']
    text = HEADER + b"".join(pieces[(at * at + at // 3) % len(pieces)] for at in range(200))
    (tmp_path / "i").write_bytes(b"i")
    config = _write(tmp_path, text, "a.csv")
    assert len(list(open_source(config).units())) > 3
    in_groups = _rows(config)
    whole = _rows(_write(tmp_path, gzip.compress(text), "a.csv.gz"))
    assert prompts_of(in_groups) == prompts_of(whole)
    assert in_groups["id"].to_pylist() == whole["id"].to_pylist()
    assert _failures(in_groups) == {at: text.replace(".gz", "") for at, text in _failures(whole).items()}


def test_a_header_of_csv_must_be_there(tmp_path):
    with pytest.raises(InputError, match=r"a.csv has no single column 'prompt' \(--prompt-column\); it has 1, i, x"):
        _csv(tmp_path, b"1,i,x\n2,i,y\n")
    with pytest.raises(InputError, match=r"a.csv has no single column 'id' .*; it has id, id, image, prompt"):
        _csv(tmp_path, b"id,id,image,prompt\n1,2,i,x\n")
    with pytest.raises(
        InputError, match=r"a.csv is not a readable CSV file: its header cannot be read: line 1: a quote"
    ):
        _csv(tmp_path, b'"id,image,prompt\n1,i,x\n')


def test_a_quote_that_never_closes_in_a_large_file_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited_module, "MOST_BYTES", 1_000_000)
    (tmp_path / "i").write_bytes(b"i")
    text = HEADER + b'x,i,"p\n' + b"a,i,p\n" * 400_000
    config = _write(tmp_path, text, "a.csv")
    del text
    forget_peak()
    before = peak_memory()
    source = open_source(config)
    assert source.rows == 400_001
    assert peak_memory() - before < 100_000_000


# Tar.


def _tar(tmp_path, members, prompt=None, **options):
    config = replace(_write(tmp_path, tar(members), "a.tar"), prompt=prompt, **options)
    return _rows(config)


def _sample(key, image=b"i", prompt=b"p", **fields):
    parts = [member(f"{key}.jpg", image)] + ([member(f"{key}.txt", prompt)] if prompt is not None else [])
    return parts + ([member(f"{key}.json", json.dumps(fields).encode())] if fields else [])


def test_a_sample_is_what_has_one_key(tmp_path, where):
    members = [
        *_sample("b/1"), *_sample("a/1.x"), *_sample("a/1"), *_sample("./c"), *_sample("/d"), *_sample("../e"),
        *_sample("b/1"),
    ]  # fmt: skip
    table = _tar(tmp_path, members, prompt="What?")
    # WebDataset cuts a name at its first dot, so that `1.x.jpg` and `1.jpg` are of one sample.
    assert table["id"].to_pylist() == ["b/1", "a/1", "c", "/d", "../e", "b/1"]
    ((row, said),) = _failures(table).items()
    several = "it has several images (.x.jpg, .jpg): name one of them with --image-column"
    assert said == f"row {row} of {where}/a.tar (sample 'a/1') cannot be read: {several}"
    assert images_of(_tar(tmp_path, members, prompt="What?", image_column="jpg"))[:3] == [b"i"] * 3
    assert _tar(tmp_path, members, prompt="What?", id_column="__key__")["id"].to_pylist() == table["id"].to_pylist()


def test_fields_of_json_are_columns_and_a_prompt_may_be_one(tmp_path):
    fields = {"prompt": "from json", "id": "x", "width": 7, "url": "u"}
    members = [member("0.jpg", b"i"), member("0.json", json.dumps(fields).encode())]
    members += _sample("1", prompt=None, width=8, json="j")
    members += [*_sample("2", prompt=b"from txt\n", width=None)]
    table = _tar(tmp_path, members, keep_columns=("width", "url", "json", "txt", "__key__"))
    assert table["id"].to_pylist() == table["__key__"].to_pylist() == ["0", "1", "2"]
    assert prompts_of(table) == ["from json", None, "from txt"]
    assert table["width"].to_pylist() == [7, 8, None]
    assert table["width"].type == pa.int64()
    assert table["url"].to_pylist() == ["u", None, None]
    assert [json.loads(text).get("id") for text in table["json"].to_pylist()] == ["x", None, None]
    assert table["txt"].to_pylist() == [None, None, "from txt"]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([member("x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")], ".jpg is a link: pack the file itself"),
        ([member("x.jpg", type=tarfile.LNKTYPE, linkname="0.jpg")], ".jpg is a link"),
        ([member("x.jpg", type=tarfile.CHRTYPE)], ".jpg is no regular file"),
        ([member("x.jpg", type=tarfile.FIFOTYPE)], ".jpg is no regular file"),
        ([member("x.jpg", b"a"), member("x.JPG", b"b")], "it has two members .jpg"),
        ([member("x", b"a")], "its name has no extension"),
        ([member("x.txt", b"\xff"), member("x.jpg", b"i")], ".txt: 'utf-8' codec can't decode"),
        ([member("x.txt", b"p")], None),
        ([member("x.jpg", b"i"), member("x.json", b"{")], ".json: it is not JSON"),
    ],
)
def test_a_bad_sample_costs_itself(bad, why, tmp_path, where):
    table = _tar(tmp_path, [*_sample("0"), *bad, *_sample("1")])
    assert table["id"].to_pylist() == ["0", "x", "1"]
    assert list(_failures(table)) == [1]
    if why is not None:
        assert _failures(table)[1].startswith(f"row 1 of {where}/a.tar (sample 'x') cannot be read: {why}")


def test_members_that_macos_adds_and_folders_are_no_samples(tmp_path):
    extra = [
        member("a", type=tarfile.DIRTYPE),
        member("a/._0.jpg", b"x"),
        member("__MACOSX/0.jpg", b"x"),
        member(".DS_Store", b"x"),
    ]
    assert _tar(tmp_path, [*extra, *_sample("a/0"), *extra])["id"].to_pylist() == ["a/0"]


def test_a_member_may_be_of_any_size_and_is_not_read_to_find_the_next(tmp_path):
    path = tmp_path / "a.tar"
    huge = 3_000_000_000
    with path.open("wb") as file:
        file.write(member("0.jpg", size=huge)[0].tobuf(format=tarfile.GNU_FORMAT))
        file.truncate(512 + huge + -huge % 512)
        file.seek(0, 2)
        file.write(tar(_sample("1")))
    forget_peak()
    before = peak_memory()
    config = config_of(tmp_path, "a.tar", prompt="What?")
    table = _rows(config)
    assert peak_memory() - before < 50_000_000
    assert table["id"].to_pylist() == ["0", "1"]
    assert _failures(table)[0].endswith(".jpg has 3,000,000,000 bytes; the limit is 268,435,456")


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("size", [-1_000, 1 << 60])
def test_a_size_that_cannot_be_is_no_endless_loop(size, tmp_path):
    header = tarfile.TarInfo("1.jpg")
    header.size = size
    data = tar(_sample("0"))[: 4 * 512] + header.tobuf(format=tarfile.GNU_FORMAT) + tar(_sample("2"))
    table = _rows(replace(_write(tmp_path, data, "a.tar"), prompt="What?"))
    assert table["id"].to_pylist()[0] == "0"
    assert 1 in _failures(table)


def test_a_name_of_any_length_is_no_reason_to_read_it(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    data = tar(_sample("0"))[: 4 * 512] + header.tobuf(format=tarfile.GNU_FORMAT) + b"x" * 10_000
    table = _rows(_write(tmp_path, data, "a.tar"))
    assert table["id"].to_pylist() == ["0", None]
    assert (
        "the tar is damaged at byte 2,048, and what follows is lost: a header of 1,073,741,824 bytes"
        in _failures(table)[1]
    )


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_may_be_long_and_of_any_letters(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "GROUP_ROWS", 2)
    keys = [f"{'folder/' * 40}ö{at}" for at in range(7)]
    data = tar([part for key in keys for part in _sample(key)], format=kind)
    assert _rows(_write(tmp_path, data, "a.tar"))["id"].to_pylist() == keys


@pytest.mark.usefixtures("where")
def test_a_tar_that_is_damaged_between_members_says_so_in_its_last_row(tmp_path):
    data = bytearray(tar([part for at in range(4) for part in _sample(str(at))]))
    data[2 * 4 * 512 : 2 * 4 * 512 + 512] = b"\x55" * 512
    table = _rows(_write(tmp_path, bytes(data), "a.tar"))
    assert table["id"].to_pylist() == ["0", "1", None]
    assert "the tar is damaged at byte 4,096, and what follows is lost: there is no header" in _failures(table)[2]


@pytest.mark.usefixtures("where")
def test_a_tar_without_members_has_no_rows_and_one_without_bytes_is_none(tmp_path):
    KINDS["rows.tar"](tmp_path, "b.tar", rows_of(3))
    _write(tmp_path, tar([]), "a.tar")
    assert len(_rows(config_of(tmp_path, "a.tar", "b.tar"))) == 3
    with pytest.raises(InputError, match=r"a.tar is not a readable tar file: empty file"):
        open_source(_write(tmp_path, b"", "a.tar"))


def test_names_that_are_no_text_are_keys_all_the_same(tmp_path):
    table = _tar(tmp_path, _sample("a\udcff"))
    assert table["id"].to_pylist() == ["a\\xff"]


# Arrow.


@pytest.mark.usefixtures("where")
def test_a_stream_with_dictionaries_is_read_across_its_batches(tmp_path):
    table = table_of(rows_of(23))
    notes = table["note"].dictionary_encode()
    config = _write(tmp_path, arrow(table.set_column(3, "note", notes), new=pa.ipc.new_stream), "a.arrow")
    config = replace(config, keep_columns=("note",))
    source = open_source(config)
    assert len(list(source.units())) == 1
    done = RowSet([23])
    done.add(0, 2, 12)
    left = _read(source.without(done), config)
    assert left["note"].to_pylist() == [row["note"] for at, row in enumerate(rows_of(23)) if not 2 <= at < 12]


@pytest.mark.usefixtures("where")
def test_a_batch_with_damaged_bytes_fails_with_what_can_be_read_of_it(tmp_path):
    data = arrow(table_of(rows_of(21)), compression="zstd")
    frames = [at for at in range(len(data)) if data.startswith(b"\x28\xb5\x2f\xfd", at)]
    seen = set()
    for at in frames:
        config = _write(tmp_path, data[:at] + b"\xff" * 12 + data[at + 12 :], "a.arrow")
        table = _rows(replace(config, keep_columns=("note",)))
        failures = _failures(table)
        assert len(table) == 21
        assert len(failures) == 7
        assert all(f"(record batch {row // 7}) cannot be read" in text for row, text in failures.items())
        seen.add(sum(id_ is None for id_ in table["id"].to_pylist()))
    assert seen == {0, 7}


@pytest.mark.usefixtures("where")
def test_values_that_lead_out_of_their_column_fail_alone(tmp_path):
    rows = table_of(rows_of(8))
    offsets = pa.py_buffer(bytes(rows["prompt"].chunk(0).buffers()[1]))
    wrong = bytearray(offsets.to_pybytes())
    wrong[4 * 4 : 5 * 4] = (1 << 30).to_bytes(4, "little")
    chunk = rows["prompt"].chunk(0)
    broken = pa.Array.from_buffers(pa.string(), len(chunk), [None, pa.py_buffer(bytes(wrong)), chunk.buffers()[2]])
    config = _write(tmp_path, arrow(rows.set_column(2, "prompt", broken), batch=8), "a.arrow")
    table = _rows(config)
    assert sorted(_failures(table)) == [3, 4]
    assert table["id"].null_count == 0


@pytest.mark.usefixtures("where")
def test_feather_of_the_first_version_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"a.feather is not a readable Arrow file: .* begins like a Feather file of version 1"
    ):
        open_source(_write(tmp_path, b"FEA1" + b"\0" * 100, "a.feather"))


# Folders of images.


def _photos(tmp_path, *names, prompt="What?", **options):
    for at, name in enumerate(names):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"%d" % at)
    return caption_config(tmp_path, tmp_path / "photos", prompt=prompt, **options)


def test_a_folder_of_images_is_read_through_links_and_its_ids_are_paths(tmp_path):
    config = _photos(tmp_path, "b/2.JPG", "b/a/1.png", "a.webp", ".hidden.jpg", "_tmp/3.jpg", "note.md", "read.txt")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.heic").write_bytes(b"far")
    (tmp_path / "photos" / "link").symlink_to("../far")
    (tmp_path / "photos" / "one.jpeg").symlink_to("a.webp")
    (tmp_path / "photos" / "b" / "back").symlink_to("..")
    source = open_source(config)
    table = _read(source, config)
    assert table["id"].to_pylist() == ["a.webp", "b/2.JPG", "b/a/1.png", "link/x.heic", "one.jpeg"]
    assert images_of(table) == [b"2", b"0", b"1", b"far", b"2"]
    assert prompts_of(table) == ["What?"] * 5
    assert source.passed_over == (1, f"{tmp_path}/photos/note.md")
    assert [file.path for file in source.files] == [f"{tmp_path}/photos/"]


def test_an_image_that_cannot_be_read_fails_alone(tmp_path, monkeypatch):
    config = _photos(tmp_path, "a.jpg", "b.jpg", "c.jpg", "f.jpg")
    (tmp_path / "photos" / "d.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "photos" / "e.jpg")
    monkeypatch.setattr(images, "MAX_BYTES", 5)
    (tmp_path / "photos" / "f.jpg").write_bytes(b"123456")
    source = open_source(config)
    (tmp_path / "photos" / "b.jpg").unlink()
    table = _read(source, config)
    assert table["id"].to_pylist() == [f"{letter}.jpg" for letter in "abcdef"]
    place = f"of {tmp_path}/photos/ "
    assert _failures(table) == {
        1: f"row 1 {place}(b.jpg) cannot be read: No such file or directory",
        3: f"row 3 {place}(d.jpg) cannot be read: No such file or directory",
        4: f"row 4 {place}(e.jpg) cannot be read: it is not a regular file",
        5: f"row 5 {place}(f.jpg) cannot be read: it has 6 bytes; the limit is 5",
    }
    assert {*table[STAGE].to_pylist()} == {None, "image"}


def test_prompts_may_be_beside_images(tmp_path):
    config = _photos(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", prompt=None)
    with pytest.raises(InputError, match=r"photos/ has images without prompts: give --prompt, or a file a.txt beside"):
        open_source(config)
    (tmp_path / "photos" / "a.txt").write_bytes("\ufeffWas ist das?\r\n".encode())
    (tmp_path / "photos" / "b.txt").write_bytes(b"\xff")
    (tmp_path / "photos" / "c.txt").mkdir()
    table = _rows(config)
    assert prompts_of(table) == ["Was ist das?", None, None, None]
    place = f"of {tmp_path}/photos/ "
    assert _failures(table)[1].startswith(f"row 1 {place}(b.jpg) cannot be read: b.txt is not UTF-8")
    assert _failures(table)[3] == f"row 3 {place}(d.jpg) cannot be read: there is no d.txt with its prompt beside it"
    assert set(_failures(table)) == {1, 2, 3}
    assert _rows(replace(config, prompt="What?"))[STAGE].null_count == 4


def test_images_that_came_since_are_rows_of_their_own_and_others_keep_theirs(tmp_path, where):
    config = _photos(tmp_path, "b.jpg", "d.jpg")
    first, listing_of = open_source(config), _listings(config)
    _photos(tmp_path, "a.jpg", "c/1.jpg")
    (tmp_path / "photos" / "a.jpg").write_bytes(b"new")
    source = open_source(config, first.files, listing_of)
    table = _read(source, config)
    assert [(file.path, file.rows) for file in source.files] == [(f"{where}/photos/", 2)] * 2
    assert list(zip(table[FILE].to_pylist(), table[ROW].to_pylist(), table["id"].to_pylist(), strict=True)) == [
        (0, 0, "b.jpg"), (0, 1, "d.jpg"), (1, 0, "a.jpg"), (1, 1, "c/1.jpg"),
    ]  # fmt: skip
    listings = {first.files[0].fingerprint: first.listings[0], source.files[1].fingerprint: source.listings[1]}
    again = open_source(config, source.files, lambda file: listings[file.fingerprint])
    assert again.files == source.files


@pytest.mark.parametrize("what", ["gone", "size", "time"])
def test_images_that_went_or_changed_are_named(what, tmp_path):
    config = _photos(tmp_path, "a.jpg", "b/b.jpg", "c.jpg")
    known, listing_of = open_source(config).files, _listings(config)
    path = tmp_path / "photos" / "b" / "b.jpg"
    if what == "gone":
        path.unlink()
    elif what == "size":
        path.write_bytes(b"larger")
    else:
        os.utime(path, (1, 1))
    kind = "gone" if what == "gone" else "changed"
    said = rf"photos/ has 1 of 3 images that are gone or have changed since .*, such as b/b.jpg \({kind}\): put them"
    with pytest.raises(InputError, match=said):
        open_source(config, known, listing_of)


def test_a_prompt_that_changed_is_noticed_and_one_that_came_is_none(tmp_path):
    config = _photos(tmp_path, "a.jpg", "b.jpg", prompt=None)
    (tmp_path / "photos" / "a.txt").write_text("What?")
    known, listing_of = open_source(config).files, _listings(config)
    (tmp_path / "photos" / "b.txt").write_text("And this?")
    source = open_source(config, known, listing_of)
    assert source.files == known
    assert prompts_of(_read(source, config)) == ["What?", "And this?"]
    (tmp_path / "photos" / "a.txt").write_text("Else?")
    os.utime(tmp_path / "photos" / "a.txt", (1, 1))
    with pytest.raises(InputError, match=r"such as a.jpg \(changed\)"):
        open_source(config, known, listing_of)


def test_the_output_folder_keeps_the_listing(tmp_path):
    config = _photos(tmp_path, "a.jpg", "b.jpg")
    source, folder = open_source(config), LocalFolder(tmp_path / "out")
    schema = source.columns.output_schema()
    with OutputFolder(folder, Job({}, source.files, source.listings), schema, overwrite=False):
        pass
    earlier = Job.of(folder)
    again = open_source(config, earlier.files, lambda file: read_listing(folder, file))
    assert again.files == source.files == earlier.files
    (kept,) = (tmp_path / "out").glob("_images-*")
    with OutputFolder(folder, Job({}, (), {}), schema, overwrite=True):
        assert not kept.exists()
    with pytest.raises(
        OutputError, match=r"_images-.*, which has the images of .*photos/ as they were .* cannot be read"
    ):
        read_listing(folder, source.files[0])
    pq.write_table(source.listings[0].slice(1), kept)
    with pytest.raises(OutputError, match=r"is damaged; give another --output, or --overwrite"):
        read_listing(folder, source.files[0])


@pytest.mark.usefixtures("where")
def test_the_output_folder_may_be_in_the_folder_of_images(tmp_path):
    config = replace(_photos(tmp_path, "a.jpg", "out/b.jpg"), output=str(tmp_path / "photos" / "out"))
    assert _rows(config)["id"].to_pylist() == ["a.jpg"]
    with pytest.raises(InputError, match="has only files of the output folder"):
        open_source(replace(config, input=(str(tmp_path / "photos" / "out"),)))


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("inputs", [("photos/**",), ("photos", "photos/a"), ("photos/a", "photos"), ("p*",)])
def test_a_folder_inside_a_folder_of_images_is_not_read_twice(inputs, tmp_path):
    config = replace(_photos(tmp_path, "a/1.jpg", "2.jpg"), input=tuple(str(tmp_path / name) for name in inputs))
    assert _rows(config)["id"].to_pylist() == ["2.jpg", "a/1.jpg"]


def test_images_beside_files_of_rows_are_what_these_name(tmp_path, where):
    config = _photos(tmp_path, "img/row-00000", "img/a.jpg")
    (tmp_path / "photos" / "a.jsonl").write_bytes(jsonl(with_paths(tmp_path / "photos", rows_of(1))))
    config = replace(config, prompt=None, allow_images_from=(str(tmp_path),))
    for given in (tmp_path / "photos", tmp_path / "photos" / "**"):
        source = open_source(replace(config, input=(str(given),)))
        assert [file.path for file in source.files] == [f"{where}/photos/a.jsonl"]
        assert source.passed_over[0] >= 2


@pytest.mark.usefixtures("where")
def test_a_folder_of_several_kinds_is_refused_and_named_files_are_not(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("rows.parquet", "rows.tar"):
        KINDS[name](tmp_path / "in", name, rows_of(3))
    with pytest.raises(
        InputError, match=r"in has files of parquet \(.*rows.parquet\) and of tar \(.*rows.tar\), which may"
    ):
        open_source(config_of(tmp_path, "in"))
    assert len(_rows(config_of(tmp_path, "in/*"))) == 6


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("given", ["photos/a.jpg", "photos/*.jpg", "photos/*"])
def test_images_that_are_named_are_refused(given, tmp_path):
    config = replace(_photos(tmp_path, "a.jpg"), input=(str(tmp_path / given),))
    with pytest.raises(InputError, match=r"names images, such as .*a.jpg: images are read by folder, so give theirs"):
        open_source(config)


def test_names_of_images_may_be_any_bytes(tmp_path):
    config = _photos(tmp_path, "a\udcff.jpg", "b\n.jpg")
    table = _rows(config)
    assert table["id"].to_pylist() == ["a\\xff.jpg", "b\n.jpg"]
    assert images_of(table) == [b"0", b"1"]


# Many.


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", *(pytest.param(name, marks=pytest.mark.long) for name in ("rows.csv", "rows.tar", "rows.arrow"))],
)
def test_an_input_may_be_ten_thousand_small_files(name, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    KINDS[name](folder, name, rows_of(2))
    for at in range(1, 10_000):
        (folder / f"{at:05d}-{name}").hardlink_to(folder / name)
    config = config_of(tmp_path, "in")
    forget_peak()
    before = peak_memory()
    source = open_source(config)
    assert (source.rows, len(source.files)) == (20_000, 10_000)
    assert peak_memory() - before < 150_000_000
    assert sum(unit.rows for unit in source.units()) == 20_000
    unit = next(source.units())
    (table,) = read_unit(unit, source.columns, None, 8, Fetcher(config.allow_images_from))
    assert table[STAGE].null_count == 2


def test_a_large_file_of_lines_takes_little_memory_to_look_through(tmp_path):
    row = jsonl([{"id": "a", "image": "i", "prompt": "x" * 1_000}])
    with (tmp_path / "a.jsonl").open("wb") as file:
        for _ in range(100):
            file.write(row * 1_000)
    said = []
    forget_peak()
    before = peak_memory()
    source = open_source(config_of(tmp_path, "a.jsonl"), say=said.append)
    assert source.rows == 100_000
    assert len(list(source.units())) == 50
    assert peak_memory() - before < 50_000_000


def test_long_looking_through_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(source_module, "SECONDS", 0.0)
    KINDS["rows.jsonl"](tmp_path, "a.jsonl", rows_of(3))
    said = []
    open_source(config_of(tmp_path, "a.jsonl"), say=said.append)
    assert said
    assert all(line.startswith("input     counting rows: 0.0 GB") for line in said)


def test_ctrl_c_does_not_wait_for_large_files(tmp_path, monkeypatch):
    KINDS["rows.jsonl"](tmp_path, "a.jsonl", rows_of(3))
    (tmp_path / "b.jsonl").write_bytes(b"{}\n")
    started, ended = threading.Event(), []

    def endless(path, progress):
        if path.name == "b.jsonl":
            started.wait(60)
            raise KeyboardInterrupt
        started.set()
        try:
            while True:
                progress(1)
                time.sleep(0.01)
        except CancelledError:
            ended.append(str(path))
            raise

    monkeypatch.setattr(source_module, "describe", endless)
    with pytest.raises(KeyboardInterrupt):
        open_source(config_of(tmp_path, "b.jsonl", "a.jsonl"))
    assert ended == [f"{tmp_path}/a.jsonl"]


@pytest.mark.usefixtures("where")
def test_images_that_came_without_prompts_fail_alone(tmp_path):
    config = _photos(tmp_path, "a.jpg", prompt=None)
    (tmp_path / "photos" / "a.txt").write_text("What?")
    known, listing_of = open_source(config).files, _listings(config)
    _photos(tmp_path, "a.jpg", "b.jpg")
    os.utime(tmp_path / "photos" / "a.jpg", ns=(0, int(_time_of(listing_of, known))))
    table = _read(open_source(config, known, listing_of), config)
    assert table["id"].to_pylist() == ["a.jpg", "b.jpg"]
    assert list(_failures(table)) == [1]


def _time_of(listing_of, known):
    return listing_of(known[0])["time"][0].as_py()
