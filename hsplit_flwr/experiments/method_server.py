"""The server of methods that split the model: a deployment's, but for what becomes of a round's adapters."""

from collections.abc import Mapping, Sequence
from typing import Any

from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.rivals.corrections import correct, freeze_A
from hsplit_flwr.experiments.rivals.whole_model import resized
from hsplit_flwr.experiments.split_head import SplitHead
from hsplit_flwr.federation.roster import Present
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.lora.aggregation import RULES, Contribution, aggregate, terms_by_module
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.models.segments import block_of
from hsplit_flwr.training.barrier import BarrierLimits

LIMITS = BarrierLimits(start_gate_s=60.0, straggler_limit_s=600.0, step_limit_s=600.0)
"""nobody is late here: a step always takes all clients, so that a run does not depend on the machine's load"""
Factors = Mapping[str, LoraFactors]


class MethodServer(RoundServer):
    """A `RoundServer` that ends its rounds as `method` does.

    Args:
        method: what is run.
        heads: client id -> its head of the round under way.
        arguments: of `RoundServer`, as are `options`.
    """

    def __init__(self, method: Method, heads: Mapping[str, SplitHead], *arguments: Any, **options: Any) -> None:
        coding = {"update_codec": method.update_codec, "update_rank": method.update_rank}
        config = StrategyConfig(rule=method.rule, federated_evaluation=False, **coding)  # type: ignore[arg-type]
        super().__init__(*arguments, config=config, limits=LIMITS, **options)
        self._method = method
        self._heads = heads
        self.update: dict[str, LoraFactors] = {}
        """what the last round aggregated"""
        self.residual: dict[str, LoraFactors] = {}
        """what the weights got in the last round beside carried adapters"""
        self.average: dict[str, LoraFactors] = {}
        """what becomes of adapters that heads hold, where these are carried from round to round"""
        self._plan_of_average: dict[str, object] = {}

    def open_training(self, round_number: int, present: Present) -> dict[str, RoundTask]:
        """See `RoundServer`. Where adapters are carried, the tail goes on from those that it shares with heads, too.

        A new plan ends that: what was averaged is merged, and all restart.
        """
        tasks = super().open_training(round_number, present)
        if self._method.carried:
            plan = self._shared_plan(tasks)
            if self.average and any(self._plan_of_average.get(key, value) != value for key, value in plan.items()):
                self.model.apply(self.average)
                self.average = {}
            self._plan_of_average |= plan
            self._hand_to_tail()
        return tasks

    def merge(self, contributions: Sequence[Contribution], tail_factors: Factors) -> None:
        """The update goes into the weights; or the mean of what heads hold is carried, and the tail's own kept."""
        if self._method.carried:
            kept = self._stale() if self._method.stale_snapshots else contributions
            self.tail_rounds.keep_tail_only()
            own = self.tail_rounds.unmerged()
            shared = {name: pair for name, pair in tail_factors.items() if name not in own}
            self.update = aggregate(kept, shared, block_of, RULES[self.config.rule])
            terms = terms_by_module(kept, shared, block_of)
            start, self.residual = correct(self.update, terms, self._method.correction)
            self.average |= start
            if self.residual:
                self.model.apply(self.residual)
            return
        self.update = self.tail_rounds.merge(contributions, tail_factors, self.config.rule)
        if not self._method.keep_tail:
            self.tail_rounds.merge_remaining()

    def _shared_plan(self, tasks: Mapping[str, RoundTask]) -> dict[str, object]:
        """All that decides the form of what heads and tail share."""
        spec, deepest = self._plans.tail_lora, self._plans.deepest_cut
        names = [name for name in self.tail_rounds.tail.adapters.module_names if block_of(name) < deepest]
        tail = {name: (spec.rank(name), spec.scaling(name)) for name in names}
        heads = {f"client {client}": task.plan for client, task in tasks.items()}
        return {**heads, "deepest cut": deepest, "tail": tail}

    def _hand_to_tail(self) -> None:
        adapters = self.tail_rounds.tail.adapters
        own = adapters.factors()
        adapters.set({name: self.start(name, pair) for name, pair in own.items()})
        if self._method.frozen_A:
            shared = [name for name in own if block_of(name) < self._plans.deepest_cut]
            freeze_A(adapters, frozen=False)
            freeze_A(adapters, names=shared)

    def start(self, name: str, fresh: LoraFactors) -> LoraFactors:
        """What is carried of the matrix `name`, at the rank of the `fresh` adapter; that one where there is nothing."""
        return resized(self.average[name], fresh) if name in self.average else fresh

    def _stale(self) -> list[Contribution]:
        """N + 1 snapshots of N heads, each before its last step, the first one twice."""
        heads = [*self._heads.values(), next(iter(self._heads.values()))]
        return [Contribution(1 / len(heads), head.plan.cut, head.snapshot) for head in heads]
