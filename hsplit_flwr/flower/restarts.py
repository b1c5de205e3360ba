"""Messages that are lost because a SuperNode was restarted: Flower answers them only when their time is over.

A SuperNode that is killed takes the message that it is working on with it. Flower (1.42) reports a node that stays
away; one that its supervisor starts again at once counts as there, and the round would wait for its whole limit. So the
SuperLink is asked when nodes came online: where one did since it was sent a message, and nothing is heard of the
message's client at the tail's door for a while, the message is given up.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Error, Message
from flwr.serverapp import Grid

from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower.messages import TASK_KEY
from hsplit_flwr.flower.same_grid import SameGrid

LOOK_S = 10.0
"""age of what is known of nodes while messages are under way"""
POLL_S = 1.0
FRESH_S = 1.0
"""its age when a message is sent"""
NODE_UNAVAILABLE = 5
"""Flower's code of an error"""


@dataclass
class Watched:
    """A message under way, and when its node had come online as it was sent."""

    message: Message
    client: str
    """whose task it is; empty: a message without one, which is not watched"""
    activated: str
    silent_since: float | None = None
    """when it was found that its node had come online anew, and its client was not heard of since"""


class Restarts:
    """Tells which messages are lost. Safe to use from many threads, which ask the SuperLink together.

    Args:
        grid: Flower's.
        hears_of: whether a client's connection to the tail is open.
        grace_s: how long a client may be silent after its node came online anew.
        clock: seconds.
    """

    def __init__(
        self,
        grid: Grid,
        hears_of: Callable[[str], bool],
        grace_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid = grid
        self._hears_of = hears_of
        self._grace_s = grace_s
        self._clock = clock
        self._lock = threading.Lock()
        self._activations: Mapping[int, str] = {}
        self._looked_at = -math.inf

    def watch(self, message: Message) -> Watched:
        """`message`, which is about to be sent."""
        client = client_of(message)
        return Watched(message, client, self._activated(message, FRESH_S) if client else "")

    def has_lost(self, sent: Watched) -> bool:
        """Whether nobody will answer it."""
        activated = self._activated(sent.message, LOOK_S) if sent.activated else ""
        if activated in ("", sent.activated) or self._hears_of(sent.client):  # away: Flower itself says so
            sent.silent_since = None
            return False
        now = self._clock()
        if sent.silent_since is None:
            sent.silent_since = now
        return now - sent.silent_since >= self._grace_s

    def _activated(self, message: Message, age_s: float) -> str:
        """When the node of `message` came online; empty where it is not."""
        with self._lock:
            if self._clock() - self._looked_at > age_s:
                self._activations = {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}
                self._looked_at = self._clock()
            return self._activations.get(message.metadata.dst_node_id, "")


class UnlostGrid(SameGrid):
    """`grid`, which answers messages that a restarted SuperNode has lost with an error, as it does those of a dead one.

    Args:
        grid: Flower's.
        restarts: knows them.
    """

    def __init__(self, grid: Grid, restarts: Restarts) -> None:
        super().__init__(grid)
        self._restarts = restarts

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies that came before the `timeout`, as Flower's own."""
        give_up = math.inf if timeout is None else time.monotonic() + timeout
        waiting: dict[str, Watched] = {}
        for message in messages:
            sent = self._restarts.watch(message)
            waiting |= {message_id: sent for message_id in self._grid.push_messages([message]) if message_id}
        replies: list[Message] = []
        while waiting and time.monotonic() < give_up:
            arrived = list(self._grid.pull_messages(list(waiting)))
            for reply in arrived:
                waiting.pop(reply.metadata.reply_to_message_id)
            lost = [message_id for message_id, sent in waiting.items() if self._restarts.has_lost(sent)]
            replies += [*arrived, *(lost_reply(waiting.pop(message_id).message) for message_id in lost)]
            if waiting:
                time.sleep(POLL_S)
        return replies


def restarts_of(rounds: RoundServer, grid: Grid) -> Restarts:
    """Restarts that concern a run; a client may be silent for as long as the tail waits at its start gate."""
    return Restarts(grid, rounds.hears_of, rounds.limits.start_gate_s)


def lost_reply(message: Message) -> Message:
    """What Flower would have answered."""
    reason = "its SuperNode was restarted, and what it had been sent is lost"
    return Message(Error(NODE_UNAVAILABLE, reason), reply_to=message)


def client_of(message: Message) -> str:
    """The client whose task `message` carries; empty where it carries none."""
    for record in message.content.config_records.values():
        if TASK_KEY in record:
            return RoundTask.from_json(str(record[TASK_KEY])).client
    return ""
