"""Bundles at addresses are fetched once, checked, shared, and evicted when the cache is full."""

import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from conftest import QUESTIONS, ROOT
from output_folders import rows_by_id
from range_server import serving

import check
from qvl_batch import Captioner, stores
from qvl_batch.bundle import cache
from qvl_batch.bundle.cache import BundleCache
from qvl_batch.bundle.loading import Bundle, BundleReference
from qvl_batch.bundle.manifest import DECODER, MANIFEST, file_sha256
from qvl_batch.errors import BundleError, JobError

WEIGHTS = f"{DECODER}.data"


class _Store(fsspec.get_filesystem_class("memory")):
    """Objects of this process; counts requests, and fails when it is told to."""

    protocol = "memory"
    asked: list[tuple[str, int]]
    fails_after: int | None

    def cat_file(self, path, start=None, end=None, **options):
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise ConnectionError("the line is dead")
        data = super().cat_file(path, start=start, end=end, **options)
        self.asked.append((path.rsplit("/", 1)[-1], len(data)))
        return data


@pytest.fixture
def store(monkeypatch):
    """A store in place of every other, whose clients wait no seconds."""
    files = _Store(skip_instance_cache=True)
    files.asked, files.fails_after = [], None
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: files)
    monkeypatch.setattr(stores, "WAITS", (0.0,))
    monkeypatch.setattr(cache, "PIECE", 1 << 17)
    monkeypatch.setattr(cache, "AT_ONCE", 1)
    return files


def _put(store, folder):
    address = f"memory://{uuid.uuid4().hex}/bundle"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{address.removeprefix('memory:/')}/{path.relative_to(folder)}", path.read_bytes())
    return address


@pytest.fixture
def address(store, tiny_bundle):
    return _put(store, tiny_bundle.path)


@pytest.fixture
def kept(tmp_path):
    return BundleCache(tmp_path / "cache")


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_is_fetched_once_and_is_the_same(store, address, kept, tiny_bundle):
    bundle = Bundle.load(address, cache=kept)
    assert _files(bundle.path) == _files(tiny_bundle.path)
    assert bundle.address == address
    assert bundle.sha256 == tiny_bundle.sha256
    assert not list(kept.folder.glob("*.partial"))
    store.asked.clear()
    assert Bundle.load(address, cache=kept).path == bundle.path
    assert [name for name, _ in store.asked] == [MANIFEST]
    store.fails_after = 0
    assert BundleReference.of(bundle).load().path == bundle.path  # asks for nothing


def test_a_fetch_that_was_cut_off_goes_on(store, address, kept, tiny_bundle):
    store.fails_after = 30
    with pytest.raises(BundleError, match="cannot be read: ConnectionError: the line is dead"):
        kept.fetch(address)
    before = sum(size for _, size in store.asked)
    assert before > 1e6
    store.asked.clear()
    store.fails_after = None
    assert _files(kept.fetch(address)) == _files(tiny_bundle.path)
    whole = sum(file.size for file in tiny_bundle.manifest.files.values())
    manifest = (tiny_bundle.path / MANIFEST).stat().st_size
    assert sum(size for _, size in store.asked) == whole - before + 2 * manifest


def test_what_was_damaged_on_the_way_is_fetched_again(store, address, kept, tiny_bundle):
    store.fails_after = 30
    with pytest.raises(BundleError):
        kept.fetch(address)
    (partial,) = kept.folder.glob("*.partial")
    largest = max((path for path in partial.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    store.fails_after = None
    assert _files(kept.fetch(address)) == _files(tiny_bundle.path)


def _damage(store, address, name, change):
    path = f"{address.removeprefix('memory:/')}/{name}"
    store.pipe_file(path, change(store.cat_file(path)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (WEIGHTS, lambda data: bytes(len(data)), rf"/{WEIGHTS} is damaged \(its SHA-256 differs\): copy the bundle"),
        (WEIGHTS, lambda data: data[:-9], rf"/{WEIGHTS} gives [0-9,]+ bytes where [0-9,]+ were asked for: copy the"),
        (MANIFEST, lambda data: data[:-9], rf"/{MANIFEST} is not valid JSON"),
        (MANIFEST, lambda data: data.replace(b'"tokenizer.json"', b'"../tokenizer.json"'), "which is outside the bund"),
        (MANIFEST, lambda data: data.replace(b'"tokenizer.json"', b'"t.json"'), "/t.json is not there: give the addr"),
    ],
    ids=["damaged", "short", "manifest", "outside", "missing"],
)  # fmt: skip
def test_what_is_wrong_at_the_address_is_named_and_nothing_is_kept(name, change, message, store, address, kept):
    _damage(store, address, name, change)
    for _ in range(2):
        with pytest.raises(BundleError, match=message):
            kept.fetch(address)
    assert not [path for path in kept.folder.iterdir() if path.is_dir() and not path.name.endswith(".partial")]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://nowhere/bundle", "memory://nowhere/bundle is not there: give the address of a bundle's folder"),
        ("ghost://bucket/bundle", "ghost://bucket/bundle: Protocol not known: ghost"),
    ],
)
def test_an_address_without_a_bundle(address, message, kept):
    with pytest.raises(JobError, match=message):
        kept.fetch(address)


