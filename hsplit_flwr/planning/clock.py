"""A virtual clock: how long a round takes on given devices, from FLOPs and bytes alone. Pure, event-based, exact.

Every client and the server is a process that spends virtual seconds or sleeps until another wakes it. As in the
protocol (`client_head`, `server_tail`, `barrier`):

    client   download; then per step: forward, send, *wait for the tail*, receive, backward; then upload
    server   per step: waits for every client that still has a step of that number; computes their tails one after
             another and answers each as it is done (joint steps: all at once, at the end); takes its further passes;
             after the last upload: aggregates, and the round ends

A client never computes while it sends or receives. Links do not share anything: each client's is its own, and the
server's is not looked at. A transfer takes the one-way latency + bytes / rate; where there is nothing to send there is
no transfer. A client without a tail has its steps back to back and is in no barrier.
"""

import heapq
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from hsplit_flwr.common.checks import require_whole
from hsplit_flwr.common.tables import client_order
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets.budget import Budget

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
    """Every party's intervals, one after another without gaps, from the start of the round to its end."""

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
        """Seconds that `who` computes, sends or receives."""
        return math.fsum(interval.seconds for interval in self.of(who) if interval.what != "wait")

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
    joint_steps: bool = False,
    tail_passes: int = 1,
) -> RoundTimeline:
    """One round in virtual time; the same for `work` in any order.

    Args:
        work: of every client of the round; none: the server computes `aggregate_flops` by itself.
        devices: client -> its device; others than those of `work` are left alone.
        server: its compute; nothing else of it is looked at.
        start_s: when the round starts.
        aggregate_flops: of the server, once all clients have uploaded.
        joint_steps: see `TrainingConfig`, as for `tail_passes`.

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
    simulation = _Round([by_client[client] for client in clients], devices, server, start_s)
    return simulation.play(aggregate_flops, joint_steps, tail_passes)


class _Round:
    """The processes of one round and the queue of those that spend time; ties are taken in the order of the names."""

    def __init__(
        self, work: Sequence[ClientWork], devices: Mapping[str, Budget], server: Budget, start_s: float
    ) -> None:
        self._work, self._devices, self._server = work, devices, server
        self._start_s = self._now = start_s
        self._queue: list[tuple[float, str]] = []
        self._asleep: set[str] = set()
        self._arrived = 0
        """clients whose activations are at the server and not yet in a step"""
        self._uploaded = 0
        self._intervals: dict[str, list[Interval]] = {}

    def play(self, aggregate_flops: float, joint_steps: bool, tail_passes: int) -> RoundTimeline:
        """Run all processes to their ends."""
        processes = {item.client: self._client(item) for item in self._work}
        processes[SERVER] = self._serve(aggregate_flops, joint_steps, tail_passes)
        self._intervals = {who: [] for who in processes}
        self._queue = [(self._now, who) for who in processes]
        heapq.heapify(self._queue)
        while self._queue:
            self._now, who = heapq.heappop(self._queue)
            try:
                seconds = next(processes[who])
            except StopIteration:
                continue
            if seconds is None:
                self._asleep.add(who)
            else:
                heapq.heappush(self._queue, (self._now + seconds, who))
        assert not self._asleep, f"nobody woke {self._asleep}"
        intervals = [
            interval
            for who, own in self._intervals.items()
            for interval in _with_waits(who, own, self._start_s, self._now)
        ]
        return RoundTimeline(self._start_s, self._now, tuple(intervals), tuple(processes))

    def _client(self, work: ClientWork) -> Process:
        client, device = work.client, self._devices[work.client]
        yield self._spend(client, "download", None, _transfer_s(work.download_bytes, device, up=False))
        for step in range(work.steps):
            yield self._spend(client, "forward", step, work.forward_flops / device.flops_per_s)
            if work.tail_flops:
                yield self._spend(client, "send", step, _transfer_s(work.step_bytes_up, device, up=True))
                self._arrived += 1
                self._wake(SERVER)
                yield None
                yield self._spend(client, "receive", step, _transfer_s(work.step_bytes_down, device, up=False))
            yield self._spend(client, "backward", step, work.backward_flops / device.flops_per_s)
        yield self._spend(client, "upload", None, _transfer_s(work.upload_bytes, device, up=True))
        self._uploaded += 1
        self._wake(SERVER)

    def _serve(self, aggregate_flops: float, joint_steps: bool, tail_passes: int) -> Process:
        step = 0
        while members := [item for item in self._work if item.tail_flops and item.steps > step]:
            while self._arrived < len(members):
                yield None
            self._arrived = 0
            for together in [members] if joint_steps else [[item] for item in members]:
                yield self._spend(SERVER, "tail", step, self._tail_s(together))
                for item in together:
                    self._wake(item.client)
            if tail_passes > 1:
                yield self._spend(SERVER, "tail", step, (tail_passes - 1) * self._tail_s(members))
            step += 1
        while self._uploaded < len(self._work):
            yield None
        yield self._spend(SERVER, "aggregate", None, aggregate_flops / self._server.flops_per_s)

    def _tail_s(self, members: Sequence[ClientWork]) -> float:
        return math.fsum(item.tail_flops for item in members) / self._server.flops_per_s

    def _spend(self, who: str, what: What, step: int | None, seconds: float) -> float:
        """Write down what `who` does from now on; returns `seconds`."""
        if (end_s := self._now + seconds) > self._now:
            self._intervals[who].append(Interval(who, what, step, self._now, end_s))
        return seconds

    def _wake(self, who: str) -> None:
        """`who` wakes now if it sleeps; otherwise it will see for itself."""
        if who in self._asleep:
            self._asleep.discard(who)
            heapq.heappush(self._queue, (self._now, who))


def _transfer_s(count: float, device: Budget, *, up: bool) -> float:
    rate = device.uplink_bytes_per_s if up else device.downlink_bytes_per_s
    return device.latency_s + count / rate if count else 0.0


def _with_waits(who: str, own: Sequence[Interval], start_s: float, end_s: float) -> list[Interval]:
    """The intervals of `who` with its waits in between, before and after."""
    filled: list[Interval] = []
    now = start_s
    for interval in own:
        if interval.start_s > now:
            filled.append(Interval(who, "wait", interval.step, now, interval.start_s))
        filled.append(interval)
        now = interval.end_s
    if end_s > now:
        filled.append(Interval(who, "wait", None, now, end_s))
    return filled
