"""What users decide of a run's rounds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypedDict

from hsplit_flwr.common.checks import is_above, is_at_least, require, require_whole
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.task_limits import LONGEST_S
from hsplit_flwr.lora.aggregation import EXACT_RULE, RULES
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import DELTA_RANK, UpdateCoding
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.step import StepReport
from hsplit_flwr.training.workload import Workload

UPDATE_EXCESS = ("clip", "refuse")


WAITING = ("min_nodes", "round_limit_s", "message_limit_s", "wait_for_nodes_s", "patience")
"""fields of `StrategyConfig` that say how long is waited, not what is computed"""


@dataclass(frozen=True)
class StrategyConfig:
    """What a run does besides training steps."""

    rule: str = EXACT_RULE
    """aggregation rule, one of `aggregation.RULES`"""
    min_nodes: int = 1
    """a run begins once so many SuperNodes are connected and say whom they host; later rounds go on with fewer"""
    fraction_clients: float = 1.0
    """share of the known clients that train in a round"""
    federated_evaluation: bool = True
    """score the clients' held-out data after every round"""
    round_limit_s: float = 600.0
    """longest a client's stream may last"""
    message_limit_s: float = 300.0
    """how long a client may take to answer a message, where the exchange goes over Flower's messages"""
    wait_for_nodes_s: float = 300.0
    """longest wait for the nodes that a run begins with, and later for the first one, before the run ends"""
    patience: int = 0
    """a run ends after so many scored rounds in a row without a lower held-out perplexity; 0: after its last round"""
    max_share: float = 1.0
    """largest share p_i of a client in a round's aggregation; what is cut off goes to the others. 1: its share of the
    tokens, whatever that is"""
    max_update_norm: float = 0.0
    """largest size of a client's update, see `federation/bounds.py`; 0: any"""
    max_update_ratio: float = 0.0
    """the same, in multiples of the median of the round's clients (>= 1); 0: any"""
    update_excess: str = "clip"
    """what becomes of a larger update: ``clip`` scales it down to the limit, ``refuse`` leaves its client out"""

    update_codec: str = "fp32"
    """how a round's update goes to the clients: ``fp32`` as it is, without the client's own part; ``bf16`` rounded, and
    the rounding error carried to the next one (`lora/update_rounding.py`)"""
    update_rank: int = 0
    """largest rank of a matrix' update, with what is cut off carried to the next one; 0: any"""
    delta_rank: int = DELTA_RANK
    """largest rank of all updates of a matrix together where the base is quantised, so that they stand beside it; what
    is cut off is carried in the same way; 0: any"""

    def __post_init__(self) -> None:
        self.update_coding  # noqa: B018  (which checks it)
        if self.rule not in RULES:
            raise ConfigError(f"Expected an aggregation rule among {sorted(RULES)}, found {self.rule!r}.")
        if not 0 < self.fraction_clients <= 1:
            raise ConfigError(f"Expected 0 < fraction_clients <= 1, found {self.fraction_clients}.")
        require_whole("min_nodes", self.min_nodes, 1)
        require_whole("patience", self.patience, 0)
        limited = is_above(self.round_limit_s, 0) and self.round_limit_s <= LONGEST_S
        require(limited, "round_limit_s", f"> 0 s and at most {LONGEST_S:.0f} s", self.round_limit_s)
        require(is_above(self.message_limit_s, 0), "message_limit_s", "> 0 s", self.message_limit_s)
        require(self.wait_for_nodes_s > 0, "wait_for_nodes_s", "> 0 s", self.wait_for_nodes_s)
        require(is_above(self.max_share, 0) and self.max_share <= 1, "max_share", "> 0 and at most 1", self.max_share)
        require(is_at_least(self.max_update_norm, 0), "max_update_norm", ">= 0 (0: any size)", self.max_update_norm)
        ratio = self.max_update_ratio
        good = ratio == 0 or is_at_least(ratio, 1)
        require(good, "max_update_ratio", ">= 1, or 0 (any size)", ratio)
        known = self.update_excess in UPDATE_EXCESS
        require(known, "update_excess", f"as one of {UPDATE_EXCESS}", self.update_excess)

    @property
    def update_coding(self) -> UpdateCoding:
        """How a round's update goes to the clients."""
        return UpdateCoding(self.update_codec, self.update_rank, self.delta_rank)


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
    metrics_bind: str
    """where metrics and health are served, see `tail_metrics.py`; empty, the default: nowhere"""
    on_step: Callable[[StepReport], None] | None
    """called after every tail step; default: a line of progress in the log now and then"""
