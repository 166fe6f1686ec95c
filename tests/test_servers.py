"""A server has so many connections and no more, is left alone when it asks for it, and given up if it is not there."""

import random
import threading
import time

import pytest

from qvl_batch.errors import ImageError
from qvl_batch.input import servers as module
from qvl_batch.input.servers import FAILURES, LONGEST_PAUSE, LONGEST_WAIT, REST, Gate, Servers, Slot


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, and its time."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_those_who_ask_for_one_server_wait_for_each_other_and_for_no_other_server():
    all_, servers, begun = Gate(3), Servers(1), []
    slots = [Slot(all_, servers, name, lambda _, name=name: begun.append(name)) for name in "aaabc"]
    assert begun == ["a", "b", "c"]  # two of them do not hold up the others
    slots[0].leave()
    slots[0].leave()
    assert begun == ["a", "b", "c", "a"]
    for slot in slots[1:]:
        slot.leave()
    assert begun == ["a", "b", "c", "a", "a"]
    assert all_.is_idle
    assert len(servers) == 0


def test_images_on_their_way_come_before_those_that_are_not_begun():
    gate, order = Gate(1), []
    gate.ask(lambda: order.append("first"))
    for name in "ab":
        gate.ask(lambda name=name: order.append(name))
    for name in "xy":
        gate.ask(lambda name=name: order.append(name), in_hurry=True)
    for _ in range(5):
        gate.leave()
    assert order == ["first", "x", "y", "a", "b"]
    assert gate.is_idle


def test_who_no_longer_waits_holds_nothing():
    all_, servers = Gate(2), Servers(1)
    slots = [Slot(all_, servers, name, lambda _: None) for name in "ab"]
    with pytest.raises(TimeoutError):
        slots[0].move("b", 0.01)
    slots[1].leave()
    slots[0].leave()
    assert all_.is_idle
    assert len(servers) == 0


def test_images_that_want_each_others_servers_do_not_wait_for_ever():
    all_, servers, done = Gate(2), Servers(1), []

    def fetch(slot, first, second):
        for server in (second, first) * 50:
            slot.move(server, 10.0)
        slot.leave()
        done.append(first)

    for first, second in ("ab", "ba", "ab", "ba", "bc", "ca"):
        start = lambda slot, f=first, s=second: threading.Thread(target=fetch, args=(slot, f, s)).start()  # noqa: E731
        Slot(all_, servers, first, start)
    until = time.monotonic() + 20
    while len(done) < 6 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(done) == ["a", "a", "b", "b", "b", "c"]
    assert all_.is_idle
    assert len(servers) == 0


def test_bounds_hold_whatever_happens_at_once():
    all_, servers, lock = Gate(6), Servers(2), threading.Lock()
    now, most = dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 0)
    ended = threading.Semaphore(0)

    def fetch(slot, name):
        for server in (name, random.choice("abcde")):  # noqa: S311
            try:
                slot.move(server, 0.02)
            except TimeoutError:
                break
            with lock:
                now[server] += 1
                most[server] = max(most[server], now[server])
                assert sum(now.values()) <= 6
            time.sleep(0.002)
            with lock:
                now[server] -= 1
        slot.leave()
        ended.release()

    for at in range(300):
        name = "abcde"[at % 5]
        start = lambda slot, name=name: threading.Thread(target=fetch, args=(slot, name)).start()  # noqa: E731
        Slot(all_, servers, name, start)
    assert all(ended.acquire(timeout=20) for _ in range(300))
    assert set(most.values()) == {2}
    assert all_.is_idle
    assert len(servers) == 0


def test_a_server_that_cannot_be_reached_is_asked_again_after_a_rest(clock):
    servers = Servers(1)
    for _ in range(FAILURES - 1):
        servers.failed("a:80", "nobody there")
    assert servers.wait_before("a:80", is_first=True) == 0
    servers.failed("a:80", "nobody there")
    message = (
        r"^was not asked for: a:80 could not be reached for 3 images in a row or more \(nobody there\), and is asked"
    )
    for _ in range(2):
        with pytest.raises(ImageError, match=message):
            servers.wait_before("a:80", is_first=True)
    # What has begun ends as it would have, and others are not concerned.
    assert servers.wait_before("a:80", is_first=False) == servers.wait_before("b:80", is_first=True) == 0
    clock[0] += REST
    assert servers.wait_before("a:80", is_first=True) == 0  # one finds out
    with pytest.raises(ImageError, match=message):
        servers.wait_before("a:80", is_first=True)
    servers.answered("a:80")
    assert servers.wait_before("a:80", is_first=True) == 0
    servers.failed("a:80", "nobody there")
    assert servers.wait_before("a:80", is_first=True) == 0


def test_failures_count_only_in_a_row():
    servers = Servers(1)
    for _ in range(5 * FAILURES):
        servers.failed("a:80", "nobody there")
        servers.answered("a:80")
    assert servers.wait_before("a:80", is_first=True) == 0


def test_a_pause_is_waited_for_unless_it_is_long(clock):
    servers = Servers(1)
    servers.pause("a:80", 5.0)
    servers.pause("a:80", 2.0)
    assert servers.wait_before("a:80", is_first=False) == 5
    clock[0] += 6
    assert servers.wait_before("a:80", is_first=True) == 0
    servers.pause("a:80", 1e12)
    with pytest.raises(ImageError, match=f"^was not asked for: a:80 wants a longer pause than the {LONGEST_WAIT:g} s"):
        servers.wait_before("a:80", is_first=False)
    clock[0] += LONGEST_PAUSE
    assert servers.wait_before("a:80", is_first=False) == 0


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 100)
    all_, servers = Gate(1000), Servers(1)
    busy = [Slot(all_, servers, f"busy-{at}", lambda _: None) for at in range(50)]
    for at in range(1000):
        servers.failed(f"a{at}", "nobody there")
    assert len(servers) == 100
    for slot in busy:
        slot.leave()
    assert len(servers) == 50
