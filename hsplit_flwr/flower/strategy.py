"""The legacy face of the server: a `flwr.server.strategy.Strategy` that translates Flower's hooks into rounds.

What a round is stands in `federation/round_server.py`. Flower calls the hooks by keyword, and counts rounds from 1 also
where a run is resumed after some: `server_round` is its number, `round_number` the run's.
"""

from collections.abc import Callable
from typing import Any, Unpack

from flwr.common import EvaluateIns, EvaluateRes, FitIns, FitRes, Parameters, Scalar, parameters_to_ndarrays
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.history import History
from flwr.server.strategy import Strategy

from hsplit_flwr.common.reasons import describe_failure
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import RoundOptions
from hsplit_flwr.federation.trained_head import HeadReply, Refusal
from hsplit_flwr.flower.doors import flower_rounds
from hsplit_flwr.flower.messages import TASK_KEY, named_arrays, unpack_each, unpack_trained
from hsplit_flwr.flower.nodes import ConnectedNodes
from hsplit_flwr.flower.talks import open_talk
from hsplit_flwr.flower.task_proxy import TaskProxy
from hsplit_flwr.planning.plans import Plans
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.training.config import TrainingConfig

FitResults = list[tuple[ClientProxy, FitRes]]
EvaluateResults = list[tuple[ClientProxy, EvaluateRes]]
Failures = list[tuple[ClientProxy, Any] | BaseException]


class HSplitLoRAStrategy(Strategy):
    """Heterogeneous split LoRA as a Flower strategy.

    Args:
        model: the global model; the strategy merges every round's update into it.
        plans: chosen from budgets and importance (`AdaptivePlanning`), or configured: client id -> its cut and
            adapters, or one plan for all.
        training: shared by heads and tail.
        service: address, TLS and limits of the tail's gRPC service.
        options: tail_lora, workload, config, limits, eval_batches, metrics_bind, on_step: see `RoundOptions`.

    Raises:
        ConfigError: a plan's cut is not in 1..L-1, or a value is out of range.
    """

    def __init__(
        self,
        model: GlobalModel,
        plans: Plans,
        training: TrainingConfig,
        *,
        service: ServiceConfig | None = None,
        **options: Unpack[RoundOptions],
    ) -> None:
        super().__init__()
        self.rounds = flower_rounds(model, plans, training, service, **options)
        self.nodes = ConnectedNodes(self.rounds)
        self.so_far = History()
        """what the hooks returned: Flower loses its own history where a run ends before its last round"""

    @property
    def history(self) -> list[RoundRecord]:
        """What each round was, so far."""
        return self.rounds.history

    def close(self) -> None:
        """Stop the tail and its service. The strategy cannot be used afterwards."""
        self.rounds.close()

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Nothing: every client reads the base model itself, what training changed comes over the tail's stream."""
        return Parameters(tensors=[], tensor_type="numpy.ndarray")

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Open the tail for a training round and give every client its task."""
        round_number = self.rounds.resumed_after + server_round
        tasks = self.rounds.open_training(round_number, self.nodes.refresh(client_manager))
        return [
            (self._proxy(client, task, self.rounds.answered), FitIns(parameters, {TASK_KEY: task.to_json()}))
            for client, task in tasks.items()
        ]

    def aggregate_fit(
        self, server_round: int, results: FitResults, failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Close the tail; aggregate the adapters of the clients that finished, and the tail's; merge."""
        replies, unreadable = unpack_each(((_client(proxy), res) for proxy, res in results), _unpack)
        record = self.rounds.close_training(replies, [*map(_reason, failures), *unreadable])
        if record.train_loss is None:
            return None, {}
        metrics: dict[str, Scalar] = {
            "train_loss": record.train_loss,
            "tokens": record.tokens,
            "clients": len(record.clients),
        }
        self.so_far.add_metrics_distributed_fit(server_round, metrics)
        return None, metrics

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Central loss and perplexity on the server's held-out batches (round 0: before training)."""
        resumed_after = self.rounds.resumed_after
        if server_round == 0 and resumed_after:
            return None  # scored when the run began
        score = self.rounds.score(resumed_after + server_round)
        if score is None:
            return None
        self.so_far.add_loss_centralized(server_round, score.loss)
        self.so_far.add_metrics_centralized(server_round, {"perplexity": score.perplexity})
        return score.loss, {"perplexity": score.perplexity}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Open the tail for scoring and give every client its task."""
        if not self.rounds.config.federated_evaluation:
            return []
        round_number = self.rounds.resumed_after + server_round
        tasks = self.rounds.open_scoring(round_number, self.nodes.refresh(client_manager))
        return [
            (self._proxy(client, task), EvaluateIns(parameters, {TASK_KEY: task.to_json()}))
            for client, task in tasks.items()
        ]

    def aggregate_evaluate(
        self, server_round: int, results: EvaluateResults, failures: Failures
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Federated loss and perplexity, from what the tail itself summed over the clients that finished."""
        finished = {_client(proxy) for proxy, _ in results}
        score = self.rounds.close_scoring(finished, [_reason(failure) for failure in failures])
        if score is None:
            return None, {}
        metrics: dict[str, Scalar] = {"perplexity": score.perplexity, "clients": len(finished)}
        self.so_far.add_loss_distributed(server_round, score.loss)
        self.so_far.add_metrics_distributed(server_round, metrics)
        return score.loss, metrics

    def _proxy(self, client: str, task: RoundTask, on_answer: Callable[[str], None] = lambda client: None) -> TaskProxy:
        limit_s = self.rounds.config.message_limit_s
        return TaskProxy(self.nodes.proxy(client), client, on_answer, talk=open_talk(task), message_limit_s=limit_s)


def _client(proxy: ClientProxy) -> str:
    assert isinstance(proxy, TaskProxy)  # Flower hands back what `configure_fit` gave it
    return proxy.client


def _unpack(res: FitRes) -> HeadReply | Refusal:
    """A fit's result by name.

    Raises:
        ConfigError: no figures of a trained head.
        ValueError: not NumPy arrays (pickled ones are not read).
    """
    arrays = named_arrays(parameters_to_ndarrays(res.parameters), res.metrics)
    return unpack_trained(arrays, res.metrics, sum(len(tensor) for tensor in res.parameters.tensors))


def _reason(failure: tuple[ClientProxy, FitRes | EvaluateRes] | BaseException) -> str:
    if isinstance(failure, BaseException):
        return str(failure)
    proxy, res = failure
    return describe_failure(_client(proxy), f"{res.status.code.name}: {res.status.message}")
