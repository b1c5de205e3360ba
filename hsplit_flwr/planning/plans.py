"""Who trains what, round by round: plans that are configured once, or planned from budgets and importance."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

from hsplit_flwr.common.state import State
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.planning.adaptive_plans import AdaptivePlans
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.configured_plans import ConfiguredPlans
from hsplit_flwr.planning.importance_history import ImportanceHistory
from hsplit_flwr.planning.replanning import AdaptivePlanning, PlanDecision
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload

Plans = AdaptivePlanning | Mapping[str, ClientPlan] | ClientPlan
"""what users give: a planner, or configured plans: client id -> its cut and adapters, or one plan for all"""
Profile = Mapping[str, float]


class PlansInForce(Protocol):
    """The plans in force of heads and tail."""

    tail_lora: LoraSpec
    """the tail's adapters"""

    @property
    def adaptive(self) -> AdaptivePlanning | None:
        """What plans; None where plans are configured."""

    @property
    def asks_budgets(self) -> bool:
        """Whether clients must say what they can afford."""

    @property
    def workload(self) -> Workload | None:
        """The largest batches that the plans are good for; None: any."""

    def train_by(self, training: TrainingConfig) -> TrainingConfig:
        """`training` with the exchange of the plan in force, if a plan decides that."""

    def update_by(self, stated: UpdateCoding) -> UpdateCoding:
        """How updates go to the clients by the plan in force; as `stated` if no plan decides that."""

    @property
    def history(self) -> ImportanceHistory:
        """The importance measured so far."""

    @property
    def deepest_cut(self) -> int:
        """The largest cut of all plans in force; 1 where there are none yet."""

    def settle(self, known: Iterable[str], new_budgets: Mapping[str, Budget]) -> PlanDecision | None:
        """The plan of a round with the clients `known`; None where plans are configured.

        Raises:
            ConfigError: nobody can take part, or see `AdaptivePlanning.decide`.
        """

    def takes_part(self, client: str) -> bool:
        """Whether `client` has a plan in force."""

    def plan(self, client: str) -> ClientPlan:
        """The plan in force of `client`.

        Raises:
            ConfigError: there is none.
        """

    def observe_budget(self, client: str, budget: Budget | None) -> None:
        """`client` says what it can afford from the next round on, if it says anything."""

    def observe_importance(
        self,
        heads: Mapping[str, Profile],
        tail: Mapping[str, Profile],
        shares: Mapping[str, float],
        modules: Iterable[str],
    ) -> None:
        """Learn from a round's measurements of importance: see `ImportanceHistory.update_from_round`."""

    def settings(self) -> Mapping[str, Any]:
        """What never changes in a run: records and values for `common.dataclass_state.to_state`."""

    def state(self) -> State:
        """All that changes from round to round, as values that JSON knows; `load_state` takes it back."""

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave, with the same plans or planner.

        Raises:
            ConfigError: not such a state.
        """


def plans_in_force(
    plans: Plans,
    tail_lora: LoraSpec | None,
    workload: Workload | None,
    training: TrainingConfig,
    modules: Collection[str],
) -> PlansInForce:
    """The plans in force for what users give.

    Args:
        plans: see `Plans`.
        tail_lora: the tail's adapters where plans are configured; default: rank 8 on every linear layer.
        workload: the largest batches where plans are configured; None: any. A planner has its own.
        training: what heads and tail train by.
        modules: every linear layer of the model's blocks, by whole-model name.

    Raises:
        ConfigError: a plan's cut is not in 1..L-1, a target or pattern matches no module, or the costs are predicted
            for other steps or dtypes than those of `training`.
    """
    if isinstance(plans, AdaptivePlanning):
        plans.stated_costs.workload.check(training)
        return AdaptivePlans(plans)
    if workload:
        workload.check(training)
    return ConfiguredPlans(plans, tail_lora or LoraSpec(), workload, modules)
