"""The exchange inside Flower's messages, on the server: what a client's reply says goes to the tail, and what the tail
says into the client's next message (`exchange/turns.py`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.message_transport import Conversation, converse
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.turns import Turn, in_turns
from hsplit_flwr.flower.message_client import CONFIG, config_of
from hsplit_flwr.flower.messages import pack_turn, unpack_said


class Talk:
    """One client's exchange with the tail in one round.

    Args:
        task: of the client.
    """

    def __init__(self, task: RoundTask) -> None:
        self._task = task
        self._conversation: Conversation | None = None
        self._refusal: ExchangeError | None = None
        self.awaits_tail = False
        """the client has said something that the tail has not answered yet"""

    def hears(self, figures: Mapping[str, Any]) -> bool:
        """Hand the client's answer to the tail, which comes back to it by `turn`; False: it is none to the tail."""
        if (said := unpack_said(figures)) is None:
            return False
        self.awaits_tail = True
        try:
            if self._conversation is None:
                self._conversation = converse(self._task.address, self._task.token, self._task.time_limit_s)
            self._conversation.say(said.number, said.frames)
        except ExchangeError as error:
            self._refusal = error
        return True

    def turn(self, wait_s: float = 0.0) -> Turn | None:
        """The tail's answer, once it is there; waits `wait_s` for it.

        Raises:
            ExchangeError: what the client said is refused, or the tail is gone.
        """
        if self._refusal or self._conversation is None:
            raise self._refusal or ExchangeError("wrong_turn", "Expected a client that says something, found none.")
        turn = self._conversation.turn(wait_s)
        if turn:
            self.awaits_tail = False
        return turn

    def end(self) -> None:
        """The client says nothing more; the tail no longer waits for it."""
        self.awaits_tail = False
        if self._conversation:
            self._conversation.end()


def open_talk(task: RoundTask) -> Talk | None:
    """The talk of a task whose exchange goes over messages; None where it goes over a connection."""
    return Talk(task) if in_turns(task.address) else None


class Talks:
    """The talks of a round's clients, for a `WatchedGrid`.

    Args:
        limit_s: how long a client may take to answer a message.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._talks: list[tuple[Message, str, Talk]] = []
        """the first message of each client"""
        self.refused: dict[str, str] = {}
        """why the tail refused a client in this round"""

    def begin(self, told: Sequence[tuple[Message, str]], tasks: Mapping[str, RoundTask]) -> None:
        """A round begins with these messages for these clients."""
        self.end()
        self.refused = {}
        talks = [(message, client, open_talk(tasks[client])) for message, client in told]
        self._talks = [(message, client, talk) for message, client, talk in talks if talk]

    def goes_on(self, message: Message, reply: Message) -> bool:
        """Whether `reply` is a turn in the talk that began with `message`; the tail hears it."""
        return any(
            first is message and not reply.has_error() and talk.hears(config_of(reply))
            for first, _, talk in self._talks
        )

    def over(self, message: Message) -> None:
        """The talk that began with `message` has ended."""
        for first, _, talk in self._talks:
            if first is message:
                talk.end()

    def due(self) -> Iterator[tuple[Message, Message | None]]:
        """The first message of each talk in which the tail has answered, and the next one; None: there is none."""
        for first, client, talk in self._talks:
            if not talk.awaits_tail:
                continue
            try:
                turn = talk.turn()
            except ExchangeError as error:
                self.refused[client] = str(error)
                yield first, None
            else:
                if turn:
                    yield first, self._next(first, turn)

    def end(self) -> None:
        """The round is over: nobody is waited for."""
        for _, _, talk in self._talks:
            talk.end()
        self._talks = []

    def _next(self, first: Message, turn: Turn) -> Message:
        told = first.metadata
        content = RecordDict({CONFIG: ConfigRecord({**config_of(first), **pack_turn(turn)})})
        return Message(content, told.dst_node_id, told.message_type, ttl=self._limit_s, group_id=told.group_id)
