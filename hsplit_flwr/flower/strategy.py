"""The Flower face of the server: a `Strategy` that holds the tail of the model and aggregates without noise.

A round: `configure_fit` opens the tail and sends every client its task (cut, ranks, address, one-time token); clients
stream their steps; `aggregate_fit` closes the tail, aggregates the adapters of heads and tail exactly, merges them.
`evaluate` scores the whole model on the server's data, `configure_evaluate`/`aggregate_evaluate` score the clients'
held-out data with heads on the clients and the tail here. Flower calls the hooks by keyword.

Method: HSplitLoRA, arXiv:2505.02795.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.errors import AggregationError, ConfigError
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_server import StrategyConfig
from hsplit_flwr.federation.tail_rounds import TailRounds
from hsplit_flwr.flower.fit_results import client_record, read_budget, read_trained, require_accepted
from hsplit_flwr.flower.messages import PROBE_KEY, TASK_KEY
from hsplit_flwr.flower.nodes import Roster
from hsplit_flwr.flower.task_proxy import TaskProxy, describe_failure
from hsplit_flwr.lora.aggregation import EXACT_RULE, Contribution, token_shares
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import block_of, linear_shapes
from hsplit_flwr.planning.plans import PlanBook, Plans
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.planning.report import plan_table
from hsplit_flwr.reports.health.aggregation import measure_aggregation
from hsplit_flwr.reports.health.steps import StepNotes
from hsplit_flwr.reports.records import ClientRecord, Journal, RoundRecord
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.loss import Batch, Score
from hsplit_flwr.training.tail import StepReport
from hsplit_flwr.training.workload import Workload

_log = logging.getLogger("hsplit_flwr")
FitResults = list[tuple[ClientProxy, FitRes]]
EvaluateResults = list[tuple[ClientProxy, EvaluateRes]]


class _Finished(NamedTuple):
    """What a client that finished its round brought."""

    record: ClientRecord
    adapters: dict[str, LoraFactors]
    importance: dict[str, float]


class HSplitLoRAStrategy(Strategy):
    """Heterogeneous split LoRA as a Flower strategy.

    Args:
        model: the global model; the strategy merges every round's update into it.
        plans: chosen from budgets and importance (`AdaptivePlanning`), or configured: client id -> its cut and
            adapters, or one plan for all.
        training: shared by heads and tail.
        tail_lora: the tail's adapters where plans are configured (default: rank 8 on every linear layer).
        workload: the largest batches where plans are configured (default: any); planning has its own.
        config: rounds, sampling, evaluation.
        service: address, TLS and limits of the tail's gRPC service.
        limits: waiting times of the step barrier.
        eval_batches: server-side held-out batches; none: no central evaluation.
        on_step: called after every tail step (progress).

    Raises:
        ConfigError: a plan's cut is not in 1..L-1, or a value is out of range.
    """

    def __init__(
        self,
        model: GlobalModel,
        plans: Plans,
        training: TrainingConfig,
        *,
        tail_lora: LoraSpec | None = None,
        workload: Workload | None = None,
        config: StrategyConfig | None = None,
        service: ServiceConfig | None = None,
        limits: BarrierLimits | None = None,
        eval_batches: Iterable[Batch] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = training
        self.config = config or StrategyConfig()
        self._journal = Journal()
        self.initial_score: Score | None = None
        self._book = PlanBook(plans, tail_lora, workload, training, model.num_blocks)
        self._eval_batches = eval_batches
        self._run = f"{random.SystemRandom().getrandbits(64):016x}"
        self._roster = Roster(self.config.wait_for_nodes_s, self._question)
        limits = limits or BarrierLimits()
        if limits.start_gate_s >= self.config.round_limit_s:
            raise ConfigError(
                f"Expected start_gate_s below round_limit_s, found {limits.start_gate_s} >= "
                f"{self.config.round_limit_s}: a round must not end at its gate. Lower start_gate_s."
            )
        self._shapes = linear_shapes(model.segment)
        self._steps = StepNotes(on_step)
        self._tail_rounds = TailRounds(model, model.segment, self._book, training, limits, self._steps)
        self._tail = self._tail_rounds.tail
        self._service_config = replace(service or ServiceConfig(), activation_dtype=training.activation_dtype)
        self._service: TailService | None = None
        self._round_plans: dict[str, ClientPlan] = {}
        self._phase_started = time.perf_counter()

    @property
    def history(self) -> list[RoundRecord]:
        """What each round was, so far."""
        return self._journal.rounds

    @property
    def planning(self) -> AdaptivePlanning | None:
        """What chooses cuts and ranks; None where they are configured."""
        return self._book.adaptive

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters:
        """Nothing: every client reads the base model itself, what training changed comes over the tail's stream."""
        return Parameters(tensors=[], tensor_type="numpy.ndarray")

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Open the tail for a training round and give every client its task."""
        started = time.perf_counter()
        known = self._roster.refresh(client_manager, self.config.min_nodes)
        self._settle_plans(server_round, known)
        proxies = self._sample(known, server_round)
        tasks = self._open_round(server_round, "train", proxies)
        self._tail_rounds.open(server_round, tasks, self._roster.concurrency(tasks))
        self._journal.phase(server_round, "configure", started)
        self._phase_started = time.perf_counter()
        return [
            (TaskProxy(proxies[client], client, self._tail.withdraw), FitIns(parameters, {TASK_KEY: task.to_json()}))
            for client, task in tasks.items()
        ]

    def aggregate_fit(
        self,
        server_round: int,
        results: FitResults,
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Close the tail; aggregate the adapters of the clients that finished, and the tail's; merge."""
        self._journal.phase(server_round, "fit", self._phase_started)
        started = time.perf_counter()
        dropped = self._tail.close_training()
        tickets = self._close_round()
        finished, refused = self._finished(results, tickets)
        self._observe_budgets(results)
        stragglers = [f"client {client}: too late for {steps} steps" for client, steps in sorted(dropped.items())]
        self._journal.note(
            server_round,
            clients=tuple(done.record for done in finished.values()),
            failures=(*map(_reason, failures), *refused, *stragglers),
            steps=self._steps.take(),
        )
        tokens = {client: tickets[client].tokens for client in finished}
        if sum(tokens.values()) == 0:
            _log.warning("round %d: no client finished, the weights stay as they are", server_round)
            self._tail.undo_training()
            return None, {}
        shares = token_shares(tokens)
        contributions = [
            Contribution(shares[client], tickets[client].cut, done.adapters) for client, done in finished.items()
        ]
        tail_factors = self._tail.adapters.factors()
        self._tail_rounds.merge(contributions, tail_factors, self.config.rule)
        heads = {client: done.importance for client, done in finished.items()}
        self._book.observe_importance(heads, self._tail.importance(), shares, self._shapes)
        self._journal.note(server_round, importance=self._book.history.profile)
        train_loss = sum(tickets[client].nll for client in finished) / sum(tokens.values())
        self._journal.note(server_round, train_loss=train_loss)
        self._journal.phase(server_round, "aggregate", started)
        started = time.perf_counter()
        profile = self._book.history.profile
        health = measure_aggregation(contributions, tail_factors, list(self._shapes), block_of, profile)
        self._journal.note(server_round, aggregation=health)
        self._journal.phase(server_round, "health", started)
        return None, {"train_loss": train_loss, "tokens": sum(tokens.values()), "clients": len(finished)}

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Central loss and perplexity on the server's held-out batches (round 0: before training)."""
        if self._eval_batches is None:
            return None
        started = time.perf_counter()
        score = self.model.score(self._eval_batches)
        if server_round == 0:
            self.initial_score = score
        else:
            self._journal.note(server_round, central_perplexity=score.perplexity)
            self._journal.phase(server_round, "evaluate", started)
        _log.info("round %d: central perplexity %.3f", server_round, score.perplexity)
        return score.loss, {"perplexity": score.perplexity}

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Open the tail for scoring and give every client its task."""
        if not self.config.federated_evaluation:
            return []
        self._phase_started = time.perf_counter()
        proxies = self._sample(self._roster.refresh(client_manager, self.config.min_nodes), server_round)
        tasks = self._open_round(server_round, "evaluate", proxies)
        return [
            (TaskProxy(proxies[client], client), EvaluateIns(parameters, {TASK_KEY: task.to_json()}))
            for client, task in tasks.items()
        ]

    def aggregate_evaluate(
        self,
        server_round: int,
        results: EvaluateResults,
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Federated loss and perplexity, from what the tail itself summed over the clients that finished."""
        tickets = self._close_round()
        failed = tuple(f"evaluate: {_reason(failure)}" for failure in failures)
        self._journal.note(server_round, failures=(*self._journal.record(server_round).failures, *failed))
        done = {proxy.client for proxy, _ in results if isinstance(proxy, TaskProxy)}
        scored = [ticket for client, ticket in tickets.items() if client in done and ticket.tokens]
        self._journal.phase(server_round, "federated", self._phase_started)
        if not scored:
            return None, {}
        score = Score(sum(ticket.nll for ticket in scored), sum(ticket.tokens for ticket in scored))
        self._journal.note(server_round, federated_perplexity=score.perplexity)
        return score.loss, {"perplexity": score.perplexity, "clients": len(scored)}

    def remove_adapters(self) -> None:
        """Merge what is not merged yet and take the adapters out of the model, to save it. Only after `close`."""
        self._tail_rounds.settle()
        self._tail.adapters.remove()

    def close(self) -> None:
        """Stop the tail and its service. The strategy cannot be used afterwards."""
        if self._service:
            self._service.stop()
        self._tail.close_training()

    def _question(self, cid: str) -> dict[str, Scalar]:
        """What node `cid` is asked with: a way to measure its link, if plans depend on budgets."""
        if self._book.adaptive is None:
            return {}
        token = self._open_service().open_probe(cid)
        return {PROBE_KEY: self._task(0, "probe", cid, token, ClientPlan(1, LoraSpec(0))).to_json()}

    def _settle_plans(self, server_round: int, known: Iterable[str]) -> None:
        """The plan in force, or a new one for heads and tail."""
        decision = self._book.settle(known, self._roster.new_budgets)
        if decision is None:
            return
        self._journal.note(server_round, drift=decision.drift, plan_reasons=decision.reasons)
        if decision.reasons:
            _log.info(
                "round %d: new plan: %s\n%s", server_round, "; ".join(decision.reasons), plan_table(decision.plan)
            )
            self._journal.note(server_round, plan=decision.plan)
            self._tail_rounds.replan()

    def _sample(self, known: Mapping[str, ClientProxy], server_round: int) -> dict[str, ClientProxy]:
        able = sorted(filter(self._book.takes_part, known))
        count = min(len(able), max(1, round(self.config.fraction_clients * len(able))))
        generator = random.Random(derive_seed(self.training.seed, "sample", server_round))
        return {client: known[client] for client in sorted(generator.sample(able, count))}

    def _open_round(self, server_round: int, mode: Mode, clients: Iterable[str]) -> dict[str, RoundTask]:
        plans = self._round_plans = {client: self._book.plan(client) for client in clients}
        cuts = {client: plan.cut for client, plan in plans.items()}
        first_step = (server_round - 1) * self.training.local_steps
        steps = self.training.local_steps if mode == "train" else None
        tokens = self._open_service().open_round(
            server_round, mode, cuts, first_step, steps=steps, workload=self._book.workload
        )
        return {client: self._task(server_round, mode, client, tokens[client], plans[client]) for client in plans}

    def _open_service(self) -> TailService:
        if self._service is None:
            self._service = TailService(self._tail, self.model.since, self._run, self._service_config)
            _log.info("the tail listens on %s", self._service.address)
        return self._service

    def _task(self, server_round: int, mode: Mode, client: str, token: str, plan: ClientPlan) -> RoundTask:
        return RoundTask(
            run=self._run,
            round=server_round,
            client=client,
            mode=mode,
            address=self._open_service().address,
            token=token,
            time_limit_s=self.config.round_limit_s,
            max_frame_bytes=self._service_config.max_frame_bytes,
            plan=plan,
            training=self.training,
            workload=self._book.workload,
            common_start=self.config.rule != EXACT_RULE,
        )

    def _close_round(self) -> dict[str, Ticket]:
        return self._service.close_round() if self._service else {}

    def _observe_budgets(self, results: FitResults) -> None:
        for proxy, res in results:
            assert isinstance(proxy, TaskProxy)
            try:
                self._book.observe_budget(proxy.client, read_budget(res, proxy.client))
            except ConfigError as error:
                _log.warning("client %s: its budget stays as it was: %s", proxy.client, error)

    def _finished(self, results: FitResults, tickets: Mapping[str, Ticket]) -> tuple[dict[str, _Finished], list[str]]:
        """The clients that did all their steps and sent usable adapters, by id, and why others are left out."""
        finished, refused = {}, []
        for proxy, res in results:
            assert isinstance(proxy, TaskProxy)
            client = proxy.client
            try:
                require_accepted(res)
                if (steps := tickets[client].steps) != self.training.local_steps:
                    raise AggregationError(f"Expected {self.training.local_steps} steps at the tail, found {steps}.")
                plan = self._round_plans[client]
                head_shapes = {name: self._shapes[name] for name in self.model.head_names(plan.cut)}
                adapters, importance = read_trained(res, client, plan, head_shapes)
                record = client_record(tickets[client], res, adapters)
                finished[client] = _Finished(record, adapters, importance)
            except Exception as error:  # whatever a client sends must not stop the run
                refused.append(describe_failure(client, f"{type(error).__name__}: {error}"))
                _log.warning("left out %s", refused[-1])
        return dict(sorted(finished.items())), refused


def _reason(failure: tuple[ClientProxy, FitRes | EvaluateRes] | BaseException) -> str:
    if isinstance(failure, BaseException):
        return str(failure)
    proxy, res = failure
    assert isinstance(proxy, TaskProxy)
    return describe_failure(proxy.client, f"{res.status.code.name}: {res.status.message}")
