"""What this process knows of the servers that it asks for images: how many connections each has, which asked for a
pause, and which could not be reached.

What enters: names of servers, and how asking them went. What leaves: permission to ask, at once or later, or an
`ImageError`. There is a record of a server while it is asked, and for those that are in trouble of the last ones.

This module knows nothing of HTTP, and opens no connection.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qvl_batch.errors import ImageError

#: Images in a row of a server that could not be reached, after which others are not tried; and for how many seconds.
FAILURES, REST = 3, 60.0
#: Longest pause in seconds that an image waits; and longest that a server can ask for.
LONGEST_WAIT, LONGEST_PAUSE = 30.0, 3600.0
#: Most servers that are remembered while nobody asks them.
REMEMBERED = 10_000


Granted = Callable[[], object]


class Gate:
    """Lets so many pass at a time, in the order in which they ask, those in a hurry first; threads share it.

    Args:
        at_once: how many.
    """

    def __init__(self, at_once: int) -> None:
        self._lock = threading.RLock()
        self._free, self._at_once = at_once, at_once
        self._in_hurry: deque[Granted] = deque()
        self._waiting: deque[Granted] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether nobody has passed."""
        return self._free == self._at_once

    def ask(self, granted: Granted, *, in_hurry: bool = False) -> None:
        """Ask to pass; `granted` is called as soon as one may, and must not block."""
        with self._lock:
            if not self._free:
                (self._in_hurry if in_hurry else self._waiting).append(granted)
                return
            self._free -= 1
            granted()

    def withdraw(self, granted: Granted) -> bool:
        """Be in a hurry no longer, and do not pass; False if `granted` was called already."""
        with self._lock:
            if granted not in self._in_hurry:
                return False
            self._in_hurry.remove(granted)
            return True

    def leave(self) -> None:
        """Let the next one pass."""
        with self._lock:
            if waiting := self._in_hurry or self._waiting:
                waiting.popleft()()
            else:
                self._free += 1


@dataclass(slots=True)
class _Server:
    gate: Gate
    failures: int = 0
    why: str = ""
    asked_again_at: float = 0.0
    free_at: float = 0.0


class Servers:
    """Servers by name; threads share it.

    Args:
        at_once: connections to a server at a time.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._lock = threading.RLock()
        self._known: OrderedDict[str, _Server] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def ask(self, name: str, granted: Granted, *, in_hurry: bool = False) -> None:
        """Ask for a connection; `granted` is called as soon as there is one, and must not block."""
        with self._lock:
            self._of(name).gate.ask(granted, in_hurry=in_hurry)

    def withdraw(self, name: str, granted: Granted) -> bool:
        """As `Gate.withdraw`."""
        with self._lock:
            return self._of(name).gate.withdraw(granted)

    def leave(self, name: str) -> None:
        """Give a connection to the next who asked."""
        with self._lock:
            server = self._of(name)
            server.gate.leave()
            if server.gate.is_idle and not server.failures and server.free_at < time.monotonic():
                del self._known[name]

    def wait_before(self, name: str, *, is_first: bool) -> float:
        """Seconds to wait before the server is asked.

        Args:
            name: of the server.
            is_first: an image is begun. Only then does it matter that the server could not be reached.

        Raises:
            ImageError: the pause that the server asked for is too long, or it could not be reached for the last images.
        """
        with self._lock:
            server, now = self._known.get(name), time.monotonic()
            if server is None:
                return 0.0
            if is_first and server.failures >= FAILURES:
                if now < server.asked_again_at:
                    raise ImageError(
                        f"was not asked for: {name} could not be reached for {FAILURES} images in a row or more "
                        f"({server.why}), and is asked again {REST:g} s after the last"
                    )
                # This image finds out; others do not wait for it.
                server.asked_again_at = now + REST
            if server.free_at - now > LONGEST_WAIT:
                raise ImageError(
                    f"was not asked for: {name} wants a longer pause than the {LONGEST_WAIT:g} s that an image waits"
                )
            return max(0.0, server.free_at - now)

    def pause(self, name: str, seconds: float) -> None:
        """The server wants not to be asked for so long."""
        with self._lock:
            server = self._of(name)
            server.free_at = max(server.free_at, time.monotonic() + min(seconds, LONGEST_PAUSE))

    def answered(self, name: str) -> None:
        """The server was reached."""
        with self._lock:
            if name in self._known:
                self._known[name].failures = 0

    def failed(self, name: str, why: str) -> None:
        """The server could not be reached for an image, in all attempts."""
        with self._lock:
            server = self._of(name)
            server.failures += 1
            server.why, server.asked_again_at = why, time.monotonic() + REST

    def _of(self, name: str) -> _Server:
        """The record of a server, a new one in place of the oldest if there are too many. Needs the lock."""
        if name not in self._known and len(self._known) >= REMEMBERED:
            oldest = next((key for key, each in self._known.items() if each.gate.is_idle), None)
            if oldest is not None:
                del self._known[oldest]
        server = self._known.setdefault(name, _Server(Gate(self._at_once)))
        self._known.move_to_end(name)
        return server


class Slot:
    """Permission of an image to be fetched: it is one of those at a time, and has a connection to one server.

    Args:
        all_: images at a time.
        servers: of this process.
        server: to ask first.
        granted: is called as soon as there is permission, and must not block.
    """

    def __init__(self, all_: Gate, servers: Servers, server: str, granted: Callable[["Slot"], object]) -> None:
        self.servers = servers
        self._all, self._server, self._is_held = all_, server, True
        # In this order: those who wait for one server do not take the places of others.
        servers.ask(server, lambda: all_.ask(lambda: granted(self)))

    def move(self, server: str, seconds: float) -> None:
        """Have a connection to this server in place of the one to another.

        All is given away first, since images that hold what others wait for would wait for ever. Those that are not
        begun yet come after it, since its time is running.

        Raises:
            TimeoutError: there was none within these seconds.
        """
        if self._is_held and self._server == server:
            return
        self.leave()
        until = time.monotonic() + seconds
        ask, withdraw = partial(self.servers.ask, server, in_hurry=True), partial(self.servers.withdraw, server)
        if not _wait(ask, withdraw, seconds):
            raise TimeoutError
        if not _wait(partial(self._all.ask, in_hurry=True), self._all.withdraw, until - time.monotonic()):
            self.servers.leave(server)
            raise TimeoutError
        self._server, self._is_held = server, True

    def leave(self) -> None:
        """Give all of it away."""
        if self._is_held:
            self._is_held = False
            self._all.leave()
            self.servers.leave(self._server)


def _wait(ask: Callable[[Granted], None], withdraw: Callable[[Granted], bool], seconds: float) -> bool:
    """Ask, and wait; False if it was not granted within these seconds."""
    ready = threading.Event()
    granted = ready.set  # one object: each access makes another
    ask(granted)
    return ready.wait(max(seconds, 0.0)) or not withdraw(granted)
