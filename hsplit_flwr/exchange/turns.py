"""The exchange in turns, where no stream can be open: what is said goes inside messages that others carry.

In each turn the tail says all that it can, and the head answers with all that it can. A head's process need not outlive
its turn: it begins the same work again, up to where it was, and what it said before is not said twice.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from hsplit_flwr.errors import ExchangeError

MESSAGE_BYTES = 32 << 20
"""a message is closed before it has more frames than these; a larger frame has one of its own"""
MOST_FRAMES = 4096
"""of a message"""
SCHEME = "messages://"
"""how the address of a tail begins that is spoken to in turns"""


def in_turns(address: str) -> bool:
    """Whether the tail at `address` is spoken to in turns."""
    return address.startswith(SCHEME)


class Turn(NamedTuple):
    """What the tail says to a head in one message."""

    number: int
    """in the client's round, from 1; the first says nothing yet"""
    frames: Sequence[bytes] = ()
    more: bool = False
    """it has more to say, and wants no answer but that these frames are kept"""


class Said(NamedTuple):
    """A head's answer to a turn whose round goes on."""

    number: int
    """of the turn"""
    frames: Sequence[bytes]


class Suspended(Exception):  # noqa: N818  # no error: the turn is over
    """The next frame comes in another message: what is under way ends here and begins again then."""


class TurnStream:
    """A head's `FrameStream` during one turn.

    Args:
        heard: what the tail says in this turn.
        said_before: `digest` of each frame that the tail answers with it, which this head says again first.
    """

    def __init__(self, heard: Iterable[bytes], said_before: Sequence[str] = ()) -> None:
        self._heard: Iterator[bytes] = iter(heard)
        self._said_before = deque(said_before)
        self.said: list[bytes] = []
        """frames that go to the tail with this turn's answer"""

    @property
    def has_room(self) -> bool:
        """Whether another frame of about the size of the largest fits into this turn's answer."""
        sizes = [len(frame) for frame in self.said]
        return sum(sizes) + max(sizes, default=0) <= MESSAGE_BYTES and len(sizes) < MOST_FRAMES

    def send(self, frame: bytes) -> None:
        """See `FrameStream`.

        Raises:
            ExchangeError: ``not_repeatable``: the frame is not what was said in the turn before. What the tail answers
                would belong to other activations, or to another copy of the weights.
        """
        if not self._said_before:
            self.said.append(frame)
            return
        if digest(frame) != self._said_before.popleft():
            raise ExchangeError(
                "not_repeatable",
                "Expected to compute again, bit for bit, what this client sent in its last message, found something "
                "else: its data or its state-dir have changed, or this device does not compute the same twice. "
                'Keep them as they are within a round, or use exchange = "grpc".',
            )

    def receive(self) -> bytes | None:
        """See `FrameStream`. Raises `Suspended` where that is for another turn."""
        for frame in self._heard:
            return frame
        raise Suspended

    def close(self) -> None:
        """See `FrameStream`. Nothing is open."""


def digest(frame: bytes) -> str:
    """What tells a frame from any other."""
    return hashlib.sha256(frame).hexdigest()
