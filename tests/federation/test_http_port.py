"""The port for scrapers and probes: right answers to good requests, and next to no cost of all others."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation import http_port
from hsplit_flwr.federation.http_port import HttpPort, Page

pytestmark = pytest.mark.timeout(60)

MOST_THREADS = http_port.AT_A_TIME + 1


class Counted:
    """A page that says how often it was made."""

    made = 0

    def __call__(self) -> Page:
        self.made += 1
        return Page(f"made {self.made}\n".encode())


def broken() -> Page:
    raise ValueError("no figures")


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def port(counted: Counted) -> Iterator[HttpPort]:
    port = HttpPort("0", {"/metrics": counted, "/broken": broken}, "metrics-bind")
    yield port
    port.stop()


def place(port: HttpPort) -> tuple[str, int]:
    host, _, number = port.address.rpartition(":")
    return host, int(number)


def ask(port: HttpPort, path: str, method: str = "GET") -> tuple[int, str]:
    with closing(HTTPConnection(*place(port), timeout=20)) as connection:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def said(port: HttpPort, request: bytes) -> bytes:
    with socket.create_connection(place(port), timeout=20) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def threads() -> int:
    return sum(thread.name in ("http-port", "http-page") for thread in threading.enumerate())


def test_pages(port: HttpPort) -> None:
    assert place(port)[0] == "127.0.0.1", "a port alone is this machine's own"
    assert ask(port, "/metrics") == (200, "made 1\n")
    assert ask(port, "/metrics?name[]=up")[0] == 200
    assert ask(port, "/metrics", "HEAD") == (200, "")
    assert ask(port, "/") == (404, "Expected one of /broken, /metrics.\n")
    assert ask(port, "/metrics", "POST")[0] == 405
    assert ask(port, "/broken") == (503, "This page could not be made: ValueError('no figures').\n")


@pytest.mark.parametrize(
    "garbage", [b"", b"\r\n\r\n", b"\x16\x03\x01" * 500, b"GET /metrics\r\n\r\n", b"\x00" * (1 << 20)]
)
def test_garbage_is_refused(port: HttpPort, garbage: bytes) -> None:
    """A TLS hello, half a request, a megabyte of nothing."""
    try:
        answer = said(port, garbage)
    except OSError:  # cut off
        answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert ask(port, "/metrics")[0] == 200


def test_slow_scrapers_do_not_pile_up(port: HttpPort, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then kept a connection of http.server alive for good, with a thread of its own."""
    monkeypatch.setattr(http_port, "LONGEST_S", 1.0)
    with ExitStack() as opened:
        slow = [opened.enter_context(socket.create_connection(place(port), timeout=20)) for _ in range(10)]
        end, most = time.monotonic() + 3.0, 0
        while time.monotonic() < end:
            for connection in slow:
                try:
                    connection.send(b"G")
                except OSError:
                    continue  # it was cut off
            most = max(most, threads())
            time.sleep(0.1)
        assert most <= MOST_THREADS
    end = time.monotonic() + 10.0
    while ask(port, "/metrics")[0] != 200 and time.monotonic() < end:
        pass
    assert ask(port, "/metrics")[0] == 200


def test_who_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_port, "LONGEST_S", 1.0)
    port = HttpPort("127.0.0.1:0", {"/metrics": lambda: Page(bytes(64 << 20))}, "metrics-bind")
    try:
        with socket.create_connection(place(port), timeout=20) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            deadline = time.monotonic() + 10.0
            while not (served := threads() > 1) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert served
            while threads() > 1 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert threads() == 1
    finally:
        port.stop()


def test_many_scrapers_cost_next_to_nothing(port: HttpPort, counted: Counted) -> None:
    """A page is made once a second at most, and connections are taken with pauses."""
    stop, answers = threading.Event(), []

    def scrape() -> None:
        while not stop.is_set():
            try:
                answers.append(ask(port, "/metrics")[0])
            except OSError:
                continue

    scrapers = [threading.Thread(target=scrape) for _ in range(20)]
    for scraper in scrapers:
        scraper.start()
    time.sleep(3.0)
    most = threads()
    stop.set()
    for scraper in scrapers:
        scraper.join(20)
    assert set(answers) == {200}
    assert counted.made <= 5
    assert len(answers) <= 4.5 / http_port.PAUSE_S
    assert most <= MOST_THREADS


def test_a_stopped_port_is_free_again(port: HttpPort) -> None:
    port.stop()
    port.stop()
    again = HttpPort(port.address, {}, "metrics-bind")
    assert again.address == port.address
    again.stop()


def test_a_port_that_is_taken_says_so(port: HttpPort) -> None:
    with pytest.raises(ConfigError, match=r"Expected to listen on 127.0.0.1:\d+ \(metrics-bind\), found: the address"):
        HttpPort(port.address, {}, "metrics-bind")


@pytest.mark.parametrize("bind", ["nowhere", "::1:9100", "127.0.0.1:99999"])
def test_what_is_no_address_is_refused(bind: str) -> None:
    with pytest.raises(ConfigError, match="metrics-bind"):
        HttpPort(bind, {}, "metrics-bind")


def test_beyond_loopback_people_are_warned(caplog: pytest.LogCaptureFixture) -> None:
    port = HttpPort("0.0.0.0:0", {"/metrics": Counted()}, "metrics-bind")
    assert "whoever reaches it can read its pages" in caplog.text
    port.stop()
