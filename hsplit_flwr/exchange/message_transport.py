"""Frames in turns: the tail's side of an exchange whose frames travel inside messages that somebody else carries.

Nothing listens on a port. Whoever carries the messages holds a `Conversation` with the tail for each client: it hands
over what the client said, and gets all that the tail says before it needs to hear more (`exchange/turns.py`).
"""

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.transport import Serve
from hsplit_flwr.exchange.turns import MESSAGE_BYTES, MOST_FRAMES, SCHEME, Turn

if TYPE_CHECKING:
    from hsplit_flwr.exchange.grpc_transport import ServiceConfig
    from hsplit_flwr.exchange.tls_files import ClientTls

_listeners: dict[str, "MessageListener"] = {}
"""of this process, by address"""


class MessageListener:
    """A `Listener` for whoever carries messages in this process."""

    holds_clients = False

    def __init__(self, serve: Serve, config: "ServiceConfig") -> None:
        self.serve = serve
        self.address = f"{SCHEME}{secrets.token_hex(8)}"

    def start(self) -> None:
        """See `Listener`."""
        _listeners[self.address] = self

    def stop(self) -> None:
        """See `Listener`."""
        _listeners.pop(self.address, None)


listen = MessageListener
"""See `Transport`."""


def connect(
    address: str, token: str, time_limit_s: float, max_receive_bytes: int, tls: "ClientTls | None" = None
) -> NoReturn:
    """Nobody connects to such a tail (see `Transport`).

    Raises:
        ExchangeError: always.
    """
    raise ExchangeError(
        "tail_unreachable",
        'Expected a link to the tail that can be measured, found exchange = "messages". State what the node can afford '
        "in its node config (uplink-mbps, downlink-mbps, latency-ms and the rest), or budgets by profiles.",
    )


def converse(address: str, token: str, time_limit_s: float) -> "Conversation":
    """Speak for the client that owns `token` with the tail at `address`, for at most `time_limit_s`.

    Raises:
        ExchangeError: ``tail_unreachable``: it listens no more.
    """
    if (listener := _listeners.get(address)) is None:
        raise ExchangeError("tail_unreachable", f"Expected a tail at {address} in this process, found none.")
    return Conversation(listener.serve, token, time_limit_s)


class Conversation:
    """A client's exchange with the tail, turn by turn; the `Caller` of its stream.

    Args:
        serve: the tail's.
        token: the client's.
        time_limit_s: of the exchange.
    """

    def __init__(self, serve: Serve, token: str, time_limit_s: float) -> None:
        self.token = token
        self._until = time.monotonic() + time_limit_s
        self._serve = serve
        self._heard: queue.SimpleQueue[Sequence[bytes] | None] = queue.SimpleQueue()
        self._turns: queue.SimpleQueue[Turn | ExchangeError | None] = queue.SimpleQueue()
        self._number = 1
        self._said: list[bytes] = []
        self._lock = threading.Lock()
        self._gone: list[Callable[[], object]] = []
        self._over = False
        threading.Thread(target=self._speak, name="tail-conversation", daemon=True).start()

    @property
    def seconds_left(self) -> float:
        """See `Caller`."""
        return self._until - time.monotonic()

    def on_gone(self, action: Callable[[], object]) -> None:
        """See `Caller`."""
        with self._lock:
            if not self._over:
                self._gone.append(action)
                return
        action()

    def end(self) -> None:
        """See `Caller`; for whoever carries the messages: the client says nothing more."""
        with self._lock:
            actions, self._gone, self._over = self._gone, [], True
        for action in actions:
            action()
        self._heard.put(None)

    def say(self, number: int, frames: Sequence[bytes]) -> None:
        """Hand over the client's answer to turn `number`; what the tail says to it comes by `turn`.

        Raises:
            ExchangeError: ``wrong_turn``, or ``malformed_frame``: too many of them.
        """
        if number != self._number:
            raise ExchangeError("wrong_turn", f"Expected the answer to turn {self._number}, found that to {number}.")
        if len(frames) > MOST_FRAMES:
            raise ExchangeError(
                "malformed_frame", f"Expected at most {MOST_FRAMES} frames in a message, found {len(frames)}."
            )
        self._heard.put(frames)

    def turn(self, wait_s: float = 0.0) -> Turn | None:
        """The tail's next turn; None: it is not due within `wait_s`.

        Raises:
            ExchangeError: the tail refused what the client said; its round is over.
        """
        try:
            turn = self._turns.get(timeout=wait_s) if wait_s > 0 else self._turns.get_nowait()
        except queue.Empty:
            return None
        if turn is None:
            raise ExchangeError("round_closed", "The server closed the round.")
        if isinstance(turn, ExchangeError):
            raise turn
        return turn

    def _speak(self) -> None:
        """The tail's part, in a thread of its own: it waits for the other clients' steps."""
        try:
            for frame in self._serve(self, self._frames()):
                if self._said and sum(map(len, self._said)) + len(frame) > MESSAGE_BYTES and not self._goes_on():
                    break
                self._said.append(frame)
            self._turns.put(None)
        except ExchangeError as error:
            self._turns.put(error)
        except Exception as error:  # whoever waits for an answer must hear of it
            self._turns.put(ExchangeError("tail_failed", f"The tail failed: {error!r}. See the server's log."))

    def _frames(self) -> Iterator[bytes]:
        """What the client says; whenever the tail needs more of it, the client has its turn."""
        frames = self._hear()
        while frames is not None:
            if not frames:
                raise ExchangeError("malformed_frame", "Expected frames in a client's message, found none.")
            yield from frames
            self._take_turn()
            frames = self._hear()

    def _goes_on(self) -> bool:
        """Let the client hear the first part of what is to be said; whether it is still there then."""
        self._take_turn(more=True)
        if frames := (said := self._hear()):
            raise ExchangeError("malformed_frame", f"Expected to be heard out, found {len(frames)} frames in between.")
        return said is not None

    def _take_turn(self, *, more: bool = False) -> None:
        self._number += 1
        said, self._said = self._said, []
        self._turns.put(Turn(self._number, said, more))

    def _hear(self) -> Sequence[bytes] | None:
        """The client's answer; None: it says nothing more."""
        try:
            return self._heard.get(timeout=max(0.0, self.seconds_left))
        except queue.Empty:
            return None
