"""What a step of the tail is asked for and what comes of it, as data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor

from hsplit_flwr.training.session import StepReply


@dataclass(frozen=True)
class StepReport:
    """What one tail step was: for progress and for the results."""

    step: int
    """run step (0-based) of the furthest client in it"""
    clients: tuple[str, ...]
    loss: float
    """token-weighted mean over the clients, nats per token"""
    tokens: int
    answered_s: tuple[float, ...]
    """client by client: the tail's own forward, backward and optimizer steps until the client had its last answer"""
    round_clients: int
    """clients that were given this round's task"""

    @property
    def compute_s(self) -> float:
        """Until the last client had its answer; further passes are not in it."""
        return max(self.answered_s)


@dataclass(frozen=True, kw_only=True, eq=False)
class StepRequest:
    """One client's batch of a step, or a part of it."""

    client: str
    cut: int
    """the block before which the activations enter"""
    run_step: int
    activations: Tensor
    """(B, T, H)"""
    attention_mask: Tensor
    """(B, T)"""
    labels: Tensor
    """(B, T)"""
    number: int = 0
    """of the parts of its batch, from 0"""
    pass_number: int = 0
    """of the passes over the batch, from 0"""
    ends_batch: bool = True
    """no further part of what the client's optimizer step is taken on follows"""
    wants_gradient: bool = True
    """the client is sent that of its activations"""
    measured: bool = False
    """the tail's importance is measured on it"""


@dataclass(frozen=True, kw_only=True)
class TrainedBatch:
    """What became of the requests that were trained on at a time, and of the optimizer step taken on them, if any."""

    requests: list[StepRequest] = field(default_factory=list)
    """those that were trained on"""
    replies: dict[str, StepReply] = field(default_factory=dict)
    """by client"""
    refused: dict[str, Exception] = field(default_factory=dict)
    """by client, why it was not trained on"""
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Target tokens of all clients."""
        return sum(reply.tokens for reply in self.replies.values())

    @property
    def loss(self) -> float:
        """Token-weighted mean over the clients, nats per token."""
        return sum(reply.loss * reply.tokens for reply in self.replies.values()) / max(1, self.tokens)


def step_report(batches: Sequence[TrainedBatch], round_clients: int) -> StepReport:
    """One report of a step, whose `batches` (at least one) were trained on one after another."""
    tokens = sum(batch.tokens for batch in batches)
    ends = accumulate(batch.seconds for batch in batches)
    answered = {client: end for end, batch in zip(ends, batches, strict=True) for client in batch.replies}
    return StepReport(
        step=max(request.run_step for batch in batches for request in batch.requests),
        clients=tuple(answered),
        loss=sum(batch.loss * batch.tokens for batch in batches) / max(1, tokens),
        tokens=tokens,
        answered_s=tuple(answered.values()),
        round_clients=round_clients,
    )
