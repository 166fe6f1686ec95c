"""Addresses of images: parsing them, the places that they may be in, and whether their host is public.

What enters: locations from the input, unchecked, and places of the settings. What leaves: `Address`es, and `Place`s
that say whether they hold one; or an `ImageError`: a location is malformed, or its host is in a private network.

An address is spelled in one way: its host in lower case, in ASCII, without a dot at its end; its port always known.
What is checked is what is asked for, since requests are made of the parts and not of the text. This module opens no
connection; to check a host, it resolves its name.
"""

import ipaddress
import re
import socket
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from qvl_batch.config import OBJECT_STORES
from qvl_batch.errors import ConfigError, ImageError

#: Schemes of HTTP with their default ports.
HTTP = {"http": 80, "https": 443}
#: In a place: any host, and before a domain the domain and all below it.
ANY_HOST, BELOW = "*", "*."
#: Characters of the longest name of a host (RFC 1035).
LONGEST_HOST = 253
#: Characters of a location or an error that a message shows.
SHOWN = 300
#: Characters of an address that are sent as they are, since they can be syntax; others are percent-encoded, as browsers
#: do.
_SAFE = "%/:=&?~+!$,;'@()*[]"
#: In text, what follows the path of an address, and a user name with a password before its host. A password can have a
#: slash. Names in an object store can have any character.
_AFTER_PATH = re.compile(r"(\b(?!(?:s3|gs)://)[a-z][a-z0-9+.-]*://[^?#]*[?#])\S+", re.ASCII | re.IGNORECASE)
_USER = re.compile(r"(?<=://)(?:[^/?#\s]*|[^/:?#\s]*:(?!\d*(?:/|\s|$))[^?#\s]*)@")
_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*):", re.ASCII | re.IGNORECASE)
#: Names of hosts. Parsers of addresses differ in what they make of other characters.
_HOST = re.compile(r"[a-z0-9._-]+", re.ASCII)
#: IPv6 addresses that end with an IPv4 address to which they can lead: translated (RFC 6052) and compatible ones.
_WITH_IPV4 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))
#: Translated addresses within a network (RFC 8215), which Python takes for public ones.
_LOCAL_TRANSLATION = ipaddress.IPv6Network("64:ff9b:1::/48")


