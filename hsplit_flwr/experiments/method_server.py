"""The server of methods that split the model: a deployment's, but for what becomes of a round's adapters."""

from collections.abc import Mapping, Sequence
from typing import Any

from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.split_head import SplitHead
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.lora.aggregation import RULES, Contribution, aggregate
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
        self.average: dict[str, LoraFactors] = {}
        """mean of the heads' adapters, where they are carried from round to round"""

    def merge(self, contributions: Sequence[Contribution], tail_factors: Factors) -> None:
        """The update goes into the weights; or the mean of the heads' adapters is kept, and the tail's as they are."""
        if self._method.carried:
            kept = self._stale() if self._method.stale_snapshots else contributions
            self.average = self.update = aggregate(kept, {}, block_of, RULES[self.config.rule])
            self.tail_rounds.keep_tail_only()
            return
        self.update = self.tail_rounds.merge(contributions, tail_factors, self.config.rule)
        if not self._method.keep_tail:
            self.tail_rounds.merge_remaining()

    def _stale(self) -> list[Contribution]:
        """N + 1 snapshots of N heads, each before its last step, the first one twice."""
        heads = [*self._heads.values(), next(iter(self._heads.values()))]
        return [Contribution(1 / len(heads), head.plan.cut, head.snapshot) for head in heads]
