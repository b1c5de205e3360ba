"""A TCP proxy whose connections can be cut."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 1 << 16
_WAIT_S = 10.0


class CuttableProxy:
    """Passes on what comes to `address`; use as a context manager.

    Args:
        target: host:port behind it.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._lock = threading.Lock()
        self._open: set[tuple[socket.socket, socket.socket]] = set()
        self._unheard: set[socket.socket] = set()
        self._is_down = False
        self.passed = {"up": 0, "down": 0}
        """bytes from clients, and to them"""
        self._cuts: dict[str, list[int]] = {"up": [], "down": []}
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self.cut()
        for end in self._unheard:
            _close(end)

    def cut(self, *, stay_down: bool = False, near_only: bool = False) -> None:
        """Break every connection.

        Args:
            stay_down: and all further ones, until `mend`.
            near_only: the server does not hear of it.
        """
        with self._lock:
            self._is_down = stay_down
            broken, self._open = self._open, set()
            if near_only:
                self._unheard |= {far for _, far in broken}
        for near, far in broken:
            for end in (near,) if near_only else (near, far):
                _close(end)

    def cut_at(self, way: str, *passed: int) -> None:
        """Break every connection each time that so many bytes have gone ``up`` or ``down`` in all."""
        self._cuts[way] = sorted(passed)

    def mend(self) -> None:
        """Pass on again."""
        with self._lock:
            self._is_down = False

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, _WAIT_S)
            except OSError:
                return
            far.settimeout(None)
            with self._lock:
                is_down = self._is_down
                if not is_down:
                    self.connections += 1
                    self._open.add((near, far))
            if is_down:
                near.close()
                far.close()
                continue
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._pass_on, args=(source, sink, way), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK_BYTES):
                with self._lock:
                    self.passed[way] += len(chunk)
                    is_due = bool(self._cuts[way]) and self.passed[way] >= self._cuts[way][0]
                    if is_due:
                        self._cuts[way].pop(0)
                if is_due:
                    self.cut()
                    return
                sink.sendall(chunk)
        with self._lock:
            unheard = self._unheard & {source, sink}
        for end in {source, sink} - unheard:
            _close(end)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
