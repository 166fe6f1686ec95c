"""Images are read from where that was allowed, within bounds of size and time, and from nowhere else."""

import io
import os
import re
import socket
import threading
import time
from collections import Counter
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from qvl_batch.errors import ConfigError, ImageError
from qvl_batch.input.fetch import Fetcher


@pytest.fixture
def images(tmp_path):
    (tmp_path / "allowed" / "inner").mkdir(parents=True)
    (tmp_path / "allowed" / "inner" / "image").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (tmp_path / "allowed-not").mkdir()
    (tmp_path / "allowed-not" / "image").write_bytes(b"outside")
    for name in ("IMG-10:30.jpg", "a:"):
        (tmp_path / "allowed" / name).symlink_to("inner" + "/image" * (name != "a:"))
    (tmp_path / "allowed" / "inner" / "b").write_bytes(b"inside")
    (tmp_path / "allowed" / "link").symlink_to("inner/image")
    (tmp_path / "allowed" / "way out").symlink_to("../secret")
    (tmp_path / "allowed" / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "allowed" / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    "location",
    [
        "inner/image",
        "IMG-10:30.jpg",
        "a:/b",
        "../allowed/inner/image",
        "link",
        "{0}/allowed/inner/image",
        "file://{0}/allowed/inner/image",
    ],
)
def test_files_in_an_allowed_folder_are_read(location, images):
    fetcher = Fetcher([str(images / "allowed-not"), str(images / "allowed")])
    assert fetcher.fetch(location.format(images), images / "allowed") == b"inside"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../secret", "is not inside any folder of --allow-images-from"),
        ("way out", "is not inside any folder of --allow-images-from"),
        ("../allowed-not/image", "is not inside any folder"),
        ("{0}/secret", "is not inside any folder"),
        ("file://{0}/secret", "is not inside any folder"),
        ("file://{0}/allowed/%2e%2e/secret", "is not inside any folder"),
        ("/proc/self/environ", "is not inside any folder"),
        ("pipe", "is not a regular file"),
        ("inner", "is not a regular file"),
        ("missing", "cannot be read: FileNotFoundError"),
        ("loop", "cannot be read: "),
        ("nul\0l", "cannot be read: ValueError"),
        ("x" * 1_000, r"^x{300}… \(1,000 characters\) cannot be read: OSError: .{300}… \(1,... characters\)$"),
    ],
)
def test_other_files_are_not(location, message, images):
    with pytest.raises(ImageError, match=message):
        Fetcher([str(images / "allowed")]).fetch(location.format(images), images / "allowed")


@pytest.mark.parametrize("location", ["\ud800", "inner/\udcff", "file:///\ud800", "https://host/\ud800"])
def test_a_location_that_is_no_unicode_is_not_repeated(location, images):
    with pytest.raises(ImageError, match="the path of the image is not valid Unicode") as error:
        Fetcher([str(images), "https://host"]).fetch(location, images / "allowed")
    str(error.value).encode()


def test_nothing_is_allowed_unasked(images):
    for location in ("inner/image", "https://example.com/image", "s3://bucket/image", "ftp://host/image"):
        with pytest.raises(ImageError, match="--allow-images-from"):
            Fetcher(()).fetch(location, images / "allowed")


@pytest.mark.parametrize(
    "location",
    [
        "http://host/images-not/a",
        "http://host/a",
        "http://host/images/../a",
        "http://host/images/%2e%2e/a",
        "http://host.evil/images/a",
        "http://host@evil/images/a",
        "http://host:81/images/a",
        "https://host/images/a",
        "s3://host/images/a",
        "http://[::1/images/a",
        "//host/images/a",
    ],
)
def test_addresses_elsewhere_are_refused(location, proxy, tmp_path):
    fetcher = Fetcher(["http://host/images/"])
    assert fetcher.fetch("http://host/images/a%20b/c?d=e", tmp_path) == b"from afar"
    with pytest.raises(ImageError, match=r"--allow-images-from|is not a valid address|has a user name"):
        fetcher.fetch(location, tmp_path)
    assert proxy == {"http://host/images/a%20b/c?d=e": 1}


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("images./{0}", r"is too long for a path$"),
        ("http://127.0.0.1:1/images/{0}", r"cannot be read: ConnectionRefusedError"),
        ("http://elsewhere/{0}", r"is not inside any address of --allow-images-from$"),
        ("http://[{0}/", r"is not a valid address: "),
    ],
)
def test_a_location_as_long_as_an_image_is_told_by_its_beginning(location, message, images, monkeypatch):
    monkeypatch.setattr("qvl_batch.input.download.WAITS", ())
    fetcher = Fetcher([str(images), "http://127.0.0.1:1/images"])
    with pytest.raises(
        ImageError, match=rf"^{re.escape(location.format('')[:7])}.*… \(1,000,\d\d\d characters\) {message}"
    ) as error:
        fetcher.fetch(location.format("a/" * 500_000), images)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("location", ["", " ", "\n"])
