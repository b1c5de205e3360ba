"""Plans that users configured: they stay what they are."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from hsplit_flwr.common.state import State
from hsplit_flwr.common.tables import client_order
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.models.block_layout import block_of
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.importance_history import ImportanceHistory
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload

_log = logging.getLogger("hsplit_flwr")
Profile = Mapping[str, float]


class ConfiguredPlans:
    """Plans that stay what they are: one for all clients, or one per client id.

    Args:
        plans: client id -> its cut and adapters, or one plan for all.
        tail_lora: the tail's adapters.
        workload: the largest batches; None: any.
        modules: every linear layer of the model's blocks, by whole-model name.

    Raises:
        ConfigError: a plan's cut is not in 1..L-1, or a target or pattern matches no module.
    """

    adaptive = None
    asks_budgets = False

    def __init__(
        self,
        plans: Mapping[str, ClientPlan] | ClientPlan,
        tail_lora: LoraSpec,
        workload: Workload | None,
        modules: Collection[str],
    ) -> None:
        self.plans = plans
        self.tail_lora = tail_lora.spelled_out(modules)
        self.workload = workload
        self.history = ImportanceHistory()
        self._left_out: set[str] = set()
        """clients that were named in the log"""
        self._modules = list(modules)
        num_blocks = 1 + max(block_of(name) for name in modules)
        for plan in self._all():
            _check_cut(plan.cut, num_blocks)
            plan.lora.check(modules)
        tail_lora.check(modules)

    @property
    def deepest_cut(self) -> int:
        """The largest cut of all plans."""
        return max((plan.cut for plan in self._all()), default=1)

    def settle(self, known: Iterable[str], new_budgets: Mapping[str, Budget]) -> None:
        """Name the clients of `known` that have no plan, each once.

        Raises:
            ConfigError: none of them has one.
        """
        ids = sorted(known, key=client_order)
        without = [client for client in ids if not self.takes_part(client)]
        if isinstance(self.plans, Mapping) and len(without) == len(ids):
            raise ConfigError(
                f"Expected a client among the planned {self._planned()}, found {ids}. "
                "Add plans for these, or give one plan for all."
            )
        for client in without:
            if client not in self._left_out:
                remedy = "Add a plan for it, or give one plan for all."
                _log.warning("client %s is left out: planned are %s. %s", client, self._planned(), remedy)
        self._left_out.update(without)

    def train_by(self, training: TrainingConfig) -> TrainingConfig:
        """`training` as it is."""
        return training

    def update_by(self, stated: UpdateCoding) -> UpdateCoding:
        """Updates as `stated`."""
        return stated

    def takes_part(self, client: str) -> bool:
        """Whether `client` has a plan."""
        return isinstance(self.plans, ClientPlan) or client in self.plans

    def plan(self, client: str) -> ClientPlan:
        """The plan of `client`, its adapters by plain names.

        Raises:
            ConfigError: there is none.
        """
        plan = self._configured(client)
        head = [name for name in self._modules if block_of(name) < plan.cut]
        return replace(plan, lora=plan.lora.spelled_out(head, self._modules))

    def _configured(self, client: str) -> ClientPlan:
        if isinstance(self.plans, ClientPlan):
            return self.plans
        if client not in self.plans:
            raise ConfigError(
                f"Expected a client among the planned {self._planned()}, found {client!r}. "
                "Add a plan for it, or give one plan for all."
            )
        return self.plans[client]

    def observe_budget(self, client: str, budget: Budget | None) -> None:
        """Nothing: plans do not depend on it."""

    def observe_importance(
        self,
        heads: Mapping[str, Profile],
        tail: Mapping[str, Profile],
        shares: Mapping[str, float],
        modules: Iterable[str],
    ) -> None:
        """Learn from a round's measurements of importance: for the reports."""
        self.history.update_from_round(heads, tail, shares, modules)

    def settings(self) -> Mapping[str, Any]:
        """The plans, the tail's adapters and the largest batches."""
        return {"clients": self.plans, "tail": self.tail_lora, "workload": self.workload}

    def state(self) -> State:
        """The history's state; the plans themselves do not change."""
        return self.history.state()

    def load_state(self, state: State) -> None:
        """Go on with the history that `state` gave.

        Raises:
            ConfigError: not such a state.
        """
        self.history.load_state(state)

    def _all(self) -> Collection[ClientPlan]:
        return [self.plans] if isinstance(self.plans, ClientPlan) else self.plans.values()

    def _planned(self) -> list[str]:
        return sorted(self.plans, key=client_order) if isinstance(self.plans, Mapping) else []


def _check_cut(cut: int, num_blocks: int) -> None:
    if not 1 <= cut < num_blocks:
        raise ConfigError(f"Expected a cut in 1..{num_blocks - 1} for this model of {num_blocks} blocks, found {cut}.")
