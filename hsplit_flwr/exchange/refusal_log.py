"""What the tail's log says of refusals: who is refused can try again at once, and must not fill disk or memory."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

WINDOW_S = 60.0
LINES = 10
"""of one client, or of all strangers together, in a window"""
_log = logging.getLogger("hsplit_flwr")


class RefusalLog:
    """Warns of the first few refusals of everybody in a minute; the others are counted. Safe to use from many threads.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._refused: Counter[str] = Counter()

    def note(self, who: str, error: Exception) -> None:
        """`who` was refused for `error`."""
        with self._lock:
            over = self._take_window()
            self._refused[who] += 1
            is_said = self._refused[who] <= LINES
        for refused, count in over:
            _log.warning("tail: refused %s %d times more within %.0f s", refused, count, WINDOW_S)
        if is_said:
            _log.warning("tail: refused %s: %s", who, error)

    def _take_window(self) -> list[tuple[str, int]]:
        """If a window has ended: who was refused more often in it than was said, and how often."""
        if self._clock() - self._since < WINDOW_S:
            return []
        over = [(who, count - LINES) for who, count in self._refused.items() if count > LINES]
        self._since = self._clock()
        self._refused.clear()
        return over
