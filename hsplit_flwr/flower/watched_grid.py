"""A grid that tells of failures as they come, and gets past the dead actors of a simulation.

Flower's `Strategy.start` sees replies when all are in; by then the tail has waited at its gate for clients that failed
at once.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

LOST_ACTOR = "ray.exceptions.Actor"
"""in the reason of a message that a dead actor was given"""
RETRY_S = 1.0
SHORTEST_POLL_S, LONGEST_POLL_S, POLL_GROWTH = 0.1, 2.0, 1.2


@dataclass
class _Sent:
    """A message under way."""

    message: Message
    """as it was given to `send_and_receive`"""
    first_failure: Message | None = None
    """of a client whose actor died: that is the one to tell"""


class WatchedGrid(Grid):
    """`grid`, whose `send_and_receive` hands on every reply as soon as it is there.

    Args:
        grid: Flower's.
        on_reply: called with a message and a reply to it, or None where Flower did not take the message.
    """

    def __init__(self, grid: Grid, on_reply: Callable[[Message, Message | None], None]) -> None:
        self._grid = grid
        self._on_reply = on_reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies that came before the `timeout`, as Flower's own.

        Flower's simulation never replaces an actor whose process died: it hands it further messages, which fail at
        once. Such a message is sent again, until it gets to a living actor; a client that died in the middle of its
        task is refused there (its token is used), and its first failure is the one to tell.
        """
        give_up = float("inf") if timeout is None else time.monotonic() + timeout
        waiting: dict[str, _Sent] = {}
        for message in messages:
            self._send(_Sent(message), message, waiting)
        replies: list[Message] = []
        poll_s = SHORTEST_POLL_S
        while waiting and time.monotonic() < give_up:
            arrived = list(self._grid.pull_messages(list(waiting)))
            done = [(waiting.pop(reply.metadata.reply_to_message_id), reply) for reply in arrived]
            lost = []
            for sent, reply in done:
                self._on_reply(sent.message, reply)
                if _lost_actor(reply) and time.monotonic() + RETRY_S < give_up:
                    lost.append(_Sent(sent.message, sent.first_failure or reply))
                else:
                    replies.append(sent.first_failure or reply if reply.has_error() else reply)
            if lost:
                time.sleep(RETRY_S)
            for sent in lost:
                self._send(sent, _again(sent.message), waiting)
            poll_s = SHORTEST_POLL_S if arrived else min(LONGEST_POLL_S, poll_s * POLL_GROWTH)
            if waiting and not lost:
                time.sleep(poll_s)
        return replies

    def _send(self, sent: _Sent, message: Message, waiting: dict[str, _Sent]) -> None:
        ids = [message_id for message_id in self._grid.push_messages([message]) if message_id]
        if ids:
            waiting[ids[0]] = sent
        else:
            self._on_reply(sent.message, sent.first_failure)

    def set_run(self, run: Run) -> None:
        """Flower's own."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Flower's own."""
        return self._grid.run

    def create_message(self, *args: object, **options: object) -> Message:
        """Flower's own."""
        return self._grid.create_message(*args, **options)  # type: ignore[arg-type]

    def get_node_ids(self) -> Iterable[int]:
        """Flower's own."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Flower's own."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Flower's own."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Flower's own."""
        return self._grid.pull_messages(message_ids)


def _lost_actor(reply: Message) -> bool:
    return reply.has_error() and LOST_ACTOR in (reply.error.reason or "")


def _again(message: Message) -> Message:
    told = message.metadata
    return Message(message.content, told.dst_node_id, told.message_type, ttl=told.ttl, group_id=told.group_id)
