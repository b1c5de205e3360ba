"""Frames that are taken in before they are asked for: how many, and what ends it."""

import threading
import time
from collections.abc import Iterator

import pytest

from hsplit_flwr.exchange.read_ahead import read_ahead

pytestmark = pytest.mark.timeout(20)
SOON_S = 5.0
NOT_S = 0.05


class Link:
    """Frames that come one by one; `taken` says how many were."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.taken = 0
        self._count = count
        self._error = error

    def __iter__(self) -> Iterator[bytes]:
        for number in range(self._count):
            self.taken = number + 1
            yield bytes([number])
        if self._error:
            raise self._error

    def wait_for(self, taken: int) -> None:
        end = time.monotonic() + SOON_S
        while self.taken < taken:
            assert time.monotonic() < end, f"{self.taken} of {taken} frames were taken in"
            time.sleep(0.001)


def test_so_many_frames_are_taken_in_and_no_more() -> None:
    link = Link(6)
    frames = read_ahead(iter(link), 2)
    assert next(frames) == b"\x00"
    link.wait_for(4)  # one was given, two lie there, one is in hand
    time.sleep(NOT_S)
    assert link.taken == 4
    assert list(frames) == [bytes([number]) for number in range(1, 6)]


def test_without_it_nothing_is_taken_in() -> None:
    link = Link(3)
    frames = read_ahead(iter(link), 0)
    next(frames)
    time.sleep(NOT_S)
    assert link.taken == 1


def test_an_error_comes_in_its_place() -> None:
    frames = read_ahead(iter(Link(2, ValueError("torn"))), 4)
    assert [next(frames), next(frames)] == [b"\x00", b"\x01"]
    with pytest.raises(ValueError, match="torn"):
        next(frames)


def test_who_stops_early_leaves_no_thread() -> None:
    frames = read_ahead(iter(Link(100)), 1)
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    end = time.monotonic() + SOON_S
    while any(thread.name == "tail-read-ahead" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
