"""Plans that a planner makes: heads and tail follow its plan in force."""

from collections.abc import Iterable, Mapping
from typing import Any

from hsplit_flwr.common.state import State
from hsplit_flwr.common.tables import client_order
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.importance_history import ImportanceHistory
from hsplit_flwr.planning.replanning import AdaptivePlanning, PlanDecision
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload

Profile = Mapping[str, float]


class AdaptivePlans:
    """Plans made from budgets and importance, kept or renewed round by round.

    Args:
        planning: what makes them.
    """

    asks_budgets = True

    def __init__(self, planning: AdaptivePlanning) -> None:
        self.adaptive = planning
        self.tail_lora = LoraSpec(0)
        self._plans: dict[str, ClientPlan] = {}
        self._adopt()

    @property
    def workload(self) -> Workload:
        """The batches that costs are predicted for."""
        return self.adaptive.costs.workload

    def train_by(self, training: TrainingConfig) -> TrainingConfig:
        """`training` with the exchange of the plan in force; as it is before the first."""
        return made.exchange.of(training) if (made := self.adaptive.in_force) else training

    def update_by(self, stated: UpdateCoding) -> UpdateCoding:
        """The coding of updates that the plan in force has chosen; as `stated` where it is not the plan's to choose."""
        made = self.adaptive.in_force
        return made.update if made and self.adaptive.chooses_update else stated

    @property
    def history(self) -> ImportanceHistory:
        """The importance that plans are made from."""
        return self.adaptive.history

    @property
    def deepest_cut(self) -> int:
        """The largest cut of the plan in force; 1 before the first."""
        return max((plan.cut for plan in self._plans.values()), default=1)

    def settle(self, known: Iterable[str], new_budgets: Mapping[str, Budget]) -> PlanDecision:
        """The plan in force for a round with the clients `known`, or a new one and why.

        Raises:
            ConfigError: nobody can take part, or see `AdaptivePlanning.decide`.
        """
        for client, budget in new_budgets.items():
            self.adaptive.observe_budget(client, budget)
        decision = self.adaptive.decide(known)
        if not decision.plan.clients:
            reasons = "; ".join(f"client {client}: {reason}" for client, reason in decision.plan.left_out.items())
            raise ConfigError(f"Expected a client that can take part, found none: {reasons}")
        if decision.reasons:
            self._adopt()
        return decision

    def takes_part(self, client: str) -> bool:
        """False for whom the plan leaves out, and who joined after it was made."""
        return client in self._plans

    def plan(self, client: str) -> ClientPlan:
        """The plan in force of `client`.

        Raises:
            ConfigError: there is none.
        """
        if client not in self._plans:
            raise ConfigError(
                f"Expected a client that the plan in force is for {sorted(self._plans, key=client_order)}, found "
                f"{client!r}. It takes part once a plan is made with it."
            )
        return self._plans[client]

    def observe_budget(self, client: str, budget: Budget | None) -> None:
        """`client` says what it can afford from the next round on, if it says anything."""
        if budget:
            self.adaptive.observe_budget(client, budget)

    def observe_importance(
        self,
        heads: Mapping[str, Profile],
        tail: Mapping[str, Profile],
        shares: Mapping[str, float],
        modules: Iterable[str],
    ) -> None:
        """Learn from a round's measurements of importance: for the next plan."""
        self.history.update_from_round(heads, tail, shares, modules)

    def settings(self) -> Mapping[str, Any]:
        """See `AdaptivePlanning.settings`."""
        return self.adaptive.settings()

    def state(self) -> State:
        """The planning's state: the plans in force follow from it."""
        return self.adaptive.state()

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave, with a planner of the same model and settings.

        Raises:
            ConfigError: not such a state.
        """
        self.adaptive.load_state(state)
        self._adopt()

    def _adopt(self) -> None:
        """Heads and tail follow the planner's plan in force."""
        if made := self.adaptive.in_force:
            lora = self.adaptive.lora
            self._plans = {client: ClientPlan(p.cut, lora(p.ranks)) for client, p in made.clients.items()}
            self.tail_lora = lora(made.tail.ranks)
