"""What a head asks of a tail, wherever the tail is (in this process, or behind gRPC)."""

from typing import NamedTuple, Protocol

from torch import Tensor


class StepReply(NamedTuple):
    """The tail's answer to one training step."""

    gradient: Tensor
    """(B, T, H): gradient of the client's own mean loss with respect to its activations"""
    loss: float
    """the client's own mean loss per target token, nats"""
    tokens: int
    """target tokens of the client's batch"""


class ScoreReply(NamedTuple):
    """The tail's answer to one evaluation step."""

    nll: float
    """summed negative log-likelihood, nats"""
    tokens: int
    """target tokens"""


class TailSession(Protocol):
    """One client's use of the tail during one round. Shapes: (B, T, H) activations, (B, T) mask and labels."""

    def train_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> StepReply:
        """Train the tail on a batch, together with the other clients of this step; blocks until it is done.

        `step` counts the round's steps from 0. Raises `ExchangeError`.
        """

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """Score a batch without training. Raises `ExchangeError`."""

    def close(self) -> None:
        """Leave the round. The tail no longer waits for this client."""
