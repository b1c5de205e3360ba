"""Who takes part in the tail's next step, and whose turn it is: start gate, turns, straggler limit. No tensors.

*Gate*: while no client is under way, the first ones wait for `concurrency` clients (or for all that are still to come,
if those are fewer) or for `start_gate_s`, so that those who run at the same time start together.
*Turns*: a step takes every member once, in the order of their names, whoever asks first: what is computed does not
depend on who is fast. Each has its turn as soon as it has asked, while those after it may still be under way; a batch
that comes in parts is one turn. Where members step *together*, a turn takes one part of everybody.
*Stragglers*: who is waited for and has not asked after `straggler_limit_s`, though others have, is dropped from this
step (not from the round), and is not waited for until it asks again.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from hsplit_flwr.common.checks import is_at_least, require
from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.training.activity import Standing

Request = TypeVar("Request")
_POLL_S = 1.0


@dataclass(frozen=True)
class BarrierLimits:
    """Waiting times of the tail, in seconds."""

    start_gate_s: float = 60.0
    straggler_limit_s: float = 30.0
    step_limit_s: float = 300.0
    """how long a client's request may wait for its answer at all"""
    reconnect_grace_s: float = 30.0
    """how long a client whose connection broke may take to come back to its round; until then it is waited for as
    anybody who is late. 0: it leaves at once"""

    def __post_init__(self) -> None:
        require(is_at_least(self.reconnect_grace_s, 0), "reconnect_grace_s", ">= 0 s", self.reconnect_grace_s)
        for name in ("start_gate_s", "straggler_limit_s", "step_limit_s"):
            require(getattr(self, name) > 0, name, "> 0 s", getattr(self, name))


class Turn(NamedTuple, Generic[Request]):
    """What the tail computes next."""

    requests: list[Request]
    """ordered by client; none: those who were still waited for in this step are late or gone"""
    ends_step: bool
    """as far as is known, nobody else has a turn in this step"""


class _Asked(NamedTuple, Generic[Request]):
    request: Request
    last: bool


class StepBarrier(Generic[Request]):
    """Collects one request per client and hands them out turn by turn.

    Args:
        clients: who is expected in the round.
        concurrency: how many of them run at a time.
        limits: waiting times.
        together: a turn takes everybody, not one client.
        clock: seconds.
    """

    def __init__(
        self,
        clients: Iterable[str],
        concurrency: int,
        limits: BarrierLimits,
        *,
        together: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._to_come = set(clients)
        self._withdrawn: set[str] = set()
        self._concurrency = max(1, concurrency)
        self._limits = limits
        self._together = together
        self._clock = clock
        self._changed = threading.Condition()
        self._members: set[str] = set()
        self._lagging: set[str] = set()
        self._done: set[str] = set()
        """members that had their turn in this step"""
        self._turn: str | None = None
        """whose batch is under way: some of its parts were handed out, and more are to come"""
        self._under_way = False
        """something of this step was handed out"""
        self._pending: dict[str, _Asked[Request]] = {}
        self._gate_since = clock()
        self._gate_open = False
        self._waiting_since = clock()
        self._closed: ExchangeError | None = None
        self.dropped: dict[str, int] = {}
        """steps from which each straggler was dropped"""

    def join(self, client: str) -> None:
        """`client` takes part from now on.

        Raises:
            ExchangeError: ``unknown_client`` (not of this round, already in it or done with it) or ``round_closed``.
        """
        with self._changed:
            self._require_open()
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
            return untaken.request if untaken else None

    def ask(self, client: str, request: Request, *, last: bool = True) -> None:
        """Put in `client`'s request for its next turn; `last`: it ends the client's turn, no part is to follow."""
        with self._changed:
            self._require_open()
            if client not in self._members:
                raise _over()
            if client in self._pending:
                raise ExchangeError("wrong_step", f"Expected one request at a time, found a second of {client!r}.")
            if not self._pending:
                self._waiting_since = self._clock()
            self._pending[client] = _Asked(request, last)
            self._lagging.discard(client)
            self._changed.notify_all()

    def take(self) -> Turn[Request] | None:
        """The next turn; None once the round is closed. Whoever takes it has answered the turn before."""
        with self._changed:
            self._waiting_since = self._clock()  # while the tail computed, nobody waited for a client
            while not self._closed:
                if self._under_way and not self._expected():
                    return self._hand_out(())
                wait_s = self._seconds_to_wait()
                if wait_s <= 0:
                    return self._hand_out(self._next())
                self._changed.wait(min(wait_s, _POLL_S))
            return None

    def close(self, why: ExchangeError | None = None) -> list[Request]:
        """Close the round; returns the requests that nobody took. Who asks later hears the first `why`."""
        with self._changed:
            self._closed = self._closed or why or _over()
            left = [asked.request for asked in self._pending.values()]
            self._pending.clear()
            self._changed.notify_all()
            return left

    def standing(self) -> Standing:
        """How many are still to come, take part, and wait for their turn."""
        with self._changed:
            return Standing(len(self._to_come - self._withdrawn), len(self._members), len(self._pending))

    def _require_open(self) -> None:
        if why := self._closed:
            raise ExchangeError(why.code, why.message)

    def _expected(self) -> set[str]:
        """Those who are still to have their turn in this step: they have asked, or are waited for."""
        return self._members - self._done - (self._lagging - self._pending.keys())

    def _next(self) -> tuple[str, ...]:
        """Whose requests the next turn takes, once they have asked."""
        expected = self._expected()
        if self._together:
            return tuple(sorted(expected))
        if self._turn in expected:
            return (self._turn,)
        return tuple(sorted(expected)[:1])

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
            self._waiting_since = now
        missing = set(self._next()) - self._pending.keys()
        if not missing:
            return 0.0
        left_s = self._waiting_since + self._limits.straggler_limit_s - now
        if left_s > 0:
            return left_s
        for client in missing:
            self.dropped[client] = self.dropped.get(client, 0) + 1
        self._lagging |= missing
        return self._seconds_to_wait() if self._next() else 0.0

    def _hand_out(self, clients: Iterable[str]) -> Turn[Request]:
        taken = [(client, self._pending.pop(client)) for client in clients]
        self._turn = next((client for client, asked in taken if not asked.last), None)
        self._done |= {client for client, asked in taken if asked.last}
        ends_step = not self._expected()
        self._under_way = not ends_step
        if ends_step:
            self._done.clear()
        return Turn([asked.request for _, asked in taken], ends_step)


def _over() -> ExchangeError:
    return ExchangeError("round_closed", "Expected an open round, found a closed one. Ask for a new task.")