def test_another_bundle_than_the_jobs_is_refused(store, address, kept, tiny_bundle, copied_bundle):
    sha256 = file_sha256(tiny_bundle.path / MANIFEST)
    manifest = json.loads((copied_bundle / MANIFEST).read_text())
    text = json.dumps(manifest | {"versions": {}})
    _damage(store, address, MANIFEST, lambda _: text.encode())
    with pytest.raises(BundleError, match=f"{address} is not the bundle any more with which this job began: copy it"):
        kept.fetch(address, sha256)
    reference = BundleReference(str(copied_bundle), sha256)
    assert reference.load().path == copied_bundle
    (copied_bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"is another bundle on .* than on the machine that runs the job: copy it"):
        reference.load()


def _bundles(store, tiny_bundle, tmp_path, count):
    """Addresses of bundles that differ in nothing but their names."""
    for number in range(count):
        folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / f"bundle-{number}"))
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"versions": {"number": str(number)}}))
        yield _put(store, folder)


def test_the_least_recently_used_go_unless_they_are_used(store, tiny_bundle, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in tiny_bundle.path.rglob("*") if path.is_file())
    kept = BundleCache(tmp_path / "cache", 2.5 * size / 1e9)
    first, second, third, fourth = _bundles(store, tiny_bundle, tmp_path, 4)
    used = kept.fetch(first)  # this process holds it
    held = len(cache._used)  # noqa: SLF001
    places = [kept.fetch(address) for address in (second, third)]
    assert [place.is_dir() for place in (used, *places)] == [True] * 3  # over the limit, but all are used
    while len(cache._used) > held:  # noqa: SLF001
        cache._used.pop().close()  # noqa: SLF001  (as if another process had held them, and ended)
    last = kept.fetch(fourth)
    assert used.is_dir()
    assert last.is_dir()
    assert [place.is_dir() for place in places] == [False, False]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(BundleError, match=rf"{second} needs 0.0 GB more in .*cache, where 0.0 are free"):
        kept.fetch(second)
    assert used.is_dir()


def test_jobs_at_the_same_time_fetch_once(tiny_bundle, tmp_path):
    with serving(tiny_bundle.path) as server:
        program = (
            "import sys; from pathlib import Path; from qvl_batch.bundle.cache import BundleCache\n"
            f"print(BundleCache(Path({str(tmp_path / 'cache')!r})).fetch({server.address!r}))"
        )
        started = [
            subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(3)
        ]
        places = {process.communicate(timeout=60)[0] for process in started}
    assert len(places) == 1
    assert _files(Path(places.pop().decode().strip())) == _files(tiny_bundle.path)
    given = {name: server.given[name] for name in tiny_bundle.manifest.files}
    assert given == {name: file.size for name, file in tiny_bundle.manifest.files.items()}


def test_a_job_takes_its_bundle_from_an_address(tiny_bundle, job, tmp_path):
    with serving(tiny_bundle.path) as server:
        result = job(
            "--bundle", server.address, "--bundle-cache", tmp_path / "cache", "--input", QUESTIONS, "--limit", 2,
            "--output", tmp_path / "out",
        )  # fmt: skip
    assert "rows      2 (2 stop)" in result.stdout
    assert server.given[WEIGHTS] == tiny_bundle.manifest.files[WEIGHTS].size
    assert all(row["answer"] for row in rows_by_id(tmp_path / "out"))
    run = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert run["bundle"]["path"] == server.address
    assert run["bundle"]["sha256"] == tiny_bundle.sha256


def test_notebooks_and_checks_take_their_bundle_from_an_address(tiny_bundle, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serving(tiny_bundle.path) as server:
        with Captioner(server.address) as captioner:
            (answer,) = captioner.caption([demo[0]["image"]["bytes"]], [demo[0]["prompt"]])
        monkeypatch.setattr(sys, "argv", ["check.py", server.address])
        assert check.main() == 0
    assert answer.answer == demo[0]["expected"]
    assert f"bundle    {server.address}: tiny-qwen2.5-vl" in capsys.readouterr().out
    assert server.given[WEIGHTS] == tiny_bundle.manifest.files[WEIGHTS].size
    assert len(list((tmp_path / "qvl-batch" / "bundles").glob("*.lock"))) == 1
