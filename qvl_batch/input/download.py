"""Downloads one image: bounded in size and time, from allowed places and public addresses, with redirects and retries.

What enters: an address that is allowed. What leaves: its bytes, or an `ImageError`. A redirect is followed to where the
input could have named the image itself: each address on the way is checked as the first.
"""

import errno
import random
import re
import socket
import ssl
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as TimeOut
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from urllib.parse import urljoin, urlsplit

import fsspec

from qvl_batch.errors import ImageError, stable_message
from qvl_batch.input.addresses import HTTP, Address, Place, short
from qvl_batch.input.headers import Headers
from qvl_batch.input.request import MAX_BYTES, CutOffError, Reply, Request, send, too_large, whole, within
from qvl_batch.input.servers import LONGEST_WAIT, Slot

#: Seconds of an attempt, with its redirects; of the pauses before the second and the third, on average; and of all.
SECONDS, WAITS, ALL_SECONDS = 30.0, (0.5, 2.0), 180.0
#: Most redirects from the address in the input to the image.
REDIRECTS = 5
#: Statuses below 500 that are worth another attempt, as are all from 500 on.
BUSY = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
#: Errors that another attempt would not change.
FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ssl.SSLCertVerificationError,
)
#: DNS errors that mean "no such host"; and errors of this machine's own network, which say nothing of a server.
UNKNOWN, OWN_NETWORK = {socket.EAI_NONAME, socket.EAI_NODATA}, {errno.ENETUNREACH, errno.ENETDOWN}
#: The query of an address in a message: it can be a signature that gives access.
_QUERY = re.compile(r"\?\S+")


@dataclass(frozen=True, slots=True)
class Rules:
    """What is allowed, and what servers are told.

    Args:
        places: where images may be.
        user_agent: how requests name this program.
        headers: what is sent besides.
    """

    places: tuple[Place, ...]
    user_agent: str
    headers: Headers

    def allow(self, address: Address) -> bool:
        """Whether the host must be public: it need not be where a place names it by its IP address.

        Raises:
            ImageError: the address is in no place. The message is a reason, without the address.
        """
        places = [place for place in self.places if place.holds(address)]
        if not places:
            raise ImageError("is not inside any address of --allow-images-from")
        return not any(place.is_ip for place in places)


class _BusyError(Exception):
    """A server says that it cannot answer now."""


class Download:
    """One image of a web server.

    Args:
        address: of the image.
        rules: what is allowed, and what servers are told.
        slot: a connection to the address's server.
    """

    def __init__(self, address: Address, rules: Rules, slot: Slot) -> None:
        self._first, self._rules, self._slot = address, rules, slot
        #: What was asked for last, and why its server could not be reached, if it could not.
        self._at, self._unreached = address, ""

    def fetch(self) -> bytes:
        """Download the image.

        Raises:
            ImageError: it is not allowed, or did not come.
        """
        try:
            return with_retries(self._attempt, self._error)
        except ImageError:
            if self._unreached:
                self._slot.servers.failed(self._at.server, short(self._unreached))
            raise

    def _attempt(self, number: int, until: float) -> bytes:
        """Ask for the image, and follow redirects.

        Args:
            number: of the attempt, from 0 on.
            until: when the last one must have ended.
        """
        self._at, self._unreached = self._first, ""
        deadline = time.monotonic() + SECONDS
        seen, has_left = {self._at.url}, False
        for _ in range(REDIRECTS + 1):
            try:
                is_public = self._rules.allow(self._at)
                # The time of an attempt is the servers', not what is spent to wait for a turn.
                deadline += self._wait(until, is_first=number == 0)
            except ImageError as error:
                raise self._error(str(error)) from error
            # What is for one server is not for another, wherever that leads.
            headers = {} if has_left else self._rules.headers.of(self._at)
            reply = self._ask(headers, min(deadline, until), is_public=is_public)
            if reply.moved is None:
                return self._data(reply)
            before, self._at = self._at, self._moved(reply.moved)
            has_left |= (before.scheme, before.server) != (self._at.scheme, self._at.server)
            if self._at.url in seen:
                raise self._error("was there before: the redirects lead in a circle")
            seen.add(self._at.url)
        raise self._error(f"is one redirect more than the {REDIRECTS} that are followed")

    def _wait(self, until: float, *, is_first: bool) -> float:
        """Wait until the server may be asked, for a connection and for the end of a pause; the seconds that it took.

        Raises:
            ImageError: it may not be asked in time. The message is a reason, without the address.
        """
        began, server = time.monotonic(), self._at.server
        try:
            self._slot.move(server, until - began)
        except TimeoutError as error:
            late = f"did not arrive within {ALL_SECONDS:g} s: all connections to {server} were in use"
            raise ImageError(late) from error
        pause = self._slot.servers.wait_before(server, is_first=is_first)
        if time.monotonic() + pause > until:
            raise ImageError(f"did not arrive within {ALL_SECONDS:g} s: {server} wants a pause")
        # Not all who wait come at the same moment.
        time.sleep(pause * random.uniform(1.0, 1.05))  # noqa: S311
        return time.monotonic() - began

    def _ask(self, headers: dict[str, str], deadline: float, *, is_public: bool) -> Reply:
        """Send one request, and note whether it reached the server.

        Raises:
            ImageError: there is no such host, or it is not public, or the image is too large.
            OSError: no answer came.
        """
        at = self._at
        request = Request(at.url, headers | {"User-Agent": self._rules.user_agent}, deadline, is_public=is_public)
        try:
            reply = within(deadline - time.monotonic(), partial(send, at, request), request.sockets)
        except ImageError as error:
            raise self._error(str(error)) from error
        except socket.gaierror as error:
            if error.errno not in UNKNOWN:  # the name server's trouble
                raise
            self._unreached = f"there is no host {at.host}: {error}"
            raise self._error(f"cannot be read: {self._unreached}") from error
        except Exception as error:
            is_ours = isinstance(error, OSError) and error.errno in OWN_NETWORK
            if not (is_ours or isinstance(error, CutOffError)):
                self._unreached = _reason(error)
            raise
        self._slot.servers.answered(at.server)
        return reply

    def _data(self, reply: Reply) -> bytes:
        """The image of a reply.

        Raises:
            ImageError: there is none, and there would be none after another attempt.
            _BusyError: there can be one later.
        """
        if reply.status < HTTPStatus.BAD_REQUEST:
            return reply.data
        if reply.status < HTTPStatus.INTERNAL_SERVER_ERROR and reply.status not in BUSY:
            raise self._error(f"cannot be read: {reply.reason}")
        server = self._at.server
        if reply.pause:
            self._slot.servers.pause(server, reply.pause)
        if reply.pause > LONGEST_WAIT:
            longer = f"{server} wants a longer pause than the {LONGEST_WAIT:g} s that an image waits"
            raise self._error(f"cannot be read: {reply.reason}, and {longer}")
        raise _BusyError(reply.reason)

    def _moved(self, location: str) -> Address:
        """Where a redirect leads.

        Raises:
            ImageError: to no address of an image.
        """
        with suppress(UnicodeError):
            location = location.encode("latin-1").decode()  # headers are read as Latin-1, and addresses are often UTF-8
        try:
            joined = urljoin(self._at.url, location.strip())
            scheme = urlsplit(joined).scheme
            to = Address.of(joined)
        except (ImageError, ValueError) as error:
            why = _QUERY.sub("?…", short(str(error)))
            raise self._error(f"redirects to an address that cannot be followed: {why}") from error
        if scheme not in HTTP:
            raise self._error(f"redirects to an address of {short(scheme)}, not of http or https")
        return to

    def _error(self, reason: str) -> ImageError:
        """The error of this image because of the address that was asked for last."""
        name = short(self._first.url)
        if self._at is self._first:
            return ImageError(f"{name} {reason}")
        return ImageError(f"{name} is redirected to {short(self._at.url_without_query)}, which {reason}")


