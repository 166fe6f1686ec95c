"""Files of object stores are found, read by ranges and told apart as local ones; a store that fails stops the job."""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import arrow, jsonl, members_of, rows_of, table_of, tar, with_paths
from reading import caption_config, images_of, read_rows
from s3 import Mirror, environment, serving

from qvl_batch import stores
from qvl_batch.columns import FAILURE
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.input import files
from qvl_batch.input.source import open_source


@pytest.fixture(scope="module")
def store():
    with serving() as files:
        yield files


@pytest.fixture
def mirror(store, tmp_path):
    return Mirror(store, tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Attempts without pauses."""
    monkeypatch.setattr(stores, "WAITS", (0.0, 0.0))


def _write(folder, *names, rows=None):
    for at, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table_of(rows or rows_of(3, first=3 * at)), folder / name, row_group_size=2)


def _found(mirror, *given, **options):
    config = mirror.config(caption_config(mirror.folder, *(mirror.folder / each for each in given), **options))
    return [file.path.removeprefix(f"{mirror.address}/") for file in open_source(config).files]


def test_files_folders_and_globs_are_found_once_in_order(mirror):
    _write(mirror.folder, "in/b/2.parquet", "in/b/1.parquet", "in/a.parquet", "in/b/_c.parquet", "in/.d/e.parquet")
    for given, names in (
        (["in"], ["in/a.parquet", "in/b/1.parquet", "in/b/2.parquet"]),
        (["in/"], ["in/a.parquet", "in/b/1.parquet", "in/b/2.parquet"]),
        (["in/*"], ["in/a.parquet", "in/b/1.parquet", "in/b/2.parquet"]),
        (["in/**/[0-9].parquet"], ["in/b/1.parquet", "in/b/2.parquet"]),
        (["in/?/[!_]*.parquet"], ["in/b/1.parquet", "in/b/2.parquet"]),
        (["in/b/2.parquet", "in/b"], ["in/b/2.parquet", "in/b/1.parquet"]),
    ):
        assert _found(mirror, *given) == names


@pytest.mark.parametrize("sign", ["_delta_log/0.json", "metadata/v1.metadata.json", ".hoodie/hoodie.properties"])
@pytest.mark.parametrize("given", ["in", "in/t", "in/t/p=1", "in/*/p=*"])
def test_folders_of_tables_are_refused(sign, given, mirror):
    _write(mirror.folder, "in/1.parquet", "in/t/p=1/2.parquet")
    (mirror.folder / "in/t" / sign).parent.mkdir()
    (mirror.folder / "in/t" / sign).write_bytes(b"{}")
    with pytest.raises(InputError, match=rf"^{mirror.address}/in/t is an? .* table: .* To read it, give"):
        _found(mirror, given)


def test_the_output_in_the_same_store_is_no_input(mirror):
    _write(mirror.folder, "in/1.parquet", "in/out/part-0.parquet", "in/outer/2.parquet")
    config = mirror.config(replace(caption_config(mirror.folder), output=str(mirror.folder / "in" / "out")))
    assert len(open_source(config).files) == 2
    with pytest.raises(InputError, match="has only files of the output folder"):
        open_source(replace(config, input=(f"{mirror.address}/in/out",)))


def test_columns_may_be_in_the_names_of_folders(mirror):
    _write(mirror.folder, "in/day=1/a.parquet", "in/day=2/b.parquet")
    config = mirror.config(caption_config(mirror.folder, mirror.folder / "in", keep_columns=("day",)))
    assert sorted(set(map(str, read_rows(open_source(config))["day"].to_pylist()))) == ["1", "2"]


def test_relative_paths_of_images_begin_at_the_address_of_the_file(mirror):
    (mirror.folder / "in").mkdir()
    rows = with_paths(mirror.folder, rows_of(2))
    (mirror.folder / "in" / "a.jsonl").write_bytes(jsonl([{**row, "image": f"../{row['image']}"} for row in rows]))
    config = mirror.config(caption_config(mirror.folder, mirror.folder / "in"))
    for allowed, shown in (((f"{mirror.address}/img",), [b"image 0", b"image 1"]), (("s3://other",), [None, None])):
        table = read_rows(open_source(config), allowed=allowed)
        assert images_of(table) == shown
    message = table[FAILURE[2]][0].as_py()
    assert message == f"{mirror.address}/img/row-00000 is not inside any address of --allow-images-from"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("s3://data/none", "--input s3://data/none: no file found that ends in"),
        ("s3://no-bucket/a", "--input s3://no-bucket/a: no file found"),
        ("ghost://a/b", "--input ghost://a/b: Protocol not known: ghost"),
        ("gs://a/b", "--input gs://a/b: .*gcsfs"),
        ("abfs://a/b", "--input abfs://a/b: .*adlfs"),
        ("https://example.org/a.parquet", "a web server has no folders, and its files can change: fetch them first"),
        ("file:///a.parquet", "give local files by their path"),
        ("s3://key:hidden@data/a", "--input s3://…: give credentials as the client of the store takes them"),
    ],
)
@pytest.mark.usefixtures("store", "quick")
def test_an_input_that_cannot_be_is_refused(given, message, tmp_path):
    with pytest.raises(InputError, match=message) as error:
        open_source(caption_config(tmp_path, given))
    assert "hidden" not in str(error.value)


class _Bucket(ThreadingHTTPServer):
    """As much of S3 as reading needs; it counts requests, and takes its time or refuses.

    Args:
        objects: by key.
        seconds: that each request takes.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, objects, seconds=0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects, self.seconds = objects, seconds
        self.asked, self.given = Counter(), Counter()
        self.now, self.most, self.lock = 0, 0, threading.Lock()
        #: Of a request's key, the status and code of an error, or None.
        self.refuses = lambda _: None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.seconds)
        parts = urlsplit(self.path)
        key, query = parts.path.removeprefix("/data").lstrip("/"), parse_qs(parts.query)
        with server.lock:
            server.asked[self.command, key] += 1
            refused = server.refuses(key)
            server.now -= 1
        if refused:
            self._send(refused[0], f"<Error><Code>{refused[1]}</Code><Message>no</Message></Error>".encode())
        elif "list-type" in query:
            self._list(query)
        elif key not in server.objects:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            data = server.objects[key]
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            some = data[int(first) : int(last) + 1 if last else len(data)]
            with server.lock:
                server.given[key] += len(some) if self.command == "GET" else 0
            self._send(206 if "Range" in self.headers else 200, some, len(data) if self.command == "HEAD" else None)

    def _list(self, query):
        prefix, most = query.get("prefix", [""])[0], int(query.get("max-keys", ["1000"])[0])
        after = query.get("continuation-token", [""])[0]
        keys = sorted(key for key in self.server.objects if key.startswith(prefix) and key > after)
        some, more = keys[:most], len(keys) > most
        listed = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.server.objects[key])}</Size><ETag>e</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>" for key in some
        )  # fmt: skip
        token = f"<NextContinuationToken>{some[-1]}</NextContinuationToken>" if more else ""
        self._send(200, f"<ListBucketResult><KeyCount>{len(some)}</KeyCount><IsTruncated>{str(more).lower()}"
                        f"</IsTruncated>{token}{listed}</ListBucketResult>".encode())  # fmt: skip

    def _send(self, status, body, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("ETag", "e")
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def bucket(objects, seconds=0.0):
    """A bucket `data` that runs."""
    with _Bucket(objects, seconds) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        with environment(f"http://127.0.0.1:{server.server_port}"):
            yield server
        server.shutdown()
        thread.join()


def parquet(rows, **options):
    sink = pa.BufferOutputStream()
    pq.write_table(table_of(rows) if isinstance(rows, list) else rows, sink, **options)
    return sink.getvalue().to_pybytes()


def test_many_files_are_listed_once_and_described_by_a_request_each_several_at_a_time(tmp_path):
    data = parquet(rows_of(3))
    with bucket({f"in/{at:05d}.parquet": data for at in range(1_200)}, seconds=0.02) as server:
        source = open_source(caption_config(tmp_path, "s3://data/in"))
        assert source.rows == 3_600
        asked = Counter(count for (command, key), count in server.asked.items() if key.endswith(".parquet"))
        assert asked == {1: 1_200}
        others = sum(count for (_, key), count in server.asked.items() if not key.endswith(".parquet"))
        assert others <= 2 + 20  # pages of the list, and whether something around it is a table
        assert server.most >= 8


def test_of_a_file_what_is_needed_is_read_in_few_requests(tmp_path):
    rng, rows = np.random.default_rng(1), rows_of(400)
    table = table_of(rows).append_column("unused", pa.array([rng.bytes(50_000) for _ in rows]))
    table = table.set_column(1, "image", pa.array([rng.bytes(10_000) for _ in rows]))
    data = parquet(table, row_group_size=200, compression="none")
    with bucket({"a.parquet": data}) as server:
        source = open_source(caption_config(tmp_path, "s3://data/a.parquet"))
        assert server.asked["GET", "a.parquet"] == 1
        server.asked.clear()
        server.given.clear()
        assert images_of(read_rows(source)) == table["image"].to_pylist()
        assert server.given["a.parquet"] < len(data) / 3
        assert server.asked["GET", "a.parquet"] <= 2 * 7
        assert server.asked["HEAD", "a.parquet"] == 2


def test_a_footer_of_any_size_takes_a_second_request(tmp_path):
    data = parquet(rows_of(3_000), row_group_size=1)
    with bucket({"a.parquet": data}) as server:
        assert open_source(caption_config(tmp_path, "s3://data/a.parquet")).rows == 3_000
        assert server.asked["GET", "a.parquet"] <= 3


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow", "a.tar"])
@pytest.mark.usefixtures("quick")
def test_a_store_that_fails_stops_the_job_and_costs_no_row(name, tmp_path, monkeypatch):
    rows = [row | {"image": b"i" * 200_000} for row in rows_of(8)]
    asked_with = [row | {"image": None, "note": "x" * 200_000} for row in rows]
    data = {
        "a.parquet": lambda: parquet(rows, compression="none"),
        "a.jsonl": lambda: jsonl(asked_with),
        "a.arrow": lambda: arrow(table_of(rows), batch=8),
        "a.tar": lambda: tar(members_of(rows)),
    }[name]()
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with bucket({name: data}) as server:
        source = open_source(caption_config(tmp_path, f"s3://data/{name}"))
        for status, code, said in (
            (503, "SlowDown", "the same command goes on once it can be"),
            (403, "AccessDenied", "PermissionError: .*; see that the credentials allow it"),
        ):
            for after in range(3):  # the failure comes at the first request for the file, or at a later one
                server.asked.clear()
                server.refuses = lambda _, after=after, answer=(status, code): (
                    answer if server.asked.total() > after else None
                )
                with pytest.raises(InputError, match=rf"^s3://data/{name} cannot be read: .*{said}"):
                    read_rows(source)
        server.refuses = lambda _: None
        assert len(read_rows(source)) == 8


@pytest.mark.usefixtures("quick")
def test_a_store_that_is_back_after_a_while_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with bucket({"a.parquet": parquet(rows_of(3))}) as server:
        source = open_source(caption_config(tmp_path, "s3://data/a.parquet"))
        failures = iter([True] * 2)
        server.refuses = lambda _: (500, "InternalError") if next(failures, False) else None
        assert len(read_rows(source)) == 3


@pytest.mark.usefixtures("quick")
def test_missing_credentials_are_said(tmp_path, monkeypatch):
    with bucket({}) as _:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(InputError, match=r"s3://data/a.* cannot be read: NoCredentialsError: .*redentials"):
            open_source(caption_config(tmp_path, "s3://data/a.parquet"))


def test_reads_one_after_the_other_ask_for_more_and_more():
    data = bytes(range(256)) * 160_000
    with bucket({"a": data}) as server:
        with files.open_file(files.place_at("s3://data/a")) as file:
            found = b"".join(iter(lambda: file.read(10_000), b""))
        assert found == data
        assert server.asked["GET", "a"] < 15
        with files.open_file(files.place_at("s3://data/a")) as file:
            assert file.seek(-10, 2) == len(data) - 10
            assert file.read(100) == data[-10:]
            file.seek(30_000_000)
            assert file.read(9) == data[30_000_000:][:9]


def test_a_file_that_went_while_it_was_read_is_named():
    with bucket({"a.tar": b"x" * 1_000_000}) as server, files.open_file(files.place_at("s3://data/a.tar")) as file:
        file.read(10)
        del server.objects["a.tar"]
        with pytest.raises(InputError, match=r"s3://data/a.tar was deleted while it was read: put it back"):
            file.seek(500_000), file.read(10)


def test_a_client_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match=r"gs://bucket/a: .*gcsfs"):
        stores.client("gs://bucket/a")
