"""What the planner decides, as data: who trains what in a round, what it costs, what limits it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Limit = Literal["memory", "deadline", "server", "none"]
"""what keeps a client from more: its memory, the round's deadline, the server's budget, or nothing"""


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
    """one step alone: its own compute and transfer, and the tail's compute for all clients of the step"""
    round_s: float
    """all steps of a round and the adapters' upload"""
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
