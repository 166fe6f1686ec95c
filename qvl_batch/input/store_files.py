"""Files of the input in object stores, asked as `Path` is, and read by ranges.

What enters: addresses. What leaves: a `StorePath`, and open files. Each read of a file asks for what is not there yet,
and reads one after the other ask for more and more ahead. An open file keeps the last ranges that it read, at most
24 MiB.

What a store refuses for good, or does not give after all attempts, is an `InputError`: it stops the job, which can go
on later, and is no damage of a file.
"""

import io
import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from qvl_batch.errors import InputError
from qvl_batch.stores import client, retried

Result = TypeVar("Result")
#: Bytes of a first read, and of the largest that reads ahead; ranges that an open file keeps.
FIRST, MOST, KEPT = 1 << 16, 1 << 23, 3
#: Characters of the longest reason in a message.
_REASON = 300
#: The query of an address in an error of a client: it can be a signature that gives access.
_QUERY = re.compile(r"\?\S+")
#: What clients call the version of a file, the first that is there.
_STAMPS = ("ETag", "etag", "generation", "blob_id", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfss": "abfs"}


@dataclass(frozen=True, slots=True)
class Status:
    """A file of a store: its size, and what changes when it does, as the store says it."""

    size: int
    stamp: str

    @classmethod
    def of(cls, info: dict[str, Any]) -> "Status":
        """As a client of fsspec has it."""
        return cls(int(info["size"]), str(next((info[name] for name in _STAMPS if info.get(name)), "")))


@dataclass(frozen=True, slots=True)
class StorePath:
    """A place in a store. Its methods are those of `Path`; a store has no links, so each place has one name.

    Args:
        address: without a slash at its end.
        store: where it is.
    """

    address: str
    store: "Store" = field(compare=False, repr=False)

    @classmethod
    def at(cls, address: str) -> "StorePath":
        """The place at an address.

        Raises:
            ConfigError: there is no client for such stores.
        """
        address = address.rstrip("/")
        return cls(address, Store(address))

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "StorePath":
        return StorePath(f"{self.address}/{name}", self.store)

    @property
    def name(self) -> str:
        """The last part."""
        return self.address.rpartition("/")[-1]

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> "StorePath":
        """The folder that it is in; a bucket is in itself."""
        return next(iter(self.parents), self)

    @property
    def parents(self) -> list["StorePath"]:
        """Folders that it is in, up to the bucket."""
        scheme, _, path = self.address.partition("://")
        parts = path.split("/")
        return [StorePath(f"{scheme}://{'/'.join(parts[:end])}", self.store) for end in range(len(parts) - 1, 0, -1)]

    def with_name(self, name: str) -> "StorePath":
        """A place beside it."""
        return self.parent / name

    def joined(self, path: str) -> str:
        """The address of a relative path from this folder; it leads out of no bucket."""
        scheme, _, place = self.address.partition("://")
        bucket, _, folder = place.partition("/")
        return f"{scheme}://{bucket}{posixpath.normpath(f'/{folder}/{path}')}"

    def resolve(self) -> "StorePath":
        """Itself."""
        return self

    def is_relative_to(self, other: "Path | StorePath") -> bool:
        """Whether it is another place or inside it."""
        if not isinstance(other, StorePath):
            return False
        return f"{_plain(self.address)}/".startswith(f"{_plain(other.address)}/")

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return self.store.find(self.address) is not None

    def is_symlink(self) -> bool:
        """There are no links."""
        return False

    def is_dir(self) -> bool:
        """Whether it is a folder: there is something in it, and no file of its name."""
        return isinstance(self.store.find(self.address), Folder)

    def iterdir(self) -> "Iterator[StorePath]":
        """What is in the folder."""
        return (self / name for name in dict(self.store.entries(self.address)))

    def glob(self, pattern: str) -> "Iterator[StorePath]":
        """What is in the folder and matches a pattern, in whose last part alone are wildcards."""
        folder, _, last = pattern.rpartition("/")
        place = self / folder if folder else self
        try:
            if not has_magic(last):
                return iter([place / last] if (place / last).exists() else [])
            return iter([place / name for name, _ in self.store.entries(place.address) if fnmatchcase(name, last)])
        except InputError as error:
            if isinstance(error.__cause__, PermissionError):  # as `Path.glob`
                return iter([])
            raise

    def status(self) -> Status:
        """Size and stamp of the file.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self.store.find(self.address)
        if not isinstance(found, Status):
            raise FileNotFoundError(f"{self.address}: there is no such file")
        return found

    def read_bytes(self) -> bytes:
        """What is in the file, in one request.

        Raises:
            FileNotFoundError: it is gone.
        """
        return self.store.read(self.address)


@dataclass(frozen=True, slots=True)
class Folder:
    """What is in a folder of a store. A file and a folder can have the same name."""

    files: dict[str, Status] = field(default_factory=dict)
    folders: "dict[str, Folder]" = field(default_factory=dict)

    def folder(self, name: str) -> "Folder":
        """The folder of that name, made if it is not known yet."""
        return self.folders.setdefault(name, Folder())

    def find(self, name: str) -> "Status | Folder | None":
        """The file of that name, or the folder."""
        return self.files.get(name) or self.folders.get(name)


#: In place of a folder that is not there.
_NOTHING = Folder()


class Store:
    """A store, and what was listed of it: each folder is listed once.

    Args:
        address: of anything in it.
    """

    def __init__(self, address: str) -> None:
        self._files, _ = client(address)
        #: Folders that were listed, with all below them or alone; and what was asked for by name.
        self._trees: dict[str, Folder] = {}
        self._folders: dict[str, Folder] = {}
        self._found: dict[str, Status | Folder | None] = {}

    def find(self, address: str) -> "Status | Folder | None":
        """What is at an address; None if there is nothing."""
        parent, _, name = address.rpartition("/")
        if (known := self._known(parent)) is not None:
            return known.find(name)
        if (known := self._known(address)) is not None:
            return known
        if address not in self._found:
            self._found[address] = self._asked_for(address)
        return self._found[address]

    def _asked_for(self, address: str) -> "Status | Folder | None":
        try:
            info = asked(address, lambda: self._files.info(self._at(address)))
        except FileNotFoundError:
            return None
        return Folder() if info["type"] == "directory" else Status.of(info)

    def _known(self, address: str) -> Folder | None:
        """A folder, if it was listed."""
        for top, folder in self._trees.items():
            if address == top:
                return folder
            if address.startswith(f"{top}/"):
                below = address[len(top) + 1 :].split("/")
                return reduce(lambda at, name: at.folders.get(name, _NOTHING), below, folder)
        return self._folders.get(address)

    def entries(self, address: str) -> list[tuple[str, bool]]:
        """Names in a folder, and whether they are those of folders."""
        folder = self._known(address)
        if folder is None:
            folder = self._folders[address] = self._listed(address, lambda at: self._files.ls(at, detail=True))
        return [*((name, False) for name in folder.files), *((name, True) for name in folder.folders)]

    def list_all(self, address: str) -> None:
        """List a folder and all folders below it, at once."""
        if not any(f"{address}/".startswith(f"{top}/") for top in self._trees):
            self._trees[address] = self._listed(address, lambda at: self._files.find(at, detail=True).values())

    def _listed(self, address: str, listing: Callable[[str], Iterable[dict[str, Any]]]) -> Folder:
        at, top = self._at(address).rstrip("/"), Folder()
        try:
            found = asked(address, lambda: listing(at))
        except (FileNotFoundError, NotADirectoryError):
            return top
        for info in found:
            *folders, name = info["name"][len(at) + 1 :].rstrip("/").split("/")
            if info["name"].rstrip("/") == at:
                continue
            folder = top
            for each in folders:
                folder = folder.folder(each)
            if info["type"] == "directory" or info["name"].endswith("/"):  # a mark that programs leave for a folder
                folder.folder(name)
            else:
                folder.files[name] = Status.of(info)
        return top

    def read(self, address: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes of a file.

        Raises:
            FileNotFoundError: it is gone.
            InputError: it cannot be read.
        """
        path = self._at(address)
        return asked(address, lambda: bytes(self._files.cat_file(path, start=start, end=end)))

    def _at(self, address: str) -> str:
        """The path that the client has for an address."""
        return str(self._files._strip_protocol(address))  # noqa: SLF001  (fsspec has no public name for it)


class StoreFile(io.RawIOBase):
    """An open file of a store.

    Args:
        place: of the file.
    """

    def __init__(self, place: StorePath) -> None:
        super().__init__()
        self._place, self._size = place, place.status().size
        self._position, self._ahead = 0, FIRST
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It can."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As `io.RawIOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a negative place in a file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read until the buffer is full, or the file ends."""
        target = memoryview(buffer).cast("B")
        wanted = max(0, min(len(target), self._size - self._position))
        filled = 0
        while filled < wanted:
            start, data = self._range(self._position, wanted - filled)
            some = memoryview(data)[self._position - start :][: wanted - filled]
            target[filled : filled + len(some)] = some
            filled += len(some)
            self._position += len(some)
        return filled

    def read_end(self, size: int) -> None:
        """Read the end of the file, and keep it."""
        self._read(max(0, self._size - size), self._size)

    def _range(self, start: int, size: int) -> tuple[int, bytes]:
        """A range that begins at or before a byte, and holds it."""
        for begin, data in self._kept:
            if begin <= start < begin + len(data):
                return begin, data
        follows = any(start == begin + len(data) for begin, data in self._kept)
        self._ahead = min(MOST, 4 * self._ahead) if follows else FIRST
        # What is there already, such as the end, is not asked for again.
        stop = min([self._size, start + max(size, self._ahead), *(each for each, _ in self._kept if each > start)])
        return start, self._read(start, stop)

    def _read(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        try:
            data = self._place.store.read(self._place.address, start, stop)
        except FileNotFoundError as error:
            raise InputError(f"{self._place} was deleted while it was read: put it back") from error
        if len(data) != stop - start:
            raise InputError(
                f"{self._place} has changed while it was read: it gives {len(data):,} of {stop - start:,} B"
            )
        if len(data) <= MOST:
            self._kept.append((start, data))
        return data


def asked(address: str, ask: Callable[[], Result]) -> Result:
    """What a store answers, in several attempts.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such thing.
        InputError: it refuses, or does not answer.
    """
    try:
        return retried(ask)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:  # clients of object stores raise errors of any type
        reason = _QUERY.sub("?…", " ".join(str(error).split()))[:_REASON]
        is_refused = isinstance(error, PermissionError)
        advice = "see that the credentials allow it" if is_refused else "the same command goes on once it can be"
        raise InputError(f"{address} cannot be read: {type(error).__name__}: {reason}; {advice}") from error


def _plain(address: str) -> str:
    """An address under the first of several names of its scheme."""
    scheme, _, path = address.partition("://")
    return f"{_ALIASES.get(scheme, scheme)}://{path}"
