"""Images that the input names by path or address, read from where that was allowed and nowhere else.

What enters: locations out of the input, which nobody may have checked. What leaves: their bytes,
or an `ImageError`. A location counts only if it lies in one of the allowed places after links and
`..` are resolved; a redirect is not followed; a name that leads to a private address is refused,
unless the allowed place is that address. Size and time of each image, and images at a time, are bounded.
"""

import ipaddress
import re
import socket
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimeOut
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import (
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    Request,
    build_opener,
    getproxies,
    proxy_bypass,
)

import fsspec

from qvl_batch.errors import ConfigError, ImageError, stable_message

#: Largest file of an image.
MAX_BYTES = 1 << 28
#: Most bytes that are taken from a server at a time.
PIECE = 1 << 16
#: Images of one task that are fetched at a time.
AT_ONCE = 8
#: Longest that fetching an image may take, and the waits before each further attempt.
SECONDS, WAITS = 30.0, (0.5, 2.0)
LOCAL, HTTP, STORES = {"", "file"}, {"http": 80, "https": 443}, {"s3", "gs"}
#: Most characters of a path, as the system has them, and of a location or an error in a message.
LONGEST_PATH, SHOWN = 4_096, 300
#: Characters of an address that mean something, or may; others are sent quoted, as browsers do.
_AS_IT_IS = "%/:=&?~#+!$,;'@()*[]"
#: Answers of a server that may be another the next time, as those from 500 on.
BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
#: A name that nobody has, as looking it up says.
UNKNOWN = {socket.EAI_NONAME, socket.EAI_NODATA}
#: How an image itself begins where it stands in place of its path: as a `data:` address; or in base64, as a JPEG, PNG,
#: GIF, WebP, TIFF, AVIF or JPEG 2000, or as anything that is longer than paths are.
DATA = re.compile(r"data:\w+/[\w.+-]+[;,]", re.IGNORECASE)
BASE64 = re.compile(r"((?=/9j/|iVBORw|R0lGOD|UklGR|SUkqA|TU0AK|AAAA)[\w+/\s-]{64,}|[\w+/\s-]{2000,})=*", re.ASCII)
#: What will be no different the next time.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Fetcher:
    """Reads images from the allowed places.

    Args:
        allowed: local folders, and addresses up to a `/`: `s3://bucket/images`, `https://host/images`.

    Raises:
        ConfigError: a place is neither, or what reads it is not installed.
    """

    def __init__(self, allowed: Sequence[str]) -> None:
        self._folders: list[Path] = []
        self._addresses: list[_Address] = []
        for place in allowed:
            if not place.strip():
                raise ConfigError("--allow-images-from must not be empty")
            try:
                address = _Address.of(place)
            except ImageError as error:
                raise ConfigError(f"--allow-images-from {error}") from error
            if address.scheme in LOCAL:
                self._folders.append(Path(_local(place)).resolve())
                if not self._folders[-1].is_dir():
                    raise ConfigError(f"--allow-images-from {place}: there is no such folder")
            elif address.scheme in STORES.union(HTTP):
                self._addresses.append(address)
                try:
                    if address.scheme in STORES:
                        fsspec.get_filesystem_class(address.scheme)
                except ImportError as error:
                    raise ConfigError(f"--allow-images-from {place}: {error}") from error
            else:
                schemes = ", ".join(sorted(STORES.union(HTTP)))
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
        address = _Address.of(location)
        if address.scheme in LOCAL:
            return self._read(location, folder)
        place = next((place for place in self._addresses if address.is_in(place)), None)
        if place is None:
            raise ImageError(f"{_short(location)} is in no place of --allow-images-from")
        return _patiently(location, lambda: _download(location, address, is_public=not place.is_ip))

    def _read(self, location: str, folder: Path) -> bytes:
        name = _short(location)
        if len(location) > LONGEST_PATH:
            raise ImageError(f"{name} is too long for a path")
        try:
            path = (folder / _local(location)).resolve()
            if not any(path.is_relative_to(allowed) for allowed in self._folders):
                raise ImageError(f"{name} is in no folder of --allow-images-from")
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ImageError(f"{name} is no file")
            if found.st_size > MAX_BYTES:
                raise ImageError(f"{name} has {found.st_size:,} bytes; the most is {MAX_BYTES:,}")
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError) as error:  # not there; a null byte; a loop of links
            raise _unreadable(location, error) from error


