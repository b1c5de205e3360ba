"""What the shared tail has done so far and what it is doing, for whoever watches a run."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Doing = Literal["idle", "waiting", "computing"]
"""between rounds; for clients of an open round; at a step"""


class Standing(NamedTuple):
    """Where the clients of the open round are."""

    to_come: int = 0
    """expected, and not there yet"""
    joined: int = 0
    """taking part"""
    waiting: int = 0
    """of those that joined: their batch waits for its turn"""


@dataclass(frozen=True, kw_only=True)
class TailActivity:
    """A moment of a tail, and what it did until then."""

    doing: Doing
    doing_s: float
    """how long it has been doing that"""
    seconds: dict[Doing, float]
    """all time so far, what is under way included"""
    steps: int
    """that all who take part had their turn in"""
    batches: int
    """of clients, that were answered"""
    tokens: int
    """target tokens in those"""
    clients: Standing
    failure: str
    """what ended the tail's worker; empty: nothing"""


class ActivityLog:
    """Keeps the time of one tail. Written by its worker, read from any thread.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._doing: Doing = "idle"
        self._since = clock()
        self._seconds: dict[Doing, float] = {"idle": 0.0, "waiting": 0.0, "computing": 0.0}
        self._steps = self._batches = self._tokens = 0
        self._failure = ""

    def begin(self, doing: Doing) -> None:
        """Note that the tail does this from now on."""
        with self._lock:
            now = self._clock()
            self._seconds[self._doing] += now - self._since
            self._doing, self._since = doing, now

    def count(self, batches: int, tokens: int, *, ends_step: bool) -> None:
        """Count a turn that was taken."""
        with self._lock:
            self._batches += batches
            self._tokens += tokens
            self._steps += ends_step

    def fail(self, reason: str) -> None:
        """Note what ended the tail's worker; empty: it works again."""
        with self._lock:
            self._failure = reason

    def now(self, clients: Standing) -> TailActivity:
        """This moment, with the `clients` as they are."""
        with self._lock:
            doing_s = self._clock() - self._since
            seconds = {**self._seconds, self._doing: self._seconds[self._doing] + doing_s}
            return TailActivity(
                doing=self._doing,
                doing_s=doing_s,
                seconds=seconds,
                steps=self._steps,
                batches=self._batches,
                tokens=self._tokens,
                clients=clients,
                failure=self._failure,
            )
