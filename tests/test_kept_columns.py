"""Columns are found by the names that people know them by, and what is kept of them is what the input has."""

import io
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import caption_config, images_of, prompts_of, read_rows

from qvl_batch.columns import FAILURE
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.input.lookup import partitions
from qvl_batch.input.source import open_source

TABLE = pa.table({"id": [1, 2, 3], "image": [b"a", b"b", b"c"], "prompt": ["x", "y", "z"]})
MESSAGE = FAILURE[2]


def _write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**{name: TABLE[name] for name in TABLE.column_names}, **columns}), path)
    return path


def _rows(config):
    return read_rows(open_source(config), config.prompt)


def _kept(folder, *names, **options):
    return caption_config(folder, keep_columns=names, **options)


def test_a_column_may_be_kept_under_another_name(tmp_path):
    _write(tmp_path / "a.parquet", answer=["p", "q", None], **{"a=b": [1.0, 2.0, 3.0]})
    config = _kept(tmp_path, "answer=truth", "prompt", "prompt=asked", "a=b=ratio", "id=key")
    rows = _rows(config)
    assert rows["truth"].to_pylist() == ["p", "q", None]
    assert rows["prompt"].to_pylist() == rows["asked"].to_pylist() == ["x", "y", "z"]
    assert rows["ratio"].to_pylist() == rows["id"].to_pylist() == rows["key"].to_pylist() == [1, 2, 3]
    names = open_source(config).columns.output_schema().names
    assert names[:7] == ["id", "truth", "prompt", "asked", "ratio", "key", "answer"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "a"), "--keep-columns names a more than once; NAME=NEW keeps a column as NEW"),
        (("a", "b=a"), "--keep-columns names a more than once"),
        (("=a",), "--keep-columns '=a': give NAME, or NAME=NEW"),
        (("a=",), "--keep-columns 'a=': give NAME, or NAME=NEW"),
        (("",), "--keep-columns '': give NAME"),
    ],
)
def test_names_that_say_nothing_or_the_same_twice_are_refused(names, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        _kept(tmp_path, *names)


@pytest.mark.parametrize("name", ["answer", "id", "error_type"])
def test_a_kept_column_may_not_hide_an_output_column_and_how_to_rename_it_is_said(name, tmp_path):
    _write(tmp_path / "a.parquet", key=TABLE["id"], answer=TABLE["prompt"], error_type=TABLE["prompt"])
    with pytest.raises(ConfigError, match=rf"--keep-columns {name}: .* such as --keep-columns {name}=my_{name}$"):
        open_source(_kept(tmp_path, name, id_column="key"))
    with pytest.raises(ConfigError, match=rf"--keep-columns {name}: .* such as --keep-columns prompt=my_{name}$"):
        open_source(_kept(tmp_path, f"prompt={name}", id_column="key"))
    assert open_source(_kept(tmp_path, f"{name}=my_{name}", id_column="key")).rows == 3


def test_names_of_the_pipeline_are_reserved_in_the_output_alone(tmp_path):
    _write(tmp_path / "a.parquet", __qvl_row=[7, 8, 9])
    for name in ("__qvl_row", "prompt=__qvl_row"):
        with pytest.raises(ConfigError, match="--keep-columns __qvl_row: names that begin with __qvl_ are reserved"):
            open_source(_kept(tmp_path, name))
    assert _rows(_kept(tmp_path, "__qvl_row=place"))["place"].to_pylist() == [7, 8, 9]


TIMES = pa.array([1, 2, None], pa.timestamp("s"))
JOINED = [
    (pa.nulls(3), pa.array(["x", "y", None]), pa.string()),
    (pa.array(["x", "y", "z"]), pa.array(["x", "y", None], pa.large_string()), pa.large_string()),
    (pa.array([1, 2, 3], pa.int32()), pa.array([1, 2**40, None]), pa.int64()),
    (pa.array([1, 2, 3], pa.uint8()), pa.array([1, -2, None], pa.int8()), pa.int16()),
    (pa.array([1, 2, 3], pa.float64()), pa.array([1, 2, None], pa.float32()), pa.float64()),
    (pa.array([1, 2, 2**53]), pa.array([1.5, 2.0, None]), pa.float64()),
    (pa.array([0.1, 2, 3], pa.float32()), pa.array([2**31 - 1, -7, None], pa.int32()), pa.float64()),
    (pa.array([0.5], pa.float16()).take(pa.array([0, 0, 0])), pa.array([2**40, None, 1]), pa.float64()),
    (pa.array([Decimal("1.50")] * 3), pa.array([Decimal("123456.7")] * 3), pa.decimal128(8, 2)),
    (TIMES, pa.array([1, 2, None], pa.timestamp("us")), pa.timestamp("us")),
    (TIMES.cast(pa.timestamp("ms", "UTC")), TIMES.cast(pa.timestamp("ns", "UTC")), pa.timestamp("ns", "UTC")),
    (pa.array([[], None, []], pa.list_(pa.null())), pa.array([["x"], [], None]), pa.list_(pa.string())),
    (pa.array([[], None, []], pa.list_(pa.null())), pa.array([{"a": [1]}] * 3).field(0), pa.list_(pa.int64())),
    (pa.array([[1, 2]] * 3, pa.list_(pa.int8(), 2)), pa.array([[1.5]] * 3), pa.list_(pa.float64())),
    (
        pa.array([{"a": 1, "b": []}, None, {"a": 2, "b": None}]),
        pa.array([{"b": ["x"], "c": 1, "a": 0.5}] * 3),
        pa.struct([("a", pa.float64()), ("b", pa.list_(pa.string())), ("c", pa.int64())]),
    ),
    (
        pa.array([[{"a": 1}]] * 3),
        pa.array([[{"b": 1}], [], None]),
        pa.list_(pa.struct([("a", pa.int64()), ("b", pa.int64())])),
    ),
    (
        pa.array([[("k", 1)]] * 3, pa.map_(pa.string(), pa.int32())),
        pa.array([[("k", 2**40)]] * 3, pa.map_(pa.string(), pa.int64())),
        pa.map_(pa.string(), pa.int64()),
    ),
    (pa.array(["x", "y", "x"]).dictionary_encode(), pa.array(["z", None, "z"]), pa.string()),
    (pa.array(["x", "y", "x"]).dictionary_encode(), pa.array(["z", None, "z"]).dictionary_encode(), None),
    (
        pa.array(["x", None, "x"]).cast(pa.dictionary(pa.int8(), pa.string())),
        pa.array(["z"] * 3).dictionary_encode(),
        pa.string(),
    ),
    (pa.array([b"ab"] * 3, pa.binary(2)), pa.array([b"x", b"abc", None]), pa.binary()),
]


@pytest.mark.parametrize(("one", "other", "kind"), JOINED, ids=lambda value: str(getattr(value, "type", value)))
@pytest.mark.parametrize("turned", [False, True])
def test_a_kept_column_has_a_type_that_holds_all_files(one, other, kind, turned, tmp_path):
    one, other = (other, one) if turned else (one, other)
    kind = kind or one.type
    for name, column in (("a", one), ("b", other)):
        _write(tmp_path / f"{name}.parquet", note=column)
    config = _kept(tmp_path, "note")
    source = open_source(config)
    found = source.columns.output_schema().field("note").type
    assert _in_order(found) == _in_order(kind)
    rows = _rows(config)
    assert rows["note"].type == found
    assert rows["note"].to_pylist() == [_filled(each, found) for each in one.to_pylist() + other.to_pylist()]
    assert rows[MESSAGE].to_pylist() == [None] * 6
    # Of files that come later, the answers that are there do not know.
    first = open_source(_kept(tmp_path / "a.parquet", "note")).files
    if found == one.type:
        assert open_source(config, first).files == source.files
    else:
        with pytest.raises(InputError, match=r"b.parquet and .*a.parquet differ in the type .* of a kept column"):
            open_source(config, first)


def test_rows_in_pieces_are_the_same_rows_whatever_is_null_in_them(tmp_path):
    nothing = pa.struct([("k", pa.null()), ("n", pa.list_(pa.null()))])
    lists = pa.array([[{"k": None, "n": [None] * at}] * at for at in range(7)], pa.list_(nothing))
    maps = pa.array([[("k", [None] * at)] for at in range(7)], pa.map_(pa.string(), pa.list_(pa.null())))
    twice = pa.StructArray.from_arrays(
        [pa.array(range(7)), pa.array(range(7, 14))], fields=[pa.field("t", pa.int64(), nullable=False)] * 2
    )
    views = pa.array([["x"] * at for at in range(7)], pa.list_view(pa.string_view()))
    columns = {"lists": lists, "maps": maps, "twice": twice, "views": views}
    rows = {"id": range(7), "image": [b"x"] * 7, "prompt": ["?"] * 7}
    pq.write_table(pa.table({**rows, **columns}), tmp_path / "a.parquet")
    other = {
        "lists": pa.array([[{"k": 1, "n": ["x"], "more": 0.5}]] * 7),
        "maps": pa.array([[("k", ["x"])]] * 7, pa.map_(pa.string(), pa.list_(pa.string()))),
        "twice": twice,
        "views": pa.array([["y"]] * 7),
    }
    pq.write_table(pa.table({**rows, **other}), tmp_path / "b.parquet")
    for size in (1, 2, 3, 8):
        found = read_rows(open_source(_kept(tmp_path, *columns)), None, size)
        found.validate(full=True)
        for name, one in columns.items():
            if name != "twice":
                values = [*one.to_pylist(), *other[name].to_pylist()]
                assert found[name].to_pylist() == [_filled(value, found[name].type) for value in values]
        parts = [found["twice"].combine_chunks().field(at).to_pylist() for at in range(2)]
        assert parts == [[*range(7)] * 2, [*range(7, 14)] * 2]


def _in_order(kind):
    """A type with the fields of structs in the order of their names."""
    if pa.types.is_list(kind):
        return pa.list_(_in_order(kind.value_type))
    return pa.struct(sorted(kind, key=lambda field: field.name)) if pa.types.is_struct(kind) else kind


def _filled(value, kind):
    """A value with a null for each field that its own type lacks."""
    if pa.types.is_list(kind) and value is not None:
        return [_filled(each, kind.value_type) for each in value]
    return {field.name: value.get(field.name) for field in kind} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1, 2, 3]), pa.array(["1", "2", "3"])),
        (pa.array([True] * 3), pa.array([1] * 3)),
        (pa.array(["x"] * 3), pa.array([b"x"] * 3)),
        (pa.array([["x"]] * 3), pa.array([[b"x"]] * 3)),
        (pa.array([Decimal("0.1")] * 3), pa.array([0.1] * 3)),
        (pa.array([Decimal("0.1")] * 3), pa.array([1] * 3)),
        (pa.array([{"a": Decimal("0.1")}] * 3), pa.array([{"a": 0.1}] * 3)),
        (TIMES, TIMES.cast(pa.timestamp("s", "UTC"))),
        (TIMES, TIMES.cast(pa.date64())),
        (pa.array([[1]] * 3), pa.array([1] * 3)),
    ],
    ids=lambda value: str(value.type),
)
def test_types_of_which_values_would_change_are_refused(one, other, tmp_path):
    for name, column in (("a", one), ("b", other)):
        _write(tmp_path / f"{name}.parquet", note=column)
    with pytest.raises(InputError, match=r"b.parquet and .*a.parquet differ in the type .* of a kept column"):
        open_source(_kept(tmp_path, "note"))


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        (pa.array([1, 2**53 + 1, None]), pa.array([0.5] * 3), "9007199254740993, int64, which double"),
        (pa.array([1, 2**63, None], pa.uint64()), pa.array([-1] * 3), "9223372036854775808, uint64, which int64"),
        (
            pa.array([1, 2**40, None], pa.timestamp("s")),
            TIMES.cast(pa.timestamp("ns")),
            r"the timestamp\[ms\], which timestamp\[ns\]",
        ),
        (pa.array([[1], [2**53 + 1], None]), pa.array([[0.5]] * 3), r"\[9007199254740993\], list<.*int64>, which list"),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_value_that_the_common_type_would_change_fails_its_row(one, other, shown, tmp_path):
    for name, column in (("a", one), ("b", other)):
        _write(tmp_path / f"{name}.parquet", note=column)
    rows = _rows(_kept(tmp_path, "note=n"))
    values = one.cast(pa.timestamp("ns"), safe=False) if pa.types.is_timestamp(one.type) else one
    assert rows["n"].to_pylist() == [values[0].as_py(), None, None, *rows["n"].to_pylist()[3:]]
    messages = rows[MESSAGE].to_pylist()
    assert messages[:1] + messages[2:] == [None] * 5
    with pytest.raises(AssertionError, match=rf"^column 'note' \(--keep-columns\) has {shown}.* would change$"):
        raise AssertionError(messages[1])


