"""Bundles at addresses (`s3://…`), fetched once into a folder of this machine.

What enters: the address of a bundle. What leaves: a local folder that holds it, whose files have the hashes of its
manifest. Processes of several jobs share the folder:

    <cache>/<hash of bundle.json>/           a complete bundle
    <cache>/<hash of bundle.json>.partial/   one that is being fetched; a fetch that was cut off goes on there
    <cache>/<hash of bundle.json>.lock       held exclusively to fetch or remove it, shared by those who use it

When the cache is larger than it may be, bundles go that were used longest ago and that nobody uses.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qvl_batch.bundle.manifest import MANIFEST, File, file_sha256, parse_manifest
from qvl_batch.config import BUNDLE_CACHE_GB
from qvl_batch.errors import BundleError
from qvl_batch.stores import client, retried

#: Bytes of one request, and requests at a time.
PIECE, AT_ONCE = 1 << 24, 8
#: Largest manifest in bytes: its size is not known before it is read.
LARGEST_MANIFEST = 1 << 26
#: Locks of bundles that this process uses, held until it ends.
_used: list[BinaryIO] = []


@dataclass(frozen=True, slots=True)
class BundleCache:
    """A folder of fetched bundles.

    Args:
        place: the folder, made if it does not exist; by default that of this machine's user, below `XDG_CACHE_HOME` or
            `~/.cache`.
        gigabytes: size from which on bundles are removed.
    """

    place: Path | None = None
    gigabytes: float = BUNDLE_CACHE_GB

    @property
    def folder(self) -> Path:
        """The folder on this machine."""
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return self.place or caches / "qvl-batch" / "bundles"

    def fetch(self, address: str, expected: str | None = None) -> Path:
        """The folder of a bundle, which stays while this process runs.

        Args:
            address: of the bundle.
            expected: SHA-256 of its `bundle.json`. A bundle that is in the cache already then needs no request.

        Raises:
            BundleError: there is no bundle, another one than is expected, or it cannot be fetched whole.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if expected is not None and (found := self._kept(expected)) is not None:
                return found
            files, root = client(address)
            manifest = _retried(address, lambda: bytes(files.cat_file(f"{root}/{MANIFEST}", end=LARGEST_MANIFEST)))
            sha256 = hashlib.sha256(manifest).hexdigest()
            if expected is not None and sha256 != expected:
                raise BundleError(f"{address} is not the bundle any more with which this job began: copy it back there")
            return self._kept(sha256) or self._fetched(address, files, root, manifest)
        except OSError as error:
            raise BundleError(f"{address} cannot be kept in {self.folder}: {error}") from error

    def _kept(self, sha256: str) -> Path | None:
        """The folder of a bundle that is complete, held for this process; None if there is none."""
        place = self.folder / sha256
        if not place.is_dir():
            return None
        lock = _open(self._lock(sha256))
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not place.is_dir():  # it was removed meanwhile
            lock.close()
            return None
        _used.append(lock)
        with suppress(OSError):
            os.utime(place)
        return place

    def _fetched(self, address: str, files: Any, root: str, manifest: bytes) -> Path:
        sha256 = hashlib.sha256(manifest).hexdigest()
        place, partial = self.folder / sha256, self.folder / f"{sha256}.partial"
        with _held(self._lock(sha256)):
            if not place.is_dir():
                listed = parse_manifest(manifest, address).files
                partial.mkdir(exist_ok=True)
                self._make_room(sum(file.size for file in listed.values()) - _size(partial), address)
                for name, file in listed.items():
                    _fetch_file(address, files, root, partial, name, file)
                (partial / MANIFEST).write_bytes(manifest)
                partial.rename(place)
        found = self._kept(sha256)
        assert found is not None
        return found

    def _make_room(self, size: int, address: str) -> None:
        """Remove bundles that nobody uses until there is room, those first that were used longest ago.

        Raises:
            BundleError: the disk is full.
        """
        kept = sorted((path for path in self.folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        sizes = {path: _size(path) for path in kept}
        for path in kept:
            if sum(sizes.values()) + size <= 1e9 * self.gigabytes and shutil.disk_usage(self.folder).free > size:
                break
            if self._removed(path):
                del sizes[path]
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise BundleError(
                f"{address} needs {size / 1e9:,.1f} GB more in {self.folder}, where {free / 1e9:,.1f} are free: give "
                "another folder (--bundle-cache)"
            )

    def _removed(self, place: Path) -> bool:
        """Remove a bundle, or what there is of it, unless it is used or being fetched."""
        with suppress(BlockingIOError), _held(self._lock(place.name.removesuffix(".partial")), fcntl.LOCK_NB):
            away = place.with_name(f"{place.name}.removed")  # so that it is gone at once, and not half
            place.rename(away)
            shutil.rmtree(away)
            return True
        return False

    def _lock(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.lock"


def _fetch_file(address: str, files: Any, root: str, folder: Path, name: str, file: File) -> None:
    """Fetch one file, from where an earlier fetch of it ended.

    Raises:
        BundleError: it cannot be read, or is not what the manifest says.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{address}/{MANIFEST} lists {name}, which is outside the bundle")
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(2):  # what was there before can be damaged
        _append(f"{address}/{name}", files, f"{root}/{name}", path, file.size)
        if file_sha256(path) == file.sha256:
            return
        path.unlink()
        if attempt:
            raise BundleError(f"{address}/{name} is damaged (its SHA-256 differs): copy the bundle there again")


def _append(address: str, files: Any, source: str, path: Path, size: int) -> None:
    with path.open("ab") as output, ThreadPoolExecutor(AT_ONCE, "qvl-bundle") as pool:
        if output.tell() > size:
            output.truncate(0)
        ranges = [(at, min(at + PIECE, size)) for at in range(output.tell(), size, PIECE)]

        def piece(extent: tuple[int, int]) -> bytes:
            data = _retried(address, lambda: bytes(files.cat_file(source, start=extent[0], end=extent[1])))
            if len(data) != (asked := extent[1] - extent[0]):
                raise BundleError(
                    f"{address} gives {len(data):,} bytes where {asked:,} were asked for: copy the bundle there again"
                )
            return data

        for at in range(0, len(ranges), AT_ONCE):
            for data in pool.map(piece, ranges[at : at + AT_ONCE]):
                output.write(data)


def _retried(address: str, read: Callable[[], bytes]) -> bytes:
    """The result of `read`, which is called again after errors that can be temporary.

    Raises:
        BundleError: there is nothing, or the store refuses.
    """
    try:
        return retried(read)
    except FileNotFoundError as error:
        raise BundleError(f"{address} is not there: give the address of a bundle's folder") from error
    except PermissionError as error:
        raise BundleError(f"{address} cannot be read: {error}") from error
    except Exception as error:  # clients of object stores raise errors of any type
        raise BundleError(f"{address} cannot be read: {type(error).__name__}: {error}") from error


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _open(path: Path) -> BinaryIO:
    return path.open("ab")


@contextmanager
def _held(path: Path, flags: int = 0) -> Iterator[None]:
    """Hold a lock exclusively.

    Raises:
        BlockingIOError: with `LOCK_NB`, someone else holds it.
    """
    with _open(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | flags)
        yield
