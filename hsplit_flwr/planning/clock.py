"""A virtual clock: how long a round takes on given devices, from FLOPs and bytes alone. Pure, event-based, exact.

Every client and the server is a process that spends virtual seconds or sleeps until another wakes it; each client has
a link up and one down, which carry one transfer after another beside its compute. As in the protocol (`train_head`,
`StepBarrier`):

    client   download; then part by part: forward, send, *wait for the tail*, receive, backward; then upload
    server   step by step: takes the clients' turns in the order of their names, each as soon as it has arrived, and
             answers it as it is done (joint steps: all at once, at the end); takes its further passes; after the last
             upload: aggregates, and the round ends

With several parts in flight a client computes the next while one is on its way; with one it never does. Links do not
share anything: each client's is its own, and the server's is not looked at. A transfer takes the one-way latency +
bytes / rate, and only the latter keeps the link from the next one; where there is nothing to send there is no transfer.
A client without a tail has its steps back to back and waits for nobody.
"""

import heapq
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from hsplit_flwr.common.checks import require_whole
from hsplit_flwr.common.tables import client_order
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.training.workload import Workload

SERVER = "server"
What = Literal["download", "forward", "send", "tail", "receive", "backward", "wait", "upload", "aggregate"]
Process = Generator[float | None, None, None]
"""yields the seconds it spends, or None to sleep until it is woken"""


@dataclass(frozen=True)
class ClientWork:
    """What one client does in a round. A client that trains the whole model by itself has no tail and no step bytes."""

    client: str
    steps: int
    forward_flops: float
    """FLOPs of the head's forward pass, per step"""
    backward_flops: float
    """FLOPs of the head's backward pass, per step"""
    step_bytes_up: float
    """of all parts of a step"""
    step_bytes_down: float
    tail_flops: float
    """forward and backward of the server's tail for this client's batch of one step; 0: no tail"""
    download_bytes: float
    """bytes it is sent before its first step"""
    upload_bytes: float
    """bytes it sends after its last step"""

    def __post_init__(self) -> None:
        require_whole(what := f"steps of client {self.client!r}", self.steps, 1, key=what)
        amounts = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        if bad := {name: value for name, value in amounts.items() if not 0 <= value < math.inf}:
            raise ConfigError(f"Expected finite FLOPs and bytes >= 0 for client {self.client!r}, found {bad}.")
        if not self.tail_flops and (self.step_bytes_up or self.step_bytes_down):
            raise ConfigError(
                f"Expected no step bytes for client {self.client!r}, which has no tail, found "
                f"{self.step_bytes_up} up and {self.step_bytes_down} down. State its tail_flops, or leave them at 0."
            )


@dataclass(frozen=True)
class Interval:
    """What one party did from `start_s` to `end_s` (virtual, > `start_s`)."""

    who: str
    """`SERVER` or a client"""
    what: What
    step: int | None
    """0-based; None outside of the steps. A wait belongs to what it waits for: the step, or the end of the round."""
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class RoundTimeline:
    """Every party's intervals, without gaps from the start of the round to its end.

    They overlap where a client computes, sends and receives at the same time.
    """

    start_s: float
    end_s: float
    intervals: tuple[Interval, ...]
    """client by client, the server last; each in the order of time"""
    parties: tuple[str, ...]
    """the clients in order, the server last"""

    @property
    def duration_s(self) -> float:
        """Virtual seconds of the round."""
        return self.end_s - self.start_s

    @property
    def idle_share(self) -> float:
        """Mean over the clients of the time they wait / the round's duration; after its upload a client waits.

        0 without clients.
        """
        whole = (len(self.parties) - 1) * self.duration_s
        waited = sum(i.seconds for i in self.intervals if i.what == "wait" and i.who != SERVER)
        return waited / whole if whole else 0.0

    def of(self, who: str) -> tuple[Interval, ...]:
        """One party's intervals.

        Raises:
            ConfigError: not a party of this round.
        """
        if who not in self.parties:
            raise ConfigError(f"Expected a party of the round, one of {', '.join(self.parties)}, found {who!r}.")
        return tuple(interval for interval in self.intervals if interval.who == who)

    def busy_s(self, who: str) -> float:
        """Seconds that `who` computes, sends or receives, or several of them at a time."""
        return self.duration_s - self.wait_s(who)

    def wait_s(self, who: str) -> float:
        """Seconds that `who` waits; a client also while the tail computes."""
        return math.fsum(interval.seconds for interval in self.of(who) if interval.what == "wait")