def test_a_column_that_some_files_lack_is_null_there_and_one_that_all_lack_is_refused(tmp_path):
    _write(tmp_path / "a.parquet")
    _write(tmp_path / "b.parquet", note=pa.array([{"k": 1}] * 3), more=["m"] * 3)
    _write(tmp_path / "c.parquet", note=pa.array([{"k": 2}] * 3))
    config = _kept(tmp_path, "note", "more=most")
    source = open_source(config)
    assert [(kept.name, kept.missing) for kept in source.columns.kept] == [("note", 1), ("more", 2)]
    rows = _rows(config)
    assert rows["note"].to_pylist() == [None] * 3 + [{"k": 1}] * 3 + [{"k": 2}] * 3
    assert rows["most"].to_pylist() == [None] * 3 + ["m"] * 3 + [None] * 3
    with pytest.raises(InputError, match=r"no file has a column 'mor' \(--keep-columns\); .*c.parquet has id, "):
        open_source(_kept(tmp_path, "note", "mor"))
    first = open_source(_kept(tmp_path / "b.parquet", "note", "more=most")).files
    assert open_source(config, first).rows == 9
    # Of a file without rows, too, a column is one that is there.
    pq.write_table(
        pa.table({**{n: TABLE[n] for n in TABLE.column_names}, "mor": [1] * 3}).slice(0, 0), tmp_path / "d.parquet"
    )
    assert _rows(_kept(tmp_path, "mor"))["mor"].to_pylist() == [None] * 9


