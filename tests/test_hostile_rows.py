"""Rows that are odd, or that cannot be read, are answered or fail by themselves; files are refused by name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz import forget_peak, peak_memory
from reading import caption_config, images_of, prompts_of, read_rows

from qvl_batch.columns import FAILURE, IMAGES, MESSAGES, ROW
from qvl_batch.errors import InputError
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit
from qvl_batch.input.source import open_source

ROWS = 40
STAGE, KIND, MESSAGE = FAILURE


def _source(tmp_path, **options):
    return open_source(caption_config(tmp_path, **options))


def _questions(**columns):
    rows = {
        "id": [f"row {number}" for number in range(ROWS)],
        "image": [bytes([number]) * 100 for number in range(ROWS)],
        "prompt": [f"What is {number}?" for number in range(ROWS)],
    }
    return pa.table(rows | columns)


def _write_damaged(path, column, table=None, page=None, **options):
    """A file of two row groups; a column of the first is overwritten, from its page with so many rows before it on."""
    pq.write_table(
        table or _questions(), path, row_group_size=ROWS // 2, compression="zstd", use_dictionary=False,
        write_batch_size=5, data_page_size=1, **options,
    )  # fmt: skip
    group = pq.read_metadata(path).row_group(0)
    chunk = next(group.column(at) for at in range(group.num_columns) if group.column(at).path_in_schema == column)
    start, size = chunk.data_page_offset, chunk.total_compressed_size
    damaged = bytearray(path.read_bytes())
    begin = start + (0 if page is None else size * page // 4)
    damaged[begin : start + size] = b"\xff" * (start + size - begin)
    path.write_bytes(damaged)


@pytest.mark.parametrize("column", ["image", "prompt", "id", "note"])
def test_rows_of_a_damaged_row_group_fail_with_what_can_be_read_of_them(column, tmp_path):
    table = _questions(note=list(range(ROWS)))
    _write_damaged(tmp_path / "a.parquet", column, table)
    pq.write_table(table, tmp_path / "b.parquet")
    rows = read_rows(_source(tmp_path, keep_columns=("note",)))
    assert rows[ROW].to_pylist() == [*range(ROWS), *range(ROWS)]
    half = ROWS // 2
    damaged, whole = rows.slice(0, half), rows.slice(half)
    for name in ("id", "note"):
        expected = [None] * half if name == column else table[name].to_pylist()[:half]
        assert damaged[name].to_pylist() == expected
    assert set(damaged[STAGE].to_pylist()) == {"read"}
    assert set(damaged[KIND].to_pylist()) == {"RecordError"}
    for row, message in enumerate(damaged[MESSAGE].to_pylist()):
        assert message.startswith(f"row {row} of {tmp_path}/a.parquet (row group 0) cannot be read: ")
    assert damaged[IMAGES].null_count == damaged[MESSAGES].null_count == half
    assert whole["id"].to_pylist() == [*table["id"].to_pylist()[half:], *table["id"].to_pylist()]
    assert whole[IMAGES].null_count == 0
    assert set(whole[STAGE].to_pylist()) == {None}


def test_rows_before_the_damage_are_read_and_a_limit_holds(tmp_path):
    _write_damaged(tmp_path / "a.parquet", "image", page=2)
    rows = read_rows(_source(tmp_path, limit=15), prompt="What?", rows_per_table=4)
    assert rows["id"].to_pylist() == _questions()["id"].to_pylist()[:15]
    failed = [stage is not None for stage in rows[STAGE].to_pylist()]
    assert 0 < failed.count(False) < 15
    assert failed == sorted(failed)


def test_a_file_that_went_stops_the_job(tmp_path):
    pq.write_table(_questions(), tmp_path / "a.parquet")
    source = _source(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"a.parquet: row group 0 cannot be read"):
        read_rows(source)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(InputError, match=r"a.parquet: row group 0 cannot be read: .*No such file"):
        read_rows(source)


def test_a_row_group_with_fewer_rows_than_its_footer_says_stops_the_job(tmp_path):
    pq.write_table(_questions(), tmp_path / "a.parquet")
    source = _source(tmp_path)
    unit = replace(next(source.units()), spans=[(0, ROWS + 1)])
    with pytest.raises(InputError, match=r"a.parquet: row group 0 has 40 rows, not 41: the file is damaged"):
        list(read_unit(unit, source.columns, None, 8, Fetcher(())))


def test_a_damaged_footer_among_good_files_is_named_at_the_start(tmp_path):
    for name in "abc":
        pq.write_table(_questions(), tmp_path / f"{name}.parquet")
    data = (tmp_path / "b.parquet").read_bytes()
    at = data.index(b"ARROW:schema")
    (tmp_path / "b.parquet").write_bytes(data[: at - 100] + bytes(90) + data[at - 10 :])
    with pytest.raises(InputError, match=r"b.parquet is not a readable parquet file: "):
        _source(tmp_path)


def test_a_file_without_bytes_is_named(tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(InputError, match=r"a.parquet is not a readable parquet file: .*0 bytes"):
        _source(tmp_path)


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_files_without_rows_add_none(groups, tmp_path):
    with pq.ParquetWriter(tmp_path / "empty.parquet", _questions().schema) as writer:
        for _ in range(groups):
            writer.write_table(_questions().slice(0, 0))
    source = _source(tmp_path)
    assert (source.rows, list(source.units()), len(source.files)) == (0, [], 1)
    pq.write_table(_questions(), tmp_path / "full.parquet")
    assert read_rows(_source(tmp_path)).num_rows == ROWS


NOT_TEXT = [b"fine", b"\xff\xfe", b"lone \xed\xa0\x80", "wörter".encode()]


def _unchecked(values):
    """Strings that nobody has checked, as a cast without a check or another writer leaves them."""
    return pa.array(values, pa.binary()).view(pa.string())


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_prompt_that_is_no_text_fails_alone(dictionary, tmp_path):
    prompts = _unchecked(NOT_TEXT)
    prompts = prompts.dictionary_encode() if dictionary else prompts
    table = pa.table({"id": range(4), "image": [b"x"] * 4, "prompt": prompts})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(_source(tmp_path))
    assert prompts_of(rows) == ["fine", None, None, "wörter"]
    assert rows[KIND].to_pylist() == [None, "RecordError", "RecordError", None]
    assert "a string is not valid Unicode text" in rows[MESSAGE][2].as_py()


def test_a_path_that_is_no_text_fails_alone_and_not_beside_bytes(tmp_path):
    image = pa.StructArray.from_arrays(
        [pa.array([None, None, b"inside", b"inside"]), _unchecked(NOT_TEXT)], names=["bytes", "path"]
    )
    pq.write_table(pa.table({"id": range(4), "image": image}), tmp_path / "a.parquet")
    rows = read_rows(_source(tmp_path, prompt="What?", allow_images_from=(str(tmp_path),)), prompt="What?")
    assert images_of(rows) == [None, None, b"inside", b"inside"]
    assert rows[KIND].to_pylist() == ["ImageError", "RecordError", None, None]


def test_ids_may_repeat_be_null_or_be_no_text(tmp_path):
    ids = _unchecked([b"same", b"same", None, b"\xff"])
    pq.write_table(pa.table({"id": ids, "image": [b"x"] * 4, "prompt": ["?"] * 4}), tmp_path / "a.parquet")
    rows = read_rows(_source(tmp_path))
    assert rows["id"].cast(pa.binary()).to_pylist() == [b"same", b"same", None, b"\xff"]
    assert rows[STAGE].null_count == 4


def test_control_characters_are_text(tmp_path):
    odd = "".join(map(chr, range(32))) + "\x7f\u202e\ufeff\U0010ffff"
    table = pa.table({"id": [odd], "image": [b"x"], "prompt": [odd]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(_source(tmp_path))
    assert (rows["id"].to_pylist(), prompts_of(rows)) == ([odd], [odd])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": [True]}, r"'id' \(--id-column\) is bool; it must be strings, numbers, dates, times, UUIDs or bytes"),
        ({"id": pa.nulls(1)}, r"'id' \(--id-column\) is null"),
        ({"id": [["a"]]}, r"'id' \(--id-column\) is list"),
        ({"image": [[[b"a"]]]}, r"'image' \(--image-column\) is list"),
        ({"image": [[{"data": b"x"}]]}, r"'image' \(--image-column\) is list<[^:]*: struct<data: binary>>; it must be"),
        ({"image": [{"data": b"x"}]}, r"'image' \(--image-column\) is struct<data: binary>"),
        (
            {"image": pa.StructArray.from_arrays([pa.array([b"x"])] * 3, ["path", "bytes", "bytes"])},
            r"'image' \(--image-column\) is struct<path: binary, bytes: binary, bytes: binary>",
        ),
        ({"prompt": [b"x"]}, r"'prompt' \(--prompt-column\) is binary"),
        ({"prompt": [["x"]]}, r"'prompt' \(--prompt-column\) is list"),
    ],
)
def test_columns_of_a_wrong_type_are_named(columns, message, tmp_path):
    pq.write_table(pa.table({"id": ["a"], "image": [b"x"], "prompt": ["?"]} | columns), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        _source(tmp_path)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([b"x"]), pa.array(["?"]), pa.array(["b"])],
                                 names=["id", "image", "prompt", "id"])  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no single column 'id' \(--id-column\); it has id, image, prompt, id"):
        _source(tmp_path)


def test_a_struct_whose_parts_are_of_other_types_fails_row_by_row(tmp_path):
    image = [{"bytes": 7, "path": None}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"id": [1, 2], "image": image, "prompt": ["?"] * 2}), tmp_path / "a.parquet")
    rows = read_rows(_source(tmp_path))
    assert rows[KIND].to_pylist() == ["RecordError", "ImageError"]
    assert rows[MESSAGE][0].as_py() == "the image is a int, not bytes or a path"


def test_what_else_a_struct_has_is_not_looked_at(tmp_path):
    beyond = pa.array([2**61, None], pa.timestamp("ms"))
    columns = [pa.array([b"inside", None]), beyond, beyond]
    image = pa.StructArray.from_arrays(columns, names=["bytes", "taken", "taken"])
    pq.write_table(pa.table({"id": [1, 2], "image": image, "prompt": ["?"] * 2}), tmp_path / "a.parquet")
    rows = read_rows(_source(tmp_path))
    assert images_of(rows) == [b"inside", None]
    assert rows[MESSAGE].to_pylist() == [None, "the image is null"]


def test_an_image_that_python_has_no_value_for_fails_alone(tmp_path):
    image = pa.StructArray.from_arrays([pa.array([2**61, None], pa.timestamp("ms"))], names=["bytes"])
    pq.write_table(pa.table({"id": [1, 2], "image": image, "prompt": ["?"] * 2}), tmp_path / "a.parquet")
    rows = read_rows(_source(tmp_path))
    assert rows[KIND].to_pylist() == ["RecordError", "ImageError"]
    assert rows[MESSAGE][0].as_py().startswith("a timestamp[ms] cannot be read: ")


def test_a_folder_of_many_files_is_opened_by_their_footers_alone(tmp_path):
    noise = np.random.default_rng(0).bytes(1_000_000)
    pq.write_table(pa.table({"id": [1], "image": [noise], "prompt": ["?"]}), tmp_path / "0.parquet")
    for number in range(1, 500):
        (tmp_path / f"{number}.parquet").hardlink_to(tmp_path / "0.parquet")
    read = _bytes_read()
    forget_peak()
    before = peak_memory()
    source = _source(tmp_path)
    assert (source.rows, len(source.files)) == (500, 500)
    assert _bytes_read() - read < 50_000_000
    assert peak_memory() - before < 50_000_000


def _bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])
