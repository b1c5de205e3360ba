"""When to plan anew: the plan in force, what it was made for, and why it changes.

A plan stays in force until the importance profile has drifted past a threshold since it was made, a budget has changed,
or clients joined or left: a new plan costs every client whose cut changes the whole delta of its new head, and the
comparison of rounds. Nothing learnt is lost by it: what a round trained is merged before the next plan.

Follows HSplitLoRA (arXiv:2505.02795), adaptive rank and split configuration; the thresholds are ours.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from hsplit_flwr.common.checks import require
from hsplit_flwr.common.dataclass_state import from_state, to_state
from hsplit_flwr.common.state import State
from hsplit_flwr.common.tables import client_order
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.importance_history import HistoryRecord, ImportanceHistory, drift
from hsplit_flwr.planning.planner import PlannerConfig, plan
from hsplit_flwr.planning.round_plan import RoundPlan

Profile = Mapping[str, float]


@dataclass(frozen=True)
class ReplanConfig:
    """What is worth a new plan."""

    drift_threshold: float = 0.15
    """of the importance profile since the plan in force, as total variation distance in [0, 1]"""
    budget_tolerance: float = 0.1
    """relative change of any figure of a budget that is let pass, as long as the client's head still fits"""

    def __post_init__(self) -> None:
        require(0 <= self.drift_threshold <= 1, "drift_threshold", "in [0, 1]", self.drift_threshold)
        require(0 <= self.budget_tolerance < 1, "budget_tolerance", "in [0, 1)", self.budget_tolerance)


@dataclass(frozen=True)
class PlanDecision:
    """Which plan a round follows, and why."""

    plan: RoundPlan
    reasons: tuple[str, ...]
    """of the change; empty where the plan in force stays"""
    drift: float
    """of the importance profile since the plan that was in force"""


