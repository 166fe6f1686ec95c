"""A folder in which files appear whole or not at all: of a file system, or of an object store.

What enters: names and contents of files. What leaves: the same. One job at a time holds the folder,
and a job that died does not hold it.

    file system     a temporary name, fsync, rename; the lock is the system's, on a file
    object store    a put is whole or not at all; the lock is an object that its holder renews

This module knows nothing of what the files hold.
"""

from contextlib import AbstractContextManager
from pathlib import Path, PurePath
from typing import BinaryIO, Protocol

import fsspec

from qvl_batch.config import OBJECT_STORES
from qvl_batch.errors import ConfigError
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.object_store import StoreFolder


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


def folder_at(place: str | PurePath) -> Folder:
    """The folder at a path or an address.

    Raises:
        ConfigError: there is no such kind of store, or what speaks to it is not installed.
    """
    scheme, separator, _ = str(place).partition("://")
    if not separator:
        return LocalFolder(Path(place))
    if scheme not in OBJECT_STORES:
        stores = ", ".join(f"{store}://" for store in sorted(OBJECT_STORES))
        raise ConfigError(f"{place}: give the path of a folder, or an address of {stores}")
    try:
        return StoreFolder(fsspec.filesystem(scheme), str(place))
    except ImportError as error:
        raise ConfigError(f"{place}: {error}") from error
