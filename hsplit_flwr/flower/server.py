"""Flower's own legacy server, with a worker for every client, results after every round, and an end that is true."""

import time
from typing import Any

from flwr.server import Server, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.history import History

from hsplit_flwr.federation.run_output import RunOutput, run_rounds
from hsplit_flwr.flower.early_end import EnoughRoundsError, end_if_enough
from hsplit_flwr.flower.flower_log import log_through_flower
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy

MOST_CLIENTS = 10_000
"""under way at a time; a thread is made only for a client that there is"""


class HSplitLoRAServer(Server):
    """Runs `HSplitLoRAStrategy`.

    Flower's server calls clients through a thread pool of cores + 4; clients beyond that would wait for a free thread
    while the tail waits for them, so the pool has one thread per client. (The Message API's face has none.)

    Args:
        strategy: decides rounds and limits.
        output: what becomes of the results, and whether a run is resumed; None: they stay in
            ``strategy.rounds.history`` and in the model.

    Raises:
        ConfigError: a run cannot be resumed, see `RunOutput.resume`.
    """

    def __init__(self, strategy: HSplitLoRAStrategy, output: RunOutput | None = None) -> None:
        super().__init__(client_manager=SimpleClientManager(), strategy=strategy)
        self.set_max_workers(MOST_CLIENTS)
        self._rounds = strategy.rounds
        self._so_far = strategy.so_far
        self._output = output
        if output:
            output.resume(self._rounds)

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Flower's rounds, with the tail closed and the results written in any case.

        Raises:
            RunFailedError: no client finished any round.
        """
        history, seconds = run_rounds(self._rounds, self._output, lambda: self._play(num_rounds, timeout))
        return _RunHistory(history, self._output), seconds

    def _play(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        started = time.perf_counter()
        try:
            return super().fit(num_rounds, timeout)
        except EnoughRoundsError:
            return self._so_far, time.perf_counter() - started

    def evaluate_round(self, server_round: int, timeout: float | None) -> Any:
        """Flower's, the last of a round; then the results so far are written, and the run may end."""
        evaluated = super().evaluate_round(server_round, timeout)
        if self._output:
            self._output.after_round(self._rounds)
        end_if_enough(self._rounds)
        return evaluated


class _RunHistory(History):
    """Flower's history, whose text is the last that Flower logs: it ends with the folder of the results."""

    def __init__(self, history: History, output: RunOutput | None) -> None:
        self.__dict__ = history.__dict__
        self._output = output

    def __repr__(self) -> str:
        return super().__repr__() + (f"\nResults: {self._output.folder}\n" if self._output else "")


def server_components(strategy: HSplitLoRAStrategy, *, output: RunOutput | None = None) -> ServerAppComponents:
    """What a ``server_fn`` returns: ``ServerApp(server_fn=lambda context: server_components(strategy))``.

    Args:
        strategy: decides rounds and limits.
        output: where the results go (summary, tables, pictures, adapter, merged model); None: nowhere.

    Raises:
        ConfigError: a run cannot be resumed, see `RunOutput.resume`.
    """
    log_through_flower()
    server, rounds = HSplitLoRAServer(strategy, output), strategy.rounds
    return ServerAppComponents(
        server=server,
        config=ServerConfig(num_rounds=rounds.rounds_left, round_timeout=rounds.config.round_limit_s),
    )
