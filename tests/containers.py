"""The same rows in files of every kind that a job reads."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from reading import caption_config


def rows_of(count, first=0):
    """Rows with an id, the bytes of an image, a prompt, and a note; every third has no note."""
    return [
        {
            "id": f"row-{at:05d}",
            "image": b"image %d" % at,
            "prompt": f'What, "{at}"?',
            "note": f"ö{at}" if at % 3 else None,
        }
        for at in range(first, first + count)
    ]


def table_of(rows):
    schema = pa.schema([("id", pa.string()), ("image", pa.binary()), ("prompt", pa.string()), ("note", pa.string())])
    return pa.Table.from_pylist(rows, schema)


def with_paths(folder, rows):
    """The same with images as files."""
    (folder / "img").mkdir(exist_ok=True)
    for row in rows:
        (folder / "img" / row["id"]).write_bytes(row["image"])
    return [row | {"image": f"img/{row['id']}"} for row in rows]


def jsonl(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def delimited(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([list(rows[0]), *(row.values() for row in rows)] if rows else [])
    return text.getvalue().encode()


def member(name, data=b"", **fields):
    """A member of a tar, with a header whose fields can be any."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    for field, value in fields.items():
        setattr(header, field, value)
    return header, data


def members_of(rows):
    return [
        part
        for row in rows
        for part in (
            member(f"{row['id']}.jpg", row["image"]),
            member(f"{row['id']}.txt", row["prompt"].encode()),
            member(f"{row['id']}.json", json.dumps({"note": row["note"]}).encode()),
        )
    ]


def tar(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as packed:
        for header, data in members:
            packed.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def arrow(table, *, batch=7, new=pa.ipc.new_file, compression=None):
    sink = pa.BufferOutputStream()
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=batch)
    return sink.getvalue().to_pybytes()


def _write_parquet(folder, name, rows):
    pq.write_table(table_of(rows), folder / name, row_group_size=7)


def _write_images(folder, name, rows):
    (folder / name / "deeper").mkdir(parents=True, exist_ok=True)
    for at, row in enumerate(rows):
        place = folder / name / ("deeper" if at % 2 else ".")
        (place / f"{row['id']}.jpg").write_bytes(row["image"])
        (place / f"{row['id']}.txt").write_text(row["prompt"] + "\n")


def _as(data_of):
    return lambda folder, name, rows: (folder / name).write_bytes(data_of(folder, rows))


#: For each kind, what writes rows to a file or folder of that name.
KINDS = {
    "rows.parquet": _write_parquet,
    "rows.jsonl": _as(lambda folder, rows: jsonl(with_paths(folder, rows))),
    "rows.NDJSON.gz": _as(lambda folder, rows: pa.compress(jsonl(with_paths(folder, rows)), "gzip", asbytes=True)),
    "rows.jsonl.zst": _as(lambda folder, rows: pa.compress(jsonl(with_paths(folder, rows)), "zstd", asbytes=True)),
    "rows.csv": _as(lambda folder, rows: delimited(with_paths(folder, rows))),
    "rows.tsv.gz": _as(
        lambda folder, rows: pa.compress(delimited(with_paths(folder, rows), "\t"), "gzip", asbytes=True)
    ),
    "rows.arrow": _as(lambda _, rows: arrow(table_of(rows))),
    "rows.feather": _as(lambda _, rows: arrow(table_of(rows), compression="zstd")),
    "stream.arrow": _as(lambda _, rows: arrow(table_of(rows), new=pa.ipc.new_stream)),
    "packed.ipc": _as(lambda _, rows: arrow(table_of(rows), new=pa.ipc.new_stream, compression="lz4")),
    "rows.tar": _as(lambda _, rows: tar(members_of(rows))),
    "photos": _write_images,
}
#: Those that are one file, which can change as a whole.
FILES = [name for name in KINDS if name != "photos"]


def config_of(folder, *names, **options):
    """Settings of a job with these inputs; images that they name by path can be read."""
    return caption_config(folder, *(folder / name for name in names), allow_images_from=(str(folder),), **options)
