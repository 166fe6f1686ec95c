"""Headers of a user go to whom the file names, and their values nowhere else."""

import pickle
import re

import pytest
from conftest import ROOT

from qvl_batch.errors import ConfigError
from qvl_batch.input.addresses import Address, Place
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.headers import read_headers

ANYWHERE = [Place.of("https://*"), Place.of("http://*")]


def _read(folder, text, allowed=ANYWHERE):
    file = folder / "headers"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_headers(file, allowed)


def test_headers_are_for_the_places_that_they_stand_below(tmp_path):
    text = """
        # of the archive
        [https://images.example.org/private]
        Authorization:  Bearer a:b
        X-Key: 1
        [https://*.example.org]
        x-key: 2
        [https://*]
        Accept: image/*
    """
    headers = _read(tmp_path, text)
    found = {
        location: headers.of(Address.of(f"{location}/a"))
        for location in (
            "https://images.example.org/private",
            "https://images.example.org/public",
            "https://images.example.org:8443/private",
            "https://evil/images.example.org/private",
            "http://images.example.org/private",
        )
    }
    assert list(found.values()) == [
        {"Authorization": "Bearer a:b", "X-Key": "2", "Accept": "image/*"},
        {"X-Key": "2", "Accept": "image/*"},
        {},
        {"Accept": "image/*"},
        {},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no header"),
        ("[https://a]\n# Authorization: secret", "has no header"),
        ("Authorization: secret", "line 1: say above it whom the header is for"),
        ("\n[https://a]\nsecret", "line 3: it must be a header, Name: value, or a place"),
        ("[https://a]\nBearer secret: 1", "line 2: it must be a header"),
        ("[https://a]\n: secret", "line 2: it must be a header"),
        ("[https://a]\nX-Key:", "line 2: X-Key has no value"),
        ("[https://a]\nX-Key: secret\nx-KEY: secret", "line 3: x-KEY is there twice for this place"),
        ("[https://a]\nX-Key: secret\r", None),
        ("[https://a]\nX-Key: se\x00cret", "line 2: the value of X-Key has characters that are not printable"),
        ("[https://a]\nX-Key: secr\u00e9t", "line 2: the value of X-Key has characters that are not printable"),
        ("[https://a]\nX-Key: a\x0bSecret: secret", "line 2: the value of X-Key has characters that are not printable"),
        ("[https://a]\nHost: secret", "line 2: Host cannot be chosen"),
        ("[https://a]\nuser-agent: secret", "line 2: give the user agent with --user-agent"),
        ("[https://a]\nProxy-Authorization: secret", "line 2: Proxy-Authorization cannot be chosen"),
        ("[https://a\nX-Key: secret", "line 1: ] is missing at its end"),
        ("[https://me:secret@a]\nX-Key: secret", "line 1: it has a user name before its host"),
        ("[https://]\nX-Key: secret", "line 1: it names no host: write https"),
        ("[a]\nX-Key: secret", "line 1: give a folder, or an address|line 1: "),
        ("[s3://a]\nX-Key: secret", "line 1: only requests by http and https have headers"),
        ("[ftp://a]\nX-Key: secret", "line 1: "),
        (b"[https://a]\nX-Key: secret\xff", "is not text in UTF-8"),
        (b"\xff\xfe[\x00", "is not text in UTF-8"),
        ("\ufeff[https://a]\nX-Key: secret", None),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_its_line_without_a_value(text, message, tmp_path):
    if message is None:
        assert _read(tmp_path, text).of(Address.of("https://a/b")) == {"X-Key": "secret"}
    else:
        with pytest.raises(ConfigError, match=message) as error:
            _read(tmp_path, text)
        assert "secret" not in str(error.value)
        assert "--image-headers" in str(error.value)
        assert error.value.__cause__ is None


def test_a_place_where_no_image_can_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="line 1: no image can be there: --allow-images-from allows none"):
        _read(tmp_path, "[https://a]\nX-Key: 1", [Place.of("https://b"), Place.of("http://a")])
    assert _read(tmp_path, "[https://a]\nX-Key: 1", [Place.of("https://*/images")])


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--image-headers .*/none: No such file or directory"):
        Fetcher(["https://*"], headers=tmp_path / "none")
    with pytest.raises(ConfigError, match="Is a directory"):
        Fetcher(["https://*"], headers=tmp_path)


def test_what_is_printed_of_headers_has_names_only(tmp_path):
    text = "[https://a:444/b]\nAuthorization: secret\nCookie: secret"
    headers = _read(tmp_path, text, [Place.of("https://*:444")])
    assert repr(headers) == str(headers) == "Headers(https://a:444/b: Authorization, Cookie)"
    assert f"{[headers]!r}" == f"[{headers!r}]"
    fetcher = Fetcher(["https://*:444"], headers=tmp_path / "headers")
    assert "secret" not in repr(fetcher) + repr(vars(fetcher))
    copied = pickle.loads(pickle.dumps(fetcher))  # noqa: S301
    assert "secret" not in repr(vars(copied))


def test_the_file_in_the_page_is_read(tmp_path):
    (block,) = re.findall(r"^```ini\n(.*?)^```$", (ROOT / "jobs" / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    headers = _read(tmp_path, block)
    assert headers.of(Address.of("https://images.example.org/a")) == {"Authorization": "Bearer 1234"}
    assert headers.of(Address.of("https://example.org/a")) == {}
