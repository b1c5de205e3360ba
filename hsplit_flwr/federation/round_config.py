"""What users decide of a run's rounds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypedDict

from hsplit_flwr.common.checks import require, require_whole
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.aggregation import EXACT_RULE, RULES
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.step import StepReport
from hsplit_flwr.training.workload import Workload


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


class RoundOptions(TypedDict, total=False):
    """Keyword arguments of a `RoundServer`, which the strategies of both faces take, too."""

    tail_lora: LoraSpec | None
    """the tail's adapters where plans are configured (default: rank 8 on every linear layer)"""
    workload: Workload | None
    """the largest batches where plans are configured (default: any); planning has its own"""
    config: StrategyConfig | None
    """rounds, sampling, evaluation"""
    limits: BarrierLimits | None
    """waiting times of the step barrier"""
    eval_batches: Iterable[Batch] | None
    """server-side held-out batches; none: no central evaluation"""
    on_step: Callable[[StepReport], None] | None
    """called after every tail step; default: a line of progress in the log now and then"""
