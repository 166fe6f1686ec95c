"""Addresses of images: parsing them, and checking whether they may be read.

What enters: locations from the input, unchecked. What leaves: `Address`es, which can be compared with allowed ones, or
an `ImageError`: a location is malformed, or its host is in a private network.

This module opens no connection; to check a host, it resolves its name.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from qvl_batch.errors import ImageError

#: Schemes of local paths, and schemes of HTTP with their default ports.
LOCAL, HTTP = {"", "file"}, {"http": 80, "https": 443}
#: Characters of a location or an error that a message shows.
SHOWN = 300
#: DNS errors that mean "no such host".
UNKNOWN = {socket.EAI_NONAME, socket.EAI_NODATA}


@dataclass(frozen=True, slots=True)
class Address:
    """Scheme, host (or bucket), port, and the segments of the path, percent-decoded."""

    scheme: str
    host: str
    port: int | None
    segments: tuple[str, ...]

    @classmethod
    def of(cls, location: str) -> "Address":
        """Parse a location; without a scheme, it is a local path, which is not parsed any further.

        Raises:
            ImageError: it is not a valid address.
        """
        if "://" not in location and not location.lower().startswith("file:"):
            return cls("", "", None, ())  # the name of a local file can contain a colon
        try:
            parts = urlsplit(location)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ImageError(f"{short(location)} is not a valid address: {short(str(error))}") from error
        return cls(parts.scheme, host, port, tuple(segment for segment in unquote(parts.path).split("/") if segment))

    @property
    def is_ip(self) -> bool:
        """Whether the host is an IP address, not a name."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True

    @property
    def is_proxied(self) -> bool:
        """Whether requests to this address go through a proxy."""
        host = self.host if self.port is None else f"{self.host}:{self.port}"
        return self.scheme in getproxies() and not proxy_bypass(host)

    def is_in(self, place: "Address") -> bool:
        """Whether the address is `place` or below it; one with a segment `.` or `..` never is."""
        if ".." in self.segments or "." in self.segments:
            return False
        same_host = (self.scheme, self.host, self.port) == (place.scheme, place.host, place.port)
        return same_host and self.segments[: len(place.segments)] == place.segments


def local_path(location: str) -> str:
    """The path of a local location: a `file:` address, or the path itself."""
    return unquote(urlsplit(location).path) if location.lower().startswith("file:") else location


def check_public(address: Address) -> None:
    """Refuse a host in a private network. A name that a proxy resolves is not checked.

    Raises:
        ImageError: the host resolves to an address that is not public, or does not exist.
        OSError: the name cannot be resolved at the moment.
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
        raise ImageError(f"there is no host {address.host}: {error}") from error
    for each in found:
        check_global(address.host, str(each[4][0]))


def check_global(host: str, ip: str) -> None:
    """Refuse an IP address that is not public.

    Args:
        host: the name that resolved to it, for the message.
        ip: the address.

    Raises:
        ImageError: it is not public.
    """
    if not ipaddress.ip_address(ip).is_global:
        raise ImageError(
            f"{host} resolves to the private address {ip}; to permit it, name the host by that address, both in "
            "--allow-images-from and in the input"
        )


def short(text: str) -> str:
    """Cut a text for a message: a location can be as long as an image, if the image is given in its place."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"
