"""What went through the tail's door so far, for whoever watches a run."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class TrafficFigures:
    """Counts since the door was opened."""

    streams: int
    """open now"""
    admitted: int
    """streams that were let in, those of clients that came back included"""
    bytes_up: int
    """frames of clients"""
    bytes_down: int
    refusals: dict[str, int]
    """code of an `ExchangeError` -> how often a stream ended with it"""


class Traffic:
    """Counts streams, bytes and refusals. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams = self._admitted = self._up = self._down = 0
        self._refusals: Counter[str] = Counter()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count a stream that was let in, as long as the ``with`` block lasts."""
        with self._lock:
            self._streams += 1
            self._admitted += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams -= 1

    def received(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        """`frames` of a client, counted."""
        for frame in frames:
            with self._lock:
                self._up += len(frame)
            yield frame

    def sent(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        """`frames` for a client, counted."""
        for frame in frames:
            with self._lock:
                self._down += len(frame)
            yield frame

    def refuse(self, code: str) -> None:
        """Count a stream that ended with an error of that code."""
        with self._lock:
            self._refusals[code] += 1

    def figures(self) -> TrafficFigures:
        """The counts so far."""
        with self._lock:
            return TrafficFigures(self._streams, self._admitted, self._up, self._down, dict(self._refusals))
