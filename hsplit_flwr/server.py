"""Flower's own server, with enough workers for all clients and an end that closes the tail."""

from collections.abc import Callable

from flwr.server import Server, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.history import History

from hsplit_flwr.strategy import HSplitLoRAStrategy


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
    return ServerAppComponents(
        server=HSplitLoRAServer(strategy, max_clients, on_end),
        config=ServerConfig(num_rounds=strategy.training.rounds, round_timeout=strategy.config.round_limit_s),
    )
