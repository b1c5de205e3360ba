"""The links of SuperNodes to SuperLink and tail: TCP proxies that break all connections of a node, or slow it down.

They need no root, unlike network namespaces. What breaks is the connection: a link that is silent for 2 s would be
mended by TCP itself.
"""

import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from types import TracebackType
from typing import Self

CHUNK_BYTES = 4096
BUFFER_BYTES = 65536
"""of the proxy's sockets: what a link may hold that is not there yet"""
CONNECT_S = 10.0
_POLL_S = 0.05
Connection = tuple[socket.socket, socket.socket]


class Links:
    """Proxies for `nodes` SuperNodes; use as a context manager.

    Args:
        nodes: how many.
        superlink_port: on loopback.
        tail_port: the same.
        owner: the local port of a connection -> the node that opened it, None if that is gone.
    """

    def __init__(self, nodes: int, superlink_port: int, tail_port: int, owner: Callable[[int], int | None]) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self._open: dict[Connection, int] = {}
        self._down: set[int] = set()
        self._is_over = False
        self._bytes_per_s: dict[int, float] = {}
        self._busy = {(node, way): threading.Lock() for node in range(nodes) for way in ("up", "down")}
        self._superlink = [_listener() for _ in range(nodes)]
        self._tail = _listener()
        self._ports = superlink_port, tail_port

    @property
    def tail_address(self) -> str:
        """What clients are told."""
        return f"127.0.0.1:{self._tail.getsockname()[1]}"

    def superlink_address(self, node: int) -> str:
        """What a SuperNode is told."""
        return f"127.0.0.1:{self._superlink[node].getsockname()[1]}"

    def __enter__(self) -> Self:
        superlink_port, tail_port = self._ports
        for node, listener in enumerate(self._superlink):
            _start(self._accept, listener, superlink_port, lambda port, node=node: node)
        _start(self._accept, self._tail, tail_port, self._owner)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        for listener in (*self._superlink, self._tail):
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        self._break(range(len(self._superlink)))

    def cut(self, nodes: Collection[int], seconds: float) -> None:
        """Break all connections of `nodes`; for `seconds` nothing passes on new ones, as if their packets were lost."""
        with self._lock:
            self._down |= set(nodes)
        self._break(nodes)
        time.sleep(seconds)
        with self._lock:
            self._down -= set(nodes)

    def limit(self, nodes: Collection[int], bytes_per_s: float | None) -> None:
        """Let no more pass for each of `nodes`, either way; None: as much as comes."""
        with self._lock:
            for node in nodes:
                if bytes_per_s is None:
                    self._bytes_per_s.pop(node, None)
                else:
                    self._bytes_per_s[node] = bytes_per_s

    def _break(self, nodes: Collection[int]) -> None:
        with self._lock:
            broken = [connection for connection, node in self._open.items() if node in nodes]
        for connection in broken:
            self._close(connection)

    def _accept(self, listener: socket.socket, port: int, owner: Callable[[int], int | None]) -> None:
        while True:
            try:
                near, (_, near_port) = listener.accept()
            except OSError:
                return
            _start(self._join, near, near_port, port, owner)

    def _join(self, near: socket.socket, near_port: int, port: int, owner: Callable[[int], int | None]) -> None:
        node = owner(near_port)
        while node in self._down and not self._is_over:
            time.sleep(_POLL_S)
        try:
            if node is None or self._is_over:
                raise ConnectionRefusedError
            far = socket.create_connection(("127.0.0.1", port), CONNECT_S)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        with self._lock:
            self._open[near, far] = node
        for source, sink, way in ((near, far, "up"), (far, near, "down")):
            _start(self._pass_on, source, sink, (near, far), node, way)

    def _pass_on(self, source: socket.socket, sink: socket.socket, connection: Connection, node: int, way: str) -> None:
        with suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                if rate := self._bytes_per_s.get(node):
                    with self._busy[node, way]:
                        time.sleep(len(chunk) / rate)
                sink.sendall(chunk)
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        with self._lock:
            self._open.pop(connection, None)
        for end in connection:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _listener() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)  # inherited by what it accepts
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return listener


def _start(work: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()
