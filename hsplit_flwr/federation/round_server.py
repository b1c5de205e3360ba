"""A round on the server, whoever carries the messages: HSplitLoRA (arXiv:2505.02795) without Flower and without gRPC.

A round: `open_training` settles the plan, opens the tail and gives every client its task (cut, ranks, address, one-time
token); clients stream their steps; `close_training` closes the tail, aggregates the adapters of heads and tail exactly
and merges them. `score` scores the whole model on the server's data; `open_scoring` and `close_scoring` score the
clients' held-out data with heads on the clients and the tail here.
"""

import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from hsplit_flwr.common.checks import require, require_whole
from hsplit_flwr.common.dataclass_state import to_state
from hsplit_flwr.common.progress import describe_participants
from hsplit_flwr.common.reasons import describe_failure
from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.common.state import State
from hsplit_flwr.common.tables import describe_ranks
from hsplit_flwr.errors import AggregationError, ConfigError, ExchangeError, RunFailedError
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.task import Mode, RoundTask
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.roster import Present
from hsplit_flwr.federation.tail_rounds import TailRounds
from hsplit_flwr.federation.trained_head import HeadReply, Refusal, TrainedHead, read_trained
from hsplit_flwr.lora.aggregation import EXACT_RULE, RULES, Contribution, token_shares
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import block_of, linear_shapes
from hsplit_flwr.planning.plans import Plans, plans_in_force
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.planning.report import plan_table
from hsplit_flwr.reports.health.aggregation import measure_aggregation
from hsplit_flwr.reports.health.steps import StepNotes
from hsplit_flwr.reports.records import CLIENT_PHASES, ClientRecord, Journal, RoundRecord
from hsplit_flwr.reports.step_log import log_progress
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.loss import Score
from hsplit_flwr.training.step import StepReport
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.workload import Workload

_log = logging.getLogger("hsplit_flwr")
Replies = Mapping[str, HeadReply | Refusal]
"""client id -> what it sent back"""


class Door(Protocol):
    """Where heads meet the tail: it admits the clients of a round and counts what they do."""

    @property
    def address(self) -> str:
        """Address that clients are told."""

    def open_round(
        self,
        round_number: int,
        mode: Mode,
        cuts: Mapping[str, int],
        first_step: int,
        *,
        steps: int | None = None,
        workload: Workload | None = None,
    ) -> dict[str, str]:
        """Admit the clients of `cuts`; returns each one's one-time token."""

    def open_probe(self, node: str, round_number: int) -> str:
        """Admit a node that measures its link before round `round_number`; returns its one-time token."""

    def close_round(self) -> dict[str, Ticket]:
        """End the round; returns what each client did."""

    def stop(self) -> None:
        """Let nobody in any more."""


OpenDoor = Callable[[SharedTail, GlobalModel, str], Door]
"""(tail, global model, id of the run) -> a door to that tail, open from then on"""


@dataclass(frozen=True)
class StrategyConfig:
    """What a run does besides training steps."""

    rule: str = EXACT_RULE
    """aggregation rule, one of `aggregation.RULES`"""
    min_nodes: int = 1
    """a round starts once so many SuperNodes are connected"""
    fraction_clients: float = 1.0
    """share of the known clients that train in a round"""
    federated_evaluation: bool = True
    """score the clients' held-out data after every round"""
    round_limit_s: float = 600.0
    """longest a client's stream may last"""
    wait_for_nodes_s: float = 300.0

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"Expected an aggregation rule among {sorted(RULES)}, found {self.rule!r}.")
        if not 0 < self.fraction_clients <= 1:
            raise ConfigError(f"Expected 0 < fraction_clients <= 1, found {self.fraction_clients}.")
        require_whole("min_nodes", self.min_nodes, 1)
        require(self.round_limit_s > 0, "round_limit_s", "> 0 s", self.round_limit_s)
        require(self.wait_for_nodes_s > 0, "wait_for_nodes_s", "> 0 s", self.wait_for_nodes_s)


