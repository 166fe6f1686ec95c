"""A folder of a file system, behind the interface `storage.Folder`: atomic renames, and an flock on a lock file."""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from qvl_batch.output.locks import LOCK, held_by, this_process

#: Prefix of a file's name while it is being written.
PARTIAL = ".partial-"


class LocalFolder:
    """A folder of a file system."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def names(self, pattern: str) -> list[str]:
        """Names of files that match a glob, sorted."""
        return sorted(path.name for path in self._path.glob(pattern))

    def read(self, name: str) -> bytes:
        """Contents of a file."""
        return (self._path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it can seek."""
        return (self._path / name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        """Write a file under a temporary name, and rename it: fsync of the file before that, of the folder after."""
        partial = self._path / f"{PARTIAL}{os.getpid()}-{name}"
        try:
            with partial.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(self._path / name)
        except BaseException:
            partial.unlink(missing_ok=True)  # so that a full disk does not stay fuller than it was
            raise
        folder = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, *names: str) -> None:
        """Remove those of these files that exist."""
        for name in names:
            (self._path / name).unlink(missing_ok=True)

    def put(self, files: Mapping[str, bytes]) -> None:
        """As `Folder.put`. There is no lock file afterwards if there was none before."""
        with suppress(FileNotFoundError), (self._path / LOCK).open("r+") as stream:
            self._lock(stream)
        if files:
            self._path.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            self.write(name, data)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, made if it does not exist, and remove partial files of jobs that crashed.

        The lock is an flock, which the system releases when this process ends, however that happens.

        Raises:
            OutputError: another job holds the folder.
        """
        if self._path.is_file():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self._path.mkdir(parents=True, exist_ok=True)
        with (self._path / LOCK).open("a+") as stream:
            self._lock(stream)
            stream.truncate(0)
            stream.write(this_process())
            stream.flush()
            self.remove(*self.names(f"{PARTIAL}*"))
            yield

    def _lock(self, stream: TextIO) -> None:
        """Lock the lock file until it is closed.

        Raises:
            OutputError: another job has locked it.
        """
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise held_by(self, stream.read().strip()) from None
