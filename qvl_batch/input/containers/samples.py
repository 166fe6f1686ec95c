"""The samples of a tar file: headers of members are read, and gathered by their names.

What enters: an open file. What leaves: samples, each with the places of its members' bytes; nothing is unpacked.
Members with a part that begins with a dot or an underscore are left out, as macOS adds them, and so are folders.

What a header says is not trusted. A tar that is cut off within a member ends with a sample that cannot be read; one
that is damaged between two members ends with a sample without a key that says so.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from qvl_batch.errors import RecordError
from qvl_batch.input.endings import is_image

#: Most bytes that a header may take for a long name.
MOST_HEADER = 1 << 20


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a sample: where its bytes are, and why they cannot be read, if they cannot."""

    offset: int
    size: int
    problem: str | None


@dataclass(slots=True)
class Sample:
    """A sample: the byte at which it begins, its key, members by extension, and why it cannot be read."""

    offset: int
    key: str | None
    members: dict[str, Member] = field(default_factory=dict)
    error: RecordError | None = None

    def add(self, extension: str | None, header: tarfile.TarInfo, size: int) -> None:
        """Take in a member of a file of so many bytes."""
        if extension is None:
            self.error = RecordError("its name has no extension")
            return
        if extension in self.members:
            self.error = RecordError(f"it has two members .{extension}")
        if header.isreg() and header.offset_data + header.size > size:
            self.error = RecordError(f"the tar is cut off in its .{extension}; further samples are lost")
        self.members[extension] = Member(header.offset_data, header.size, _problem(header))

    @property
    def images(self) -> list[str]:
        """Extensions of its images."""
        return [extension for extension in self.members if shows(extension)]


def shows(extension: str) -> bool:
    """Whether an extension is that of an image."""
    return is_image(f".{extension}")


def samples(file: BinaryIO, start: int, tell: Callable[[bytes], None] = lambda _: None) -> Iterator[Sample]:
    """The samples from a byte on.

    Args:
        file: the open tar.
        start: where a sample begins.
        tell: is told what each header says.

    Raises:
        TarError: there is no header at the start.
    """
    size, sample = file.seek(0, 2), None
    for member in _members(file, start):
        if isinstance(member, RecordError):
            if sample is not None:
                yield sample
            sample = Sample(size, None, {}, member)
            break
        tell(repr((member.name, member.size, member.mtime, member.type, member.linkname)).encode(errors="replace"))
        parts = member.name.removeprefix("./").split("/")
        if member.isdir() or any(part.startswith((".", "_")) and part not in (".", "..") for part in parts):
            continue
        stem, dot, extension = parts[-1].partition(".")
        key = "/".join([*parts[:-1], stem]).encode(errors="surrogateescape").decode(errors="backslashreplace")
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(member.offset, key)
        sample.add(extension.lower() if dot else None, member, size)
    if sample is not None:
        yield sample


def _problem(member: tarfile.TarInfo) -> str | None:
    """Why the bytes of a member are not where others have them."""
    if member.islnk() or member.issym():
        return "is a link: pack the file itself in its place"
    if member.issparse():
        return "is packed as a sparse file: pack it whole"
    return None if member.isreg() else "is no regular file"


def _members(file: BinaryIO, start: int) -> "Iterator[tarfile.TarInfo | RecordError]":
    """Headers of members from a byte on; at the end what is wrong, if the tar is damaged there.

    Raises:
        TarError: the first header is none.
    """
    file.seek(start)
    headers = cast("BinaryIO", _Headers(file))
    with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        size, before = file.seek(0, 2), -1
        while tar.offset <= size or before < 0:  # else the last member is cut off, and its sample says so
            try:
                member = tar.next()
                if member is None:
                    file.seek(tar.offset)
                    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                        raise tarfile.ReadError("there is no header")
                    return
                if tar.offset <= before:
                    raise tarfile.ReadError("the size of a member is negative")
            except (tarfile.TarError, ValueError) as error:
                yield RecordError(f"the tar is damaged at byte {tar.offset:,}, and what follows is lost: {error}")
                return
            before = tar.offset
            vars(tar)["members"] = []  # else it keeps all of them
            yield member


class _Headers:
    """A file of which only as much is read at a time as a header needs: one could claim any length for a name."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Read bytes.

        Raises:
            ReadError: these are too many for a header.
        """
        if not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)
