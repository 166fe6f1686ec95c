"""Headers that a user wants to be sent with requests for images, by the places that they are for.

What enters: a file such as

    # a comment
    [https://images.example.org]
    Authorization: Bearer …

What leaves: `Headers`. Values can be secrets: no text that this module makes has one, nor has the `repr` of `Headers`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qvl_batch.config import option_of
from qvl_batch.errors import ConfigError
from qvl_batch.input.addresses import HTTP, Address, Place

#: Names and values of headers that can be sent (RFC 9110).
_NAME, _VALUE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"), re.compile(r"[\x20-\x7e]+")
#: Headers that this program decides itself, in lower case.
OWN = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "content-type", "expect", "host", "keep-alive", "range"),
        *("proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "user-agent"),
    }
)
Section = tuple[Place, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True, repr=False)
class Headers:
    """Names and values of headers, by place, in the order of the file."""

    sections: tuple[Section, ...] = ()

    def of(self, address: Address) -> dict[str, str]:
        """What is sent with a request for an address. Of one name in several places, the last in the file counts."""
        found = [header for place, headers in self.sections if place.holds(address) for header in headers]
        return {name.title(): value for name, value in found}

    def __repr__(self) -> str:
        names = (f"{place}: {', '.join(name for name, _ in headers)}" for place, headers in self.sections)
        return f"Headers({'; '.join(names)})"


def read_headers(path: Path, allowed: Sequence[Place]) -> Headers:
    """Read a file of headers.

    Args:
        path: of the file.
        allowed: places of `--allow-images-from`.

    Raises:
        ConfigError: it cannot be read, or a line cannot be used; the message has its number, and not its text.
    """
    option = f"{option_of('image_headers')} {path}"
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{option}: {error.strerror}") from error
    except ValueError:  # a name of a file, or the text, that is no UTF-8; the error has some of it
        raise ConfigError(f"{option} is not text in UTF-8") from None
    sections: list[tuple[Place, dict[str, tuple[str, str]]]] = []
    for number, line in enumerate(map(str.strip, lines), 1):
        try:
            if line.startswith("["):
                sections.append((_place(line, allowed), {}))
            elif line and not line.startswith("#"):
                _add(line, sections)
        except ConfigError as error:
            raise ConfigError(f"{option}, line {number}: {error}") from None
    if not any(headers for _, headers in sections):
        raise ConfigError(f"{option} has no header: write [https://host] and below it lines of Name: value")
    return Headers(tuple((place, tuple(headers.values())) for place, headers in sections))


def _place(line: str, allowed: Sequence[Place]) -> Place:
    if not line.endswith("]"):
        raise ConfigError("] is missing at its end")
    place = Place.of(line[1:-1])
    if place.scheme not in HTTP:
        raise ConfigError("only requests by http and https have headers")
    if not any(place.meets(each) for each in allowed):
        raise ConfigError("no image can be there: --allow-images-from allows none")
    return place


def _add(line: str, sections: Sequence[tuple[Place, dict[str, tuple[str, str]]]]) -> None:
    name, colon, value = line.partition(":")
    name, value = name.strip(), value.strip()
    if not colon or not _NAME.fullmatch(name):
        raise ConfigError("it must be a header, Name: value, or a place, [https://host]")
    if not sections:
        raise ConfigError("say above it whom the header is for: [https://host], or [https://*] for every host")
    if name.lower() in OWN:
        raise ConfigError(
            "give the user agent with --user-agent" if name.lower() == "user-agent" else f"{name} cannot be chosen"
        )
    if not value:
        raise ConfigError(f"{name} has no value")
    if not _VALUE.fullmatch(value):
        raise ConfigError(f"the value of {name} has characters that are not printable ASCII")
    headers = sections[-1][1]
    if name.lower() in headers:
        raise ConfigError(f"{name} is there twice for this place")
    headers[name.lower()] = (name, value)
