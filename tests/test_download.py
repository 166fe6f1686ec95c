"""Images of web servers come by redirects and after refusals, from where that is allowed, and each within its time."""

import ipaddress
import random
import socket
import ssl
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from reading import caption_config
from web import Answer, serving

from qvl_batch.errors import ConfigError, ImageError
from qvl_batch.input import servers
from qvl_batch.input.fetch import Fetcher


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts."""
    monkeypatch.setattr("qvl_batch.input.download.WAITS", (0.01, 0.01))


@pytest.fixture
def web():
    with serving() as served:
        yield served


@pytest.fixture
def other():
    """A server at another address, which is another host."""
    with serving("127.0.0.2") as served:
        yield served


def _error(fetcher, location, folder):
    with pytest.raises(ImageError) as error:
        fetcher.fetch(location, folder)
    return str(error.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "to", ["{0}/b", "/b", "b", "./x/../b", "?b", "//{1}/b", "{0}/b#top", " {0}/b ", "/b%20c", "/b c", "/\u00e4?\u00fc"]
)
def test_redirects_are_followed(status, to, web, tmp_path):
    web.moved("/a", to.format(web.url, web.url.removeprefix("http://")).encode().decode("latin-1"), status)
    assert Fetcher([web.url]).fetch(f"{web.url}/a", tmp_path) == b"from afar"
    expected = {"?b": "/a?b", "/b%20c": "/b%20c", "/b c": "/b%20c", "/\u00e4?\u00fc": "/%C3%A4?%C3%BC"}.get(to, "/b")
    assert web.paths == ["/a", expected]


def test_a_redirect_leads_to_another_host_that_is_allowed(web, other, tmp_path):
    web.moved("/a", f"{other.url}/b")
    assert Fetcher([web.url, f"{other.url}/b"]).fetch(f"{web.url}/a", tmp_path) == b"from afar"
    assert (web.paths, other.paths) == (["/a"], ["/b"])


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (
            "{other}/b?key=secret",
            r"is redirected to {other}/b\?…, which is not inside any address of --allow-images-from",
        ),
        ("{web}/outside", "is redirected to {web}/outside, which is not inside any address of --allow-images-from"),
        ("/images/../outside", "is redirected to {web}/outside, which is not inside any address"),
        ("/images/%2e%2e/outside", "is redirected to {web}/images/%2e%2e/outside, which is not inside any address"),
        ("https://{host}/images/b", "is redirected to https://{host}/images/b, which is not inside any address"),
        (
            "http://localhost:{port}/images/b",
            "is redirected to http://localhost:{port}/images/b, which localhost resolves",
        ),
        (
            "http://me:secret@{host}/images/b",
            "redirects to an address that cannot be followed: the address has a user name",
        ),
        ("http://[::1/", "redirects to an address that cannot be followed"),
        ("http://a..b/c?key=secret", "redirects to an address that cannot be followed: http://a..b/c?… is not a valid"),
        (
            "https://",
            "redirects to an address that cannot be followed: https:// is not a valid address: it names no host",
        ),
        ("file:///etc/passwd", "redirects to an address of file, not of http or https"),
        ("s3://bucket/images/b", "redirects to an address of s3, not of http or https"),
        ("ftp://{host}/images/b", "redirects to an address of ftp, not of http or https"),
        ("data:image/png;base64,AAAA", "redirects to an address of data, not of http or https"),
        ("javascript:alert(1)", "redirects to an address of javascript, not of http or https"),
        ("/images/a", "is redirected to {web}/images/a, which was there before: the redirects lead in a circle"),
        ("", "cannot be read: 302 Found"),
    ],
)
def test_redirects_elsewhere_are_errors_of_both_addresses(to, message, web, other, tmp_path, monkeypatch):
    monkeypatch.setattr("fsspec.get_filesystem_class", lambda _: None)
    names = {"web": web.url, "host": web.url.removeprefix("http://"), "port": web.port, "other": other.url}
    web.moved("/images/a", to.format(**names))
    allowed = [f"{web.url}/images", f"http://localhost:{web.port}", "s3://bucket", str(tmp_path)]
    said = _error(Fetcher(allowed), f"{web.url}/images/a", tmp_path)
    assert said.startswith(f"{web.url}/images/a ")
    assert message.format(**names).replace("\\", "") in said
    assert "secret" not in said
    assert (web.paths, other.paths) == (["/images/a"], [])


def test_redirects_in_a_circle_and_too_many_end(web, tmp_path):
    web.moved("/a", "/b")
    web.moved("/b", "/c")
    web.moved("/c", "/b")
    assert "which was there before: the redirects lead in a circle" in _error(
        Fetcher([web.url]), f"{web.url}/a", tmp_path
    )
    for at in range(7):
        web.moved(f"/{at}", f"/{at + 1}")
    assert Fetcher([web.url]).fetch(f"{web.url}/2", tmp_path) == b"from afar"
    said = _error(Fetcher([web.url]), f"{web.url}/1", tmp_path)
    assert said == f"{web.url}/1 is redirected to {web.url}/7, which is one redirect more than the 5 that are followed"
    assert web.paths[-6:] == ["/1", "/2", "/3", "/4", "/5", "/6"]


def test_what_fails_after_a_redirect_is_said_of_the_right_address(web, other, tmp_path):
    web.moved("/a", f"{other.url}/b")
    fetcher = Fetcher([web.url, other.url])
    for status, said in ((404, "404 Not Found"), (500, "500 Internal Server Error, in 3 attempts")):
        other.answers["/b"] = Answer(status)
        expected = f"{web.url}/a is redirected to {other.url}/b, which cannot be read: {said}"
        assert _error(fetcher, f"{web.url}/a", tmp_path) == expected
    assert len(web.asked) == len(other.asked) == 4


def test_an_address_after_a_redirect_is_checked_before_and_after_connecting(web, tmp_path, monkeypatch):
    real, found = socket.getaddrinfo, []
    web.moved("/a", f"http://localhost:{web.port}/b")

    def look_up(host, port, *args, **options):
        if host != "localhost":
            return real(host, port, *args, **options)
        found.append(host)
        ip = "127.0.0.1" if len(found) % 2 == 0 else "93.184.216.34"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    said = _error(Fetcher([web.url, f"http://localhost:{web.port}"]), f"{web.url}/a", tmp_path)
    assert (
        f"is redirected to http://localhost:{web.port}/b, which localhost resolves to the private address 127.0" in said
    )
    assert len(found) == 2
    assert web.paths == ["/a"]


def test_any_host_is_any_public_one(web, tmp_path):
    fetcher = Fetcher(["http://*", f"http://*:{web.port}"])
    for host in ("127.0.0.1", "2130706433", "127.1", "0x7f000001", "localhost", "[::ffff:127.0.0.1]", "[::1]"):
        said = _error(fetcher, f"http://{host}:{web.port}/a", tmp_path)
        assert "private address" in said, said
    assert not web.asked
    # A place that names the host by its IP address permits it, wherever it stands among the places.
    assert Fetcher([f"http://*:{web.port}", web.url]).fetch(f"{web.url}/a", tmp_path) == b"from afar"


def test_any_host_through_a_proxy(web, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.delenv("no_proxy", raising=False)
    web.moved("http://a.example/1", "http://b.example/2?c")
    assert Fetcher(["http://*"]).fetch("http://A.example:80/1", tmp_path) == b"from afar"
    assert web.paths == ["http://a.example/1", "http://b.example/2?c"]
    assert web.asked[1][1]["Host"] == "b.example"


def test_the_host_of_a_request_is_in_ascii(web, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.delenv("no_proxy", raising=False)
    Fetcher(["http://*"]).fetch("http://bücher.example/ä", tmp_path)
    assert web.paths == ["http://xn--bcher-kva.example/%C3%A4"]
    assert web.asked[0][1]["Host"] == "xn--bcher-kva.example"


def test_requests_say_who_sends_them(web, tmp_path):
    Fetcher([web.url]).fetch(f"{web.url}/a", tmp_path)
    assert web.headers_of("/a")["User-Agent"] == "qvl-batch/0.1.0"
    web.moved("/b", "/c")
    Fetcher([web.url], user_agent="me/1 (me@example.org)").fetch(f"{web.url}/b", tmp_path)
    assert web.headers_of("/b")["User-Agent"] == web.headers_of("/c")["User-Agent"] == "me/1 (me@example.org)"


def test_headers_stay_with_the_host_that_they_are_for(web, other, tmp_path):
    file = tmp_path / "headers"
    file.write_text(f"[{web.url}]\nX-Key: secret\n[{other.url}]\nX-Other: secret")
    fetcher = Fetcher([web.url, other.url], headers=file)
    web.moved("/away", f"{other.url}/back")
    other.moved("/back", f"{web.url}/home")
    web.moved("/here", "/there")
    for path in ("/away", "/here"):
        fetcher.fetch(f"{web.url}{path}", tmp_path)
    fetcher.fetch(f"{other.url}/own", tmp_path)
    sent = {path: [name for name in headers if name.startswith("X-")] for path, headers in web.asked + other.asked}
    key = ["X-Key"]
    assert sent == {"/away": key, "/back": [], "/home": [], "/here": key, "/there": key, "/own": ["X-Other"]}
    assert web.headers_of("/here")["X-Key"] == "secret"


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 599])
def test_what_may_pass_is_tried_again(status, web, tmp_path):
    web.answers["/a"] = [Answer(status), Answer(status), Answer()]
    assert Fetcher([web.url]).fetch(f"{web.url}/a", tmp_path) == b"from afar"
    web.answers["/b"] = Answer(status)
    assert f"/b cannot be read: {status}" in _error(Fetcher([web.url]), f"{web.url}/b", tmp_path)
    assert web.paths == ["/a"] * 3 + ["/b"] * 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_what_will_not_pass_is_not(status, web, tmp_path):
    web.answers["/a"] = Answer(status)
    assert f"/a cannot be read: {status}" in _error(Fetcher([web.url]), f"{web.url}/a", tmp_path)
    assert web.paths == ["/a"]


def _in(seconds):
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("value", ["1", lambda: _in(2)])
@pytest.mark.parametrize("status", [429, 503])
def test_a_pause_that_a_server_asks_for_is_waited_for_by_all_its_images(status, value, web, tmp_path):
    pause = value if isinstance(value, str) else value()
    web.answers["/a"] = [Answer(status, {"Retry-After": pause}), Answer()]
    fetcher = Fetcher([web.url], per_host=1)
    began = time.monotonic()
    images = fetcher.fetch_all([f"{web.url}/a", f"{web.url}/b"], tmp_path)
    assert images.results() == [b"from afar"] * 2
    assert 0.9 < time.monotonic() - began < 10
    assert sorted(web.paths) == ["/a", "/a", "/b"]


@pytest.mark.parametrize("value", ["", "-5", "soon", "0", "1e3", "Wed, 99 Foo 2026", lambda: _in(-3600)])
def test_a_pause_that_is_none_changes_nothing(value, web, tmp_path):
    value = value if isinstance(value, str) else value()
    web.answers["/a"] = [Answer(503, {"Retry-After": value}), Answer()]
    began = time.monotonic()
    assert Fetcher([web.url]).fetch(f"{web.url}/a", tmp_path) == b"from afar"
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("value", ["31", "9" * 400, lambda: _in(90_000)])
def test_a_long_pause_is_respected_by_asking_no_more(value, web, other, tmp_path):
    value = value if isinstance(value, str) else value()
    web.answers["/a"] = Answer(429, {"Retry-After": value})
    fetcher = Fetcher([web.url, other.url])
    wants = f"127.0.0.1:{web.port} wants a longer pause than the 30 s that an image waits"
    said = _error(fetcher, f"{web.url}/a", tmp_path)
    assert said == f"{web.url}/a cannot be read: 429 Too Many Requests, and {wants}"
    assert _error(fetcher, f"{web.url}/b", tmp_path) == f"{web.url}/b was not asked for: {wants}"
    assert web.paths == ["/a"]
    assert fetcher.fetch(f"{other.url}/a", tmp_path) == b"from afar"


def test_pauses_between_attempts_vary(web, tmp_path, monkeypatch):
    slept, real = [], time.sleep
    monkeypatch.setattr("qvl_batch.input.download.WAITS", (0.02, 0.04))
    monkeypatch.setattr("qvl_batch.input.download.time.sleep", lambda s: slept.append(s) or real(s))
    web.answers["/a"] = Answer(500)
    for _ in range(8):
        _error(Fetcher([web.url]), f"{web.url}/a", tmp_path)
    slept = [each for each in slept if each]
    first, second = slept[::2], slept[1::2]
    assert len(set(first)) > 4
    assert all(0.01 <= each <= 0.03 for each in first)
    assert all(0.02 <= each <= 0.06 for each in second)


def test_connections_to_a_host_are_bounded_and_other_hosts_do_not_wait(web, other, tmp_path):
    slow = Answer(seconds=0.2)
    web.answers = {f"/{at}": slow for at in range(30)}
    fetcher = Fetcher([web.url, other.url], at_once=16, per_host=3)
    images = fetcher.fetch_all([f"{web.url}/{at}" for at in range(30)], tmp_path)
    began = time.monotonic()
    assert fetcher.fetch(f"{other.url}/a", tmp_path) == b"from afar"
    assert time.monotonic() - began < 1  # thirty at three a time take two seconds
    assert images.results() == [b"from afar"] * 30
    assert web.most_at_once == 3


def test_a_bound_of_hosts_holds_after_redirects_too(web, other, tmp_path):
    for at in range(20):
        web.answers[f"/{at}"] = Answer(302, {"Location": f"{other.url}/{at}"}, seconds=0.05)
        other.answers[f"/{at}"] = Answer(seconds=0.05)
    locations = [f"{web.url}/{at}" for at in range(20)] + [f"{other.url}/{at}" for at in range(20)]
    assert Fetcher([web.url, other.url], per_host=2).fetch_all(locations, tmp_path).results() == [b"from afar"] * 40
    assert (web.most_at_once, other.most_at_once) == (2, 2)


def test_the_time_of_an_attempt_is_not_spent_in_queues(web, other, tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_batch.input.download.SECONDS", 1.0)
    for at in range(6):
        web.moved(f"/{at}", f"{other.url}/{at}")
        other.answers[f"/{at}"] = Answer(seconds=0.4)
    images = Fetcher([web.url, other.url], per_host=1).fetch_all([f"{web.url}/{at}" for at in range(6)], tmp_path)
    assert images.results() == [b"from afar"] * 6
    assert (len(web.asked), len(other.asked)) == (6, 6)  # all in their first attempt


def test_images_that_wait_for_each_others_hosts_all_come(monkeypatch, tmp_path):
    monkeypatch.setattr("qvl_batch.input.download.SECONDS", 1.0)
    draw = random.Random(7)  # noqa: S311
    with ExitStack() as stack:
        webs = [stack.enter_context(serving(f"127.0.0.{at + 1}")) for at in range(6)]
        locations = []
        for at in range(300):
            web, answer = draw.choice(webs), draw.choice(["moved", "moved", "slow", "busy", "fine"])
            locations.append(f"{web.url}/{at}")
            if answer == "moved":
                for step in range(3):
                    to = draw.choice(webs)
                    web.moved(f"/{at}{'-' * step}", f"{to.url}/{at}{'-' * (step + 1)}")
                    web = to
            else:
                fine = Answer(seconds=0.2 if answer == "slow" else 0)
                web.answers[f"/{at}"] = [Answer(503), fine] if answer == "busy" else fine
        fetcher = Fetcher([web.url for web in webs], at_once=10, per_host=2)
        assert fetcher.fetch_all(locations, tmp_path).results() == [b"from afar"] * 300
        assert max(web.most_at_once for web in webs) == 2


def test_images_at_a_time_are_bounded_over_all_hosts(tmp_path):
    with serving() as a, serving() as b, serving() as c:
        locations = [f"{each.url}/{at}" for at in range(12) for each in (a, b, c)]
        now, most, lock = [0], [0], threading.Lock()

        def count(_):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.03)
            with lock:
                now[0] -= 1
            return Answer()

        for each in (a, b, c):
            each.answers = {f"/{at}": count for at in range(12)}
        fetcher = Fetcher([a.url, b.url, c.url], at_once=5, per_host=4)
        assert fetcher.fetch_all(locations, tmp_path).results() == [b"from afar"] * 36
        assert most[0] == 5


def test_tasks_share_the_connections_to_a_host(web, tmp_path):
    fetcher = Fetcher([web.url], per_host=7)
    web.answers = {f"/{at}": Answer(seconds=0.05) for at in range(12)}
    locations = list(map(f"{web.url}/{{}}".format, range(12)))
    for tasks, most in ((3, 2), (100, 1), (1, 7)):
        web.most_at_once = 0
        fetcher.shared_by(tasks).fetch_all(locations, tmp_path).results()
        assert web.most_at_once == most


def test_a_host_that_is_not_there_is_given_up_after_some_images(tmp_path, monkeypatch):
    tried = []
    real = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *a, **o: tried.append(a[0]) or real(*a, **o))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        fetcher = Fetcher([f"http://127.0.0.1:{port}"])
        said = [_error(fetcher, f"http://127.0.0.1:{port}/{at}", tmp_path) for at in range(20)]
    assert len(tried) == servers.FAILURES * 3
    for at, text in enumerate(said):
        own = "cannot be read: ConnectionRefusedError: [Errno 111] Connection refused"
        given_up = (
            f"was not asked for: 127.0.0.1:{port} could not be reached for 3 images in a row or more ({own}), and is "
        )
        assert text.startswith(f"http://127.0.0.1:{port}/{at} {own if at < servers.FAILURES else given_up}")


def test_a_host_without_an_address_is_given_up_and_one_behind_a_name_server_in_trouble_is_not(tmp_path, monkeypatch):
    asked = []

    def look_up(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME if host == "none.example" else socket.EAI_AGAIN, "not found")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    fetcher = Fetcher(["https://*"])
    said = [_error(fetcher, f"https://none.example/{at}", tmp_path) for at in range(9)]
    assert asked == ["none.example"] * 3
    assert "https://none.example/0 cannot be read: there is no host none.example" in said[0]
    assert "https://none.example/8 was not asked for: none.example:443 could not be reached for 3 images" in said[8]
    for at in range(6):
        assert "cannot be read: gaierror" in _error(fetcher, f"https://later.example/{at}", tmp_path)
    assert asked.count("later.example") == 18


def test_a_host_that_comes_back_is_asked_again(web, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "REST", 0.3)
    fetcher = Fetcher([web.url])
    real, down = socket.create_connection, [True]

    def connect(*args, **options):
        if down[0]:
            raise ConnectionRefusedError("nobody there")
        return real(*args, **options)

    monkeypatch.setattr(socket, "create_connection", connect)
    for at in range(5):
        _error(fetcher, f"{web.url}/{at}", tmp_path)
    down[0] = False
    assert "was not asked for" in _error(fetcher, f"{web.url}/a", tmp_path)
    time.sleep(0.35)
    assert fetcher.fetch_all([f"{web.url}/a"], tmp_path).results() == [b"from afar"]
    assert fetcher.fetch_all([f"{web.url}/{at}" for at in range(5)], tmp_path).results() == [b"from afar"] * 5


def test_a_host_that_refuses_images_is_not_given_up(web, tmp_path):
    for at in range(10):
        web.answers[f"/{at}"] = Answer(404 if at % 2 else 503)
        assert "cannot be read: " in _error(Fetcher([web.url]), f"{web.url}/{at}", tmp_path)
    assert len(web.asked) == 5 + 3 * 5


def test_a_server_that_never_ends_its_headers_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_batch.input.download.SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        stop = threading.Event()

        def drip():
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=dripping, args=(connection,), daemon=True).start()

        def dripping(connection):
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
                    while not stop.wait(0.02):
                        connection.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        assert "did not arrive within 0.3 s" in _error(Fetcher([url]), f"{url}/a", tmp_path)
        assert time.monotonic() - began < 5
        # Its threads end although the server goes on.
        until = time.monotonic() + 5
        while any(each.name.startswith("qvl-download") for each in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.01)
        stop.set()


def test_all_attempts_and_pauses_of_an_image_have_their_time(web, tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_batch.input.download.ALL_SECONDS", 0.5)
    web.answers["/a"] = Answer(429, {"Retry-After": "20"})
    began = time.monotonic()
    assert "did not arrive within 0.5 s" in _error(Fetcher([web.url]), f"{web.url}/a", tmp_path)
    assert time.monotonic() - began < 3


@pytest.fixture
def tls(tmp_path):
    """Both sides of TLS: a server's of 127.0.0.1, and one that trusts it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(hosts, critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    file = tmp_path / "server.pem"
    file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + made.public_bytes(pem))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=made.public_bytes(pem).decode())