def play_round(
    work: Sequence[ClientWork],
    devices: Mapping[str, Budget],
    server: Budget,
    *,
    start_s: float = 0.0,
    aggregate_flops: float = 0.0,
    workload: Workload | None = None,
) -> RoundTimeline:
    """One round in virtual time; the same for `work` in any order.

    Args:
        work: of every client of the round; none: the server computes `aggregate_flops` by itself.
        devices: client -> its device; others than those of `work` are left alone.
        server: its compute; nothing else of it is looked at.
        start_s: when the round starts.
        aggregate_flops: of the server, once all clients have uploaded.
        workload: whether steps are joint, further passes, micro-batches; by default as `Workload` has them.

    Raises:
        ConfigError: a client twice, without a device, or named as the server is; a number out of range.
    """
    clients = sorted((item.client for item in work), key=client_order)
    if len(set(clients)) < len(clients) or SERVER in clients:
        raise ConfigError(f"Expected every client once and none named {SERVER!r}, found {clients}.")
    if missing := [client for client in clients if client not in devices]:
        raise ConfigError(f"Expected a device for every client, found none for {', '.join(missing)}.")
    if not (0 <= start_s < math.inf and 0 <= aggregate_flops < math.inf):
        raise ConfigError(f"Expected finite start_s and aggregate_flops >= 0, found {start_s} and {aggregate_flops}.")
    by_client = {item.client: item for item in work}
    ordered = [by_client[client] for client in clients]
    return _Round(ordered, devices, server, start_s, workload or Workload()).play(aggregate_flops)


@dataclass
class _Link:
    """One direction of a client's link."""

    bytes_per_s: float
    latency_s: float
    free_s: float = 0.0
    """when it has carried all that was handed to it"""


