"""Features that were kept are those that the graph would give, or are not there."""

import errno
import math
import os
import threading

import numpy as np
import pytest

from qvl_batch.bundle.layout import Resolution
from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ConfigError, OutputError
from qvl_batch.images.pixels import image_key
from qvl_batch.images.view import View
from qvl_batch.vision.cache import VisionCache, open_vision_cache

SHAPE = (4, 3)
GRAPH = "a" * 64


def _filled(value):
    return np.full(SHAPE, value, np.float32)


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_put_is_got_bit_for_bit_by_another_process_too(tmp_path):
    features = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    VisionCache(tmp_path, GRAPH, SHAPE[1], 10**6).put(b"key", features)
    assert (VisionCache(tmp_path, GRAPH, SHAPE[1], 10**6).get(b"key", SHAPE[0]) == features).all()
    assert VisionCache(tmp_path, GRAPH, SHAPE[1], 10**6).get(b"other", SHAPE[0]) is None
    assert VisionCache(tmp_path, "b" * 64, SHAPE[1], 10**6).get(b"key", SHAPE[0]) is None


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-9], lambda _: b"", lambda data: data[:8] + b"!" + data[9:], lambda data: data + b"more"],
    ids=["cut", "empty", "changed", "longer"],
)
def test_a_damaged_file_is_taken_for_missing_and_replaced(damage, tmp_path):
    cache = VisionCache(tmp_path, GRAPH, SHAPE[1], 10**6)
    cache.put(b"key", _filled(1))
    (file,) = _files(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    assert cache.get(b"key", SHAPE[0]) is None
    cache.put(b"key", _filled(1))
    assert (cache.get(b"key", SHAPE[0]) == 1).all()


def test_the_folder_keeps_its_bound_and_what_was_used_last(tmp_path):
    cache, made = VisionCache(tmp_path, GRAPH, SHAPE[1], 10**6), []
    for key in range(10):
        cache.put(bytes([key]), _filled(key))
        made += [path for path in _files(tmp_path) if path not in made]
    for age, key in enumerate((3, 7, 1)):
        os.utime(made[key], (2e9 + age, 2e9 + age))
    size = _files(tmp_path)[0].stat().st_size
    VisionCache(tmp_path, GRAPH, SHAPE[1], 4 * size)
    assert sum(path.stat().st_size for path in _files(tmp_path)) <= 4 * size
    assert all(cache.get(bytes([key]), SHAPE[0]) is not None for key in (3, 7, 1))


def test_what_a_killed_worker_left_is_swept_up(tmp_path):
    cache = VisionCache(tmp_path, GRAPH, SHAPE[1], 10**6)
    cache.put(b"key", _filled(1))
    left, fresh = (_files(tmp_path)[0].with_suffix(f".partial-{name}") for name in ("left", "fresh"))
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (1, 1))
    cache.sweep()
    assert (left.exists(), fresh.exists(), len(_files(tmp_path))) == (False, True, 2)


def test_workers_may_share_a_folder(tmp_path):
    caches = [VisionCache(tmp_path, GRAPH, SHAPE[1], 3000) for _ in range(4)]

    def work(cache, failures):
        for key in list(range(60)) * 3:
            kept = cache.get(bytes([key]), SHAPE[0])
            if kept is None:
                cache.put(bytes([key]), _filled(key))
            elif not (kept == key).all():
                failures.append(key)
            if key % 7 == 0:
                cache.sweep()

    failures = []
    threads = [threading.Thread(target=work, args=(cache, failures)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"--vision-cache .*file cannot be used"):
        VisionCache(tmp_path / "file", GRAPH, SHAPE[1], 10**6)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def read_only(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(OutputError, match=r"--vision-cache .* cannot be used: Read-only file system"):
        VisionCache(tmp_path, GRAPH, SHAPE[1], 10**6)


def test_a_disk_that_is_full_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def write(path, _):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = VisionCache(tmp_path, GRAPH, SHAPE[1], 10**6)
    monkeypatch.setattr("pathlib.Path.write_bytes", write)
    with pytest.raises(OutputError, match=r"--vision-cache .* cannot be written: No space left"):
        cache.put(b"key", _filled(1))
    assert _files(tmp_path) == []


@pytest.mark.parametrize("gigabytes", [0.0, -1.0, math.nan, math.inf])
def test_a_size_is_a_number_above_0(gigabytes, tmp_path):
    with pytest.raises(ConfigError, match="--vision-cache-gb must be a number above 0, not"):
        CaptionConfig(bundle=tmp_path, input=("x",), output="out", vision_cache_gb=gigabytes)


def test_features_of_other_versions_are_not_taken(tiny_bundle, tmp_path, monkeypatch):
    manifest = tiny_bundle.manifest
    features = np.ones((SHAPE[0], 128), np.float32)
    open_vision_cache(tmp_path, 1, manifest).put(b"key", features)
    assert (open_vision_cache(tmp_path, 1, manifest).get(b"key", SHAPE[0]) == features).all()
    for name in ("PIL.__version__", "qvl_batch.vision.cache.ORT_VERSION"):
        with monkeypatch.context() as changed:
            changed.setattr(name, "another")
            assert open_vision_cache(tmp_path, 1, manifest).get(b"key", SHAPE[0]) is None


def test_a_key_stands_for_contents_and_fit():
    crop, stretch = View.square(672, "crop"), View.square(672, "stretch")
    native = [View.of(Resolution(28, None, 784, most)) for most in (10_000, 20_000)]
    assert image_key(b"a", crop) == image_key(b"a", View.square(672, "crop"))
    assert len({image_key(b"a", view) for view in (crop, stretch, *native)} | {image_key(b"b", crop)}) == 5
