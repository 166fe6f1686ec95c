"""One request for an image: sent, and its reply read, bounded in size and time.

What enters: an `Address` that is allowed, and headers. What leaves: a `Reply`, or an error. Redirects are not followed
here. If the host must be public, its IP address is checked before and after connecting, since a name can resolve
differently the second time (DNS rebinding).
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimeOut
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import (
    BaseHandler,
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
)
from urllib.request import Request as UrllibRequest

from qvl_batch.errors import ImageError
from qvl_batch.input.addresses import Address, check_global, check_public

#: Bytes of the largest image file that is read.
MAX_BYTES = 1 << 28
#: Most bytes of one read from a connection.
PIECE = 1 << 16
#: Images above these bytes, and how many of them this process downloads at a time: all at once would not fit in memory.
LARGE, LARGE_AT_ONCE = 1 << 24, threading.BoundedSemaphore(8)
#: Timeout of connecting in seconds.
CONNECT_SECONDS = 10.0
#: Statuses of redirects.
MOVED = frozenset({301, 302, 303, 307, 308})
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server says.

    Args:
        status: of HTTP.
        data: the image.
        moved: where a redirect leads.
        pause: seconds for which the server wants not to be asked.
    """

    status: int
    data: bytes = b""
    moved: str | None = None
    pause: float = 0.0

    @property
    def reason(self) -> str:
        """The status in words: ours, since the server's can be anything."""
        with suppress(ValueError):
            return f"{self.status} {HTTPStatus(self.status).phrase}"
        return str(self.status)


class Request(UrllibRequest):
    """A request.

    Args:
        url: the address.
        headers: to send.
        deadline: when the reply must be there.
        is_public: whether the host must have a public IP address.
    """

    def __init__(self, url: str, headers: dict[str, str], deadline: float, *, is_public: bool) -> None:
        super().__init__(url, headers=headers)
        self.deadline, self.is_public = deadline, is_public
        #: The connection, once there is one: another thread can end it.
        self.sockets: list[socket.socket] = []

    @property
    def left(self) -> float:
        """Seconds until the deadline, as a timeout: not 0, which would mean not to wait at all."""
        return max(0.001, self.deadline - time.monotonic())


class CutOffError(OSError):
    """The server was reached, and an image did not come to its end."""


def send(address: Address, request: Request) -> Reply:
    """Send a request, and read the reply.

    Raises:
        ImageError: the host is not public, or the image is too large.
        OSError: there was no reply, or not all of it.
    """
    if request.is_public:
        check_public(address)
    # A proxy's own address can be private.
    request.is_public = request.is_public and not address.is_proxied
    try:
        with _opener().open(request, timeout=min(CONNECT_SECONDS, request.left)) as stream:
            return Reply(stream.status, _read_until(request.deadline, stream))
    except HTTPError as error:
        with error:
            pause = _pause(error.headers.get("Retry-After"))
            moved = error.headers.get("Location") if error.code in MOVED else None
            if error.code < HTTPStatus.BAD_REQUEST and not moved:
                raise ImageError(f"cannot be read: {Reply(error.code).reason}") from error
            return Reply(error.code, moved=moved, pause=pause)
    except URLError as error:
        raise (error.reason if isinstance(error.reason, Exception) else error) from error


def _opener() -> OpenerDirector:
    """Sends requests, by a proxy if there is one. It knows no schemes but HTTP's, and follows no redirects."""
    opener = OpenerDirector()
    web: tuple[BaseHandler, ...] = (ProxyHandler(), _Handler(), _TlsHandler(context=_tls()))
    for handler in (*web, HTTPDefaultErrorHandler(), HTTPErrorProcessor()):
        opener.add_handler(handler)
    return opener


@cache
def _tls() -> ssl.SSLContext:
    """Certificates that are trusted; reading them takes longer than a handshake."""
    return ssl.create_default_context()


def _pause(value: str | None) -> float:
    """Seconds of a header `Retry-After`: a number, or the difference to a date. 0 without one, or if it is neither."""
    if value is None:
        return 0.0
    with suppress(ValueError, OverflowError):
        if value.strip().isdecimal():
            return float(value)
        date = parsedate_to_datetime(value)
        return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
    return 0.0


def _read_until(deadline: float, stream: HTTPResponse) -> bytes:
    """Read a response to its end.

    Raises:
        ImageError: it is too large.
        OSError: it had not ended by the deadline, or was cut off.
    """
    data, size = bytearray(), stream.length
    with ExitStack() as held:
        while piece := stream.read1(PIECE):
            is_large = len(data) > LARGE
            data += piece
            if len(data) > MAX_BYTES:
                raise too_large()
            if not is_large and len(data) > LARGE:
                if not LARGE_AT_ONCE.acquire(timeout=max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                held.callback(LARGE_AT_ONCE.release)
            if time.monotonic() > deadline:
                raise TimeoutError
        return whole(bytes(data), size)


def too_large() -> ImageError:
    """The error of an image that is too large."""
    return ImageError(f"has more than {MAX_BYTES:,} bytes, the limit")


def whole(data: bytes, size: int | None) -> bytes:
    """The data.

    Raises:
        CutOffError: it is less than this size, if that is known.
    """
    if size is not None and len(data) < size:
        raise CutOffError(f"the download was cut off after {len(data):,} of {size:,} bytes")
    return data


class _Connection(HTTPConnection):
    """Refuses a private IP address once connected: the name can resolve differently than when it was checked."""

    request_of: Request

    def connect(self) -> None:
        try:
            super().connect()
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {CONNECT_SECONDS:g} s") from error
        try:
            if self.request_of.is_public:
                check_global(self.host, self.sock.getpeername()[0])
        except ImageError:
            self.close()
            raise
        self.sock.settimeout(self.request_of.left)
        self.request_of.sockets.append(self.sock)


class _TlsConnection(_Connection, HTTPSConnection):
    """The same over TLS."""


def _connection_of(kind: type[_Connection], request: Request) -> Callable[..., _Connection]:
    def make(*args: Any, **options: Any) -> _Connection:
        connection = kind(*args, **options)
        connection.request_of = request
        return connection

    return make


class _Handler(HTTPHandler):
    def http_open(self, request: UrllibRequest) -> HTTPResponse:
        assert isinstance(request, Request)
        return self.do_open(_connection_of(_Connection, request), request)


class _TlsHandler(HTTPSHandler):
    def https_open(self, request: UrllibRequest) -> HTTPResponse:
        assert isinstance(request, Request)
        return self.do_open(_connection_of(_TlsConnection, request), request, context=_tls())


def within(seconds: float, work: Callable[[], Result], sockets: Sequence[socket.socket] = ()) -> Result:
    """Call `work` in a thread, and wait for it no longer than so many seconds.

    Args:
        seconds: to wait.
        work: to do. Nothing can end its thread, but it ends by itself when its connection does.
        sockets: of the work; they are ended if it takes longer.

    Raises:
        TimeoutError: it took longer.
    """
    pool = ThreadPoolExecutor(1, "qvl-download")
    try:
        return pool.submit(work).result(max(seconds, 0.0))
    except TimeOut:
        for each in list(sockets):
            with suppress(OSError):
                # Not the method of TLS, which another thread is using.
                socket.socket.shutdown(each, socket.SHUT_RDWR)
        raise
    finally:
        pool.shutdown(wait=False)
