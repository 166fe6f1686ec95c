"""Every row of the input is found and read as what it is, or the job says what it cannot read."""

import os
import re
import sys
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from reading import caption_config, images_of, prompts_of, read_rows

from qvl_batch.columns import FAILURE, FILE, ROW, failures_of
from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit, refuse_paths
from qvl_batch.input.source import open_source
from qvl_batch.rows import RowSet

TABLE = pa.table({"id": [1, 2, 3], "image": [b"a", b"b", b"c"], "prompt": ["x", "y", None]})


def _rows_of(config, rows_per_table=2):
    return read_rows(open_source(config), config.prompt, rows_per_table, config.allow_images_from)


def test_files_folders_and_globs_are_found_once_in_order(tmp_path):
    for name in ("b/2.parquet", "b/1.parquet", "a.parquet", "b/_hidden.parquet", "b/.cache/3.parquet", "b/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(TABLE, tmp_path / name)
    source = open_source(caption_config(tmp_path, tmp_path / "b", tmp_path / "*.parquet", tmp_path / "b" / "1.parquet"))
    names = [file.path.removeprefix(str(tmp_path)) for file in source.files]
    assert names == ["/b/1.parquet", "/b/2.parquet", "/a.parquet"]
    assert source.rows == 9
    assert {(file.size, file.rows) for file in source.files} == {((tmp_path / "a.parquet").stat().st_size, 3)}


def test_files_of_folders_that_are_not_taken_are_known(tmp_path):
    _write_inputs(tmp_path, "in/a.parquet", "in/b.PARQUET", "in/c.pq", "in/part-0", "in/_d", "in/e/f.json", "in/.g")
    source = open_source(caption_config(tmp_path, tmp_path / "in"))
    assert len(source.files) == 3
    assert source.passed_over == (2, f"{tmp_path}/in/part-0")
    assert open_source(caption_config(tmp_path, tmp_path / "in" / "*.pq")).passed_over == (0, None)


def _names(source, tmp_path):
    return [file.path.removeprefix(f"{tmp_path}/") for file in source.files]


def _write_inputs(tmp_path, *names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(TABLE, tmp_path / name)


@pytest.mark.parametrize("given", ["in", "in/**", "in/**/*.parquet", "i[n]", "in/l*", "./in/../in"])
def test_folders_are_read_whole_through_links_and_whatever_their_names(given, tmp_path, monkeypatch):
    _write_inputs(
        tmp_path, "in/leaf.parquet/part-0.parquet", "far/1.parquet", "far/_temporary/2.parquet", "far/.3.parquet"
    )
    (tmp_path / "in" / "link").symlink_to("../far")
    (tmp_path / "far" / "back").symlink_to("../in")
    monkeypatch.chdir(tmp_path)
    source = open_source(caption_config(tmp_path, given))
    assert _names(source, tmp_path) == ["in/leaf.parquet/part-0.parquet", "far/1.parquet"]


TABLES = {
    "t/_delta_log/00000000000000000000.json": "a Delta table: .* deltalake.DeltaTable",
    "t/metadata/v12.metadata.json": "an Iceberg table: .* pyiceberg",
    "t/metadata/00003-918d6cb2-95af.metadata.json": "an Iceberg table",
    "t/metadata/snap-2564313941058365710-0-952d9a79.avro": "an Iceberg table",
    "t/.hoodie/hoodie.properties": "a Hudi table: .* hudi",
}


@pytest.mark.parametrize(
    "given",
    [
        "in",
        "in/t",
        "in/*",
        "in/**",
        "in/t/p=1",
        "in/t/p=*",
        "in/t/p=1/q",
        "in/link",
        "in/t/",
        "in/t/*.parquet",
        "in/*/p=1/*/*",
    ],
)
@pytest.mark.parametrize("sign", TABLES)
def test_a_folder_of_a_table_is_refused_wherever_it_is_met(sign, given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deltalake", None)  # as if it were not installed
    _write_inputs(tmp_path, "in/1.parquet", "in/t/2.parquet", "in/t/p=1/q/3.parquet")
    (tmp_path / "in" / sign).parent.mkdir()
    (tmp_path / "in" / sign).touch()
    (tmp_path / "in" / "link").symlink_to("t/p=1")
    with pytest.raises(InputError, match=rf"^{tmp_path}/in/t is {TABLES[sign]}.*'{tmp_path}/in/t") as error:
        open_source(caption_config(tmp_path, tmp_path / given))
    assert len(str(error.value).splitlines()) == 1
    # Files that are named are what was asked for.
    table = tmp_path / "in" / "t"
    named = open_source(caption_config(tmp_path, table / "2.parquet", table / "p=1" / "q" / "3.parquet"))
    assert _names(named, tmp_path) == ["in/t/2.parquet", "in/t/p=1/q/3.parquet"]


def _delta_table(folder, **options):
    """A table of three rows, of which its current version has two."""
    rows = TABLE.append_column("split", [["a b", "c/d", None]])
    for some in (rows, rows.slice(1)):
        write_deltalake(folder, some, mode="overwrite", partition_by=["split"], **options)


def test_of_a_delta_table_the_current_version_is_read(tmp_path):
    table = tmp_path / "table"
    _delta_table(table)
    assert len(list(table.rglob("*.parquet"))) == 5
    source = open_source(caption_config(tmp_path, table, keep_columns=("split",)))
    rows = read_rows(source)
    assert sorted(zip(rows["id"].to_pylist(), rows["split"].to_pylist(), strict=True)) == [(2, "c/d"), (3, None)]
    known = source.files
    write_deltalake(table, TABLE.slice(0, 1).append_column("split", [["e"]]), mode="append", partition_by=["split"])
    assert open_source(caption_config(tmp_path, table), known).rows == 3
    _delta_table(table)
    with pytest.raises(InputError, match=r"was part of the input when this job began, and --input no longer names it"):
        open_source(caption_config(tmp_path, table), known)


@pytest.mark.parametrize("given", ["in", "in/table/split=c%2Fd", "in/*/*"])
def test_what_is_inside_or_around_a_delta_table_is_refused(given, tmp_path):
    _delta_table(tmp_path / "in" / "table")
    _write_inputs(tmp_path, "in/1.parquet")
    with pytest.raises(InputError, match=r"in/table is a Delta table: .* Give the table's own folder"):
        open_source(caption_config(tmp_path, tmp_path / given))


def test_a_delta_table_whose_files_alone_do_not_say_its_rows_is_refused(tmp_path):
    _delta_table(tmp_path / "mapped", configuration={"delta.columnMapping.mode": "name"})
    with pytest.raises(InputError, match=r"mapped is a Delta table whose files alone do not say .*columnMapping"):
        open_source(caption_config(tmp_path, tmp_path / "mapped"))
    (tmp_path / "broken" / "_delta_log").mkdir(parents=True)
    with pytest.raises(InputError, match=r"broken is a Delta table that cannot be read: .*"):
        open_source(caption_config(tmp_path, tmp_path / "broken"))
    write_deltalake(tmp_path / "empty", TABLE.slice(0, 0))
    with pytest.raises(InputError, match=r"empty is a Delta table without rows in its current version"):
        open_source(caption_config(tmp_path, tmp_path / "empty"))


def test_a_folder_that_is_like_a_table_is_none(tmp_path):
    _write_inputs(tmp_path, "in/metadata/1.parquet", "in/delta_log/2.parquet", "in/metadata/2026-01.parquet")
    for name in ("image.metadata.json", "2026-01-02.metadata.json", "schema.avro"):
        (tmp_path / "in" / "metadata" / name).touch()
    assert len(open_source(caption_config(tmp_path, tmp_path / "in")).files) == 3


@pytest.mark.parametrize("given", ["in", "in/*", "in/*/*.parquet", "in/**/*.parquet"])
def test_a_folder_that_may_not_be_listed_is_named(given, tmp_path, monkeypatch):
    _write_inputs(tmp_path, "in/a/1.parquet", "in/b/2.parquet")
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(_refused, getattr(os, name)))
    with pytest.raises(InputError, match=r"--input .* cannot be accessed: .*Permission denied: '.*in/b'"):
        open_source(caption_config(tmp_path, tmp_path / given))


def _refused(real, path):
    if Path(path).name == "b":
        raise PermissionError(13, "Permission denied", str(path))
    return real(path)


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("in", "in"),
        ("in/out", "in"),
        ("in/out/1.parquet", "in"),
        ("in/**/*.parquet", "link/to-in"),
        ("link", "in/out"),
        ("l.parquet", "in/out"),
        ("in/*", "in/out"),
    ],
)
def test_the_output_is_no_input(given, output, tmp_path):
    _write_inputs(tmp_path, "in/out/1.parquet", "else/1.parquet")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "to-in").symlink_to("../in")
    (tmp_path / "l.parquet").symlink_to("in/out/1.parquet")
    config = replace(caption_config(tmp_path, tmp_path / "else", tmp_path / given), output=str(tmp_path / output))
    with pytest.raises(InputError, match=rf"{re.escape(given)} has only files of the output .*: give another --output"):
        open_source(config)


