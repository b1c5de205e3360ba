"""How long a client tries to come back after its connection broke, and how often."""

import time

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.kept_rows import UNKNOWN_ROWS

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
_BROKEN = ("tail_lost", UNKNOWN_ROWS)
_STILL_AWAY = ("tail_lost", "tail_unreachable", "tail_full", UNKNOWN_ROWS)


class Absence:
    """Time since the connection broke without an answer since.

    Args:
        grace_s: longest; 0: who is gone does not come back.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._until: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def over(self) -> None:
        """The client is back: an answer came."""
        self._until, self._pause_s = None, FIRST_PAUSE_S

    def wait(self, error: ExchangeError) -> None:
        """Wait for the time of the next try, after `error`.

        Raises:
            ExchangeError: `error`, if it is none of the connection, or the grace period is over.
        """
        if self._grace_s <= 0 or error.code not in (_BROKEN if self._until is None else _STILL_AWAY):
            raise error
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._grace_s
        if now >= self._until:
            raise ExchangeError(
                "tail_lost",
                f"Expected the tail back within {self._grace_s:g} s after the connection broke, found: {error}. "
                "Raise reconnect-grace-s if such breaks are usual.",
            ) from error
        time.sleep(min(self._pause_s, self._until - now))
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
