"""What the planner decides, as data: who trains what in a round, what it costs, what limits it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, TypeVar

from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.workload import Workload

Settings = TypeVar("Settings", TrainingConfig, Workload)
Limit = Literal["memory", "deadline", "server", "none"]
"""what keeps a client from more: its memory, the round's deadline, the server's budget, or nothing"""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How batches travel, and how often the tail passes over them: fields of `TrainingConfig` that a plan decides."""

    activation_codec: str = TrainingConfig.activation_codec
    gradient_codec: str = TrainingConfig.gradient_codec
    micro_batches: int = TrainingConfig.micro_batches
    micro_batches_in_flight: int = TrainingConfig.micro_batches_in_flight
    tail_passes: int = TrainingConfig.tail_passes

    def of(self, settings: Settings) -> Settings:
        """These settings with this exchange."""
        return replace(settings, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class PlannedClient:
    """One client's share of a round and what it is predicted to cost."""

    client: str
    cut: int
    ranks: Mapping[str, int]
    """whole-model module name -> rank, for every candidate matrix of its head; 0: no adapter"""
    memory_bytes: int
    """predicted"""
    memory_budget_bytes: int
    step_s: float
    """one step if nothing went on at a time: its own compute and transfer, the tail's compute for all clients"""
    round_s: float
    """until it has sent its adapters, by the virtual clock (`planning.prediction`)"""
    limited_by: Limit
    value: float
    """its part of the objective"""


@dataclass(frozen=True)
class PlannedTail:
    """The server's share."""

    ranks: Mapping[str, int]
    """whole-model module name -> rank, for every matrix of block 1 and up"""
    memory_bytes: int
    memory_budget_bytes: int
    step_s: float
    """its compute for all clients of a step"""


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """A whole plan."""

    clients: Mapping[str, PlannedClient]
    """by client id"""
    left_out: Mapping[str, str]
    """client id -> why it cannot take part, with the figures"""
    tail: PlannedTail
    value: float
    """the objective: sum over the clients"""
    round_s: float
    """of the slowest client"""
    step_s: float
    """pace of the round: a step with all that goes on beside each other, by the virtual clock"""
    exchange: Exchange
    """how batches travel"""
    pace: float
    """steps' worth of progress that everybody's step makes (`solver.pace`)"""
    update: UpdateCoding = field(default_factory=UpdateCoding)
    """how a round's update goes to the clients"""


def progress_per_s(plan: RoundPlan) -> float:
    """Steps' worth of progress, per step and second of a round; 0 where nobody takes part."""
    return plan.pace / plan.round_s if plan.round_s else 0.0
