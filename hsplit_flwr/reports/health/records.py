"""What is measured of a run's health, as data: the tail's steps, a round's aggregation, the findings at the end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "not measured"]


@dataclass(frozen=True)
class TailSteps:
    """The steps of one round, as the tail saw them."""

    losses: tuple[float, ...]
    """by step of the round: token-weighted mean over the clients in it, nats per token, before the step's update"""


@dataclass(frozen=True)
class MatrixSpectrum:
    """The exact aggregated update of one matrix in one round."""

    name: str
    norm: float
    """Frobenius norm, > 0"""
    singular_values: tuple[float, ...]
    """the largest ones, descending"""
    effective_rank: float
    """exp(entropy of sigma_i^2 / sum sigma^2), 1 .. stacked_rank"""
    stacked_rank: int
    """the sum of its adapters' ranks: the most that the update's rank can be, if the matrix is large enough"""
    smallest_rank: int
    """of the adapters that it was formed from"""
    largest_rank: int
    energy_in_smallest: float
    """share of sum sigma^2 in the `smallest_rank` largest singular values"""


@dataclass(frozen=True)
class AdapterCoverage:
    """How much of the model the round's adapters could change, ranks of 0 included."""

    bare_share: float
    """of the heads' linear layers, summed over clients: without an adapter"""
    head_rank: float
    """mean over the same"""
    tail_rank: float
    """mean over the linear layers from the smallest cut on, those that the tail trains for somebody"""
    largest_rank: int
    """of any adapter"""


@dataclass(frozen=True)
class AggregationHealth:
    """One round's aggregation, measured on a few matrices (`health.aggregation` says which)."""

    matrices: tuple[MatrixSpectrum, ...]
    losses: Mapping[str, float]
    """rule -> Frobenius norm of (its update - the exact one) over that of the exact one, over all `matrices`"""
    coverage: AdapterCoverage


@dataclass(frozen=True)
class Finding:
    """One sign of trouble: whether a run shows it, why, and what to do."""

    sign: str
    status: Status
    value: float | None
    """the figure that decided"""
    unit: str
    measured: str
    """what was measured, for people"""
    cause: str = ""
    """of a warning"""
    remedy: str = ""
    """of a warning"""
