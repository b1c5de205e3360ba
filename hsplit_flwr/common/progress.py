"""Now and then a line on how the training goes: formatting and a rate limit, no logging."""

import time
from collections.abc import Callable


class Progress:
    """Turns steps into lines such as ``round 2/5  step 40/100  loss 3.21  1.2 k tok/s  eta 0:34``.

    At most one line per `interval_seconds`. For use from one thread (that of the tail). Steps are counted over clients,
    since clients may train together or in waves. The time left is that of the steps to come, at the mean pace so far;
    evaluation and aggregation are not in it.

    Args:
        rounds: of the run.
        interval_seconds: shortest time between two lines.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        rounds: int,
        *,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rounds = rounds
        self._steps = 0
        self._interval = interval_seconds
        self._clock = clock
        self._round = 0
        self._done = 0
        self._last_step_at = clock()
        self._last_line_at: float | None = None
        self._window_seconds = 0.0
        self._window_tokens = 0
        self._training_seconds = 0.0
        self._training_steps = 0

    def start_round(self, number: int, steps: int, seconds_ago: float = 0.0) -> None:
        """Round `number` (from 1), of so many steps over all clients, began `seconds_ago`.

        What lies before is not training time. The rounds to come are taken to have as many steps.
        """
        self._round, self._steps, self._done = number, steps, 0
        self._last_step_at = self._clock() - seconds_ago

    def step(self, clients: int, loss: float, tokens: int) -> str | None:
        """Count a step that `clients` took together on `tokens`; a line if one is due."""
        self._done += clients
        now = self._clock()
        seconds = now - self._last_step_at
        self._last_step_at = now
        self._window_seconds += seconds
        self._window_tokens += tokens
        self._training_seconds += seconds
        self._training_steps += clients
        if self._last_line_at is not None and now - self._last_line_at < self._interval:
            return None
        line = self._line(loss)
        self._last_line_at = now
        self._window_seconds, self._window_tokens = 0.0, 0
        return line

    def _line(self, loss: float) -> str:
        left = max(0, self._rounds - self._round) * self._steps + max(0, self._steps - self._done)
        pace = self._training_seconds / self._training_steps
        rate = self._window_tokens / self._window_seconds if self._window_seconds > 0 else 0.0
        return (
            f"round {self._round}/{self._rounds}  step {self._done}/{self._steps}  loss {loss:.3g}  "
            f"{format_rate(rate)} tok/s  eta {format_duration(left * pace)}"
        )


def format_rate(per_second: float) -> str:
    """``"87"``, ``"1.2 k"``, ``"3.4 M"``."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if per_second >= 0.9995 * size:
            return f"{per_second / size:.1f} {unit}"
    return f"{per_second:.0f}"


def format_duration(seconds: float) -> str:
    """``"0:34"``, ``"12:05"``, ``"1:02:05"`` (hours only where there are some)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
