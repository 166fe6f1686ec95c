"""A folder in which files appear whole or not at all: of a file system, or of an object store.

What enters: names and contents of files. What leaves: the same. One job at a time holds the folder,
and a job that died does not hold it.

    file system     a temporary name, fsync, rename; the lock is the system's, on a file
    object store    a put is whole or not at all; the lock is an object that its holder renews

This module knows nothing of what the files hold.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol, cast

import fsspec

from qvl_batch.errors import ConfigError, OutputError
from qvl_batch.input.fetch import STORES

PARTIAL, LOCK = ".partial-", "_lock"
logger = logging.getLogger(__name__)
#: Seconds from one renewal of an object's lock to the next, and without one until its holder counts as dead.
RENEWAL, LEASE = 10.0, 60.0


class Folder(Protocol):
    """Where files are. `str()` gives its path or address.

    Everything raises OSError where the file system or the store does not do it.
    """

    def names(self, pattern: str) -> list[str]:
        """Names of files that match, in order."""

    def read(self, name: str) -> bytes:
        """Contents of a file."""

    def open(self, name: str) -> BinaryIO:
        """A file to read parts of."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that it is there whole or not at all, even if the machine stops."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def held(self) -> AbstractContextManager[None]:
        """Hold the folder, made if it is not there, and sweep up what a dead job left.

        Raises:
            OutputError: another job holds it.
        """