@pytest.mark.parametrize("given", ["in", "in/**/*.parquet", "in/*"])
def test_an_output_inside_an_input_folder_is_left_out(given, tmp_path):
    _write_inputs(tmp_path, "in/1.parquet", "in/out/part-0.parquet", "in/out/deeper/2.parquet", "in/outer/3.parquet")
    (tmp_path / "in" / "4.parquet").symlink_to("out/part-0.parquet")
    source = open_source(replace(caption_config(tmp_path, tmp_path / given), output=str(tmp_path / "in" / "out")))
    assert _names(source, tmp_path) == ["in/1.parquet", "in/outer/3.parquet"]


def test_row_groups_are_read_whole_and_in_place(tmp_path):
    table = pa.table({"id": range(10), "image": [b""] * 10, "prompt": [str(i) for i in range(10)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    rows = _rows_of(caption_config(tmp_path), rows_per_table=3)
    assert rows["id"].to_pylist() == rows[ROW].to_pylist() == list(range(10))
    assert set(rows[FILE].to_pylist()) == {0}


def test_rows_that_are_done_are_not_read_again(tmp_path):
    rng = np.random.default_rng(1)
    for number, rows in enumerate((10, 7)):
        table = pa.table({"id": range(rows), "image": [b""] * rows, "prompt": ["x"] * rows})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    everything = {(file, row) for file, rows in enumerate((10, 7)) for row in range(rows)}
    for _ in range(20):
        done = RowSet([10, 7])
        answered = {pair for pair in everything if rng.random() < 0.6}
        for file, row in answered:
            done.add(file, row, row + 1)
        source = open_source(caption_config(tmp_path)).without(done)
        assert source.rows == len(everything - answered)
        tables = [t for unit in source.units() for t in read_unit(unit, source.columns, None, 3, Fetcher(()))]
        left = [pair for t in tables for pair in zip(t[FILE].to_pylist(), t[ROW].to_pylist(), strict=True)]
        assert left == sorted(everything - answered)
        assert [row for _, row in left] == [row for t in tables for row in t["id"].to_pylist()]


def test_a_source_has_parts_of_whole_units(tmp_path):
    for number in range(2):
        table = pa.table({"id": range(6), "image": [b""] * 6, "prompt": ["x"] * 6})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    source = open_source(caption_config(tmp_path))
    for rows, expected in ((1, [2] * 6), (4, [4, 4, 4]), (5, [4, 4, 4]), (100, [12])):
        parts = list(source.parts(rows))
        assert [sum(unit.rows for unit in part) for part in parts] == expected
        assert [unit for part in parts for unit in part] == list(source.units())


def test_files_keep_their_numbers_when_others_are_added(tmp_path):
    pq.write_table(TABLE, tmp_path / "b.parquet")
    known = open_source(caption_config(tmp_path)).files
    pq.write_table(TABLE, tmp_path / "a.parquet")
    source = open_source(caption_config(tmp_path), known)
    assert [Path(file.path).name for file in source.files] == ["b.parquet", "a.parquet"]
    assert next(source.units()).file == str(tmp_path / "b.parquet")


def test_files_that_changed_or_went_are_named(tmp_path):
    for name in "ab":
        pq.write_table(TABLE, tmp_path / f"{name}.parquet")
    known = open_source(caption_config(tmp_path)).files
    pq.write_table(pa.concat_tables([TABLE] * 3), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet has changed since this job began: .* 9 rows now, .* 3 rows then"):
        open_source(caption_config(tmp_path), known)
    pq.write_table(TABLE.set_column(0, "id", pa.array([4, 5, 6])), tmp_path / "b.parquet")
    assert (tmp_path / "b.parquet").stat().st_size == known[1].size
    with pytest.raises(InputError, match=r"b.parquet has changed since this job began: .* 3 rows now, .* 3 rows then"):
        open_source(caption_config(tmp_path), known)
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(InputError, match=r"b.parquet was part of the input when this job began, and --input no longer"):
        open_source(caption_config(tmp_path), known)


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 12, 100])
def test_a_limit_takes_the_first_rows(limit, tmp_path):
    for number in range(2):
        ids = range(6 * number, 6 * number + 6)
        table = pa.table({"id": ids, "image": [b""] * 6, "prompt": ["x"] * 6})
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    rows = _rows_of(caption_config(tmp_path, limit=limit))
    assert rows["id"].to_pylist() == list(range(min(limit, 12)))


def test_images_may_be_structs_bytes_or_paths(tmp_path):
    (tmp_path / "image").write_bytes(b"from a file")
    struct = pa.array(
        [
            {"bytes": b"inside", "path": "ignored"},
            {"bytes": None, "path": "image"},
            {"bytes": None, "path": str(tmp_path / "image")},
            {"bytes": None, "path": f"file://{tmp_path}/image"},
            {"bytes": None, "path": None},
            None,
            {"bytes": None, "path": "missing"},
        ]
    )
    count = len(struct)
    pq.write_table(pa.table({"id": range(count), "image": struct}), tmp_path / "a.parquet")
    rows = _rows_of(caption_config(tmp_path, prompt="What?", allow_images_from=(str(tmp_path),)))
    file = b"from a file"
    assert images_of(rows) == [b"inside", file, file, file, None, None, None]
    assert prompts_of(rows) == ["What?"] * count
    messages = rows[FAILURE[2]].to_pylist()
    assert messages[4:6] == ["the image is null"] * 2
    assert messages[6].startswith("missing cannot be read: FileNotFoundError")
    assert rows[FAILURE[0]].to_pylist() == [None] * 4 + ["image"] * 3


def test_relative_paths_start_where_the_file_is_named_not_where_a_link_leads(tmp_path):
    _write_inputs(tmp_path, "blobs/abc")
    pq.write_table(pa.table({"id": ["a"], "image": ["img/1"], "prompt": ["x"]}), tmp_path / "blobs" / "abc")
    (tmp_path / "in" / "img").mkdir(parents=True)
    (tmp_path / "in" / "img" / "1").write_bytes(b"data")
    (tmp_path / "in" / "a.parquet").symlink_to("../blobs/abc")
    (tmp_path / "other").symlink_to("in")
    config = caption_config(
        tmp_path, tmp_path / "other", tmp_path / "blobs" / "abc", allow_images_from=(str(tmp_path),)
    )
    assert images_of(_rows_of(config)) == [b"data"]


def test_a_path_column_of_strings_is_read(tmp_path):
    (tmp_path / "image").write_bytes(b"data")
    pq.write_table(pa.table({"id": ["a"], "image": ["image"], "prompt": ["x"]}), tmp_path / "a.parquet")
    assert images_of(_rows_of(caption_config(tmp_path, allow_images_from=(str(tmp_path),)))) == [b"data"]
    with pytest.raises(InputError, match=r"column 'image' has paths or addresses .* --allow-images-from: image is not"):
        refuse_paths(open_source(caption_config(tmp_path)), ())


def test_kept_columns_keep_their_types(tmp_path):
    nested = pa.array([{"a": [1, None]}, None, {"a": []}])
    table = TABLE.append_column("nested", nested).append_column("count", pa.array([1, None, 3], pa.int8()))
    pq.write_table(table, tmp_path / "a.parquet")
    rows = _rows_of(caption_config(tmp_path, keep_columns=("nested", "count", "prompt")))
    assert rows.select(["nested", "count", "prompt"]).combine_chunks() == table.select(["nested", "count", "prompt"])


@pytest.mark.parametrize(
    ("value", "kind", "kept"),
    [
        ("b", pa.string_view(), pa.large_string()),
        (b"b", pa.binary_view(), pa.large_binary()),
        ({"a": "b"}, pa.struct([("a", pa.string_view())]), pa.struct([("a", pa.large_string())])),
        (["b"], pa.list_(pa.string_view()), pa.list_(pa.large_string())),
        (["b"], pa.list_(pa.string_view(), 1), pa.list_(pa.large_string(), 1)),
        (["b"], pa.large_list(pa.string_view()), pa.large_list(pa.large_string())),
        (["b"], pa.list_view(pa.string_view()), pa.large_list(pa.large_string())),
        ([("a", "b")], pa.map_(pa.string_view(), pa.string_view()), pa.map_(pa.large_string(), pa.large_string())),
    ],
)
def test_kept_columns_of_views_are_kept_as_what_rows_can_be_taken_of(value, kind, kept, tmp_path):
    table = TABLE.append_column("kept", pa.array([value, None, value], kind))
    pq.write_table(table, tmp_path / "a.parquet")
    config = caption_config(tmp_path, keep_columns=("kept",))
    rows = _rows_of(config).take([2, 1])
    assert rows["kept"].type == open_source(config).columns.kept[0].field.type == kept
    assert rows["kept"].to_pylist() == [value, None]


@pytest.mark.parametrize(
    "image",
    [
        pa.array([b"a", None], pa.binary_view()),
        pa.array([{"bytes": b"a"}, None], pa.struct([("bytes", pa.binary_view())])),
    ],
)
def test_images_may_be_views(image, tmp_path):
    pq.write_table(pa.table({"id": [1, 2], "image": image, "prompt": ["x", "y"]}), tmp_path / "a.parquet")
    assert images_of(_rows_of(caption_config(tmp_path))) == [b"a", None]


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        (pa.array(["a", "b", "c"]), pa.string()),
        (pa.array(["a", "b", "c"], pa.large_string()), pa.string()),
        (pa.array(["a", "b", "a"]).dictionary_encode(), pa.string()),
        (pa.array([1, 2, 3], pa.int8()), pa.int64()),
        (pa.array([1, 2, 2**64 - 1], pa.uint64()), pa.uint64()),
    ],
)
def test_ids_may_be_strings_or_integers(ids, kind, tmp_path):
    pq.write_table(TABLE.set_column(0, "id", ids), tmp_path / "a.parquet")
    rows = _rows_of(caption_config(tmp_path))
    assert rows["id"].type == kind
    assert rows["id"].to_pylist() == ids.to_pylist()


