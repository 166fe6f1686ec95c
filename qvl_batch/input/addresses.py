"""Addresses of images, and whether they lie in an allowed place.

What enters: locations out of the input, which nobody may have checked. What leaves: `Address`es to compare, and an
`ImageError` for hosts in private networks.

This module opens nothing; to check a host it looks up its name.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from qvl_batch.errors import ImageError

#: Schemes of local paths, and of HTTP with their ports.
LOCAL, HTTP = {"", "file"}, {"http": 80, "https": 443}
#: Most characters of a location or an error in a message.
SHOWN = 300
#: DNS errors that mean "no such host".
UNKNOWN = {socket.EAI_NONAME, socket.EAI_NODATA}


@dataclass(frozen=True, slots=True)
class Address:
    """Scheme, host (or bucket) and steps of a path, as they are after decoding."""

    scheme: str
    host: str
    port: int | None
    steps: tuple[str, ...]

    @classmethod
    def of(cls, location: str) -> "Address":
        """The address of a location; one without a scheme is a local path.

        Raises:
            ImageError: it is none.
        """
        if "://" not in location and not location.lower().startswith("file:"):
            return cls("", "", None, ())  # a name may have a colon in it
        try:
            parts = urlsplit(location)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ImageError(f"{short(location)} is no address: {short(str(error))}") from error
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

    def is_in(self, place: "Address") -> bool:
        """Whether the address lies in a place; one with `..` in it lies nowhere."""
        if ".." in self.steps or "." in self.steps:
            return False
        same = (self.scheme, self.host, self.port) == (place.scheme, place.host, place.port)
        return same and self.steps[: len(place.steps)] == place.steps


def local_path(location: str) -> str:
    """A path, or that of a `file:` address."""
    return unquote(urlsplit(location).path) if location.lower().startswith("file:") else location


def check_public(address: Address) -> None:
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
        check_global(address.host, str(each[4][0]))


def check_global(host: str, ip: str) -> None:
    """Refuse an IP address that is not public, whatever name led to it.

    Raises:
        ImageError: it is not.
    """
    if not ipaddress.ip_address(ip).is_global:
        raise ImageError(
            f"{host} leads to {ip}, which is in a private network: of those, --allow-images-from takes hosts by number "
            "alone, in place of their names"
        )


def short(text: str) -> str:
    """A text for a message: an image may stand in the place of its address."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"
