"""One image over the network: bounded in size and time, from public addresses, with retries.

What enters: an address that is allowed. What leaves: its bytes, or an `ImageError`. A redirect is not followed, and a
name that leads to a private address is refused where it is connected to, whatever it led to when it was checked.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimeOut
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

import fsspec

from qvl_batch.errors import ImageError, stable_message
from qvl_batch.input.addresses import HTTP, Address, check_global, check_public, short

#: Largest file of an image.
MAX_BYTES = 1 << 28
#: Most bytes that are taken from a server at a time.
PIECE = 1 << 16
#: Longest that fetching an image may take, and the waits before each further attempt.
SECONDS, WAITS = 30.0, (0.5, 2.0)
#: Characters of an address that mean something, or may; others are sent quoted, as browsers do.
_AS_IT_IS = "%/:=&?~#+!$,;'@()*[]"
#: Answers of a server that may be another the next time, as those from 500 on.
BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
#: What will be no different the next time.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def download(location: str, address: Address, *, is_public: bool) -> bytes:
    """Read an image to its end.

    Raises:
        ImageError: it is not allowed, or too large.
        OSError: it did not come, or not whole.
    """
    deadline = time.monotonic() + SECONDS
    if address.scheme in HTTP:
        if is_public:
            check_public(address)
        opened = _open_http(location, is_public=is_public and not address.is_proxied)  # a proxy may be private
    else:
        opened = fsspec.filesystem(address.scheme).open(location, "rb")
    with opened as stream:
        if address.scheme in HTTP:
            size, data = stream.length, _read_until(deadline, stream)
        else:
            size, data = stream.size, stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{short(location)} has more than {MAX_BYTES:,} bytes, the most that is read")
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
            check_global(self.host, self.sock.getpeername()[0])
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
            raise ImageError(f"{short(location)} cannot be read: {error.code} {error.reason}{short(where)}") from error
        raise


def with_retries(location: str, work: Callable[[], bytes]) -> bytes:
    """Try again after errors that may be temporary: all but an answer that there is no such image.

    Raises:
        ImageError: no attempt succeeded, each within `SECONDS`.
    """
    waits = iter(WAITS)
    while True:
        pool = ThreadPoolExecutor(1, "qvl-download")
        try:
            return pool.submit(work).result(SECONDS)
        except ImageError:
            raise
        except FINAL as error:
            raise unreadable(location, error) from error
        except TimeOut as error:
            failure = ImageError(f"{short(location)} did not come within {SECONDS:g} s")
            failure.__cause__ = error
        except Exception as error:  # clients raise whatever they do
            failure = unreadable(location, error)
            failure.__cause__ = error
        finally:
            pool.shutdown(wait=False)
        wait = next(waits, None)
        if wait is None:
            raise failure
        time.sleep(wait)


def unreadable(location: str, error: BaseException) -> ImageError:
    """The error of a row whose image is not there or cannot be read."""
    return ImageError(f"{short(location)} cannot be read: {type(error).__name__}: {short(stable_message(error))}")