def test_partitions_of_folders_are_columns_that_can_be_kept(tmp_path):
    folders = ("split=train/day=1", "split=dev%2Ftest/day=__HIVE_DEFAULT_PARTITION__", "split=a=b/split=in")
    for number, folder in enumerate(folders):
        _write(tmp_path / folder / f"{number}.parquet")
    _write(tmp_path / "split=no" / "own.parquet", split=["o"] * 3, day=[7] * 3)
    found = _rows(_kept(tmp_path, "split"))["split"].to_pylist()
    assert found == ["in"] * 3 + ["dev/test"] * 3 + ["o"] * 3 + ["train"] * 3
    config = caption_config(tmp_path, tmp_path / "split=*" / "day*", keep_columns=("day=when",))
    assert _rows(config)["when"].to_pylist() == [None] * 3 + ["1"] * 3
    with pytest.raises(InputError, match=r"own.parquet and .* differ in the type .*, day: int64 and .*string"):
        open_source(_kept(tmp_path, "day"))
    with pytest.raises(InputError, match=r"no single column 'split' \(--id-column\)"):
        open_source(caption_config(tmp_path / "split=train", id_column="split"))


def test_partitions_are_read_as_hive_writes_them():
    file = "/a=1/b%3Dc=%C3%A9%20x/a=2/d=/plain/e=f.parquet"
    assert partitions(file) == {"a": "2", "b=c": "é x", "d": ""}


