"""The Message API's face of the server: a `flwr.serverapp.strategy.Strategy` that translates messages into rounds.

What a round is stands in `federation/round_server.py`. Flower counts rounds from 1 also where a run is resumed after
some: `server_round` is its number, `round_number` the run's.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from hsplit_flwr.common.reasons import describe_failure
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.turns import in_turns
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import RoundOptions
from hsplit_flwr.federation.run_output import RunOutput, run_rounds
from hsplit_flwr.federation.trained_head import HeadReply, Refusal
from hsplit_flwr.flower.doors import flower_rounds
from hsplit_flwr.flower.early_end import EnoughRoundsError, end_if_enough
from hsplit_flwr.flower.flower_log import log_through_flower
from hsplit_flwr.flower.grid_nodes import GridNodes
from hsplit_flwr.flower.message_client import ARRAYS, CONFIG, config_of
from hsplit_flwr.flower.messages import TASK_KEY, unpack_each, unpack_trained
from hsplit_flwr.flower.restarts import restarts_of
from hsplit_flwr.flower.talks import Talks
from hsplit_flwr.flower.watched_grid import WatchedGrid
from hsplit_flwr.planning.plans import Plans
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.loss import Score

_log = logging.getLogger("hsplit_flwr")
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class HSplitLoRAMessageStrategy(Strategy):
    """Heterogeneous split LoRA as a strategy of Flower's Message API.

    Args:
        model: the global model; the strategy merges every round's update into it.
        plans: see `HSplitLoRAStrategy`, as are `training`, `service` and `options`.
        output: what becomes of the results, and whether a run is resumed; None: they stay in `rounds.history` and in
            the model.

    Raises:
        ConfigError: a plan's cut is not in 1..L-1, a value is out of range, or a run cannot be resumed
            (`RunOutput.resume`).
    """

    def __init__(
        self,
        model: GlobalModel,
        plans: Plans,
        training: TrainingConfig,
        *,
        service: ServiceConfig | None = None,
        output: RunOutput | None = None,
        **options: Unpack[RoundOptions],
    ) -> None:
        self.rounds = flower_rounds(model, plans, training, service, **options)
        self._output = output
        self.nodes = GridNodes(self.rounds)
        self._told: list[tuple[Message, str]] = []
        """messages of the round under way, and the client that each is for"""
        self._resent: dict[str, str] = {}
        """id of a message that was sent again -> the client that it is for"""
        self._talks = Talks(self.rounds.config.message_limit_s)
        self._so_far = Result()
        """what the hooks returned: Flower loses its own result where a run ends before its last round"""
        if output:
            output.resume(self.rounds)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """All rounds through Flower's own loop; results are written after each, and the tail is closed in any case.

        Args:
            grid: Flower's.
            initial_arrays: not used: every client reads the base model itself.
            num_rounds: default and most sensible: ``training.rounds``, which the learning rate is planned for.
            timeout: of a round's messages, seconds; default: ``StrategyConfig.round_limit_s``.
            train_config: further entries of the clients' training messages.
            evaluate_config: the same for evaluation.
            evaluate_fn: called after the strategy's own central evaluation.

        Raises:
            RunFailedError: no client finished any round.
        """
        log_through_flower()

        def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            round_number = self.rounds.resumed_after + server_round
            scored = server_round == 0 < round_number  # when the run began, or after its last round
            score = None if scored else self.rounds.score(round_number)
            metrics: dict[str, Any] = dict(_metrics(score) or {})
            metrics |= dict((evaluate_fn(round_number, arrays) if evaluate_fn else None) or {})
            record = MetricRecord(metrics) if metrics else None
            if record:
                self._so_far.evaluate_metrics_serverapp[server_round] = record
            if server_round:
                if self._output:
                    self._output.after_round(self.rounds)
                end_if_enough(self.rounds)
            return record

        def play() -> Result:
            try:
                return super(HSplitLoRAMessageStrategy, self).start(
                    WatchedGrid(grid, self._on_reply, self._talks, restarts_of(self.rounds, grid)),
                    initial_arrays or ArrayRecord(),
                    self.rounds.rounds_left if num_rounds is None else num_rounds,
                    timeout or self.rounds.config.round_limit_s,
                    train_config,
                    evaluate_config,
                    evaluated,
                )
            except EnoughRoundsError:
                return self._so_far

        return run_rounds(self.rounds, self._output, play)

    @property
    def history(self) -> list[RoundRecord]:
        """What each round was, so far."""
        return self.rounds.history

    def close(self) -> None:
        """Stop the tail and its service. The strategy cannot be used afterwards."""
        self.rounds.close()

    def summary(self) -> None:
        """Log what the run is."""
        training, config = self.rounds.training, self.rounds.config
        _log.info(
            "\t├──> %d rounds of %d steps a client, seed %d", training.rounds, training.local_steps, training.seed
        )
        _log.info("\t├──> cuts and ranks: %s", "planned from budgets" if self.rounds.planning else "as configured")
        _log.info("\t├──> aggregation: %s", config.rule)
        _log.info(
            "\t└──> %.0f %% of the clients a round, at least %d nodes", 100 * config.fraction_clients, config.min_nodes
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the tail for a training round; a message with its task for every sampled client."""
        tasks = self.rounds.open_training(self.rounds.resumed_after + server_round, self.nodes.refresh(grid))
        return self._messages(MessageType.TRAIN, server_round, tasks, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close the tail; aggregate the adapters of the clients that finished, and the tail's; merge."""
        good, failures = self._sorted_out(replies)
        unpacked, unreadable = unpack_each(good.items(), _unpack)
        record = self.rounds.close_training(unpacked, [*failures, *unreadable])
        if record.train_loss is None:
            return None, None
        figures: dict[str, Any] = {
            "train_loss": record.train_loss,
            "tokens": record.tokens,
            "clients": len(record.clients),
        }
        metrics = self._so_far.train_metrics_clientapp[server_round] = MetricRecord(figures)
        return None, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open the tail for scoring; a message with its task for every sampled client."""
        if not self.rounds.config.federated_evaluation:
            return []
        tasks = self.rounds.open_scoring(self.rounds.resumed_after + server_round, self.nodes.refresh(grid))
        return self._messages(MessageType.EVALUATE, server_round, tasks, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Federated loss and perplexity, from what the tail itself summed over the clients that finished."""
        if not self.rounds.config.federated_evaluation:
            return None
        good, failures = self._sorted_out(replies)
        metrics = _metrics(self.rounds.close_scoring(good.keys(), failures))
        if metrics:
            self._so_far.evaluate_metrics_clientapp[server_round] = metrics
        return metrics

    def _messages(
        self, message_type: str, server_round: int, tasks: Mapping[str, RoundTask], config: ConfigRecord
    ) -> list[Message]:
        self._resent.clear()
        self._told = []
        for client, task in tasks.items():
            content = RecordDict({CONFIG: ConfigRecord({**config, TASK_KEY: task.to_json()})})
            config_of_run = self.rounds.config
            limit_s = config_of_run.message_limit_s if in_turns(task.address) else config_of_run.round_limit_s
            node = self.nodes.roster.node_of(client)
            message = Message(content, int(node), message_type, ttl=limit_s, group_id=str(server_round))
            self._told.append((message, client))
        self._talks.begin(self._told, tasks)
        return [message for message, _ in self._told]

    def _on_reply(self, message: Message, reply: Message | None) -> None:
        """What became of a client reaches the tail's gate at once."""
        client = next((client for told, client in self._told if told is message), None)
        if client is None:
            return  # an answer to a question
        if reply is not None:
            self._resent[reply.metadata.reply_to_message_id] = client
        self.rounds.answered(client)

    def _sorted_out(self, replies: Iterable[Message]) -> tuple[dict[str, Message], list[str]]:
        """Good replies by the client that was asked, whatever they say, and a line for every other client."""
        clients = {message.metadata.message_id: client for message, client in self._told} | self._resent
        good: dict[str, Message] = {}
        failures: dict[str, str] = {}
        for reply in replies:
            client = clients.get(reply.metadata.reply_to_message_id)
            if client is None:
                _log.warning(
                    "left out a reply to a message that was never sent, of node %s", reply.metadata.src_node_id
                )
            elif reply.has_error():
                failures[client] = describe_failure(client, reply.error.reason or "no reason given")
            else:
                good[client] = reply
        silent = [client for _, client in self._told if client not in good and client not in failures]
        limit_s = self.rounds.config.round_limit_s
        no_answer = f"no answer within round-limit-s = {limit_s:g} s"
        failures |= {c: describe_failure(c, self._talks.refused.get(c, no_answer)) for c in silent}
        self._talks.end()
        return good, [failures[client] for client in sorted(failures)]


def _unpack(reply: Message) -> HeadReply | Refusal:
    """A training reply by name.

    Raises:
        ConfigError: no figures of a trained head.
        ValueError, TypeError: not NumPy arrays (pickled ones are not read).
    """
    record = reply.content.get(ARRAYS)
    arrays = record if isinstance(record, ArrayRecord) else ArrayRecord()
    upload_bytes = sum(len(array.data) for array in arrays.values())
    return unpack_trained({name: array.numpy() for name, array in arrays.items()}, config_of(reply), upload_bytes)


def _metrics(score: Score | None) -> MetricRecord | None:
    return None if score is None else MetricRecord({"loss": score.loss, "perplexity": score.perplexity})