def test_a_path_that_is_empty_is_said_to_be_so(location, images):
    for allowed in ([str(images / "allowed")], ["https://host/images"], []):
        with pytest.raises(ImageError, match=r"^the path of the image is empty$"):
            Fetcher(allowed).fetch(location, images / "allowed")


def test_a_file_whose_name_looks_like_an_image_is_read(images):
    for name in ("9j/" + "a" * 80, "data:image/png;x", "AAAA" * 20):
        path = images / "allowed" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"inside")
        assert Fetcher([str(images / "allowed")]).fetch(name, images / "allowed") == b"inside"
    for missing in ("sha/" + "0123456789abcdef" * 8, "data:x.png", "data/images/" + "ab/" * 60):
        with pytest.raises(ImageError, match=f"^{missing}.* cannot be read"):
            Fetcher([str(images / "allowed")]).fetch(missing, images / "allowed")


def test_what_looks_like_an_image_is_looked_at_in_little_time(images):
    began = time.monotonic()
    for location in ("AAAA" + " " * 2_000_000 + ".", "a" * 2_000_000 + ".", "data:image/" + "a" * 2_000_000):
        with pytest.raises(ImageError, match="too long for a path"):
            Fetcher([str(images / "allowed")]).fetch(location, images)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("place", ["ftp://host/images", "memory://images", "az://container"])
def test_places_that_cannot_be_read_are_refused(place):
    with pytest.raises(ConfigError, match=f"--allow-images-from {place}: give a folder, or an address of gs, http, "):
        Fetcher([place])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "must not be empty"),
        ("/nowhere", "there is no such folder"),
        ("file:///nowhere", "there is no such folder"),
        ("https://", r"it names no host: write https://\* for any public host"),
    ],
)
def test_folders_that_are_not_there_are_refused(place, message):
    with pytest.raises(ConfigError, match=f"--allow-images-from {place}.*{message}"):
        Fetcher([place])


#: How often each path was asked for.
ASKED = Counter()
#: Where two requests wait for each other.
MEETING = threading.Barrier(2)


class _Server(BaseHTTPRequestHandler):
    def do_GET(self):
        ASKED[self.path] += 1
        name = self.path.split("/")[-1]
        status = {"missing": 404, "elsewhere": 302, "broken": 500}.get(name, 200)
        if name == "busy" and ASKED[self.path] < 3:
            status = 503
        if name == "slow":
            time.sleep(1)
        if name == "meeting":
            MEETING.wait(30)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1/other")
        if name in ("cut", "drips"):
            self.send_header("Content-Length", "18" if name == "cut" else "900")
        self.end_headers()
        self.wfile.write(b"x" * 2000 if name == "large" else b"from afar")
        with suppress(OSError):
            while name == "drips":
                time.sleep(0.05)
                self.wfile.write(b"x")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("qvl_batch.input.download.WAITS", (0.01, 0.01))
    monkeypatch.setattr("qvl_batch.input.request.MAX_BYTES", 1000)
    ASKED.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.fixture
def proxy(server, monkeypatch):
    """How often each address was asked for of a proxy, which has images of all of them."""
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://{server}")
    monkeypatch.setenv("no_proxy", "localhost")
    return ASKED


@pytest.mark.parametrize(
    ("name", "message", "asked"),
    [
        ("missing", "cannot be read: 404 Not Found", 1),
        (
            "elsewhere",
            "/elsewhere is redirected to http://127.0.0.1/other, which is not inside any address of --all",
            1,
        ),
        ("broken", "cannot be read: 500 Internal Server Error, in 3 attempts", 3),
        ("large", "has more than 1,000 bytes", 1),
        ("cut", "cannot be read: the download was cut off after 9 of 18 bytes", 3),
        ("drips", r"did not arrive within 0.1 s", 3),
        ("slow", r"did not arrive within 0.1 s|timed out", 3),
    ],
)
def test_what_a_server_does_not_give_is_an_error_of_the_row(name, message, asked, server, tmp_path, monkeypatch):
    if name in ("slow", "drips"):
        monkeypatch.setattr("qvl_batch.input.download.SECONDS", 0.1)
    location = f"http://{server}/images/{name}"
    with pytest.raises(ImageError, match=message):
        Fetcher([f"http://{server}/images"]).fetch(location, tmp_path)
    assert ASKED[f"/images/{name}"] == asked
    # Nothing goes on when nobody waits any longer.
    for thread in threading.enumerate():
        if thread.name.startswith(("qvl-download", "qvl-fetch")):
            thread.join(10)
            assert not thread.is_alive()