class AdaptivePlanning:
    """Plans from budgets and importance, kept or renewed round by round.

    Args:
        costs: of the model under the run's workload.
        server: the server's budget.
        planner: candidate ranks, target modules, deadline.
        replan: thresholds.
        lora_alpha: alpha of every adapter, whatever its rank; its scaling is alpha / r.
        use_rslora: its scaling is alpha / sqrt(r) instead.
        importance: module name -> importance known before training (of an earlier run); default: all equal.

    Raises:
        ConfigError: `importance` is not of this model, or a target module matches nothing in it.
    """

    def __init__(
        self,
        costs: ModelCosts,
        server: Budget,
        planner: PlannerConfig | None = None,
        replan: ReplanConfig | None = None,
        *,
        lora_alpha: float = LoraSpec.lora_alpha,
        use_rslora: bool = LoraSpec.use_rslora,
        importance: Profile | None = None,
    ) -> None:
        self.stated_costs = costs
        """under the exchange that is stated, whatever the plan chooses"""
        self._costs = costs
        self._lora_alpha = lora_alpha
        self._use_rslora = use_rslora
        self.history = ImportanceHistory()
        self._server = server
        self._planner = planner or PlannerConfig()
        self._planner.targets(matrix.name for matrix in costs.matrices)  # refuses what matches nothing
        self._replan = replan or ReplanConfig()
        self._uniform = {matrix.name: 1 / len(costs.matrices) for matrix in costs.matrices}
        if importance is not None and importance.keys() != self._uniform.keys():
            raise ConfigError(
                f"Expected importance for the {len(self._uniform)} linear layers of the model, found "
                f"{len(importance)} names, {len(importance.keys() - self._uniform.keys())} of them unknown. "
                "Take it from a run of the same model."
            )
        if importance is not None:
            self.history.update(importance)
        self.budgets: dict[str, Budget] = {}
        """what every client said last"""
        self.in_force: RoundPlan | None = None
        """the plan that rounds follow now"""
        self._made_for: Profile = {}
        self.made_with: dict[str, Budget] = {}
        """the budgets it was made for"""

    @property
    def chosen(self) -> tuple[str, ...]:
        """Fields of `TrainingConfig` that the plan chooses."""
        return tuple(self._planner.choose)

    @property
    def chooses_update(self) -> bool:
        """Whether the plan chooses how updates go out."""
        return self._planner.choose_update

    @property
    def costs(self) -> ModelCosts:
        """Costs under the exchange of the plan in force; before the first plan, as they are stated."""
        if self.in_force:
            self._costs = self._costs.under(self.in_force.exchange.of(self.stated_costs.workload))
        return self._costs

    @property
    def profile(self) -> Profile:
        """Importance by module, sum 1; all equal before anything was measured."""
        return self.history.profile or self._uniform

    def lora(self, ranks: Mapping[str, int]) -> LoraSpec:
        """The adapters of a head or tail of these ranks."""
        return LoraSpec.of_ranks(ranks, self._lora_alpha, use_rslora=self._use_rslora)

    def observe_budget(self, client: str, budget: Budget) -> None:
        """`client` says what it can afford from now on."""
        self.budgets[client] = budget

    def observe_importance(self, profile: Profile) -> None:
        """The merged importance of a round."""
        self.history.update(profile)

    def decide(self, clients: Iterable[str]) -> PlanDecision:
        """The plan of a round with `clients`: the one in force, or a new one and why.

        Raises:
            ConfigError: a client without a budget, or a server that cannot hold its part.
        """
        ids = sorted(clients, key=client_order)
        missing = [client for client in ids if client not in self.budgets]
        if missing:
            raise ConfigError(
                f"Expected a budget from every client, found none from {missing}. "
                "State it (node config: memory-gb, gflops, uplink-mbps, downlink-mbps) or let the client measure it."
            )
        budgets = {client: self.budgets[client] for client in ids}
        moved = drift(self._made_for, self.profile) if self.in_force else 0.0
        reasons = self._reasons(budgets, moved)
        if self.in_force is None or reasons:
            self.in_force = self.make(budgets)
            self._made_for, self.made_with = dict(self.profile), budgets
        return PlanDecision(self.in_force, reasons, moved)

    def make(self, budgets: Mapping[str, Budget]) -> RoundPlan:
        """A new plan for clients with these budgets and the importance known now.

        Raises:
            ConfigError: see `planner.plan`.
        """
        planner = self._planner
        if self.in_force and not self.in_force.update.exact:  # what such updates lack only such updates carry
            planner = replace(planner, update=self.in_force.update, choose_update=False)
        return plan(self.stated_costs, self.profile, budgets, self._server, planner)

    def settings(self) -> Mapping[str, Any]:
        """What plans are made by besides budgets and importance; the server's own budget may be measured."""
        return {
            "workload": self.stated_costs.workload,
            "planner": self._planner,
            "replan": self._replan,
            "lora-alpha": self._lora_alpha,
            "use-rslora": self._use_rslora,
        }

    def state(self) -> State:
        """Budgets, importance and the plan in force as values that JSON knows; `load_state` takes it back."""
        record = PlanningRecord(
            budgets=self.budgets,
            history=self.history.record(),
            in_force=self.in_force,
            made_for=self._made_for,
            made_with=self.made_with,
        )
        state: State = to_state(record)
        return state

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave: the next decisions are those that would have been made.

        Raises:
            ConfigError: not such a state, or one of another model.
        """
        record = from_state(PlanningRecord, state)
        ranks = record.in_force.tail.ranks if record.in_force else {}
        if unknown := sorted({*record.history.profile, *record.made_for, *ranks} - self._uniform.keys()):
            raise ConfigError(
                f"Expected a state of planning for this model, found {len(unknown)} modules that it has not, such as "
                f"{unknown[0]!r}. Resume with the model that the run began with."
            )
        self.budgets, self.made_with = dict(record.budgets), dict(record.made_with)
        self.history.resume(record.history)
        self.in_force, self._made_for = record.in_force, record.made_for

    def _reasons(self, budgets: Mapping[str, Budget], moved: float) -> tuple[str, ...]:
        if self.in_force is None:
            return ("first plan",)
        reasons = []
        if moved > self._replan.drift_threshold:
            reasons.append(f"importance drifted by {moved:.3f} (threshold {self._replan.drift_threshold:g})")
        before = self.made_with
        if joined := sorted(budgets.keys() - before.keys(), key=client_order):
            reasons.append(f"new clients: {', '.join(joined)}")
        if left := sorted(before.keys() - budgets.keys(), key=client_order):
            reasons.append(f"clients gone: {', '.join(left)}")
        for client in (c for c in budgets if c in before):
            if change := self._change(client, before[client], budgets[client]):
                reasons.append(change)
        return tuple(reasons)

    def _change(self, client: str, before: Budget, now: Budget) -> str | None:
        """What changed of a client's budget, if it matters."""
        assert self.in_force is not None
        planned = self.in_force.clients.get(client)
        if planned and planned.memory_bytes > now.memory_bytes:
            return (
                f"client {client}: its head needs {planned.memory_bytes:,} bytes, its memory is now "
                f"{now.memory_bytes:,} bytes"
            )
        then, new = asdict(before), asdict(now)
        changed = [
            f"{name} {then[name]:,.6g} -> {new[name]:,.6g}"
            for name in then
            if abs(new[name] - then[name]) > self._replan.budget_tolerance * max(abs(then[name]), abs(new[name]))
        ]
        return f"client {client}: {', '.join(changed)}" if changed else None


@dataclass(frozen=True, kw_only=True)
class PlanningRecord:
    """What an `AdaptivePlanning` knows besides its settings."""

    budgets: Mapping[str, Budget]
    """client id -> what it said last"""
    history: HistoryRecord
    in_force: RoundPlan | None
    """the plan that rounds follow"""
    made_for: Profile
    """importance that it was made for"""
    made_with: Mapping[str, Budget]
    """budgets that it was made for"""
