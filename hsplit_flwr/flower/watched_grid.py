"""A grid that tells of failures as they come, and gets past dead actors of a simulation and restarted SuperNodes.

Flower's `Strategy.start` sees replies when all are in; by then the tail has waited at its gate for clients that failed
at once.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from hsplit_flwr.flower.restarts import Restarts, Watched, lost_reply
from hsplit_flwr.flower.same_grid import SameGrid

LOST_ACTOR = "ray.exceptions.Actor"
"""in the reason of a message that a dead actor was given"""
RETRY_S = 1.0
SHORTEST_POLL_S, LONGEST_POLL_S, POLL_GROWTH = 0.1, 2.0, 1.2


@dataclass
class _Sent:
    """A message under way."""

    message: Message
    """as it was given to `send_and_receive`"""
    newest: Message
    """the last one of its exchange"""
    first_failure: Message | None = None
    """of a client whose actor died: that is the one to tell"""
    watched: Watched | None = None


class Turns(Protocol):
    """Exchanges of more messages than one."""

    def goes_on(self, message: Message, reply: Message) -> bool:
        """Whether more is to follow on `reply` in the exchange that began with `message`."""

    def over(self, message: Message) -> None:
        """Note that nothing more is to follow in the exchange that began with `message`."""

    def due(self) -> Iterable[tuple[Message, Message | None]]:
        """The first message of each exchange in which one is due, and that one; None: nothing follows after all."""


class WatchedGrid(SameGrid):
    """`grid`, whose `send_and_receive` hands on every reply as soon as it is there.

    Args:
        grid: Flower's.
        on_reply: called with a message and a reply to it, or None where Flower did not take the message. Of an exchange
            of more messages it is the first one and the last reply.
        turns: such exchanges; None: there are none.
        restarts: knows which messages a restarted SuperNode has lost; None: each is waited for.
    """

    def __init__(
        self,
        grid: Grid,
        on_reply: Callable[[Message, Message | None], None],
        turns: Turns | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        super().__init__(grid)
        self._on_reply = on_reply
        self._turns = turns
        self._restarts = restarts

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies that came before the `timeout`, as Flower's own.

        Flower's simulation never replaces an actor whose process died: it hands it further messages, which fail at
        once. Such a message is sent again, until it gets to a living actor; a client that died in the middle of its
        task is refused there (its token is used), and its first failure is the one to tell.
        """
        give_up = float("inf") if timeout is None else time.monotonic() + timeout
        waiting: dict[str, _Sent] = {}
        going_on: list[Message] = []
        for message in messages:
            self._send(_Sent(message, message), waiting)
        replies: list[Message] = []
        poll_s = SHORTEST_POLL_S
        while (waiting or going_on) and time.monotonic() < give_up:
            arrived = list(self._grid.pull_messages(list(waiting))) if waiting else []
            heard = {reply.metadata.reply_to_message_id for reply in arrived}
            lost = [sent for key, sent in waiting.items() if key not in heard and self._is_lost(sent)]
            arrived += [lost_reply(sent.newest) for sent in lost]
            done = [(waiting.pop(reply.metadata.reply_to_message_id), reply) for reply in arrived]
            to_send = []
            for sent, reply in done:
                if self._turns and self._turns.goes_on(sent.message, reply):
                    going_on.append(sent.message)
                    continue
                self._on_reply(sent.message, reply)
                if _lost_actor(reply) and time.monotonic() + RETRY_S < give_up:
                    to_send.append(_Sent(sent.message, _again(sent.newest), sent.first_failure or reply))
                else:
                    self._over(sent.message)
                    replies.append(sent.first_failure or reply if reply.has_error() else reply)
            if to_send:
                time.sleep(RETRY_S)
            due = list(self._turns.due()) if self._turns and going_on else []
            for message, following in due:
                going_on = [other for other in going_on if other is not message]
                if following is None:
                    self._over(message)
                    self._on_reply(message, None)
                else:
                    to_send.append(_Sent(message, following))
            for sent in to_send:
                self._send(sent, waiting)
            poll_s = SHORTEST_POLL_S if arrived or due else min(LONGEST_POLL_S, poll_s * POLL_GROWTH)
            if (waiting or going_on) and not to_send:
                time.sleep(poll_s)
        return replies

    def _is_lost(self, sent: _Sent) -> bool:
        return bool(self._restarts and sent.watched and self._restarts.has_lost(sent.watched))

    def _send(self, sent: _Sent, waiting: dict[str, _Sent]) -> None:
        sent.watched = self._restarts.watch(sent.message) if self._restarts else None
        ids = [message_id for message_id in self._grid.push_messages([sent.newest]) if message_id]
        if ids:
            waiting[ids[0]] = sent
        else:
            self._over(sent.message)
            self._on_reply(sent.message, sent.first_failure)

    def _over(self, message: Message) -> None:
        if self._turns:
            self._turns.over(message)


def _lost_actor(reply: Message) -> bool:
    return reply.has_error() and LOST_ACTOR in (reply.error.reason or "")


def _again(message: Message) -> Message:
    told = message.metadata
    return Message(message.content, told.dst_node_id, told.message_type, ttl=told.ttl, group_id=told.group_id)
