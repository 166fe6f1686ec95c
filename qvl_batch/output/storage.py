"""A folder with atomic writes and a lock: on a file system, or in an object store.

What enters: names and contents of files. What leaves: the same. A file appears whole or not at all. One job at a time
holds the folder; the lock of a job that died does not block others.

    file system     write to a temporary name, fsync, rename; the lock is an flock on a file
    object store    a put is atomic; the lock is an object with a lease, which its holder renews

This module knows nothing of what the files hold.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePath
from typing import BinaryIO, Protocol

from qvl_batch.config import OBJECT_STORES
from qvl_batch.errors import ConfigError
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.object_store import StoreFolder
from qvl_batch.stores import client


class Folder(Protocol):
    """A folder of files. `str()` returns its path or address.

    Every method raises OSError if the file system or the store fails.
    """

    def names(self, pattern: str) -> list[str]:
        """Names of files that match a glob, sorted."""

    def read(self, name: str) -> bytes:
        """Contents of a file."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; it can seek."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: it appears whole or not at all, even if the machine crashes."""

    def remove(self, *names: str) -> None:
        """Remove those of these files that exist, in any order."""

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write files beside those of a job, each atomically, without holding the folder any longer.

        Raises:
            OutputError: a job holds it.
        """

    def held(self) -> AbstractContextManager[None]:
        """Hold the folder, made if it does not exist, and remove the leftovers of jobs that died.

        Raises:
            OutputError: another job holds it.
        """


def folder_at(place: str | PurePath) -> Folder:
    """The folder at a path or an address.

    Raises:
        ConfigError: such stores are not supported, or the client for it is not installed.
    """
    scheme, separator, _ = str(place).partition("://")
    if not separator:
        return LocalFolder(Path(place))
    if scheme not in OBJECT_STORES:
        stores = ", ".join(f"{store}://" for store in sorted(OBJECT_STORES))
        raise ConfigError(f"{place}: give the path of a folder, or an address of {stores}")
    return StoreFolder(client(str(place))[0], str(place))