MOMENT = datetime(2026, 11, 28, 12, 0, 0, 7)  # noqa: DTZ001  (a timestamp without a zone)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([1.0, None, 2.0**60]), ["1", None, "1.152921504606847e+18"]),  # pandas, where one is missing
        (pa.array([123456789012345.0, 0.1, -2.5]), ["123456789012345", "0.1", "-2.5"]),
        (pa.array([1.5, None, 0.1], pa.float32()), ["1.5", None, "0.10000000149011612"]),
        (pa.array([Decimal("1.50"), None, Decimal("-7.00")]), ["1.50", None, "-7.00"]),
        (pa.array([b"\x00\xff", None, b"a"]), ["00ff", None, "61"]),
        (pa.array([b"ab", None, b"cd"], pa.binary(2)), ["6162", None, "6364"]),
        (pa.array([UUID(int=7).bytes] * 3, pa.binary(16)).cast(pa.uuid()), [str(UUID(int=7))] * 3),
        (pa.array([MOMENT.date()] * 3), ["2026-11-28"] * 3),
        (pa.array([MOMENT] * 3, pa.timestamp("ns")), ["2026-11-28 12:00:00.000007000"] * 3),
        (pa.array([MOMENT] * 3, pa.timestamp("us", "UTC")), ["2026-11-28 12:00:00.000007Z"] * 3),
        (pa.array([MOMENT.time()] * 3), ["12:00:00.000007"] * 3),
        (pa.array([b"x", b"y", b"x"]).dictionary_encode(), ["78", "79", "78"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_ids_of_other_types_are_text_from_which_they_can_be_read_again(ids, expected, tmp_path):
    pq.write_table(TABLE.set_column(0, "id", ids), tmp_path / "a.parquet")
    rows = _rows_of(caption_config(tmp_path))
    assert rows["id"].type == pa.string()
    assert rows["id"].to_pylist() == expected


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (TABLE.drop_columns(["image"]), {}, r"no single column 'image' \(--image-column\); it has id, prompt"),
        (TABLE, {"id_column": "key"}, r"no single column 'key' \(--id-column\); it has id, image, prompt"),
        (TABLE.drop_columns(["prompt"]), {}, r"no single column 'prompt' \(--prompt-column\)"),
        (
            TABLE,
            {"keep_columns": ("more",)},
            r"no file has a column 'more' \(--keep-columns\); .* has id, image",
        ),
        (TABLE, {"id_column": "image"}, r"'image' is both --id-column and --image-column"),
        (TABLE, {"image_column": "id"}, r"'id' \(--image-column\) is int64; it must be bytes, text, structs"),
        (TABLE, {"prompt_column": "id"}, r"'id' \(--prompt-column\) is int64; it must be strings"),
    ],
)
def test_columns_that_cannot_be_used_are_named_with_what_is_there(table, options, message, tmp_path):
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        open_source(caption_config(tmp_path, **options))