def _read_object(location: str, scheme: str) -> bytes:
    """Read an image of an object store, in one attempt.

    Raises:
        ImageError: it is too large. The message is a reason, without the location.
        Exception: it cannot be read; clients of object stores raise errors of any type.
    """
    with fsspec.filesystem(scheme).open(location, "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise too_large()
        return whole(data, stream.size)


def with_retries(attempt: Callable[[int, float], bytes], error_of: Callable[[str], ImageError]) -> bytes:
    """Call `attempt`, and again after errors that can be temporary: all but `ImageError` and `FINAL`.

    `WAITS` has the pauses before further ones, which vary by half, so that not all come back at the same moment.

    Args:
        attempt: is called with its number, from 0 on, and the time at which it must have ended.
        error_of: the error of the image for a reason.

    Raises:
        ImageError: no attempt succeeded.
    """
    until = time.monotonic() + ALL_SECONDS
    for number, wait in enumerate((*WAITS, None)):
        pause = None if wait is None else wait * random.uniform(0.5, 1.5)  # noqa: S311
        try:
            return attempt(number, until)
        except ImageError:
            raise
        except Exception as error:  # clients of object stores raise errors of any type
            if isinstance(error, FINAL) or pause is None or time.monotonic() + pause > until:
                raise error_of(_reason(error)) from error
        time.sleep(pause)
    raise AssertionError


def _reason(error: Exception) -> str:
    """Why there is no image."""
    if isinstance(error, TimeOut):
        return f"did not arrive within {SECONDS:g} s"
    if isinstance(error, _BusyError):
        return f"cannot be read: {error}, in {len(WAITS) + 1} attempts"
    if isinstance(error, CutOffError):
        return f"cannot be read: {error}"
    return f"cannot be read: {type(error).__name__}: {short(stable_message(error))}"


def download_object(location: str, scheme: str) -> bytes:
    """Read an image of an object store.

    Raises:
        ImageError: it is too large, or no attempt succeeded.
    """

    def error_of(reason: str) -> ImageError:
        return ImageError(f"{short(location)} {reason}")

    def attempt(_: int, until: float) -> bytes:
        try:
            data = within(min(SECONDS, until - time.monotonic()), partial(_read_object, location, scheme))
        except ImageError as error:
            raise error_of(str(error)) from error
        return data

    return with_retries(attempt, error_of)


def unreadable(location: str, error: Exception) -> ImageError:
    """The error of a row whose image does not exist or cannot be read."""
    return ImageError(f"{short(location)} {_reason(error)}")