class _Accepted(NamedTuple):
    """What a client that finished its round brought, and what the tail counted of it."""

    trained: TrainedHead
    ticket: Ticket


class RoundServer:
    """Rounds of heterogeneous split LoRA on a global model.

    Args:
        model: the global model; every round's update is merged into it.
        plans: chosen from budgets and importance (`AdaptivePlanning`), or configured: client id -> its cut and
            adapters, or one plan for all.
        training: shared by heads and tail.
        open_door: how heads reach the tail; called once, before the first round.
        tail_lora: the tail's adapters where plans are configured (default: rank 8 on every linear layer).
        workload: the largest batches where plans are configured (default: any); planning has its own.
        config: rounds, sampling, evaluation.
        limits: waiting times of the step barrier.
        max_frame_bytes: largest frame that clients are told to accept.
        eval_batches: server-side held-out batches; none: no central evaluation.
        on_step: called after every tail step; default: a line of progress in the log now and then.

    Raises:
        ConfigError: a plan's cut is not in 1..L-1, or a value is out of range.
    """

    def __init__(
        self,
        model: GlobalModel,
        plans: Plans,
        training: TrainingConfig,
        open_door: OpenDoor,
        *,
        tail_lora: LoraSpec | None = None,
        workload: Workload | None = None,
        config: StrategyConfig | None = None,
        limits: BarrierLimits | None = None,
        max_frame_bytes: int = 64 << 20,
        eval_batches: Iterable[Batch] | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        self.model = model
        self.training = training
        self.config = config or StrategyConfig()
        self.initial_score: Score | None = None
        limits = limits or BarrierLimits()
        if limits.start_gate_s >= self.config.round_limit_s:
            raise ConfigError(
                f"Expected start_gate_s below round_limit_s, found {limits.start_gate_s} >= "
                f"{self.config.round_limit_s}: a round must not end at its gate. Lower start_gate_s."
            )
        self.resumed_after = 0
        """the last round of the run that this one goes on from; 0: it is a run of its own"""
        self._run = f"{random.SystemRandom().getrandbits(64):016x}"
        self._journal = Journal()
        self._shapes = linear_shapes(model.segment)
        self._plans = plans_in_force(plans, tail_lora, workload, training, self._shapes)
        self._steps = StepNotes(on_step or log_progress(training))
        self.tail_rounds = TailRounds(model, self._plans, training, limits, self._steps)
        self._tail = self.tail_rounds.tail
        self._open_door = open_door
        self._door: Door | None = None
        self._max_frame_bytes = max_frame_bytes
        self._eval_batches = eval_batches
        self._round_number = 0
        self._round_plans: dict[str, ClientPlan] = {}
        self._phase_started = time.perf_counter()

    @property
    def history(self) -> list[RoundRecord]:
        """What each round was, so far."""
        return self._journal.rounds

    @property
    def planning(self) -> AdaptivePlanning | None:
        """What chooses cuts and ranks; None where they are configured."""
        return self._plans.adaptive

    @property
    def rounds_left(self) -> int:
        """How many rounds this server plays, unless it is told otherwise."""
        return self.training.rounds - self.resumed_after

    def probe_task(self, node: str) -> RoundTask | None:
        """How `node` measures its link to the tail; None where plans do not depend on budgets.

        The task's round is the next one that opens: that is what the node's budget must be for.
        """
        if not self._plans.asks_budgets:
            return None
        next_round = self._round_number + 1
        token = self._opened_door().open_probe(node, next_round)
        return self._task(next_round, "probe", node, token, ClientPlan(1, LoraSpec(0)))

    def open_training(self, round_number: int, present: Present) -> dict[str, RoundTask]:
        """Open the tail for a training round; returns every sampled client's task.

        Raises:
            ConfigError: nobody can take part.
        """
        started = time.perf_counter()
        self._settle_plans(round_number, present)
        tasks = self._open_round(round_number, "train", present)
        if round_number == self.resumed_after + 1:
            _log.info("%s take part", describe_participants(len(tasks), present.count_nodes(tasks)))
        self.tail_rounds.open(round_number, tasks, present.concurrency(tasks))
        self._journal.phase(round_number, "configure", started)
        self._phase_started = time.perf_counter()
        return tasks

    def answered(self, client: str) -> None:
        """`client` has answered its task, well or badly: if it never joined the round, nobody waits for it any more."""
        self._tail.withdraw(client)

    def close_training(self, replies: Replies, failures: Sequence[str] = ()) -> RoundRecord:
        """End the training round: settle the tail, accept, merge, learn importance, measure health.

        Args:
            replies: of the clients that answered.
            failures: a line for each one that did not.
        """
        number = self._round_number
        self._journal.phase(number, "fit", self._phase_started)
        started = time.perf_counter()
        accepted = self._settle_tail(replies, failures)
        self._observe_budgets(replies)
        shares = token_shares({c: a.ticket.tokens for c, a in accepted.items()}) if _tokens(accepted) else {}
        if not shares:
            _log.warning("round %d: no client finished, the weights stay as they are", number)
            self._tail.undo_training()
            return self._journal.record(number)
        contributions = [Contribution(shares[c], a.ticket.cut, a.trained.factors) for c, a in accepted.items()]
        tail_factors = self._tail.adapters.factors()
        self.merge(contributions, tail_factors)
        self._learn_importance(accepted, shares)
        self._journal.phase(number, "aggregate", started)
        self._measure_health(contributions, tail_factors)
        return self._journal.record(number)

    def score(self, round_number: int) -> Score | None:
        """Loss of the whole model on the server's held-out batches (round 0: before training); None without any."""
        if self._eval_batches is None:
            return None
        started = time.perf_counter()
        score = self.tail_rounds.score(self._eval_batches)
        if round_number == 0:
            self.initial_score = score
        else:
            self._journal.note(round_number, central_perplexity=score.perplexity)
            self._journal.phase(round_number, "evaluate", started)
        _log.info("round %d: central perplexity %.3f", round_number, score.perplexity)
        return score

    def open_scoring(self, round_number: int, present: Present) -> dict[str, RoundTask]:
        """Open the tail for scoring; returns every sampled client's task, none without federated evaluation."""
        if not self.config.federated_evaluation:
            return {}
        self._phase_started = time.perf_counter()
        return self._open_round(round_number, "evaluate", present)

    def close_scoring(self, finished: Collection[str], failures: Sequence[str] = ()) -> Score | None:
        """End the scoring: the loss that the tail itself summed over the clients that finished; None if nobody did."""
        number = self._round_number
        tickets = self._opened_door().close_round()
        failed = tuple(f"evaluate: {line}" for line in failures)
        self._journal.note(number, failures=(*self._journal.record(number).failures, *failed))
        scored = [ticket for client, ticket in tickets.items() if client in finished and ticket.tokens]
        self._journal.phase(number, "federated", self._phase_started)
        if not scored:
            return None
        score = Score(sum(ticket.nll for ticket in scored), sum(ticket.tokens for ticket in scored))
        self._journal.note(number, federated_perplexity=score.perplexity)
        return score

    def require_trained(self) -> None:
        """A run in which nobody ever finished a round is no result.

        Raises:
            RunFailedError: so it was; the message says what the clients said.
        """
        if not self.history or any(record.clients for record in self.history):
            return
        reasons = [line for record in self.history for line in record.failures]
        said = "; ".join(dict.fromkeys(reasons[-3:])) or "nobody was asked"
        raise RunFailedError(
            f"Expected a client that finishes a round, found none in {len(self.history)} rounds; the weights are the "
            f"base model's. The last reasons: {said}"
        )

    def settings(self) -> dict[str, Any]:
        """What decides the results, as values that JSON knows: a run that resumes this one must have it alike."""
        settings: dict[str, Any] = to_state(
            {
                "model": self.model.identity,
                "training": self.training,
                "aggregation": self.config.rule,
                "fraction-clients": self.config.fraction_clients,
                "federated-evaluation": self.config.federated_evaluation,
                "plans": self._plans.settings(),
            }
        )
        return settings

    def state(self) -> State:
        """All that the next round depends on, after the last one; `load_state` takes it back."""
        initial = self.initial_score
        return {
            "round": self._round_number,
            "initial_score": {"nll": initial.nll, "tokens": initial.tokens} if initial else {},
            "model": self.model.state(),
            "plans": self._plans.state(),
            "tail": self.tail_rounds.state(),
            "journal": self._journal.state(),
        }

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave, with the next round; before the first, with the same `settings`.

        The id of the run is a new one. Clients may hold versions of the weight delta that this server never made, or
        will make anew with other increments (of a round that is played again); by the id they know that theirs are of
        another run, and take the whole.

        Raises:
            ConfigError: a round was played already, or the state is of another model or other plans.
            AggregationError: the weight delta is malformed, or of another model.
        """
        self.model.load_state(state["model"])
        self._plans.load_state(state["plans"])
        self.tail_rounds.load_state(state["tail"])  # under those plans
        self._journal.load_state(state["journal"])
        self.initial_score = Score(**state["initial_score"]) if state["initial_score"] else None
        self.resumed_after = self._round_number = state["round"]

    def close(self) -> None:
        """Stop the tail and close the door. No round can be opened afterwards."""
        if self._door:
            self._door.stop()
        try:
            self._tail.close_training()
        except ExchangeError as error:  # a step that does not end must not keep the results from being written
            _log.error("the tail's last step is still under way: %s", error)

    def _settle_plans(self, round_number: int, present: Present) -> None:
        """The plan in force, or a new one for heads and tail."""
        decision = self._plans.settle(present.clients, present.new_budgets)
        if decision is None:
            return
        self._journal.note(round_number, drift=decision.drift, plan_reasons=decision.reasons)
        if decision.reasons:
            reasons = "; ".join(decision.reasons)
            _log.info("round %d: new plan: %s\n%s", round_number, reasons, plan_table(decision.plan))
            self._journal.note(round_number, plan=decision.plan)
            self.tail_rounds.replan()

    def _open_round(self, round_number: int, mode: Mode, present: Present) -> dict[str, RoundTask]:
        clients = self._sample(round_number, present)
        self._round_number = round_number
        plans = self._round_plans = {client: self._plans.plan(client) for client in clients}
        tokens = self._opened_door().open_round(
            round_number,
            mode,
            {client: plan.cut for client, plan in plans.items()},
            self.training.first_step(round_number),
            steps=self.training.local_steps if mode == "train" else None,
            workload=self._plans.workload,
        )
        return {client: self._task(round_number, mode, client, tokens[client], plans[client]) for client in plans}

    def _sample(self, round_number: int, present: Present) -> list[str]:
        able = sorted(filter(self._plans.takes_part, present.clients))
        count = min(len(able), max(1, round(self.config.fraction_clients * len(able))))
        generator = random.Random(derive_seed(self.training.seed, "sample", round_number))
        return sorted(generator.sample(able, count))

    def _opened_door(self) -> Door:
        if self._door is None:
            self._door = self._open_door(self._tail, self.model, self._run)
        return self._door

    def _task(self, round_number: int, mode: Mode, client: str, token: str, plan: ClientPlan) -> RoundTask:
        return RoundTask(
            run=self._run,
            round=round_number,
            client=client,
            mode=mode,
            address=self._opened_door().address,
            token=token,
            time_limit_s=self.config.round_limit_s,
            max_frame_bytes=self._max_frame_bytes,
            plan=plan,
            training=self.training,
            workload=self._plans.workload,
            common_start=self.config.rule != EXACT_RULE,
        )

    def _settle_tail(self, replies: Replies, failures: Sequence[str]) -> dict[str, _Accepted]:
        """Close the tail; note and return what the clients brought that did all their steps."""
        dropped = self._tail.close_training()
        accepted, refused = self._accept(replies, self._opened_door().close_round())
        late = [f"client {client}: too late for {steps} steps" for client, steps in sorted(dropped.items())]
        self._journal.note(
            self._round_number,
            clients=tuple(_client_record(*done) for done in accepted.values()),
            failures=(*failures, *refused, *late),
            steps=self._steps.take(),
        )
        return accepted

    def _accept(self, replies: Replies, tickets: Mapping[str, Ticket]) -> tuple[dict[str, _Accepted], list[str]]:
        """The clients that did all their steps and sent usable adapters, by id, and why others are left out."""
        accepted, refused = {}, []
        for client, reply in replies.items():
            try:
                accepted[client] = _Accepted(self._checked(client, reply, tickets[client]), tickets[client])
            except Exception as error:  # whatever a client sends must not stop the run
                refused.append(describe_failure(client, f"{type(error).__name__}: {error}"))
                _log.warning("left out %s", refused[-1])
        return dict(sorted(accepted.items())), refused

    def _checked(self, client: str, reply: HeadReply | Refusal, ticket: Ticket) -> TrainedHead:
        if isinstance(reply, Refusal):
            raise AggregationError(f"refused: {reply.reason}")
        if ticket.steps != self.training.local_steps:
            raise AggregationError(f"Expected {self.training.local_steps} steps at the tail, found {ticket.steps}.")
        plan = self._round_plans[client]
        head_shapes = {name: self._shapes[name] for name in self.model.head_names(plan.cut)}
        return read_trained(reply, client, plan, head_shapes)

    def _observe_budgets(self, replies: Replies) -> None:
        for client, reply in replies.items():
            self._plans.observe_budget(client, reply.budget)

    def merge(self, contributions: Sequence[Contribution], tail_factors: Mapping[str, LoraFactors]) -> None:
        """Noise-free aggregation; the update goes into the weights. For whoever ends a round otherwise to override."""
        self.tail_rounds.merge(contributions, tail_factors, self.config.rule)

    def _learn_importance(self, accepted: Mapping[str, _Accepted], shares: Mapping[str, float]) -> None:
        heads = {client: done.trained.importance for client, done in accepted.items()}
        self._plans.observe_importance(heads, self._tail.importance(), shares, self._shapes)
        train_loss = sum(done.ticket.nll for done in accepted.values()) / _tokens(accepted)
        self._journal.note(self._round_number, importance=self._plans.history.profile, train_loss=train_loss)

    def _measure_health(self, contributions: Sequence[Contribution], tail_factors: Mapping[str, LoraFactors]) -> None:
        started = time.perf_counter()
        profile = self._plans.history.profile
        health = measure_aggregation(contributions, tail_factors, list(self._shapes), block_of, profile)
        self._journal.note(self._round_number, aggregation=health)
        self._journal.phase(self._round_number, "health", started)


def _tokens(accepted: Mapping[str, _Accepted]) -> int:
    return sum(done.ticket.tokens for done in accepted.values())


def _client_record(trained: TrainedHead, ticket: Ticket) -> ClientRecord:
    """A client's round, as far as possible from what the tail itself counted; its seconds are its own word."""
    ranks = [factors.rank for factors in trained.factors.values()]
    return ClientRecord(
        client_id=ticket.client,
        cut=ticket.cut,
        ranks=describe_ranks(ranks),
        mean_rank=sum(ranks) / max(1, len(ranks)),
        tokens=ticket.tokens,
        steps=ticket.steps,
        loss=ticket.nll / ticket.tokens if ticket.tokens else None,
        bytes_up=ticket.bytes_up + trained.upload_bytes,
        bytes_down=ticket.bytes_down,
        seconds={phase: trained.seconds.get(phase, 0.0) for phase in CLIENT_PHASES},
    )