def test_rows_without_an_id_are_identified_by_file_and_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE.drop_columns("id"), path, row_group_size=2)
    config = caption_config(tmp_path)
    source = open_source(config)
    assert source.columns.id is None
    assert source.columns.output_schema().field("id").type == pa.string()
    rows = _rows_of(config)
    assert rows["id"].to_pylist() == [f"{path}:{row}" for row in range(3)]
    assert images_of(rows) == [b"a", b"b", None]  # the last has no prompt
    done = RowSet([3])
    done.add(0, 1, 2)
    assert read_rows(source.without(done))["id"].to_pylist() == [f"{path}:0", f"{path}:2"]


def test_rows_of_a_damaged_file_are_identified_by_their_place_too(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [b"x" * 1000] * 4, "prompt": ["?"] * 4})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    damaged = bytearray(path.read_bytes())
    damaged[4:40] = b"\xff" * 36
    path.write_bytes(damaged)
    rows = read_rows(open_source(caption_config(tmp_path)))
    assert rows["id"].to_pylist() == [f"{path}:{row}" for row in range(4)]
    assert any(failure is not None for failure in failures_of(rows))


def test_files_with_ids_and_without_are_refused_together(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet")
    pq.write_table(TABLE.drop_columns("id"), tmp_path / "b.parquet")
    with pytest.raises(
        InputError, match=r"b.parquet and .*a.parquet differ in the type of the id .*: no id and id: int64"
    ):
        open_source(caption_config(tmp_path))


@pytest.mark.parametrize("numbers", [pa.list_(pa.int64()), pa.list_(pa.uint8(), 1)])
def test_bytes_as_a_list_of_numbers_are_no_list_of_images(numbers, tmp_path):
    pq.write_table(TABLE.set_column(1, "image", pa.array([[1], [2], [3]], numbers)), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"'image' \(--image-column\) is \w*list<[^;]*; it must be bytes, text"):
        open_source(caption_config(tmp_path))


def test_files_that_differ_in_what_is_kept_are_refused(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet")
    pq.write_table(TABLE.set_column(0, "id", pa.array(["x", "y", "z"])), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b.parquet and .*a.parquet differ in the type of the id"):
        open_source(caption_config(tmp_path))


def test_input_that_is_not_there_is_named(tmp_path):
    for missing in (tmp_path / "no.parquet", tmp_path / "*.parquet", tmp_path):
        with pytest.raises(InputError, match=r"no file found that ends in .parquet, .*, and no images"):
            open_source(caption_config(tmp_path, missing))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("l.parquet", ".", "cannot be accessed: .*Too many levels of symbolic links"),
        ("l.parquet", "x" * 300, "cannot be accessed: .*File name too long"),
        ("\udcff.parquet", ".", "is not a readable parquet file: .* surrogates not allowed"),
        ("a.parquet", ".", "is not a readable parquet file: .*No such file"),
        ("pipe.parquet", ".", "is not a readable parquet file: it is not a regular file"),
    ],
)
def test_names_that_cannot_be_read_are_named(name, given, message, tmp_path):
    match name:
        case "pipe.parquet":
            os.mkfifo(tmp_path / name)
        case "\udcff.parquet":
            _write_inputs(tmp_path, "a.parquet")
            (tmp_path / "a.parquet").rename(tmp_path / name)
        case _:
            (tmp_path / name).symlink_to("nowhere" if name == "a.parquet" else name)
    with pytest.raises(InputError, match=message):
        open_source(caption_config(tmp_path, tmp_path / given))


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    config = caption_config(tmp_path, tmp_path / "a.parquet")
    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(InputError, match=r"a.parquet cannot be accessed: .*Permission denied"):
        open_source(config)


def test_footers_that_cannot_be_right_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE.rename_columns(["id", "image", "XXXX"]), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"XXXX", b"\xff\xfeXX"))
    with pytest.raises(InputError, match=r"a.parquet is not a readable parquet file: 'utf-8' codec can't decode"):
        open_source(caption_config(tmp_path))
    pq.write_table(pa.table({"id": [7] * 37}), path)
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # Thrift's zigzag: 74 is 37, 73 is -37.
    path.write_bytes(data[:footer] + data[footer:].replace(bytes([74]), bytes([73])))
    with pytest.raises(InputError, match=r"is not a readable parquet file: a row group has a negative number of rows"):
        open_source(caption_config(tmp_path))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not for long")
    with pytest.raises(InputError, match=r"a.parquet is not a readable parquet file"):
        open_source(caption_config(tmp_path))


@pytest.mark.parametrize(
    "other", [TABLE.slice(0, 1), TABLE.drop_columns(["image"]), TABLE.set_column(0, "id", pa.array([4, 5, 6]))]
)
def test_a_file_replaced_under_the_job_is_named(other, tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet")
    source = open_source(caption_config(tmp_path))
    pq.write_table(other, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet has changed while this job ran"):
        list(read_unit(next(source.units()), source.columns, None, 8, Fetcher(())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "--slots must be at least 1, not 0"),
        ({"max_new_tokens": -1}, "--max-new-tokens must be at least 1"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"max_image_pixels": 0}, "--max-image-pixels must be at least 1, not 0"),
        ({"prompt": " "}, "--prompt must not be empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        caption_config(tmp_path, **options)


@pytest.mark.parametrize("empty", [{"output": ""}, {"input": ()}, {"input": ("a", " ")}])
def test_an_empty_name_is_not_the_current_folder(empty, tmp_path):
    with pytest.raises(ConfigError, match=r"--input needs at least one file, .* none may be ''"):
        CaptionConfig(**{"bundle": tmp_path, "input": ("a",), "output": "b"} | empty)
