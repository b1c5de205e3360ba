"""Who trains what, round by round: plans that are configured once, or planned from budgets and importance."""

from collections.abc import Iterable, Mapping

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.importance_history import ImportanceHistory, merge
from hsplit_flwr.planning.replanning import AdaptivePlanning, PlanDecision
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload

Plans = AdaptivePlanning | Mapping[str, ClientPlan] | ClientPlan
Profile = Mapping[str, float]


class PlanBook:
    """The plans in force of heads and tail.

    Args:
        plans: see `HSplitLoRAStrategy`.
        tail_lora: the tail's adapters where plans are configured.
        workload: the largest batches where plans are configured; None: any.
        training: what heads and tail train by.
        num_blocks: L, of the model.

    Raises:
        ConfigError: a plan's cut is not in 1..L-1, or planning is for other steps or dtypes than `training`.
    """

    def __init__(
        self,
        plans: Plans,
        tail_lora: LoraSpec | None,
        workload: Workload | None,
        training: TrainingConfig,
        num_blocks: int,
    ) -> None:
        self.adaptive = plans if isinstance(plans, AdaptivePlanning) else None
        self.tail_lora = LoraSpec(0) if self.adaptive else tail_lora or LoraSpec()
        self.workload = self.adaptive.costs.workload if self.adaptive else workload
        self.history = self.adaptive.history if self.adaptive else ImportanceHistory()
        self._plans: Mapping[str, ClientPlan] | ClientPlan = {} if isinstance(plans, AdaptivePlanning) else plans
        for plan in self._plans.values() if isinstance(self._plans, Mapping) else [self._plans]:
            _check_cut(plan.cut, num_blocks)
        if self.workload:
            self.workload.check(training)

    def settle(self, known: Iterable[str], new_budgets: Mapping[str, Budget]) -> PlanDecision | None:
        """The plan of a round with the clients `known`; None where plans are configured.

        Raises:
            ConfigError: nobody can take part, or see `AdaptivePlanning.decide`.
        """
        if self.adaptive is None:
            return None
        for client, budget in new_budgets.items():
            self.adaptive.observe_budget(client, budget)
        decision = self.adaptive.decide(known)
        if not decision.plan.clients:
            reasons = "; ".join(decision.plan.left_out.values())
            raise ConfigError(f"Expected a client that can take part, found none: {reasons}")
        if not decision.reasons:
            return decision
        self._plans = {
            client: ClientPlan(planned.cut, self.adaptive.lora(planned.ranks))
            for client, planned in decision.plan.clients.items()
        }
        self.tail_lora = self.adaptive.lora(decision.plan.tail.ranks)
        return decision

    def takes_part(self, client: str) -> bool:
        """False for whom the plan leaves out, and who came after it was made."""
        return self.adaptive is None or (isinstance(self._plans, Mapping) and client in self._plans)

    def plan(self, client: str) -> ClientPlan:
        """The plan in force of `client`.

        Raises:
            ConfigError: there is none.
        """
        if isinstance(self._plans, ClientPlan):
            return self._plans
        if client not in self._plans:
            raise ConfigError(
                f"Expected a client among the planned {sorted(self._plans)}, found {client!r}. "
                "Add a plan for it, or give one plan for all."
            )
        return self._plans[client]

    @property
    def deepest_cut(self) -> int:
        """The largest cut of all plans in force; 1 where there are none yet."""
        plans = [self._plans] if isinstance(self._plans, ClientPlan) else self._plans.values()
        return max((plan.cut for plan in plans), default=1)

    def observe_budget(self, client: str, budget: Budget | None) -> None:
        """`client` says what it can afford from the next round on, if it says anything."""
        if self.adaptive and budget:
            self.adaptive.observe_budget(client, budget)

    def observe_importance(
        self,
        heads: Mapping[str, Profile],
        tail: Mapping[str, Profile],
        shares: Mapping[str, float],
        modules: Iterable[str],
    ) -> None:
        """Merge a round's measurements of importance into the history.

        Args:
            heads: client -> what its head measured.
            tail: client -> what the tail measured of that client's batches.
            shares: client -> p_i, its share of the trained tokens.
            modules: every linear layer of the model; a client that did not measure all of them does not count.
        """
        names = set(modules)
        whole = {client: {**tail.get(client, {}), **measured} for client, measured in heads.items()}
        complete = {client: profile for client, profile in whole.items() if shares[client] and profile.keys() == names}
        if complete:
            self.history.update(merge(complete, {client: shares[client] for client in complete}))


def _check_cut(cut: int, num_blocks: int) -> None:
    if not 1 <= cut < num_blocks:
        raise ConfigError(f"Expected a cut in 1..{num_blocks - 1} for this model of {num_blocks} blocks, found {cut}.")
