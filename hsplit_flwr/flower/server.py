"""Flower's own server, with enough workers for all clients and an end that closes the tail."""

import logging
from collections.abc import Callable

from flwr.server import Server, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.history import History

from hsplit_flwr.common.progress import Progress
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.tail import StepReport

_log = logging.getLogger("hsplit_flwr")


class HSplitLoRAServer(Server):
    """Runs `HSplitLoRAStrategy`.

    Flower's server calls clients through a thread pool of cores + 4; clients beyond that would wait for a free thread
    while the tail waits for them, so the pool has one thread per client.
    """

    def __init__(
        self,
        strategy: HSplitLoRAStrategy,
        max_workers: int,
        on_end: Callable[[HSplitLoRAStrategy], None] | None = None,
    ) -> None:
        super().__init__(client_manager=SimpleClientManager(), strategy=strategy)
        self.set_max_workers(max_workers)
        self._hsplit_strategy = strategy
        self._on_end = on_end

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Flower's rounds; then `on_end`, with the tail closed in any case."""
        try:
            history = super().fit(num_rounds, timeout)
        finally:
            self._hsplit_strategy.close()
        if self._on_end:
            self._on_end(self._hsplit_strategy)
        return history


def server_components(
    strategy: HSplitLoRAStrategy,
    *,
    max_clients: int = 64,
    on_end: Callable[[HSplitLoRAStrategy], None] | None = None,
) -> ServerAppComponents:
    """What a ``server_fn`` returns: ``ServerApp(server_fn=lambda context: server_components(strategy))``.

    Args:
        strategy: decides rounds and limits.
        max_clients: clients that may be under way at a time.
        on_end: called with the strategy after the last round (results, export).
    """
    _log_through_flower()
    return ServerAppComponents(
        server=HSplitLoRAServer(strategy, max_clients, on_end),
        config=ServerConfig(num_rounds=strategy.training.rounds, round_timeout=strategy.config.round_limit_s),
    )


def log_progress(training: TrainingConfig, interval_s: float = 5.0) -> Callable[[StepReport], None]:
    """An ``on_step`` that logs a line with round, step, loss, tokens/s and time left, at most every `interval_s`."""
    progress = Progress(training.rounds, interval_seconds=interval_s)
    current = 0

    def on_step(report: StepReport) -> None:
        nonlocal current
        round_number = 1 + report.step // training.local_steps
        if round_number != current:
            current = round_number
            progress.start_round(round_number, report.round_clients, training.local_steps, report.compute_s)
        step = 1 + report.step % training.local_steps
        line = progress.step(step, len(report.clients), report.loss, report.tokens)
        if line:
            _log.info("%s", line)

    return on_step


def _log_through_flower() -> None:
    """Let our log lines go where Flower's go (the console, and `flwr run --stream`)."""
    flower = logging.getLogger("flwr")
    _log.setLevel(logging.INFO)
    for handler in flower.handlers:
        if handler not in _log.handlers:
            _log.addHandler(handler)