class _Round:
    """The processes of one round and the queue of what happens when; ties are taken in the order of the names."""

    def __init__(
        self,
        work: Sequence[ClientWork],
        devices: Mapping[str, Budget],
        server: Budget,
        start_s: float,
        workload: Workload,
    ) -> None:
        self._work, self._devices, self._server, self._workload = work, devices, server, workload
        self._start_s = self._now = start_s
        self._queue: list[tuple[float, int, int, Callable[[], None]]] = []
        self._asked = itertools.count()
        self._rank = {who: rank for rank, who in enumerate([*(item.client for item in work), SERVER])}
        self._processes: dict[str, Process] = {}
        self._asleep: set[str] = set()
        self._arrived: dict[str, int] = defaultdict(int)
        """client -> parts that are at the server and were not taken"""
        self._answered: dict[str, int] = defaultdict(int)
        """client -> gradients that are there and were not used"""
        self._uploaded = 0
        self._intervals: dict[str, list[Interval]] = {}
        self._up = {w.client: _Link(devices[w.client].uplink_bytes_per_s, devices[w.client].latency_s) for w in work}
        self._down = {
            w.client: _Link(devices[w.client].downlink_bytes_per_s, devices[w.client].latency_s) for w in work
        }

    def play(self, aggregate_flops: float) -> RoundTimeline:
        """Run all processes to their ends."""
        self._processes = {item.client: self._client(item) for item in self._work}
        self._processes[SERVER] = self._serve(aggregate_flops)
        self._intervals = {who: [] for who in self._processes}
        for who in self._processes:
            self._at(self._now, who, lambda who=who: self._resume(who))  # type: ignore[misc]
        while self._queue:
            self._now, _, _, action = heapq.heappop(self._queue)
            action()
        assert not self._asleep, f"nobody woke {self._asleep}"
        intervals = [
            interval
            for who, own in self._intervals.items()
            for interval in _with_waits(who, own, self._start_s, self._now)
        ]
        return RoundTimeline(self._start_s, self._now, tuple(intervals), tuple(self._processes))

    def _client(self, work: ClientWork) -> Process:
        client, count = work.client, self._parts(work)
        yield self._transfer(client, "download", None, work.download_bytes, self._down)
        in_flight: deque[int] = deque()
        for step in range(work.steps):
            while in_flight and not self._workload.micro_steps:
                yield from self._use(work, in_flight)
            for _ in range(count):
                while len(in_flight) >= self._workload.micro_batches_in_flight:
                    yield from self._use(work, in_flight)
                yield self._compute(client, "forward", step, work.forward_flops / count)
                in_flight.append(step)
                if work.tail_flops:
                    sent_s = self._transfer(client, "send", step, work.step_bytes_up / count, self._up)
                    self._at(self._now + sent_s, client, lambda: self._arrive(client))
                else:
                    self._answered[client] += 1
                    yield from self._use(work, in_flight)
        while in_flight:
            yield from self._use(work, in_flight)
        yield self._transfer(client, "upload", None, work.upload_bytes, self._up)
        self._uploaded += 1
        self._wake(SERVER)

    def _use(self, work: ClientWork, in_flight: deque[int]) -> Process:
        """Wait for the oldest gradient, and use it."""
        while not self._answered[work.client]:
            yield None
        self._answered[work.client] -= 1
        yield self._compute(work.client, "backward", in_flight.popleft(), work.backward_flops / self._parts(work))

    def _serve(self, aggregate_flops: float) -> Process:
        joint, micro, passes = self._workload.joint_steps, self._workload.micro_steps, self._workload.tail_passes
        tails = [item for item in self._work if item.tail_flops]
        for step in range(max((item.steps for item in tails), default=0)):
            members = [item for item in tails if item.steps > step]
            for _ in range(self._workload.micro_batches if micro else 1):
                parts = 1 if micro else self._workload.micro_batches
                for turn in [members] * parts if joint else [[item] for item in members for _ in range(parts)]:
                    yield from self._take(turn, step)
                if passes > 1:
                    share = parts / self._workload.micro_batches
                    yield self._spend(SERVER, "tail", step, (passes - 1) * share * self._tail_s(members))
        while self._uploaded < len(self._work):
            yield None
        yield self._spend(SERVER, "aggregate", None, aggregate_flops / self._server.flops_per_s)

    def _take(self, turn: Sequence[ClientWork], step: int) -> Process:
        """Wait for a part of everybody in `turn`, compute, answer."""
        while not all(self._arrived[item.client] for item in turn):
            yield None
        yield self._spend(SERVER, "tail", step, self._tail_s(turn) / self._workload.micro_batches)
        for item in turn:
            self._arrived[item.client] -= 1
            down = item.step_bytes_down / self._workload.micro_batches
            sent_s = self._transfer(item.client, "receive", step, down, self._down)
            self._at(self._now + sent_s, item.client, lambda client=item.client: self._answer(client))  # type: ignore[misc]

    def _parts(self, work: ClientWork) -> int:
        return self._workload.micro_batches if work.tail_flops else 1

    def _tail_s(self, members: Sequence[ClientWork]) -> float:
        return math.fsum(item.tail_flops for item in members) / self._server.flops_per_s

    def _arrive(self, client: str) -> None:
        self._arrived[client] += 1
        self._wake(SERVER)

    def _answer(self, client: str) -> None:
        self._answered[client] += 1
        self._wake(client)

    def _compute(self, client: str, what: What, step: int, flops: float) -> float:
        return self._spend(client, what, step, flops / self._devices[client].flops_per_s)

    def _spend(self, who: str, what: What, step: int | None, seconds: float, start_s: float | None = None) -> float:
        """Write down what `who` does for so long, from now on or from `start_s`; returns `seconds`."""
        start_s = self._now if start_s is None else start_s
        if (end_s := start_s + seconds) > start_s:
            self._intervals[who].append(Interval(who, what, step, start_s, end_s))
        return seconds

    def _transfer(self, client: str, what: What, step: int | None, count: float, links: Mapping[str, _Link]) -> float:
        """Hand `count` bytes to the client's link; returns the seconds from now until they are at the other end."""
        if not count:
            return 0.0
        link = links[client]
        start_s = max(self._now, link.free_s)
        link.free_s = start_s + count / link.bytes_per_s
        seconds = self._spend(client, what, step, link.latency_s + count / link.bytes_per_s, start_s)
        return start_s - self._now + seconds

    def _at(self, time_s: float, who: str, action: Callable[[], None]) -> None:
        """Do `action` then; at equal times the clients in order, the server last, each in the order of asking."""
        heapq.heappush(self._queue, (time_s, self._rank[who], next(self._asked), action))

    def _resume(self, who: str) -> None:
        """Let the process of `who` go on, until it spends time or sleeps."""
        try:
            seconds = next(self._processes[who])
        except StopIteration:
            return
        if seconds is None:
            self._asleep.add(who)
        else:
            self._at(self._now + seconds, who, lambda: self._resume(who))

    def _wake(self, who: str) -> None:
        """`who` wakes now if it sleeps; otherwise it will see for itself."""
        if who in self._asleep:
            self._asleep.discard(who)
            self._at(self._now, who, lambda: self._resume(who))


def _with_waits(who: str, own: Sequence[Interval], start_s: float, end_s: float) -> list[Interval]:
    """The intervals of `who` in the order of time, with its waits in between, before and after."""
    filled: list[Interval] = []
    now = start_s
    for interval in sorted(own, key=lambda i: (i.start_s, i.end_s)):
        if interval.start_s > now:
            filled.append(Interval(who, "wait", interval.step, now, interval.start_s))
        filled.append(interval)
        now = max(now, interval.end_s)
    if end_s > now:
        filled.append(Interval(who, "wait", None, now, end_s))
    return filled
