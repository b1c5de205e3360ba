"""A few pages over HTTP, for scrapers and probes; whoever asks, and however, costs next to nothing.

A scraper may be slow, broken or hostile: connections are taken one after another with a pause between them, few are
served at a time, each has a deadline for all of it, and a page is made anew at most once a second. What is beyond waits
in the system's own queue, or is cut off.
"""

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.addresses import ListeningAddress, listening_address, why_not_bound

AT_A_TIME = 4
"""connections that are served"""
PAUSE_S = 0.02
"""between two connections: at most 50 a second"""
LONGEST_S = 5.0
"""from the first byte of a request to the last one of the answer"""
FRESH_S = 1.0
"""how long a page may be served again"""
LARGEST_REQUEST = 8 << 10
"""bytes of a request's head; what may follow is not read"""
_WAITING = 16
_REQUEST = re.compile(rb"([A-Z]+) (/[^ ?]*)(?:\?[^ ]*)? HTTP/1\.[01]\r?\n")
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True)
class Page:
    """An answer."""

    body: bytes
    media_type: str = "text/plain; charset=utf-8"
    status: int = 200


class HttpPort:
    """Serves `pages` from the moment it is made, in daemon threads of its own.

    Args:
        bind: host:port; a port alone means this machine's own (loopback). Port 0 takes a free one.
        pages: path -> makes the page. What it raises is a 503 that says so.
        key: what people typed `bind` as, for errors.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(self, bind: str, pages: Mapping[str, Callable[[], Page]], key: str) -> None:
        self._pages = {path: _Kept(make) for path, make in pages.items()}
        where = _parsed(bind, key)
        self._socket = _listening(where, bind, key)
        self._free = threading.Semaphore(AT_A_TIME)
        self._stopped = threading.Event()
        self.address = f"{where.host}:{self._socket.getsockname()[1]}"
        if not where.is_loopback:
            _log.warning("%s listens on %s: whoever reaches it can read its pages, in plain text", key, self.address)
        threading.Thread(target=self._accept, name="http-port", daemon=True).start()

    def stop(self) -> None:
        """Listen no longer; what is being answered ends within `LONGEST_S`. May be called again."""
        self._stopped.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a connection
        self._socket.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:  # stopped, or the caller was gone before it was its turn, or no files are left
                time.sleep(PAUSE_S)
                continue
            if self._free.acquire(timeout=LONGEST_S):
                threading.Thread(target=self._serve, args=(connection,), name="http-page", daemon=True).start()
            else:
                connection.close()
            time.sleep(PAUSE_S)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):  # whoever leaves before the answer does not get it
                end = time.monotonic() + LONGEST_S
                head = _read_head(connection, end)
                answer = self._answer(head)
                connection.settimeout(max(0.001, end - time.monotonic()))
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                _drain(connection, end)
        finally:
            self._free.release()

    def _answer(self, head: bytes) -> bytes:
        request = _REQUEST.match(head)
        if request is None:
            return _packed(Page(b"Expected a request such as GET / HTTP/1.1.\n", status=400))
        method, path = request[1], request[2].decode("ascii", "replace")
        if method not in (b"GET", b"HEAD"):
            return _packed(Page(b"Expected GET.\n", status=405))
        page = self._pages.get(path)
        if page is None:
            there = ", ".join(sorted(self._pages))
            return _packed(Page(f"Expected one of {there}.\n".encode(), status=404))
        return _packed(page.page(), with_body=method == b"GET")


class _Kept:
    """A page that is made anew only when it is no longer fresh."""

    def __init__(self, make: Callable[[], Page]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._page: Page | None = None
        self._made_at = 0.0

    def page(self) -> Page:
        """The page, at most `FRESH_S` old."""
        with self._lock:
            now = time.monotonic()
            if self._page is None or now - self._made_at >= FRESH_S:
                try:
                    self._page = self._make()
                except Exception as error:  # a page is no reason to end anything
                    self._page = Page(f"This page could not be made: {error!r}.\n".encode(), status=503)
                self._made_at = now
            return self._page


def _parsed(bind: str, key: str) -> ListeningAddress:
    try:
        return listening_address(
            f"127.0.0.1:{bind.removeprefix(':')}" if bind.removeprefix(":").isdigit() else bind, "x"
        )
    except ConfigError as error:
        raise ConfigError(f"Expected {key} as host:port or a port of this machine, found {bind!r}.") from error


def _listening(where: ListeningAddress, bind: str, key: str) -> socket.socket:
    host = where.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(("" if host == "*" else host, where.port), family=family, backlog=_WAITING)
    except OSError as error:
        raise ConfigError(
            f"Expected to listen on {bind} ({key}), found: {why_not_bound(where) or error}. "
            "Choose a free port (0 takes any) of an address of this machine."
        ) from error


def _read_head(connection: socket.socket, end: float) -> bytes:
    """What came up to the empty line that ends a request's head, or to its limit.

    Raises:
        OSError: too late, or the connection broke.
    """
    head = b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < LARGEST_REQUEST:
        connection.settimeout(max(0.001, end - time.monotonic()))
        part = connection.recv(LARGEST_REQUEST - len(head))
        if not part:
            break
        head += part
    return head


def _drain(connection: socket.socket, end: float) -> None:
    """Take in what else came: closing with bytes unread would reset the connection before the answer is read."""
    for _ in range(_WAITING):
        connection.settimeout(max(0.001, min(0.2, end - time.monotonic())))
        if not connection.recv(LARGEST_REQUEST):
            return


def _packed(page: Page, *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {page.status} {_REASONS[page.status]}\r\nContent-Type: {page.media_type}\r\n"
        f"Content-Length: {len(page.body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + (page.body if with_body else b"")
