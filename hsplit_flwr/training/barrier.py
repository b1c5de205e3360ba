"""Who takes part in the tail's next step: start gate, step barrier, straggler limit. No tensors, no threads.

*Gate*: while no client is under way, the first ones wait for `concurrency` clients (or for all that are still to come,
if those are fewer) or for `start_gate_s`, so that those who run at the same time start together.
*Barrier*: a step takes the requests of every member; who has not asked `straggler_limit_s` after the first request of
the step is dropped from this step (not from the round), and is not waited for until it asks again.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hsplit_flwr.common.checks import require
from hsplit_flwr.errors import ExchangeError

Request = TypeVar("Request")
_POLL_S = 1.0


@dataclass(frozen=True)
class BarrierLimits:
    """Waiting times of the tail, in seconds."""

    start_gate_s: float = 60.0
    straggler_limit_s: float = 30.0
    step_limit_s: float = 300.0
    """how long a client's request may wait for its answer at all"""

    def __post_init__(self) -> None:
        for name in ("start_gate_s", "straggler_limit_s", "step_limit_s"):
            require(getattr(self, name) > 0, name, "> 0 s", getattr(self, name))


class StepBarrier(Generic[Request]):
    """Collects one request per client and hands out the set of requests that make a step."""

    def __init__(
        self,
        clients: Iterable[str],
        concurrency: int,
        limits: BarrierLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._to_come = set(clients)
        self._withdrawn: set[str] = set()
        self._concurrency = max(1, concurrency)
        self._limits = limits
        self._clock = clock
        self._changed = threading.Condition()
        self._members: set[str] = set()
        self._lagging: set[str] = set()
        self._pending: dict[str, Request] = {}
        self._gate_since = clock()
        self._gate_open = False
        self._asked_since = clock()
        self._closed = False
        self.dropped: dict[str, int] = {}
        """steps from which each straggler was dropped"""

    def join(self, client: str) -> None:
        """`client` takes part from now on.

        Raises:
            ExchangeError: ``unknown_client`` (not of this round, already in it or done with it) or ``round_closed``.
        """
        with self._changed:
            if self._closed:
                raise ExchangeError("round_closed", "Expected an open round, found a closed one. Ask for a new task.")
            if client not in self._to_come:
                raise ExchangeError("unknown_client", f"Expected a client still to come, found {client!r}.")
            self._to_come.discard(client)
            if not self._members:
                self._gate_since, self._gate_open = self._clock(), False
            self._members.add(client)
            self._changed.notify_all()

    def withdraw(self, client: str) -> None:
        """Do not wait for `client` at the gate: it failed before it joined. It may still join."""
        with self._changed:
            self._withdrawn.add(client)
            self._changed.notify_all()

    def leave(self, client: str) -> Request | None:
        """`client` is done or gone; returns its request if nobody has taken that yet: it will be in no step."""
        with self._changed:
            self._members.discard(client)
            self._lagging.discard(client)
            untaken = self._pending.pop(client, None)
            self._changed.notify_all()
            return untaken

    def ask(self, client: str, request: Request) -> None:
        """Put in `client`'s request for the next step."""
        with self._changed:
            if self._closed or client not in self._members:
                raise ExchangeError("round_closed", "Expected an open round, found a closed one. Ask for a new task.")
            if client in self._pending:
                raise ExchangeError("wrong_step", f"Expected one request at a time, found a second of {client!r}.")
            if not self._pending:
                self._asked_since = self._clock()
            self._pending[client] = request
            self._lagging.discard(client)
            self._changed.notify_all()

    def take(self) -> list[Request] | None:
        """The requests of the next step, ordered by client; None once the round is closed."""
        with self._changed:
            while not self._closed:
                wait_s = self._seconds_to_wait()
                if wait_s <= 0:
                    return self._hand_out()
                self._changed.wait(min(wait_s, _POLL_S))
            return None

    def close(self) -> list[Request]:
        """Close the round; returns the requests that nobody took."""
        with self._changed:
            self._closed = True
            left = list(self._pending.values())
            self._pending.clear()
            self._changed.notify_all()
            return left

    def _seconds_to_wait(self) -> float:
        if not self._pending:
            return _POLL_S
        now = self._clock()
        if not self._gate_open:
            expected = min(self._concurrency, len(self._members) + len(self._to_come - self._withdrawn))
            opens = self._gate_since + self._limits.start_gate_s
            if len(self._members) < expected and now < opens:
                return opens - now
            self._gate_open = True
            self._asked_since = now
        if self._members - self._lagging <= self._pending.keys():
            return 0.0
        return self._asked_since + self._limits.straggler_limit_s - now

    def _hand_out(self) -> list[Request]:
        late = self._members - self._lagging - self._pending.keys()
        for client in late:
            self.dropped[client] = self.dropped.get(client, 0) + 1
        self._lagging |= late
        step = [self._pending[client] for client in sorted(self._pending)]
        self._pending.clear()
        return step
