"""A web server of a test: what it was asked, and what it answers."""

import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What a server answers: a status, headers, a body, and seconds that it takes."""

    status: int = 200
    headers: dict = field(default_factory=dict)
    body: bytes = b"from afar"
    seconds: float = 0.0


@dataclass
class Web:
    """A server. `answers` has what it answers by path, one for each time that it is asked or one for all times.

    Args:
        host: its address.
    """

    host: str = "127.0.0.1"
    port: int = 0
    answers: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    most_at_once: int = 0
    scheme: str = "http"

    @property
    def url(self):
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def paths(self):
        return [path for path, _ in self.asked]

    def headers_of(self, path):
        """Headers of the only request for a path."""
        (found,) = [headers for asked, headers in self.asked if asked == path]
        return found

    def moved(self, path, to, status=302):
        """Answer with a redirect."""
        self.answers[path] = Answer(status, {"Location": to})


@contextmanager
def serving(host="127.0.0.1", tls=None):
    """A server on a port of its own; `tls` is its side of TLS."""
    web, lock, now = Web(host), threading.Lock(), Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with lock:
                web.asked.append((self.path, dict(self.headers)))
                now["now"] += 1
                web.most_at_once = max(web.most_at_once, now["now"])
                answer = web.answers.get(self.path, Answer())
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
            if callable(answer):
                answer = answer(self)
            time.sleep(answer.seconds)
            with lock:
                now["now"] -= 1
            with suppress(OSError):
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

        def handle_error(self, *_):
            pass

    with Server((host, 0), Handler) as served:
        web.port = served.server_port
        if tls is not None:
            web.scheme = "https"
            # Shakes hands in the thread of the request.
            served.socket = tls.wrap_socket(served.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=served.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield web
        finally:
            served.shutdown()
            thread.join()