class LocalFolder:
    """A folder of a file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def names(self, pattern: str) -> list[str]:
        """Names of files that match, in order."""
        return sorted(path.name for path in self._path.glob(pattern))

    def read(self, name: str) -> bytes:
        """Contents of a file."""
        return (self._path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """A file to read parts of."""
        return (self._path / name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        """Write a file under another name, and move it."""
        partial = self._path / f"{PARTIAL}{os.getpid()}-{name}"
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(self._path / name)
        except BaseException:
            partial.unlink(missing_ok=True)  # a disk that is full is none the fuller
            raise
        folder = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self._path / name).unlink(missing_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder by a lock that the system takes away when this process ends, however that happens."""
        if self._path.is_file():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self._path.mkdir(parents=True, exist_ok=True)
        with (self._path / LOCK).open("a+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise _held_by(self, stream.read().strip()) from None
            stream.truncate(0)
            stream.write(_this_process())
            stream.flush()
            for partial in self.names(f"{PARTIAL}*"):
                self.remove(partial)
            yield


class StoreFolder:
    """A folder of an object store.

    Its lock is an object `_lock-N` that only one job can create (the store must be able to refuse a put
    where something is), and that this job renews. One that was not renewed for `LEASE` seconds is dead;
    who takes over creates `_lock-N+1`. N never becomes less: what remains of a job that ended is a lock
    that says so. Before each write and removal a job looks whether its own is still the last: if its machine stood
    still and another job took over, it stops.

    Args:
        files: speaks to the store.
        address: of the folder.
        renewal, lease: seconds.
    """

    def __init__(
        self, files: fsspec.AbstractFileSystem, address: str, renewal: float = RENEWAL, lease: float = LEASE
    ) -> None:
        self._files, self._address = files, address.rstrip("/")
        self._root = str(files._strip_protocol(self._address))  # noqa: SLF001  (fsspec has no public name for it)
        self._renewal, self._lease = renewal, lease
        self._lock: str | None = None

    def __str__(self) -> str:
        return self._address

    def names(self, pattern: str) -> list[str]:
        """Names of files that match, in order."""
        with _as_os_errors():
            self._files.invalidate_cache()
            try:
                paths: list[str] = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        return sorted(name for path in paths if fnmatchcase(name := path.rsplit("/", 1)[-1], pattern))

    def read(self, name: str) -> bytes:
        """Contents of a file."""
        with _as_os_errors():
            return bytes(self._files.cat_file(self._path(name)))

    def open(self, name: str) -> BinaryIO:
        """A file to read parts of."""
        with _as_os_errors():
            return cast("BinaryIO", self._files.open(self._path(name), "rb", cache_type="none"))

    def write(self, name: str, data: bytes) -> None:
        """Put a file, if this job still holds the folder.

        Raises:
            OutputError: another job took over.
        """
        self._check_held()
        with _as_os_errors():
            self._files.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there, and if this job still holds the folder.

        Raises:
            OutputError: another job took over.
        """
        self._check_held()
        with _as_os_errors(), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder by an object that is renewed. Where one is there already, see if it still is."""
        earlier = self._last_lock()
        if earlier is not None:
            self._wait_for(earlier)
        lock = f"{LOCK}-{int(earlier.rsplit('-', 1)[-1]) + 1 if earlier else 0:06d}"
        try:
            self._sign(lock, mode="create")
        except FileExistsError:
            raise _held_by(self, self._holder(lock).get("holder")) from None
        self._lock, ended = lock, threading.Event()
        keeper = threading.Thread(target=self._keep, args=(lock, ended), name="qvl-lock", daemon=True)
        keeper.start()
        try:
            for name in self._locks():
                if name < lock:
                    self.remove(name)
            yield
        finally:
            ended.set()
            keeper.join()
            self._lock = None
            with suppress(OSError):  # then the next job waits until this lock is old
                self._sign(lock, ended=True)

    def _check_held(self) -> None:
        if self._lock is None or self._last_lock() != self._lock:
            raise OutputError(f"another job took {self} over while this one stood still: it goes on there")

    def _last_lock(self) -> str | None:
        return max(self._locks(), default=None)

    def _locks(self) -> list[str]:
        """Names of all locks, in order. A store lists these alone: each write asks, and there may be many answers."""
        with _as_os_errors():
            self._files.invalidate_cache()
            paths: list[str] = self._files.find(self._root, prefix=f"{LOCK}-")
        names = (path.removeprefix(f"{self._root}/") for path in paths)
        return sorted(name for name in names if name.startswith(f"{LOCK}-") and "/" not in name)

    def _wait_for(self, lock: str) -> None:
        """Return when a lock's holder has ended or is dead; a living one renews it meanwhile."""
        before, until = self._holder(lock), time.monotonic() + self._lease
        if not (before.get("ended") or _died_here(before)):
            logger.warning("%s is held by %s: %g s to see if it lives", self, before.get("holder"), self._lease)
        while not (before.get("ended") or _died_here(before)) and time.monotonic() < until:
            if self._holder(lock) != before:
                raise _held_by(self, before.get("holder"))
            time.sleep(self._renewal / 5)

    def _keep(self, lock: str, ended: threading.Event) -> None:
        failing = False
        while not ended.wait(self._renewal):
            try:
                self._sign(lock)
            except OSError as error:  # what does not work now may the next time; until then, others see an older lock
                if not failing:
                    logger.warning(
                        "the lock of %s cannot be renewed, so that another job may take it over: %s", self, error
                    )
                failing = True
            else:
                if failing:
                    logger.warning("the lock of %s is renewed again", self)
                failing = False

    def _sign(self, lock: str, mode: str = "overwrite", *, ended: bool = False) -> None:
        process = {"machine": _this_machine(), "pid": os.getpid(), "holder": _this_process()}
        record = json.dumps(process | {"ended": ended, "signed": time.time()})
        with _as_os_errors():
            self._files.pipe_file(self._path(lock), record.encode(), mode=mode)

    def _holder(self, lock: str) -> dict[str, Any]:
        """What a lock says, nothing if it is not there."""
        try:
            return dict(json.loads(self.read(lock)))
        except (FileNotFoundError, ValueError):
            return {}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def folder_at(place: str | PurePath) -> Folder:
    """The folder at a path or an address.

    Raises:
        ConfigError: there is no such kind of store, or what speaks to it is not installed.
    """
    scheme, separator, _ = str(place).partition("://")
    if not separator:
        return LocalFolder(Path(place))
    if scheme not in STORES:
        stores = ", ".join(f"{store}://" for store in sorted(STORES))
        raise ConfigError(f"{place}: give the path of a folder, or an address of {stores}")
    try:
        return StoreFolder(fsspec.filesystem(scheme), str(place))
    except ImportError as error:
        raise ConfigError(f"{place}: {error}") from error


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _this_machine() -> str:
    """Names it from start to start, and its containers apart."""
    return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def _died_here(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine held a lock and is no more."""
    if holder.get("machine") != _this_machine():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return False


def _held_by(folder: Folder, holder: str | None) -> OutputError:
    return OutputError(
        f"another job is writing to {folder} ({holder or 'unknown'}): wait for it, or give another --output"
    )


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """What stores raise that is no OSError, such as that there are no credentials."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
