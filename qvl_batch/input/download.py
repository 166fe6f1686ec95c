"""Downloads one image: bounded in size and time, from public addresses, with retries.

What enters: an address that is allowed. What leaves: its bytes, or an `ImageError`. Redirects are not followed. The IP
address is checked again once connected, since a name can resolve differently after the first check (DNS rebinding).
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

#: Bytes of the largest image file that is read.
MAX_BYTES = 1 << 28
#: Most bytes of one read from a connection.
PIECE = 1 << 16
#: Timeout of an attempt, and the pauses before the second and the third; in seconds.
SECONDS, WAITS = 30.0, (0.5, 2.0)
#: Characters of an address that are sent as they are, since they can be syntax; others are percent-encoded, as browsers
#: do.
_SAFE = "%/:=&?~#+!$,;'@()*[]"
#: Statuses below 500 that are worth another attempt, as are all from 500 on.
BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
#: Errors that another attempt would not change.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def download(location: str, address: Address, *, is_public: bool) -> bytes:
    """Download an image, in one attempt.

    Args:
        location: the address as the input spells it.
        address: the same, parsed.
        is_public: whether the host must have a public IP address.

    Raises:
        ImageError: the host is not public or does not exist, the server refuses, or the image is too large.
        OSError: the download failed or was cut off; another attempt can succeed.
    """
    deadline = time.monotonic() + SECONDS
    if address.scheme in HTTP:
        if is_public:
            check_public(address)
        # A proxy's own address can be private.
        opened = _open_http(location, is_public=is_public and not address.is_proxied)
    else:
        opened = fsspec.filesystem(address.scheme).open(location, "rb")
    with opened as stream:
        if address.scheme in HTTP:
            size, data = stream.length, _read_until(deadline, stream)
        else:
            size, data = stream.size, stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"{short(location)} has more than {MAX_BYTES:,} bytes, the limit")
    if size is not None and len(data) < size:
        raise OSError(f"the download was cut off after {len(data):,} of {size:,} bytes")
    return data


def _read_until(deadline: float, stream: HTTPResponse) -> bytes:
    """Read a response to its end.

    The deadline is checked here too: `with_retries` stops waiting for its thread then, but cannot end it.

    Raises:
        TimeoutError: the response had not ended by the deadline.
    """
    data = bytearray()
    while len(data) <= MAX_BYTES and (piece := stream.read1(PIECE)):
        data += piece
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(data)


class _NoRedirects(HTTPRedirectHandler):
    """Returns a redirect as the response, without following it."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _PublicConnection(HTTPConnection):
    """Refuses a private IP address once connected: the name can resolve differently than when it was checked."""

    def connect(self) -> None:
        super().connect()
        try:
            check_global(self.host, self.sock.getpeername()[0])
        except ImageError:
            self.close()
            raise


class _PublicTlsConnection(_PublicConnection, HTTPSConnection):
    """The same over TLS."""


class _PublicHandler(HTTPHandler):
    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_PublicConnection, request)


class _PublicTlsHandler(HTTPSHandler):
    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_PublicTlsConnection, request)


def _open_http(location: str, *, is_public: bool) -> Any:
    """Send a request for an address whose scheme and host have been checked.

    Raises:
        ImageError: the server answers with a status that another attempt would not change.
        OSError: the connection failed, or the server answers with a status that can change.
    """
    handlers = (_PublicHandler, _PublicTlsHandler) if is_public else ()
    try:
        return build_opener(_NoRedirects, *handlers).open(quote(location, safe=_SAFE), timeout=SECONDS)
    except HTTPError as error:
        if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in BUSY:
            where = f", to {error.headers['Location']}; redirects are not followed" if error.headers["Location"] else ""
            raise ImageError(f"{short(location)} cannot be read: {error.code} {error.reason}{short(where)}") from error
        raise


def with_retries(location: str, work: Callable[[], bytes]) -> bytes:
    """Call `work`, and again after errors that can be temporary: all but `ImageError` and `FINAL`.

    Each attempt has a timeout of `SECONDS`; `WAITS` has the pauses before further ones.

    Raises:
        ImageError: no attempt succeeded.
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
            failure = ImageError(f"{short(location)} did not arrive within {SECONDS:g} s")
            failure.__cause__ = error
        except Exception as error:  # clients of object stores raise errors of any type
            failure = unreadable(location, error)
            failure.__cause__ = error
        finally:
            pool.shutdown(wait=False)
        wait = next(waits, None)
        if wait is None:
            raise failure
        time.sleep(wait)


def unreadable(location: str, error: BaseException) -> ImageError:
    """The error of a row whose image does not exist or cannot be read."""
    return ImageError(f"{short(location)} cannot be read: {type(error).__name__}: {short(stable_message(error))}")