@dataclass(frozen=True, slots=True)
class _Address:
    """Scheme, host (or bucket) and steps of a path, as they are after decoding."""

    scheme: str
    host: str
    port: int | None
    steps: tuple[str, ...]

    @classmethod
    def of(cls, location: str) -> "_Address":
        if "://" not in location and not location.lower().startswith("file:"):
            return cls("", "", None, ())  # a name may have a colon in it
        try:
            parts = urlsplit(location)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ImageError(f"{_short(location)} is no address: {_short(str(error))}") from error
        return cls(parts.scheme, host, port, tuple(step for step in unquote(parts.path).split("/") if step))

    @property
    def is_ip(self) -> bool:
        """Whether the host is an address, not a name."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    @property
    def is_proxied(self) -> bool:
        """Whether a proxy is asked for it."""
        host = self.host if self.port is None else f"{self.host}:{self.port}"
        return self.scheme in getproxies() and not proxy_bypass(host)

    def is_in(self, place: "_Address") -> bool:
        """Whether the address lies in a place; one with `..` in it lies nowhere."""
        if ".." in self.steps or "." in self.steps:
            return False
        same = (self.scheme, self.host, self.port) == (place.scheme, place.host, place.port)
        return same and self.steps[: len(place.steps)] == place.steps


def _local(location: str) -> str:
    """A path, or that of a `file:` address."""
    return unquote(urlsplit(location).path) if location.lower().startswith("file:") else location


def _check_public(address: _Address) -> None:
    """Refuse a host that leads into a private network. A proxy looks names up by itself.

    Raises:
        ImageError: it does, or there is no such name.
        OSError: that cannot be said now.
    """
    flags = socket.AI_NUMERICHOST if address.is_proxied else 0
    try:
        found = socket.getaddrinfo(
            address.host, address.port or HTTP[address.scheme], type=socket.SOCK_STREAM, flags=flags
        )
    except (socket.gaierror, UnicodeError) as error:
        if address.is_proxied:
            return
        if isinstance(error, socket.gaierror) and error.errno not in UNKNOWN:
            raise
        raise ImageError(f"{address.host} is not known: {error}") from error
    for each in found:
        _check_global(address.host, str(each[4][0]))


def _check_global(host: str, ip: str) -> None:
    if not ipaddress.ip_address(ip).is_global:
        raise ImageError(
            f"{host} leads to {ip}, which is in a private network: of those, --allow-images-from takes hosts by number "
            "alone, in place of their names"
        )


def _download(location: str, address: _Address, *, is_public: bool) -> bytes:
    """Read an image to its end.

    Raises:
        ImageError: it is not allowed, or too large.
        OSError: it did not come, or not whole.
    """
    deadline = time.monotonic() + SECONDS
    if address.scheme in HTTP:
        if is_public:
            _check_public(address)
        opened = _open_http(location, is_public=is_public and not address.is_proxied)  # a proxy may be private
    else:
        opened = fsspec.filesystem(address.scheme).open(location, "rb")
    with opened as stream:
        if address.scheme in HTTP:
            size, data = stream.length, _read_until(deadline, stream)
        else:
            size, data = stream.size, stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{_short(location)} has more than {MAX_BYTES:,} bytes, the most that is read")
    if size is not None and len(data) < size:
        raise OSError(f"it was cut off after {len(data):,} of {size:,} bytes")
    return data


def _read_until(deadline: float, stream: HTTPResponse) -> bytes:
    """What a server sends. Nobody would wait any longer for the rest, and nothing ends a thread that does.

    Raises:
        TimeoutError: it went on for too long.
    """
    data = bytearray()
    while len(data) <= MAX_BYTES and (piece := stream.read1(PIECE)):
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(data)


class _NoRedirects(HTTPRedirectHandler):
    """A redirect is an answer like any other that is not the image."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Public(HTTPConnection):
    """Leads where a name leads now, which may not be where it led when it was checked."""

    def connect(self) -> None:
        super().connect()
        try:
            _check_global(self.host, self.sock.getpeername()[0])
        except ImageError:
            self.close()
            raise


class _PublicTls(_Public, HTTPSConnection):
    """The same over TLS."""


class _PublicHandler(HTTPHandler):
    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_Public, request)


class _PublicTlsHandler(HTTPSHandler):
    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_PublicTls, request)


def _open_http(location: str, *, is_public: bool) -> Any:
    handlers = (_PublicHandler, _PublicTlsHandler) if is_public else ()
    try:
        # Scheme and host are checked.
        return build_opener(_NoRedirects, *handlers).open(quote(location, safe=_AS_IT_IS), timeout=SECONDS)
    except HTTPError as error:
        if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in BUSY:
            where = f", to {error.headers['Location']}; redirects are not followed" if error.headers["Location"] else ""
            raise ImageError(
                f"{_short(location)} cannot be read: {error.code} {error.reason}{_short(where)}"
            ) from error
        raise


def _patiently(location: str, work: Callable[[], bytes]) -> bytes:
    """Try again what may pass: anything but an answer that there is no such image."""
    waits = iter(WAITS)
    while True:
        pool = ThreadPoolExecutor(1, "qvl-download")
        try:
            return pool.submit(work).result(SECONDS)
        except ImageError:
            raise
        except FINAL as error:
            raise _unreadable(location, error) from error
        except TimeOut as error:
            failure = ImageError(f"{_short(location)} did not come within {SECONDS:g} s")
            failure.__cause__ = error
        except Exception as error:  # clients raise whatever they do
            failure = _unreadable(location, error)
            failure.__cause__ = error
        finally:
            pool.shutdown(wait=False)
        wait = next(waits, None)
        if wait is None:
            raise failure
        time.sleep(wait)


def _unreadable(location: str, error: BaseException) -> ImageError:
    return ImageError(f"{_short(location)} cannot be read: {type(error).__name__}: {_short(stable_message(error))}")


def _image_as_text(location: str) -> str | None:
    """What a location is that seems to be the image itself, and how bytes are made of it; it is not repeated."""
    size = f"of {len(location):,} characters: write a column of bytes, which"
    if DATA.match(location):
        return f"a data: address {size} urllib.request.urlopen(text).read() makes of it in Python"
    if BASE64.fullmatch(location.strip()):
        decode = "urlsafe_b64decode" if "-" in location or "_" in location else "b64decode"
        return f"base64 {size} base64.{decode}(text) makes of it in Python"
    return None


def _short(text: str) -> str:
    """A text for a message: an image may stand in the place of its address."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"
