"""Images that the input names by path or address, read from where that was allowed and nowhere else.

What enters: locations out of the input, which nobody may have checked. What leaves: their bytes,
or an `ImageError`. A location counts only if it lies in one of the allowed places after links and
`..` are resolved; a redirect is not followed; a name that leads to a private address is refused,
unless the allowed place is that address. Size and time of each image, and images at a time, are bounded.
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

#: Images of one task that are fetched at a time.
AT_ONCE = 8
#: Most characters of a path, as the system has them.
LONGEST_PATH = 4_096
#: How an image itself begins where it stands in place of its path: as a `data:` address; or in base64, as a JPEG, PNG,
#: GIF, WebP, TIFF, AVIF or JPEG 2000, or as anything that is longer than paths are.
DATA = re.compile(r"data:\w+/[\w.+-]+[;,]", re.IGNORECASE)
BASE64 = re.compile(r"((?=/9j/|iVBORw|R0lGOD|UklGR|SUkqA|TU0AK|AAAA)[\w+/\s-]{64,}|[\w+/\s-]{2000,})=*", re.ASCII)


class Fetcher:
    """Reads images from the allowed places.

    Args:
        allowed: local folders, and addresses up to a `/`: `s3://bucket/images`, `https://host/images`.

    Raises:
        ConfigError: a place is neither, or what reads it is not installed.
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
            locations: paths, those that are relative from `folder` on, or addresses.
            folder: where the file is that names them.
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
            ImageError: it is not allowed, not there, too large, or did not come in time.
        """
        if not location.strip():
            raise ImageError("the path of the image is empty")
        try:
            return self._fetch(location, folder)
        except ImageError as error:
            if (known := _image_as_text(location)) is None:
                raise
            raise ImageError(f"the path is no path but {known}") from error

    def _fetch(self, location: str, folder: Path) -> bytes:
        address = Address.of(location)
        if address.scheme in LOCAL:
            return self._read(location, folder)
        place = next((place for place in self._addresses if address.is_in(place)), None)
        if place is None:
            raise ImageError(f"{short(location)} is in no place of --allow-images-from")
        return with_retries(location, lambda: download(location, address, is_public=not place.is_ip))

    def _read(self, location: str, folder: Path) -> bytes:
        name = short(location)
        if len(location) > LONGEST_PATH:
            raise ImageError(f"{name} is too long for a path")
        try:
            path = (folder / local_path(location)).resolve()
            if not any(path.is_relative_to(allowed) for allowed in self._folders):
                raise ImageError(f"{name} is in no folder of --allow-images-from")
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ImageError(f"{name} is no file")
            if found.st_size > MAX_BYTES:
                raise ImageError(f"{name} has {found.st_size:,} bytes; the most is {MAX_BYTES:,}")
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError) as error:  # not there; a null byte; a loop of links
            raise unreadable(location, error) from error


def _image_as_text(location: str) -> str | None:
    """What a location is that seems to be the image itself, and how bytes are made of it; it is not repeated."""
    size = f"of {len(location):,} characters: write a column of bytes, which"
    if DATA.match(location):
        return f"a data: address {size} urllib.request.urlopen(text).read() makes of it in Python"
    if BASE64.fullmatch(location.strip()):
        decode = "urlsafe_b64decode" if "-" in location or "_" in location else "b64decode"
        return f"base64 {size} base64.{decode}(text) makes of it in Python"
    return None
