"""Files of a folder appear whole, and one job at a time holds it, on a file system as in an object store."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from output_folders import JOB_OF_FILES, SCHEMA, answers_to

from qvl_batch.errors import ConfigError, OutputError
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.locks import LOCK
from qvl_batch.output.object_store import StoreFolder
from qvl_batch.output.parts import read_part
from qvl_batch.output.resume import JOB, Job, OutputFolder
from qvl_batch.output.storage import folder_at
from qvl_batch.output.writer import AnswerWriter

RENEWAL, LEASE = 0.1, 1.0


class _Bytes(fsspec.get_filesystem_class("memory")):
    """Objects of this process, of which a put can be told to fail where one is, as s3 and gs can be, and
    which can be listed by the beginning of their names.
    """

    protocol = "memory"

    def find(self, path, prefix="", **options):
        return [found for found in super().find(path, **options) if found.startswith(f"{path}/{prefix}")]


@pytest.fixture
def address():
    return f"memory://{uuid.uuid4().hex}/out"


def _store(address, **options):
    return StoreFolder(_Bytes(skip_instance_cache=True), address, **{"renewal": RENEWAL, "lease": LEASE} | options)


@pytest.fixture(params=["local", "store"])
def place(request, tmp_path, address):
    return (lambda: LocalFolder(tmp_path / "out")) if request.param == "local" else (lambda: _store(address))


def test_files_are_listed_read_and_removed(place):
    folder = place()
    assert folder.names("*") == []
    with folder.held():
        for name in ("b.txt", "a.txt", "a.parquet"):
            folder.write(name, name.encode())
        folder.write("a.txt", b"again")
        assert folder.names("*.txt") == ["a.txt", "b.txt"]
        assert folder.read("a.txt") == b"again"
        with folder.open("b.txt") as file:
            file.seek(2)
            assert file.read() == b"txt"
        folder.remove("a.txt")
        folder.remove("a.txt")
        assert place().names("*.txt") == ["b.txt"]
        with pytest.raises(FileNotFoundError):
            folder.read("a.txt")


def test_a_second_job_is_refused_while_the_first_one_lives(place):
    with place().held():
        for _ in range(2):
            with pytest.raises(OutputError) as refused, place().held():
                pass
            assert f"out (process {os.getpid()} on " in str(refused.value)
    with place().held():
        pass


def test_files_beside_those_of_a_job_are_put_only_while_none_runs(place):
    folder = place()
    folder.put({})
    assert folder.names("*") == []
    folder.put({"_a": b"1", "_b": b"2"})
    assert [folder.read(name) for name in folder.names("_[ab]")] == [b"1", b"2"]
    with place().held():
        for files in ({}, {"_a": b"3"}):
            with pytest.raises(OutputError, match="another job is writing to"):
                place().put(files)
    place().put({"_b": b"4"})
    assert [folder.read(name) for name in folder.names("_[ab]")] == [b"1", b"4"]


def test_a_look_at_what_is_done_writes_nothing(place):
    folder = OutputFolder(place(), JOB_OF_FILES, SCHEMA, overwrite=False)
    with folder, AnswerWriter(folder.folder, SCHEMA) as writer:
        writer.add(answers_to((0, 1), (0, 2)))
    before = {name: place().read(name) for name in place().names("*")}
    seen = OutputFolder(place(), JOB_OF_FILES, SCHEMA, overwrite=False, retry=(6, 5)).look()
    assert (seen.done.count, seen.tally.rows, sorted(seen.failed)) == (1, 1, [(0, 2)])
    assert OutputFolder(place(), JOB_OF_FILES, SCHEMA, overwrite=True).look().done.count == 0
    other = Job(JOB_OF_FILES.settings | {"--fit": "stretch"}, JOB_OF_FILES.files)
    with pytest.raises(OutputError, match="another --fit"):
        OutputFolder(place(), other, SCHEMA, overwrite=False).look()
    assert {name: place().read(name) for name in place().names("*")} == before


def test_a_job_goes_on_where_it_stopped(place):
    for rows, known in ([(1, 0), (0, 3)], 0), ([(0, 1), (0, 2)], 2):
        with OutputFolder(place(), JOB_OF_FILES, SCHEMA, overwrite=False) as folder:
            assert folder.done.count == folder.tally.rows == known
            with AnswerWriter(folder.folder, SCHEMA) as writer:
                writer.add(answers_to(*rows))
    with OutputFolder(place(), JOB_OF_FILES, SCHEMA, overwrite=False, retry=(6, 5)) as folder:
        assert sorted(folder.failed) == [(0, 2), (1, 0)]
        with AnswerWriter(folder.folder, SCHEMA, folder.failed) as writer:
            writer.add(answers_to((0, 2)))
            writer.add(answers_to((1, 0)))
    folder = place()
    tables = [read_part(folder, name) for name in folder.names("part-*")]
    assert sorted(pa.concat_tables(tables)["id"].to_pylist()) == [(0), 1, 2, 3]
    with OutputFolder(place(), JOB_OF_FILES, SCHEMA, overwrite=True) as folder:
        assert folder.done.count == 0
        assert folder.folder.names("part-*") == []
        assert folder.folder.names(JOB) == [JOB]


def _dead(address, machine="elsewhere"):
    """A lock that nobody renews any more."""
    record = {"machine": machine, "pid": 2**22 + 1, "holder": "process 7 on elsewhere"}
    _Bytes().pipe_file(f"{address.removeprefix('memory:/')}/{LOCK}-000004", json.dumps(record).encode())


def test_a_write_lists_locks_alone(address, monkeypatch):
    with _store(address).held():
        pass
    folder = _store(address)
    _Bytes().pipe_file(f"{address.removeprefix('memory:/')}/{LOCK}-000007/of another program", b"")
    with monkeypatch.context() as patch:
        patch.setattr(StoreFolder, "names", None)
        with folder.held():
            folder.write("a", b"")
            folder.remove("a")
    assert folder.names("*") == [f"{LOCK}-000001", f"{LOCK}-000007"]


def test_a_lock_of_a_dead_job_does_not_block(address, caplog):
    _dead(address)
    began = time.monotonic()
    with _store(address).held():
        assert f"{address} is locked by process 7 on elsewhere: waiting up to 1 s to see whether" in caplog.text
        assert _store(address).names(f"{LOCK}*") == [f"{LOCK}-000005"]
    assert time.monotonic() - began >= LEASE
    with _store(address, lease=1e9).held():  # one that ended is not waited for
        assert _store(address).names(f"{LOCK}*") == [f"{LOCK}-000006"]


def test_a_lock_that_cannot_be_renewed_is_said_once_and_so_is_its_renewal(address, monkeypatch, caplog):
    put, failed = _Bytes.pipe_file, []

    def refused(*_, **__):
        failed.append(1)
        raise ConnectionError("the store is away")

    def wait_until(is_so):
        until = time.monotonic() + 30
        while not is_so() and time.monotonic() < until:
            time.sleep(RENEWAL / 10)

    lines = [
        f"the lock of {address} cannot be renewed, so another job can take it over: the store is away",
        f"the lock of {address} is renewed again",
    ]
    with _store(address).held():
        for outage in (1, 2):
            monkeypatch.setattr(_Bytes, "pipe_file", refused)
            wait_until(lambda: len(failed) >= 3)
            monkeypatch.setattr(_Bytes, "pipe_file", put)
            wait_until(lambda: len(caplog.messages) == 2 * outage)  # noqa: B023
            assert caplog.messages == lines * outage
            assert len(failed) >= 3
            failed.clear()
    assert caplog.messages == lines * 2


def test_what_a_lock_says_reaches_the_terminal_of_a_job():
    script = """
