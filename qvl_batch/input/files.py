"""Files of the input on file systems and in object stores: where they are, how large, and opening them.

What enters: paths and addresses. What leaves: a `Path` or a `StorePath`, of which discovery asks the same; and open
files.
"""

import hashlib
import io
import os
import stat
from glob import has_magic
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from qvl_batch.errors import ConfigError
from qvl_batch.input.addresses import HTTP
from qvl_batch.input.store_files import FIRST, StoreFile, StorePath
from qvl_batch.stores import is_address

#: Bytes of the end of a file with a footer, and of the ranges that columns of parquet are read in.
END, RANGE = 1 << 17, 1 << 22
FilePath = Path | StorePath


def check_address(place: str) -> None:
    """Refuse an address of what is no object store, or with a password in it. A path is none.

    Raises:
        ConfigError: what is wrong with it.
    """
    scheme, _, rest = place.partition("://")
    if not is_address(place):
        return
    if ":" in rest.partition("/")[0].rpartition("@")[0]:
        # Not repeated: it can be a password.
        raise ConfigError(f"{scheme}://…: give credentials as the client of the store takes them, not in an address")
    if scheme == "file":
        raise ConfigError(f"{place}: give local files by their path")
    if scheme in HTTP:
        raise ConfigError(f"{place}: a web server has no folders, and its files can change: fetch them first")


def place_at(text: str) -> FilePath:
    """The place of a path or an address.

    Raises:
        ConfigError: there is no client for such stores.
    """
    return StorePath.at(text) if is_address(text) else Path(text)


def place_of(name: str, target: FilePath) -> FilePath:
    """The place of a name that leads to `target`, by which its kind is known."""
    return target if isinstance(target, StorePath) else Path(name)


def is_inside(place: FilePath, folder: FilePath) -> bool:
    """Whether a place is another one or inside it."""
    if isinstance(place, StorePath) or isinstance(folder, StorePath):
        return isinstance(place, StorePath) and place.is_relative_to(folder)
    return place.is_relative_to(folder)


def start_of(pattern: str) -> tuple[FilePath, list[str]]:
    """Where to look for what a pattern matches, and the parts of the pattern from there on."""
    if not is_address(pattern):
        return Path(), list(Path(pattern).parts)
    scheme, _, path = pattern.partition("://")
    bucket, *parts = path.split("/")
    fixed = next((at for at, part in enumerate(parts) if has_magic(part)), len(parts))
    return place_at(f"{scheme}://{'/'.join([bucket, *parts[:fixed]])}"), [part for part in parts[fixed:] if part]


def entries(folder: FilePath) -> list[tuple[str, bool]]:
    """Names in a folder, and whether they are those of folders.

    Raises:
        OSError, InputError: it cannot be listed.
    """
    if isinstance(folder, StorePath):
        return folder.store.entries(folder.address)
    with os.scandir(folder) as found:
        return [(entry.name, entry.is_dir()) for entry in found]


def size_of(place: FilePath) -> int | None:
    """Bytes of a file; None if it is no regular file.

    Raises:
        OSError, InputError: it is not there, or cannot be reached.
    """
    if isinstance(place, StorePath):
        return place.status().size
    status = place.stat()
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def size_and_time(place: FilePath) -> tuple[int, int]:
    """Bytes of a file, and nanoseconds of its last change; of a store, a hash of what it calls the version of the file.

    Raises:
        OSError, InputError: it is not there, or cannot be reached.
    """
    if isinstance(place, StorePath):
        found = place.status()
        return found.size, int.from_bytes(hashlib.sha256(found.stamp.encode()).digest()[:7], "big")
    status = place.stat()
    return status.st_size, status.st_mtime_ns


def streaming(place: FilePath) -> dict[str, int | bool]:
    """How `pq.ParquetFile` reads the columns of a file: of a store in ranges, so that no more of a row group is in
    memory; else as it comes.
    """
    return {"buffer_size": RANGE, "pre_buffer": False} if isinstance(place, StorePath) else {}


def _check_regular(place: Path) -> None:
    if size_of(place) is None:
        raise OSError("it is not a regular file")


def open_file(place: FilePath) -> BinaryIO:
    """Open a file.

    Raises:
        OSError: it is not there, or no regular file: to open a named pipe would block until it has a writer.
        InputError: a store does not give it.
    """
    if isinstance(place, StorePath):
        return cast("BinaryIO", io.BufferedReader(StoreFile(place), FIRST))
    _check_regular(place)
    return place.open("rb")


def open_arrow(place: FilePath, *, mapped: bool = False) -> pa.NativeFile:
    """Open a file for Arrow, mapped into memory where that can be; else its end is what is read first.

    Raises:
        OSError, InputError: as `open_file`.
    """
    if isinstance(place, StorePath):
        file = StoreFile(place)
        if not mapped:
            file.read_end(END)
        return pa.PythonFile(file, mode="r")
    _check_regular(place)
    return pa.memory_map(str(place)) if mapped else pa.OSFile(str(place))