def _nested():
    inner = [{"k": "u"}, {"k": None}, None]
    images = [{"bytes": data, "path": None} for data in (b"a", b"b", None)]
    meta = [{"id": f"m{at}", "n": at, "in": inner[at], "big": b"x" * 1000, "img": images[at]} for at in range(2)]
    return pa.array([*meta, None], pa.array(meta).type)


def test_fields_of_structs_are_named_with_dots(tmp_path):
    pq.write_table(pa.table({"meta": _nested(), "meta.n": [7, 8, 9]}), tmp_path / "a.parquet")
    options = {"id_column": "meta.id", "image_column": "meta.img", "prompt_column": "meta.in.k"}
    rows = _rows(_kept(tmp_path, "meta.in=inner", "meta.n", "meta.in.k", **options))
    assert rows["id"].to_pylist() == ["m0", "m1", None]
    assert images_of(rows) == [b"a", None, None]
    assert prompts_of(rows) == ["u", None, None]
    assert rows["inner"].to_pylist() == [{"k": "u"}, {"k": None}, None]
    assert rows["meta.in.k"].to_pylist() == ["u", None, None]
    assert rows["meta.n"].to_pylist() == [7, 8, 9]  # a column that is really called so
    for name in ("meta.no", "meta.n.k", "meta.", ".id", "met.id"):
        with pytest.raises(InputError, match=rf"no single column '{name}' \(--id-column\); it has meta, meta.n"):
            open_source(caption_config(tmp_path, **{**options, "id_column": name}))


