"""A folder of an object store, as `storage.Folder` has it."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, cast

import fsspec

from qvl_batch.errors import OutputError
from qvl_batch.output.locks import LOCK, died_here, held_by, this_machine, this_process

logger = logging.getLogger(__name__)
#: Seconds from one renewal of an object's lock to the next, and without one until its holder counts as dead.
RENEWAL, LEASE = 10.0, 60.0


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
            raise held_by(self, self._holder(lock).get("holder")) from None
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
        if not (before.get("ended") or died_here(before)):
            logger.warning("%s is held by %s: %g s to see if it lives", self, before.get("holder"), self._lease)
        while not (before.get("ended") or died_here(before)) and time.monotonic() < until:
            if self._holder(lock) != before:
                raise held_by(self, before.get("holder"))
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
        process = {"machine": this_machine(), "pid": os.getpid(), "holder": this_process()}
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


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """What stores raise that is no OSError, such as that there are no credentials."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
