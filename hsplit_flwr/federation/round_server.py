"""A round on the server, whoever carries the messages: HSplitLoRA (arXiv:2505.02795) without Flower and without gRPC.

A round: `open_training` settles the plan, opens the tail and gives every client its task (cut, ranks, address, one-time
token); clients stream their steps; `close_training` closes the tail, aggregates the adapters of heads and tail exactly
and merges them. `score` scores the whole model on the server's data; `open_scoring` and `close_scoring` score the
clients' held-out data with heads on the clients and the tail here.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Unpack

from hsplit_flwr.common.dataclass_state import to_state
from hsplit_flwr.common.log_lines import about
from hsplit_flwr.common.progress import describe_participants
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ConfigError, ExchangeError, RunFailedError
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.traffic import TrafficFigures
from hsplit_flwr.federation.acceptance import Accepted, Replies, accept, tokens_of
from hsplit_flwr.federation.bounds import balanced_importance, bound_updates, bounded_shares
from hsplit_flwr.federation.door import OpenDoor
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.roster import Present
from hsplit_flwr.federation.round_config import WAITING, RoundOptions, StrategyConfig
from hsplit_flwr.federation.round_tasks import RoundTasks
from hsplit_flwr.federation.tail_metrics import TailMetrics
from hsplit_flwr.federation.tail_rounds import TailRounds
from hsplit_flwr.lora.aggregation import STACKING, Contribution, token_shares
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.models.segments import block_of, linear_shapes
from hsplit_flwr.planning.plans import Plans, plans_in_force
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.planning.report import plan_table
from hsplit_flwr.reports.best_round import why_enough
from hsplit_flwr.reports.health.aggregation import measure_aggregation
from hsplit_flwr.reports.health.steps import StepNotes
from hsplit_flwr.reports.records import Journal, RoundRecord
from hsplit_flwr.reports.step_log import log_incidents, log_progress, log_round
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.loss import Score

_log = logging.getLogger("hsplit_flwr")


class RoundServer:
    """Rounds of heterogeneous split LoRA on a global model.

    Args:
        model: the global model; every round's update is merged into it.
        plans: chosen from budgets and importance (`AdaptivePlanning`), or configured: client id -> its cut and
            adapters, or one plan for all.
        training: shared by heads and tail.
        open_door: how heads reach the tail; called once, before the first round.
        max_frame_bytes: largest frame that clients are told to accept.
        options: see `RoundOptions`.

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
        max_frame_bytes: int = 64 << 20,
        **options: Unpack[RoundOptions],
    ) -> None:
        self.model = model
        self._stated = training
        self.config = options.get("config") or StrategyConfig()
        model.send_updates_by(self.config.update_coding)
        self.initial_score: Score | None = None
        self.limits = limits = options.get("limits") or BarrierLimits()
        if limits.start_gate_s >= self.config.round_limit_s:
            raise ConfigError(
                f"Expected start_gate_s below round_limit_s, found {limits.start_gate_s} >= "
                f"{self.config.round_limit_s}: a round must not end at its gate. Lower start-gate-s."
            )
        if training.keep_adapters and self.config.rule not in STACKING:
            raise ConfigError(
                f"Expected an aggregation rule that sums what was trained, one of {sorted(STACKING)}, where "
                f"keep-adapters is on, found {self.config.rule!r}: it takes changes for adapters. Change one of them."
            )
        scored = options.get("eval_batches") is not None or self.config.federated_evaluation
        if self.config.patience and not scored:
            raise ConfigError(
                f"Expected held-out data where a run may end early, found patience = {self.config.patience} without "
                "any. Give the server eval_batches, turn on federated-evaluation, or set patience = 0."
            )
        self.resumed_after = 0
        """the last round of the run that this one goes on from; 0: it is a run of its own"""
        self._journal = Journal()
        self._shapes = linear_shapes(model.segment)
        self._plans = plans_in_force(plans, options.get("tail_lora"), options.get("workload"), training, self._shapes)
        self._steps = StepNotes(options.get("on_step") or log_progress(training))
        self.tail_rounds = TailRounds(model, self._plans, training, limits, self._steps)
        self._tail = self.tail_rounds.tail
        self._tasks = RoundTasks(
            model,
            self._plans,
            self.config,
            lambda run: open_door(self._tail, model, run),
            max_frame_bytes=max_frame_bytes,
            reconnect_grace_s=limits.reconnect_grace_s,
        )
        self._eval_batches = options.get("eval_batches")
        self._round_number = 0
        self._phase_started = time.perf_counter()
        bind = options.get("metrics_bind") or ""
        self._metrics = TailMetrics(self, bind, limits.step_limit_s) if bind else None
        if self._metrics:
            _log.info("metrics and health are served on http://%s", self._metrics.address)

    @property
    def round_number(self) -> int:
        """The round under way, or the last one; 0: before the first."""
        return self._round_number

    @property
    def traffic(self) -> TrafficFigures | None:
        """What went through the tail's door so far; None before it was opened."""
        return self._tasks.opened.traffic.figures() if self._tasks.opened else None

    @property
    def training(self) -> TrainingConfig:
        """What heads and tail train by, with the exchange of the plan in force."""
        return self._plans.train_by(self._stated)

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
        """How many rounds this server plays at most, unless it is told otherwise."""
        return 0 if self.enough else self.training.rounds - self.resumed_after

    @property
    def enough(self) -> str:
        """Why no more rounds are to be played, though some are left; empty: there is no reason (see `why_enough`)."""
        return why_enough(self.history, self.config.patience) if self._round_number < self.training.rounds else ""

    def probe_task(self, node: str) -> RoundTask | None:
        """How `node` measures its link to the tail; None where plans do not depend on budgets.

        The task's round is the next one that opens: that is what the node's budget must be for.
        """
        if not self._plans.asks_budgets:
            return None
        return self._tasks.probe(self._round_number + 1, node, self.training)

    def open_training(self, round_number: int, present: Present) -> dict[str, RoundTask]:
        """Open the tail for a training round; returns every sampled client's task.

        Raises:
            ConfigError: nobody can take part.
        """
        started = time.perf_counter()
        self._settle_plans(round_number, present)
        tasks = self._tasks.open(round_number, "train", present, self.training)
        self._round_number = round_number
        if round_number == self.resumed_after + 1:
            _log.info("%s take part", describe_participants(len(tasks), present.count_nodes(tasks)))
        _log.info(
            "round %d of %d: %d clients are asked to train",
            round_number,
            self.training.rounds,
            len(tasks),
            extra=about("round_opened", round=round_number, clients=sorted(tasks)),
        )
        together = present.concurrency(tasks) if self._tasks.door.holds_clients else len(tasks)
        self.tail_rounds.open(round_number, tasks, together)
        self._journal.phase(round_number, "configure", started)
        self._phase_started = time.perf_counter()
        return tasks

    def answered(self, client: str) -> None:
        """`client` has answered its task, well or badly: if it never joined the round, or its connection is broken,
        nobody waits for it any more."""
        self._tail.withdraw(client)
        if self._tasks.opened:
            self._tasks.opened.answered(client)

    def hears_of(self, client: str) -> bool:
        """Whether a connection of `client` to the tail is open."""
        return bool(self._tasks.opened and self._tasks.opened.hears_of(client))

    def close_training(self, replies: Replies, failures: Sequence[str] = ()) -> RoundRecord:
        """End the training round: settle the tail, accept, merge, learn importance, measure health.

        Args:
            replies: of the clients that answered.
            failures: a line for each one that did not.

        Raises:
            RunFailedError: nobody finished, and that is the tail's own failure: further rounds would fare no better.
        """
        number = self._round_number
        self._journal.phase(number, "fit", self._phase_started)
        started = time.perf_counter()
        accepted = self._settle_tail(replies, failures)
        self._observe_budgets(replies)
        shares = self._shares(accepted)
        if not shares:
            told = about("round_lost", round=number)
            _log.warning("round %d: no client finished, the weights stay as they are", number, extra=told)
            self._tail.undo_training()
            if failure := self._tail.failure:
                raise RunFailedError(
                    f"Expected a tail that takes steps, found in round {number} that it cannot: {failure!r:.500}. "
                    'Give the server what it lacks, such as memory, and go on after the last round (resume = "latest").'
                ) from failure
            return self._journal.record(number)
        contributions = [Contribution(shares[c], a.ticket.cut, a.trained.factors, c) for c, a in accepted.items()]
        tail_factors = self.tail_rounds.trained()
        self.merge(contributions, tail_factors)
        self._journal.note(number, delta_error=self.model.delta_error)
        self._learn_importance(accepted, shares)
        self._journal.phase(number, "aggregate", started)
        self._measure_health(contributions, tail_factors)
        record = self._journal.record(number)
        log_round(record)
        return record

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
        told = about("scored", round=round_number, measured_on="central", perplexity=score.perplexity)
        _log.info("round %d: central perplexity %.3f", round_number, score.perplexity, extra=told)
        return score

    def open_scoring(self, round_number: int, present: Present) -> dict[str, RoundTask]:
        """Open the tail for scoring; returns every sampled client's task, none without federated evaluation."""
        if not self.config.federated_evaluation:
            return {}
        self._phase_started = time.perf_counter()
        self._round_number = round_number
        return self._tasks.open(round_number, "evaluate", present, self.training)

    def close_scoring(self, finished: Collection[str], failures: Sequence[str] = ()) -> Score | None:
        """End the scoring: the loss that the tail itself summed over the clients that finished; None if nobody did."""
        number = self._round_number
        tickets = self._tasks.door.close_round()
        failed = tuple(f"evaluate: {line}" for line in failures)
        self._journal.note(number, failures=(*self._journal.record(number).failures, *failed))
        log_incidents(number, failed)
        scored = [ticket for client, ticket in tickets.items() if client in finished and ticket.tokens]
        self._journal.phase(number, "federated", self._phase_started)
        if not scored:
            return None
        score = Score(sum(ticket.nll for ticket in scored), sum(ticket.tokens for ticket in scored))
        self._journal.note(number, federated_perplexity=score.perplexity)
        told = about("scored", round=number, measured_on="federated", perplexity=score.perplexity)
        _log.info("round %d: federated perplexity %.3f", number, score.perplexity, extra=told)
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
                "training": self._stated,
                "aggregation": self.config.rule,
                **{key.replace("_", "-"): value for key, value in vars(self.config).items() if key not in WAITING},
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
        if self._tasks.opened:
            self._tasks.opened.stop()
        try:
            self._tail.close_training()
        except ExchangeError as error:  # a step that does not end must not keep the results from being written
            _log.error("the tail's last step is still under way: %s", error)
        if self._metrics:
            self._metrics.stop()

    def _settle_plans(self, round_number: int, present: Present) -> None:
        """The plan in force, or a new one for heads and tail."""
        decision = self._plans.settle(present.clients, present.new_budgets)
        self._tasks.door.exchange_by(self.training)
        self.tail_rounds.train_by(self.training)
        self.model.send_updates_by(self._plans.update_by(self.config.update_coding))
        if decision is None:
            return
        self._journal.note(round_number, drift=decision.drift, plan_reasons=decision.reasons)
        if decision.reasons:
            reasons = "; ".join(decision.reasons)
            _log.info("round %d: new plan: %s\n%s", round_number, reasons, plan_table(decision.plan))
            self._journal.note(round_number, plan=decision.plan)
            self.tail_rounds.replan()

    def _settle_tail(self, replies: Replies, failures: Sequence[str]) -> dict[str, Accepted]:
        """Close the tail; note and return what the clients brought that did all their steps."""
        dropped = self._tail.close_training()
        expected = self._tasks.expected(self._shapes)
        handed_in = self._tasks.handed_in if self.training.keep_adapters else None
        tickets, steps = self._tasks.door.close_round(), self.training.local_steps
        accepted, refused = accept(replies, tickets, expected, steps, handed_in)
        if handed_in:
            for client, done in accepted.items():
                handed_in.take(client, self._round_number, done.trained.adapters)
        accepted, beyond = bound_updates(accepted, self.config)
        late = [f"client {client}: too late for {steps} steps" for client, steps in sorted(dropped.items())]
        incidents = (*failures, *refused, *beyond, *late)
        log_incidents(self._round_number, incidents)
        self._journal.note(
            self._round_number,
            clients=tuple(done.record() for done in accepted.values()),
            failures=incidents,
            steps=self._steps.take(),
        )
        return accepted

    def _shares(self, accepted: Mapping[str, Accepted]) -> dict[str, float]:
        """p_i of the clients that finished; empty where nobody trained on anything."""
        if not tokens_of(accepted):
            return {}
        shares = token_shares({client: done.ticket.tokens for client, done in accepted.items()})
        return bounded_shares(shares, self.config.max_share)

    def _observe_budgets(self, replies: Replies) -> None:
        for client, reply in replies.items():
            self._plans.observe_budget(client, reply.budget)

    def merge(self, contributions: Sequence[Contribution], tail_factors: Mapping[str, LoraFactors]) -> None:
        """Noise-free aggregation; the update goes into the weights. For whoever ends a round otherwise to override."""
        self.tail_rounds.merge(contributions, tail_factors, self.config.rule)

    def _learn_importance(self, accepted: Mapping[str, Accepted], shares: Mapping[str, float]) -> None:
        measured = {client: done.trained.importance for client, done in accepted.items()}
        heads, tail = balanced_importance(measured, self._tail.importance())
        self._plans.observe_importance(heads, tail, shares, self._shapes)
        train_loss = sum(done.ticket.nll for done in accepted.values()) / tokens_of(accepted)
        self._journal.note(self._round_number, importance=self._plans.history.profile, train_loss=train_loss)

    def _measure_health(self, contributions: Sequence[Contribution], tail_factors: Mapping[str, LoraFactors]) -> None:
        started = time.perf_counter()
        profile = self._plans.history.profile
        health = measure_aggregation(contributions, tail_factors, list(self._shapes), block_of, profile)
        self._journal.note(self._round_number, aggregation=health)
        self._journal.phase(self._round_number, "health", started)
