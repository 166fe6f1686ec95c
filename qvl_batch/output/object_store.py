"""A folder of an object store, behind the interface `storage.Folder`: atomic puts, and a lock with a lease."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, cast

import fsspec

from qvl_batch.errors import OutputError
from qvl_batch.output.locks import LOCK, died_here, held_by, this_machine, this_process

logger = logging.getLogger(__name__)
#: Seconds between renewals of a lock; seconds without a renewal after which the lock has expired.
RENEWAL, LEASE = 10.0, 60.0
#: Files removed at a time: each is a round trip.
AT_ONCE = 16


class StoreFolder:
    """A folder of an object store.

    Its lock is an object `_lock-N` that only one job can create (the store must support a put that fails if the object
    exists), and that this job renews. A lock that is not renewed for `LEASE` seconds has expired; the job that takes
    over creates `_lock-N+1`. N never decreases: a job that ends leaves its lock, marked as ended. Before each write and
    removal, a job checks that its lock is still the last one; if its machine was suspended and another job has taken
    over meanwhile, it stops.

    Args:
        files: client of the store.
        address: of the folder.
        renewal: seconds between renewals of the lock.
        lease: seconds without a renewal after which the lock of another job has expired.
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
        """Names of files that match a glob, sorted."""
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
        """Open a file for reading; it can seek, and reads only the ranges that are asked for."""
        with _as_os_errors():
            return cast("BinaryIO", self._files.open(self._path(name), "rb", cache_type="none"))

    def write(self, name: str, data: bytes) -> None:
        """Put a file if this job still holds the folder.

        Raises:
            OutputError: another job has taken over.
        """
        self._check_held()
        with _as_os_errors():
            self._files.pipe_file(self._path(name), data)

    def remove(self, *names: str) -> None:
        """Remove those of these files that exist, several at a time, if this job still holds the folder.

        Raises:
            OutputError: another job has taken over.
        """
        if names:
            self._check_held()
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self._remove, names))

    def put(self, files: Mapping[str, bytes]) -> None:
        """As `Folder.put`. It holds the folder meanwhile, so that a lock that has ended is there afterwards."""
        if not files:
            if (earlier := self._last_lock()) is not None:
                self._wait_for(earlier)
            return
        with self.held():
            for name, data in files.items():
                self.write(name, data)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder by a lock object that a thread renews. A lock that is there already must have expired.

        Raises:
            OutputError: another job holds the folder.
        """
        earlier = self._last_lock()
        if earlier is not None:
            self._wait_for(earlier)
        lock = f"{LOCK}-{int(earlier.rsplit('-', 1)[-1]) + 1 if earlier else 0:06d}"
        try:
            self._sign(lock, mode="create")
        except FileExistsError:
            raise held_by(self, self._holder(lock).get("holder")) from None
        self._lock, ended = lock, threading.Event()
        renewer = threading.Thread(target=self._renew, args=(lock, ended), name="qvl-lock", daemon=True)
        renewer.start()
        try:
            self.remove(*(name for name in self._locks() if name < lock))
            yield
        finally:
            ended.set()
            renewer.join()
            self._lock = None
            with suppress(OSError):  # the next job then waits until this lock has expired
                self._sign(lock, ended=True)

    def _remove(self, name: str) -> None:
        with _as_os_errors(), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _check_held(self) -> None:
        if self._lock is None or self._last_lock() != self._lock:
            raise OutputError(
                f"another job took {self} over, since this one did not renew its lock in time: the other one continues"
            )

    def _last_lock(self) -> str | None:
        return max(self._locks(), default=None)

    def _locks(self) -> list[str]:
        """Names of all locks, sorted; listed by prefix, since each write calls this and there can be many parts."""
        with _as_os_errors():
            self._files.invalidate_cache()
            paths: list[str] = self._files.find(self._root, prefix=f"{LOCK}-")
        names = (path.removeprefix(f"{self._root}/") for path in paths)
        return sorted(name for name in names if name.startswith(f"{LOCK}-") and "/" not in name)

    def _wait_for(self, lock: str) -> None:
        """Wait until a lock has ended or expired.

        Raises:
            OutputError: its holder renews it.
        """
        before, until = self._holder(lock), time.monotonic() + self._lease
        if not (before.get("ended") or died_here(before)):
            logger.warning(
                "%s is locked by %s: waiting up to %g s to see whether the lock is renewed",
                self,
                before.get("holder"),
                self._lease,
            )
        while not (before.get("ended") or died_here(before)) and time.monotonic() < until:
            if self._holder(lock) != before:
                raise held_by(self, before.get("holder"))
            time.sleep(self._renewal / 5)

    def _renew(self, lock: str, ended: threading.Event) -> None:
        """Renew a lock until the event is set. Logs when that begins to fail, and when it works again."""
        failing = False
        while not ended.wait(self._renewal):
            try:
                self._sign(lock)
            except OSError as error:  # tried again at the next renewal; the lease runs on meanwhile
                if not failing:
                    logger.warning("the lock of %s cannot be renewed, so another job can take it over: %s", self, error)
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
        """Contents of a lock, empty if it does not exist or cannot be parsed."""
        try:
            return dict(json.loads(self.read(lock)))
        except (FileNotFoundError, ValueError):
            return {}

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn other errors of a store's client into OSError, for example that there are no credentials."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