def test_certificates_are_checked_and_final(tls, tmp_path, monkeypatch):
    tried, real = [], socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *a, **o: tried.append(a[0]) or real(*a, **o))
    with serving(tls=tls[0]) as web:
        said = _error(Fetcher([web.url]), f"{web.url}/a", tmp_path)
        assert said.startswith(f"{web.url}/a cannot be read: SSLCertVerificationError: ")
        assert (len(tried), web.asked) == (1, [])


def test_images_come_over_tls_from_where_that_is_allowed(tls, web, tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_batch.input.request._tls", lambda: tls[1])
    with serving(tls=tls[0]) as secure:
        secure.moved("/a", f"{web.url}/a")
        secure.moved("/b", "/c")
        fetcher = Fetcher([secure.url])
        assert fetcher.fetch(f"{secure.url}/b", tmp_path) == b"from afar"
        said = _error(fetcher, f"{secure.url}/a", tmp_path)
        assert f"is redirected to {web.url}/a, which is not inside any address of --allow-images-from" in said
        assert Fetcher([secure.url, web.url]).fetch(f"{secure.url}/a", tmp_path) == b"from afar"
        # A name that leads to a private address only once it was checked is refused over TLS too, and asked nothing.
        port, found = secure.port, iter([("93.184.216.34", secure.port), ("127.0.0.1", secure.port)])
        lead = lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", next(found))]  # noqa: E731
        monkeypatch.setattr(socket, "getaddrinfo", lead)
        monkeypatch.setattr(tls[1], "check_hostname", False)
        asked = len(secure.asked)
        said = _error(Fetcher([f"https://localhost:{port}"]), f"https://localhost:{port}/b", tmp_path)
        assert "localhost resolves to the private address 127.0.0.1" in said
        assert len(secure.asked) == asked


def test_a_server_that_never_shakes_hands_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_batch.input.download.SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert "cannot be read: " in (said := _error(Fetcher([url]), f"{url}/a", tmp_path)) or "arrive" in said
        assert time.monotonic() - began < 5


def test_large_images_are_downloaded_a_few_at_a_time(web, tmp_path, monkeypatch):
    monkeypatch.setattr("qvl_batch.input.request.LARGE", 1000)
    monkeypatch.setattr("qvl_batch.input.request.LARGE_AT_ONCE", threading.BoundedSemaphore(1))
    web.answers = {f"/{at}": Answer(body=b"x" * 300_000) for at in range(12)}
    images = Fetcher([web.url]).fetch_all([f"{web.url}/{at}" for at in range(12)], tmp_path).results()
    assert [len(image) for image in images] == [300_000] * 12


def test_settings_reach_the_servers(web, tmp_path):
    (tmp_path / "headers").write_text(f"[{web.url}]\nX-Key: 1")
    config = caption_config(
        tmp_path,
        allow_images_from=(web.url,),
        user_agent="me/1",
        image_headers=tmp_path / "headers",
        connections_per_host=3,
        images_at_once=5,
    )
    web.answers = {f"/{at}": Answer(seconds=0.05) for at in range(12)}
    fetcher = Fetcher.of(config)
    fetcher.fetch_all([f"{web.url}/{at}" for at in range(12)], tmp_path).results()
    assert web.most_at_once == 3
    assert {(sent["X-Key"], sent["User-Agent"]) for _, sent in web.asked} == {("1", "me/1")}
    assert fetcher.ahead == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_agent": ""}, "--user-agent must be printable ASCII, and not empty"),
        ({"user_agent": "a\r\nX-Key: 1"}, "--user-agent must be printable ASCII"),
        ({"user_agent": "\u00fc"}, "--user-agent must be printable ASCII"),
        ({"images_at_once": 0}, "--images-at-once must be at least 1, not 0"),
        ({"connections_per_host": 0}, "--connections-per-host must be at least 1, not 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        caption_config(tmp_path, **options)