@dataclass(frozen=True, slots=True)
class Address:
    """Scheme, host (or bucket), port, and the segments of the path, percent-decoded.

    `target` is what a server is asked for: path and query, percent-encoded.
    """

    scheme: str
    host: str
    port: int | None
    segments: tuple[str, ...]
    target: str = field(default="/", compare=False)

    @classmethod
    def of(cls, location: str) -> "Address":
        """Parse a location; without a scheme, it is a local path, which is not parsed any further.

        Raises:
            ImageError: it is not a valid address.
        """
        if is_local(location):
            return cls("", "", None, ())
        try:
            parts = urlsplit(location.strip())
            if parts.scheme not in HTTP:
                return cls(parts.scheme, parts.hostname or "", parts.port, _segments(parts))
            if "@" in parts.netloc:
                # Not repeated: it can be a password.
                raise ImageError(f"the address has a user name before its host {short(parts.hostname or '')!r}")
            query = f"?{parts.query}" if parts.query else ""
            target = quote((parts.path or "/") + query, safe=_SAFE)
            host = _host(parts.hostname or "", is_ipv6="[" in parts.netloc)
            return cls(parts.scheme, host, _port(parts), _segments(parts), target)
        except ValueError as error:
            raise ImageError(f"{short(location)} is not a valid address: {short(str(error))}") from error

    @property
    def url(self) -> str:
        """The address as text, percent-encoded, without a fragment."""
        return f"{self.scheme}://{self.netloc}{self.target}"

    @property
    def url_without_query(self) -> str:
        """The same without its query, which can be a signature that gives access."""
        path, _, query = self.target.partition("?")
        return f"{self.scheme}://{self.netloc}{path}{'?…' if query else ''}"

    @property
    def netloc(self) -> str:
        """The host, and the port if it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port in (None, HTTP.get(self.scheme)) else f"{host}:{self.port}"

    @property
    def server(self) -> str:
        """What is asked: host and port, or a bucket."""
        if self.scheme not in HTTP:
            return f"{self.scheme}://{self.host}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_proxied(self) -> bool:
        """Whether requests to this address go through a proxy."""
        return self.scheme in getproxies() and not proxy_bypass(self.netloc)


@dataclass(frozen=True, slots=True)
class Place:
    """Where images may be: a bucket, a host or `*`, any host, or `*.example.org`, a domain and all below it; and the
    segments with which paths begin.
    """

    scheme: str
    host: str
    port: int | None
    segments: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Place":
        """Parse a place.

        Raises:
            ConfigError: it cannot be one. The message is a reason, without the text.
        """
        try:
            parts = urlsplit(text.strip())
            name = parts.hostname or ""
            if parts.scheme not in OBJECT_STORES.union(HTTP):
                raise ConfigError(f"give a folder, or an address of {', '.join(sorted(OBJECT_STORES.union(HTTP)))}")
            _check_place(parts, name)
            if parts.scheme not in HTTP:
                return cls(parts.scheme, name, parts.port, _segments(parts))
            wild = BELOW if name.startswith(BELOW) else ""
            host = wild + _host(name.removeprefix(wild), is_ipv6="[" in parts.netloc) if name != ANY_HOST else name
            return cls(parts.scheme, host, _port(parts), _segments(parts))
        except ValueError as error:
            raise ConfigError(f"it is not a valid address: {short(str(error))}") from error

    def __str__(self) -> str:
        return "/".join([f"{self.scheme}://{self.address.netloc}", *self.segments])

    @property
    def address(self) -> Address:
        """The place as an address: a pattern of hosts stands for itself."""
        return Address(self.scheme, self.host, self.port, self.segments)

    @property
    def is_ip(self) -> bool:
        """Whether the host is an IP address, not a name: one that may be private."""
        return _is_ip(self.host)

    def holds(self, address: Address) -> bool:
        """Whether an address is this place or below it; with a segment `.` or `..`, it is below no path."""
        if self.segments and (".." in address.segments or "." in address.segments):
            return False
        return self.holds_server(address) and address.segments[: len(self.segments)] == self.segments

    def meets(self, other: "Place") -> bool:
        """Whether an address can be in both."""
        shared = min(len(self.segments), len(other.segments))
        servers = self.holds_server(other.address) or other.holds_server(self.address)
        return servers and self.segments[:shared] == other.segments[:shared]

    def holds_server(self, address: Address) -> bool:
        """Whether an address is at the host of this place."""
        if (self.scheme, self.port) != (address.scheme, address.port):
            return False
        if self.host.startswith(BELOW):
            domain = self.host.removeprefix(BELOW)
            return address.host == domain or (address.host.endswith(f".{domain}") and not _is_ip(address.host))
        return self.host in (ANY_HOST, address.host)


def _check_place(parts: SplitResult, name: str) -> None:
    """Refuse a place that no address is in, or that says more than where.

    Raises:
        ConfigError: what is wrong.
    """
    is_http = parts.scheme in HTTP
    if "@" in parts.netloc:
        raise ConfigError("it has a user name before its host: write what a server is to be told into --image-headers")
    if not name:
        raise ConfigError(
            f"it names no host: write {parts.scheme}://* for any public host" if is_http else "it names no bucket"
        )
    if parts.query or parts.fragment:
        raise ConfigError("leave out what follows ? or #: a place is a host, or a folder of it")
    if "*" in parts.path:
        raise ConfigError("leave out the * in its path: all below a place is in it")
    if "*" in name and not is_http:
        raise ConfigError("a bucket has a name without *")
    if "*" in name.removeprefix(BELOW) and name != ANY_HOST:
        raise ConfigError("* stands for any host, or for all below a domain: https://* or https://*.example.org")
    if {".", ".."}.intersection(_segments(parts)):
        raise ConfigError("its path has a segment . or ..")


def _segments(parts: SplitResult) -> tuple[str, ...]:
    # Some servers take a backslash for a slash.
    path = unquote(parts.path).replace("\\", "/") if parts.scheme in HTTP else unquote(parts.path)
    return tuple(segment for segment in path.split("/") if segment)


def _host(name: str, *, is_ipv6: bool) -> str:
    """A host in its one spelling.

    Raises:
        ValueError: it is none.
    """
    if len(name) > LONGEST_HOST:
        raise ValueError(f"the name of a host has up to {LONGEST_HOST} characters, not {len(name):,}")
    if is_ipv6 and "%" not in name:  # what follows a % is a network of this machine
        return str(ipaddress.IPv6Address(name))
    host = name.encode("idna").decode().lower().removesuffix(".")
    if not _HOST.fullmatch(host) or len(host) > LONGEST_HOST:
        raise ValueError(f"{short(name)!r} is no host" if name else "it names no host")
    return host


def _port(parts: SplitResult) -> int:
    return HTTP[parts.scheme] if parts.port is None else parts.port


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def host_of(location: str) -> str | None:
    """Host, with a port that is not the scheme's own, or bucket of a location; None of one that has neither."""
    try:
        address = Address.of(location)
    except ImageError:
        return None
    if address.scheme in HTTP:
        return address.netloc
    return address.server if address.scheme in OBJECT_STORES and len(address.host) <= LONGEST_HOST else None


def is_local(location: str) -> bool:
    """Whether a location or a place is a path, or a `file:` address. The name of a local file can contain a colon."""
    scheme = _SCHEME.match(location)
    return scheme is None or scheme[1].lower() == "file" or "://" not in location


def is_relative(location: str) -> bool:
    """Whether a location is a path that begins at no root."""
    return bool(location.strip()) and is_local(location) and not local_path(location).startswith("/")


def local_path(location: str) -> str:
    """The path of a local location: a `file:` address, or the path itself."""
    return unquote(urlsplit(location).path) if location.lower().startswith("file:") else location


def check_public(address: Address) -> None:
    """Refuse a host in a private network. A name that a proxy resolves is not checked.

    Raises:
        ImageError: the host resolves to an address that is not public.
        OSError: the name cannot be resolved.
    """
    flags = socket.AI_NUMERICHOST if address.is_proxied else 0
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        if address.is_proxied:
            return
        raise
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
    if not _is_public(ipaddress.ip_address(ip)):
        what = f"{host} is a private address" if host == ip else f"{host} resolves to the private address {ip}"
        raise ImageError(
            f"{what}; to permit it, name the host by that address, both in --allow-images-from and in the input"
        )


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    inner = [ip.ipv4_mapped, ip.sixtofour]
    if any(ip in network for network in _WITH_IPV4):
        inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    within = [each for each in inner if each is not None]
    if within:
        return all(map(_is_public, within))
    return ip.is_global and not ip.is_multicast and ip not in _LOCAL_TRANSLATION


def without_access(text: str) -> str:
    """A text, its addresses without what can give access: user name, password, query."""
    return _AFTER_PATH.sub(r"\1…", _USER.sub("", text))


def public_text(location: str) -> str:
    """A path or an address as text to pass on: whatever its bytes, and without what can give access."""
    return without_access(location.encode(errors="backslashreplace").decode())


def short(text: str) -> str:
    """Cut a text for a message: a location can be as long as an image, if the image is given in its place."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"