def test_names_with_dots_may_be_outside_and_inside(tmp_path):
    outer = pa.array([{"c.d": {"e": 1}, "c": {"d": {"e": 2}}}] * 3)
    twice = pa.StructArray.from_arrays([pa.array([1, 2, 3])] * 2, names=["t", "t"])
    _write(tmp_path / "a.parquet", **{"a.b": outer, "w": twice})
    rows = _rows(_kept(tmp_path, "a.b.c.d.e=e", "a.b.c=c"))
    assert (rows["e"].to_pylist(), rows["c"].to_pylist()) == ([1] * 3, [{"d": {"e": 2}}] * 3)
    with pytest.raises(InputError, match=r"no file has a column 'w\.t'"):
        open_source(_kept(tmp_path, "w.t"))


def test_of_a_struct_only_the_field_that_is_needed_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    meta = pa.array([{"big": "x" * 5000, "id": str(at)} for at in range(3)])
    pq.write_table(pa.table({"meta": meta, "image": TABLE["image"]}), path, compression="none", use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    assert chunk.path_in_schema == "meta.big"
    damaged = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    damaged[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(damaged)
    config = _kept(tmp_path, "meta.id=key", id_column="meta.id", prompt="What?")
    rows = _rows(config)
    assert rows["key"].to_pylist() == rows["id"].to_pylist() == ["0", "1", "2"]
    assert rows[MESSAGE].to_pylist() == [None] * 3


def test_kept_columns_of_rows_that_cannot_be_read_are_there(tmp_path):
    path = _write(tmp_path / "p=1" / "a.parquet", meta=[{"n": 1}] * 3)
    chunk = pq.read_metadata(path).row_group(0).column(1)
    damaged = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset
    damaged[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(damaged)
    _write(tmp_path / "b.parquet", more=[0.5] * 3)
    rows = _rows(_kept(tmp_path, "p", "meta.n=n", "more")).slice(3)
    assert all("cannot be read" in message for message in rows[MESSAGE].to_pylist())
    kept = [rows[name].to_pylist() for name in ("id", "p", "n", "more")]
    assert kept == [[1, 2, 3], ["1"] * 3, [1] * 3, [None] * 3]


def _patched(path, table, old, new, **options):
    """A parquet file of which some bytes of its footer are others."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    data = buffer.getvalue()
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8]
    assert old in footer
    footer = footer.replace(old, new, 1)
    path.write_bytes(data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize(
    "annotation",
    [
        b"\x25\x2a",  # converted type 21, interval
        b"\x6c\x0c\x3c\x00\x00",  # a logical type of number 30
    ],
)
def test_a_column_of_a_type_that_nobody_knows_does_not_refuse_its_file(annotation, tmp_path):
    table = TABLE.append_column("odd", pa.array([b"x" * 12] * 3, pa.binary(12)))
    _patched(tmp_path / "a.parquet", table, b"\x03odd", b"\x03odd" + annotation, store_schema=False)
    assert "odd (" in str(pq.ParquetFile(tmp_path / "a.parquet").schema)
    assert _rows(_kept(tmp_path, "odd"))["odd"].to_pylist() == [b"x" * 12] * 3


@pytest.mark.parametrize("damage", [b"#", b"A"])
def test_a_record_of_arrow_types_that_cannot_be_read_is_done_without(damage, tmp_path):
    table = TABLE.append_column("note", pa.array(["n"] * 3, pa.large_string()))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    begin = buffer.getvalue()
    record = begin[begin.index(b"ARROW:schema") :][20:60]
    _patched(tmp_path / "a.parquet", table, record, damage * 40)
    with pytest.raises((OSError, pa.ArrowInvalid)):
        pq.ParquetFile(tmp_path / "a.parquet")
    rows = _rows(_kept(tmp_path, "note"))
    assert (rows["id"].to_pylist(), rows["note"].to_pylist()) == ([1, 2, 3], ["n"] * 3)
    assert rows["note"].type == pa.string()


def test_an_extension_type_that_is_not_registered_is_what_it_is_stored_as(tmp_path):
    metadata = {"ARROW:extension:name": "somebody.point", "ARROW:extension:metadata": "?"}
    schema = TABLE.schema.append(pa.field("point", pa.list_(pa.float32(), 2), metadata=metadata))
    points = pa.array([[1, 2]] * 3, pa.list_(pa.float32(), 2))
    pq.write_table(pa.table([*TABLE.columns, points], schema=schema), tmp_path / "a.parquet")
    assert _rows(_kept(tmp_path, "point"))["point"].to_pylist() == [[1, 2]] * 3


def test_many_files_that_differ_are_joined_to_what_all_hold(tmp_path):
    rng = np.random.default_rng(0)
    kinds = [pa.int8(), pa.int16(), pa.int64(), pa.float32(), pa.float64(), pa.uint32(), pa.null()]
    expected = []
    for number in range(40):
        kind = kinds[int(rng.integers(len(kinds)))]
        values = [None] * 3 if kind == pa.null() else rng.integers(0, 100, 3).tolist()
        expected += values
        _write(tmp_path / f"{number:02}.parquet", n=pa.array(values).cast(kind))
    rows = _rows(_kept(tmp_path, "n"))
    assert rows["n"].type == pa.float64()
    assert rows["n"].to_pylist() == expected


def test_paths_are_those_that_the_input_names(tmp_path):
    _write(tmp_path / "store" / "blob.parquet")
    (tmp_path / "in" / "k=v").mkdir(parents=True)
    (tmp_path / "in" / "k=v" / "a.parquet").symlink_to(Path("../../store/blob.parquet"))
    assert _rows(_kept(tmp_path / "in", "k"))["k"].to_pylist() == ["v"] * 3