def test_addresses_are_quoted_as_browsers_do(server, tmp_path):
    place = f"http://{server}/images"
    for name in ("with space.png", "ü日本.png?at=é", "100%25.png"):
        assert Fetcher([place]).fetch(f"{place}/{name}", tmp_path) == b"from afar"
    sent = ["with%20space.png", "%C3%BC%E6%97%A5%E6%9C%AC.png?at=%C3%A9", "100%25.png"]
    assert sorted(ASKED) == sorted(f"/images/{name}" for name in sent)


def test_what_may_pass_is_tried_again(server, tmp_path):
    place = f"http://{server}/images"
    assert Fetcher([place]).fetch(f"{place}/busy", tmp_path) == b"from afar"
    assert ASKED["/images/busy"] == 3


def test_a_name_that_leads_into_a_private_network_is_refused(server, tmp_path):
    place = f"http://localhost:{server.split(':')[1]}/images"
    with pytest.raises(ImageError, match=r"localhost resolves to the private address (127.0.0.1|::1);"):
        Fetcher([place]).fetch(f"{place}/a", tmp_path)
    assert not ASKED


def test_a_name_that_leads_elsewhere_once_it_was_checked_is_refused(server, tmp_path, monkeypatch):
    port = int(server.split(":")[1])
    found = iter([("93.184.216.34", port), ("127.0.0.1", port)])
    lead = lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", next(found))]  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", lead)
    place = f"http://localhost:{port}/images"
    with pytest.raises(ImageError, match=r"localhost resolves to the private address 127.0.0.1;"):
        Fetcher([place]).fetch(f"{place}/a", tmp_path)
    assert not ASKED


class _Stream(io.BytesIO):
    length, size, status = None, 9, 200


@pytest.mark.parametrize(
    ("error", "message", "asked"),
    [
        (socket.EAI_AGAIN, None, 3),
        (socket.EAI_NONAME, "there is no host host", 1),
    ],
)
def test_a_name_that_is_not_found_now_may_be_found_later(error, message, asked, tmp_path, monkeypatch):
    found = []

    def look_up(host, port, **_):
        found.append((host, port))
        if len(found) < 3:
            raise socket.gaierror(error, "not found")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    monkeypatch.setattr("qvl_batch.input.download.WAITS", (0.01, 0.01))
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *_, **__: _Stream(b"fetched"))
    with pytest.raises(ImageError, match=message) if message else nullcontext():
        assert Fetcher(["https://host/images"]).fetch("https://host/images/a", tmp_path) == b"fetched"
    assert found == [("host", 443)] * asked


@pytest.mark.parametrize("data", [b"from", b"from afar"])
def test_an_object_of_a_store_is_read_whole_or_not_at_all(data, tmp_path, monkeypatch):
    store = SimpleNamespace(open=lambda *_: _Stream(data))
    monkeypatch.setattr("qvl_batch.input.download.WAITS", ())
    monkeypatch.setattr("fsspec.get_filesystem_class", lambda _: None)
    monkeypatch.setattr("fsspec.filesystem", lambda _: store)
    whole = nullcontext() if len(data) == 9 else pytest.raises(ImageError, match="cut off after 4 of 9 bytes")
    with whole:
        assert Fetcher(["s3://bucket"]).fetch("s3://bucket/a", tmp_path) == data


def test_a_proxy_looks_names_up(proxy, tmp_path):
    fetcher = Fetcher(["http://name.invalid/images", "http://localhost/images", "http://2130706433/images"])
    assert fetcher.fetch("http://name.invalid/images/a", tmp_path) == b"from afar"
    assert proxy == {"http://name.invalid/images/a": 1}
    for host in ("localhost", "2130706433"):
        with pytest.raises(ImageError, match=rf"{host} resolves to the private address (127.0.0.1|::1);"):
            fetcher.fetch(f"http://{host}/images/a", tmp_path)


def test_several_are_fetched_at_a_time_in_order(server, images):
    place = f"http://{server}/images"
    locations = [f"{place}/meeting", "inner/image", f"{place}/missing", f"{place}/meeting"]
    found = Fetcher([place, str(images / "allowed")]).fetch_all(locations, images / "allowed").results()
    assert [each if isinstance(each, bytes) else type(each) for each in found] == [
        b"from afar", b"inside", ImageError, b"from afar",
    ]  # fmt: skip
    assert Fetcher(()).fetch_all([], images).results() == []
