"""A client's stay in a round: longer than the streams it takes, where connections break.

What was begun for a client goes on when its stream breaks: its request stays with the barrier, and answers that it may
not have got are kept until it is back and says at which part it is. So nothing is trained twice, and no step is lost.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from hsplit_flwr.common.log_lines import about
from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.kept_rows import UNKNOWN_ROWS
from hsplit_flwr.training.session import TailSession

MOST_STREAMS = 1000
"""of a client in a round: each may begin with a whole delta"""
_log = logging.getLogger("hsplit_flwr")


class StreamReplacedError(Exception):
    """The client has a newer stream: this one has nothing more to say."""


class KeptAnswer(NamedTuple):
    """An answer that may not have arrived."""

    step: int
    part: int
    frame: bytes


class Stay:
    """One client's use of the tail in one round. Safe to use from the threads of several streams; the newest counts.

    Args:
        client: whose it is.
    """

    def __init__(self, client: str) -> None:
        self._client = client
        self._changed = threading.Condition()
        self._stream = 0
        """number of the newest stream"""
        self._session: TailSession | None = None
        self._answering = False
        self._kept: deque[KeptAnswer] = deque()
        self._timer: threading.Timer | None = None
        """runs while the client is away"""
        self._over = False
        self._error: ExchangeError | None = None

    @property
    def is_away(self) -> bool:
        """The client's stream broke, and it is not back."""
        return self._timer is not None

    @property
    def kept_bytes(self) -> int:
        """Memory that kept answers take."""
        return sum(len(kept.frame) for kept in self._kept)

    def arrive(self) -> int:
        """Note a new stream of the client's; returns its number. Older ones have nothing more to say.

        Raises:
            ExchangeError: what ended the stay, or ``unauthenticated``: the client left it.
        """
        with self._changed:
            if self._over:
                left = ExchangeError("unauthenticated", "Expected a client of the open round, found one that left it.")
                raise self._error or left
            if self._stream == MOST_STREAMS:
                raise ExchangeError(
                    "too_many_streams",
                    f"Expected at most {MOST_STREAMS} streams of a client in a round, found one more. "
                    "Mend the connection, or make rounds shorter (local-steps).",
                )
            self._stream += 1
            if self._timer:
                self._timer.cancel()
                self._timer = None
                _log.info("tail: %s is back", self._client, extra=about("client_back", client=self._client))
            self._changed.notify_all()
            return self._stream

    def join(
        self, stream: int, open_session: Callable[[], TailSession], at: tuple[int, int] | None = None
    ) -> deque[KeptAnswer]:
        """Take part from now on, or go on with what an earlier stream began, once that has its answer.

        Args:
            stream: its number.
            open_session: joins the tail's round; called once in a stay.
            at: step and part of the oldest frame that the client has no answer to; None: it has sent none.

        Returns:
            The answers that are there for the client's next frames.

        Raises:
            StreamReplacedError: by a newer one.
            ExchangeError: raised by `open_session`.
        """
        with self._changed:
            self._wait_for_turn(stream)
            if self._session is None:
                self._session = open_session()
            while self._kept and at and (self._kept[0].step, self._kept[0].part) != at:
                self._kept.popleft()
            return deque(self._kept if at else ())

    def answer(self, stream: int, step: int, part: int, compute: Callable[[TailSession], bytes], keep: int) -> bytes:
        """The answer to a frame by `compute`; the last `keep` of them are kept.

        Raises:
            StreamReplacedError: by a newer one.
            ExchangeError: raised by `compute`; it ends the stay, but for ``unknown_rows``.
        """
        with self._changed:
            self._wait_for_turn(stream)
            assert self._session is not None
            session = self._session
            self._answering = True
        frame: bytes | None = None
        try:
            frame = compute(session)
            return frame
        except ExchangeError as error:
            if error.code != UNKNOWN_ROWS:
                self.end(error)
            raise
        finally:
            with self._changed:  # at once, or a newer stream would take the frame for one that never came
                self._answering = False
                if frame is not None and not self._over:
                    self._kept = deque([*self._kept, KeptAnswer(step, part, frame)], maxlen=keep)
                self._changed.notify_all()

    def break_off(self, stream: int, grace_s: float) -> None:
        """The stream has ended, and not by the client's will: it has `grace_s` to come back with another."""
        if grace_s <= 0:
            self.leave(stream)
            return
        with self._changed:
            if stream != self._stream or self._over or self._timer:
                return
            self._timer = threading.Timer(grace_s, self._give_up, (stream, grace_s))
            self._timer.daemon = True
            self._timer.start()
        told = about("client_away", client=self._client, grace_s=grace_s)
        _log.info("tail: the connection of %s broke; it has %g s to come back", self._client, grace_s, extra=told)

    def leave(self, stream: int, error: ExchangeError | None = None) -> None:
        """The client leaves the round by its will, or was refused; of a stream that was replaced nothing follows."""
        with self._changed:
            session = self._finish(error) if stream == self._stream else None
        if session:
            session.close()

    def end(self, error: ExchangeError | None = None) -> None:
        """The stay is over: the tail waits for this client no longer. Who comes back hears of `error`."""
        with self._changed:
            session = self._finish(error)
        if session:
            session.close()

    def _give_up(self, stream: int, grace_s: float) -> None:
        error = ExchangeError(
            "too_late",
            f"Expected a client back within {grace_s:g} s after its connection broke, found it later. "
            "Raise reconnect-grace-s.",
        )
        with self._changed:
            if stream != self._stream or self._timer is None:
                return
            session = self._finish(error)
        told = about("client_lost", client=self._client, grace_s=grace_s)
        _log.warning("tail: %s did not come back within %g s, its round is lost", self._client, grace_s, extra=told)
        if session:
            session.close()

    def _finish(self, error: ExchangeError | None) -> TailSession | None:
        """Note that the stay is over; returns the session that is to be closed, without the lock."""
        if self._over:
            return None
        self._over, self._error = True, error
        self._kept.clear()
        if self._timer:
            self._timer.cancel()
            self._timer = None
        self._changed.notify_all()
        return self._session

    def _wait_for_turn(self, stream: int) -> None:
        """Until no other stream's frame is under way; that one is bounded by the tail's step limit."""
        self._changed.wait_for(lambda: not self._answering or self._over or stream != self._stream)
        if stream != self._stream:
            raise StreamReplacedError
        if self._over:
            raise self._error or ExchangeError("round_closed", "The round ended before this step was taken.")