import fsspec, time
import qvl_batch.pipeline.run
from qvl_batch.output.object_store import StoreFolder

class Away(fsspec.get_filesystem_class("memory")):
    find = lambda *_, **__: []
    pipe_file = lambda *_, mode="create", **__: 1 / 0 if mode == "overwrite" else None

with StoreFolder(Away(skip_instance_cache=True), "memory://bucket/out", renewal=0.05).held():
    time.sleep(0.5)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "the lock of memory://bucket/out cannot be renewed, so another" in result.stderr
    assert result.stderr.count("cannot be renewed") == 1


def test_a_lock_of_a_process_that_died_here_is_not_waited_for(address):
    from qvl_batch.output.locks import this_machine  # noqa: PLC0415

    _dead(address, this_machine())
    folder = _store(address, lease=1e9)
    with folder.held():
        folder.write("a", b"")


def test_of_two_that_take_over_one_has_the_folder(address):
    _dead(address)
    holding, refused, go_on = [], [], threading.Event()

    def take(folder):
        try:
            with folder.held():
                holding.append(folder)
                go_on.wait(30)
        except OutputError as error:
            refused.append(error)

    threads = [threading.Thread(target=take, args=(_store(address),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(holding) + len(refused) < 4:
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join()
    assert (len(holding), len(refused)) == (1, 3)


@pytest.mark.parametrize("change", [lambda folder: folder.write("a", b"2"), lambda folder: folder.remove("a")])
def test_a_job_that_stood_still_and_was_taken_over_changes_no_more(change, address):
    slow = _store(address, renewal=1e9)
    with slow.held():
        slow.write("a", b"1")
        with _store(address, renewal=0.5).held(), pytest.raises(OutputError, match=r"another job took .* over"):
            change(slow)
        # Nor after the other one has ended.
        with pytest.raises(OutputError, match=r"another job took .* over"):
            change(slow)
    assert _store(address).read("a") == b"1"
    # As one that does not hold the folder.
    with pytest.raises(OutputError, match="another job took"):
        change(_store(address))


@pytest.mark.parametrize("place", ["ftp://host/out", "http://host/out", "memory://out"])
def test_a_place_that_is_no_folder_is_named(place):
    with pytest.raises(ConfigError, match=r"give the path of a folder, or an address of gs://, s3://"):
        folder_at(place)


def test_a_store_whose_library_is_not_installed_is_named():
    script = """
import sys
sys.modules["gcsfs"] = None
from qvl_batch.errors import ConfigError
from qvl_batch.output.storage import folder_at
try:
    folder_at("gs://bucket/out")
except ConfigError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "gs://bucket/out: " in result.stdout
    assert "gcsfs" in result.stdout


def test_what_a_store_raises_is_one_line(address, monkeypatch):
    def no_credentials(*_, **__):
        raise RuntimeError("unable to locate credentials")

    monkeypatch.setattr(_Bytes, "ls", no_credentials)
    with (
        pytest.raises(OutputError, match="out cannot be written: RuntimeError: unable to locate credentials"),
        OutputFolder(_store(address), JOB_OF_FILES, SCHEMA, overwrite=False),
    ):
        pass


def test_a_part_is_read_by_its_footer(address):
    folder = _store(address)
    with folder.held():
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"a": range(10)}), buffer)
        folder.write("a.parquet", bytes(buffer.getvalue()))
        with folder.open("a.parquet") as file:
            assert pq.read_metadata(file).num_rows == 10
