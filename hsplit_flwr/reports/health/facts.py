"""What a run's health is judged from: its records, its settings, its score on held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hsplit_flwr.data.slots import SlotScore
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.training.config import TrainingConfig


@dataclass(frozen=True)
class RunSettings:
    """What a run was configured to do, as far as its health depends on it."""

    training: TrainingConfig
    rule: str
    """of aggregation"""
    num_blocks: int
    """L, of the model"""


@dataclass(frozen=True)
class RunFacts:
    """One run, as far as it has come."""

    history: Sequence[RoundRecord]
    initial_perplexity: float | None
    """before the first round, on the data of the rounds' perplexities"""
    settings: RunSettings
    slots: Mapping[str, SlotScore] = field(default_factory=dict)
    """``before`` and ``after`` training -> score of texts for held-out prompts; what was not measured is not there"""
