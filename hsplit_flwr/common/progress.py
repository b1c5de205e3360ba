"""Now and then a line on how the training goes: formatting and a rate limit, no logging."""

import time
from collections.abc import Callable


class Progress:
    """Turns steps into lines: ``round 2/5  step 9/20 (41 of 100 client steps)  loss 3.21  1.2 k tok/s  eta 0:34``.

    Where clients train in waves, a line also says how many of the round's clients are in the step: ``step 9/20 with 5
    of 10 clients``; the next wave begins at step 1 again, while the client steps go on. At most one line per
    `interval_seconds`. For use from one thread (that of the tail). The time left is that of the client steps to come,
    at the mean pace so far; evaluation and aggregation are not in it.

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
        self._clients = 0
        self._local_steps = 0
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

    def start_round(self, number: int, clients: int, local_steps: int, seconds_ago: float = 0.0) -> None:
        """Round `number` (from 1), in which `clients` take `local_steps` steps each, began `seconds_ago`.

        What lies before is not training time. The rounds to come are taken to have as many steps.
        """
        self._round, self._clients, self._local_steps, self._done = number, clients, local_steps, 0
        self._last_step_at = self._clock() - seconds_ago

    def step(self, step: int, clients: int, loss: float, tokens: int) -> str | None:
        """Count step `step` (from 1) of the round, which `clients` took together on `tokens`; a line if one is due."""
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
        line = f"round {self._round}/{self._rounds}  {self._place(step, clients)}  loss {loss:.3g}  {self._pace()}"
        self._last_line_at = now
        self._window_seconds, self._window_tokens = 0.0, 0
        return line

    def _place(self, step: int, clients: int) -> str:
        place = f"step {step}/{self._local_steps}"
        if clients < self._clients:
            place += f" with {clients} of {self._clients} clients"
        if self._clients > 1:
            place += f" ({self._done} of {self._clients * self._local_steps} client steps)"
        return place

    def _pace(self) -> str:
        of_round = self._clients * self._local_steps
        left = max(0, self._rounds - self._round) * of_round + max(0, of_round - self._done)
        pace = self._training_seconds / self._training_steps
        rate = self._window_tokens / self._window_seconds if self._window_seconds > 0 else 0.0
        return f"{format_rate(rate)} tok/s  eta {format_duration(left * pace)}"


def describe_participants(clients: int, nodes: int) -> str:
    """Who takes part, and why Flower's own line seems to say otherwise: it counts nodes, of which one may be several.

    ``"5 clients on 2 nodes (Flower logs "sampled 5 clients (out of 2)": those 2 are nodes)"``.
    """
    who = f"{clients:,} client{_s(clients)} on {nodes:,} node{_s(nodes)}"
    if clients == nodes:
        return who
    kind = f"{'that' if nodes == 1 else 'those'} {nodes} {'is a node' if nodes == 1 else 'are nodes'}"
    return f'{who} (Flower logs "sampled {clients} clients (out of {nodes})": {kind})'


def _s(count: int) -> str:
    return "" if count == 1 else "s"


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
