"""Reads images that the input names by path or address, from the allowed places only.

What enters: locations from the input, unchecked. What leaves: their bytes, or an `ImageError`. A location must be
inside one of the allowed places after links and `..` are resolved. Redirects are not followed. A host name that
resolves to a private address is refused; such a host must be given by its IP address, in the allowed place and in the
location. Size and time of each image, and the number of concurrent downloads, are bounded.
"""

import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

from qvl_batch.config import OBJECT_STORES
from qvl_batch.errors import ConfigError, ImageError
from qvl_batch.input.addresses import HTTP, LOCAL, Address, local_path, short
from qvl_batch.input.download import MAX_BYTES, download, unreadable, with_retries

#: Images that one task fetches at a time.
AT_ONCE = 8
#: Characters of the longest path: Linux's `PATH_MAX`.
LONGEST_PATH = 4_096
#: Recognises an image that is given as text in place of its path: base64 that begins like a JPEG, PNG, GIF, WebP, TIFF,
#: AVIF or JPEG 2000, or that is longer than paths usually are.
BASE64 = re.compile(r"((?=/9j/|iVBORw|R0lGOD|UklGR|SUkqA|TU0AK|AAAA)[\w+/\s-]{64,}|[\w+/\s-]{2000,})=*", re.ASCII)


class Fetcher:
    """Reads images from the allowed places.

    Args:
        allowed: local folders, and addresses of folders: `s3://bucket/images`, `https://host/images`.

    Raises:
        ConfigError: a place is neither, or the client for it is not installed.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._folders: list[Path] = []
        self._addresses: list[Address] = []
        for place in allowed:
            if not place.strip():
                raise ConfigError("--allow-images-from must not be empty")
            try:
                address = Address.of(place)
            except ImageError as error:
                raise ConfigError(f"--allow-images-from {error}") from error
            if address.scheme in LOCAL:
                self._folders.append(Path(local_path(place)).resolve())
                if not self._folders[-1].is_dir():
                    raise ConfigError(f"--allow-images-from {place}: there is no such folder")
            elif address.scheme in OBJECT_STORES.union(HTTP):
                self._addresses.append(address)
                try:
                    if address.scheme in OBJECT_STORES:
                        fsspec.get_filesystem_class(address.scheme)
                except ImportError as error:
                    raise ConfigError(f"--allow-images-from {place}: {error}") from error
            else:
                schemes = ", ".join(sorted(OBJECT_STORES.union(HTTP)))
                raise ConfigError(f"--allow-images-from {place}: give a folder, or an address of {schemes}")

    def fetch_all(self, locations: Sequence[str], folder: Path) -> list[bytes | ImageError]:
        """Fetch images, several at a time.

        Args:
            locations: paths or addresses.
            folder: folder of the file that names them, to which relative paths refer.

        Returns:
            For each location, the image's bytes or the error of its row.
        """
        if not locations:
            return []
        with ThreadPoolExecutor(min(AT_ONCE, len(locations)), "qvl-fetch") as pool:
            return list(pool.map(lambda location: self._result(location, folder), locations))

    def _result(self, location: str, folder: Path) -> bytes | ImageError:
        try:
            return self.fetch(location, folder)
        except ImageError as error:
            return error

    def fetch(self, location: str, folder: Path) -> bytes:
        """Fetch an image.

        Raises:
            ImageError: it is not allowed, does not exist, is too large, or did not arrive in time.
        """
        if not location.strip():
            raise ImageError("the path of the image is empty")
        try:
            location.encode()
        except UnicodeError as error:  # a message that repeats it could not be written
            raise ImageError(f"the path of the image is not valid Unicode: {error}") from error
        try:
            return self._fetch(location, folder)
        except ImageError as error:
            if (advice := _image_as_text(location)) is None:
                raise
            raise ImageError(f"the path is {advice}") from error

    def _fetch(self, location: str, folder: Path) -> bytes:
        address = Address.of(location)
        if address.scheme in LOCAL:
            return self._read(location, folder)
        place = next((place for place in self._addresses if address.is_in(place)), None)
        if place is None:
            raise ImageError(f"{short(location)} is not inside any address of --allow-images-from")
        return with_retries(location, lambda: download(location, address, is_public=not place.is_ip))

    def _read(self, location: str, folder: Path) -> bytes:
        name = short(location)
        if len(location) > LONGEST_PATH:
            raise ImageError(f"{name} is too long for a path")
        try:
            path = (folder / local_path(location)).resolve()
            if not any(path.is_relative_to(allowed) for allowed in self._folders):
                raise ImageError(f"{name} is not inside any folder of --allow-images-from")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{name} is not a regular file")
            if status.st_size > MAX_BYTES:
                raise ImageError(f"{name} has {status.st_size:,} bytes; the limit is {MAX_BYTES:,}")
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError) as error:  # it does not exist; a null byte; a loop of links
            raise unreadable(location, error) from error


def _image_as_text(location: str) -> str | None:
    """For a location that seems to be the image itself: what it is, and how to decode it. Does not repeat its text."""
    if not BASE64.fullmatch(location.strip()):
        return None
    decode = "urlsafe_b64decode" if "-" in location or "_" in location else "b64decode"
    return (
        f"base64 of {len(location):,} characters: write the image as a column of bytes instead, in Python with "
        f"base64.{decode}(text)"
    )
