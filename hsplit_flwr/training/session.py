"""What a head asks of a tail, wherever the tail is (in this process, or behind gRPC)."""

from typing import NamedTuple, Protocol

from torch import Tensor


class BatchPart(NamedTuple):
    """Which part of which batch: a batch travels in one piece, or in several micro-batches one after another."""

    step: int
    """of the round, from 0: one batch each"""
    number: int = 0
    """of the step's parts, from 0"""
    parts: int = 1
    """parts of the step"""

    @property
    def is_last(self) -> bool:
        """The step is complete with it."""
        return self.number == self.parts - 1


def is_measured(part: BatchPart, importance_steps: int) -> bool:
    """Whether head and tail measure importance on `part`: on the first of each of the round's first steps."""
    return part.step < importance_steps and part.number == 0


def wants_gradient(part: BatchPart, *, trains: bool, importance_steps: int) -> bool:
    """Whether a head has a use for the gradient of `part`: it trains adapters, or measures importance on it."""
    return trains or is_measured(part, importance_steps)


class StepReply(NamedTuple):
    """The tail's answer to one training step, or to a part of it."""

    gradient: Tensor | None
    """(B, T, H): gradient of the mean loss of what was sent with respect to its activations; None: the head has no use
    for it (`wants_gradient`)"""
    loss: float
    """mean loss per target token of what was sent, nats"""
    tokens: int
    """target tokens of what was sent"""


class ScoreReply(NamedTuple):
    """The tail's answer to one evaluation step."""

    nll: float
    """summed negative log-likelihood, nats"""
    tokens: int
    """target tokens"""


class TailSession(Protocol):
    """One client's use of the tail during one round. Shapes: (B, T, H) activations, (B, T) mask and labels."""

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """Hand over the next part of a step, to be trained on; does not wait for its answer. Raises `ExchangeError`."""

    def receive_part(self) -> StepReply:
        """The answer to the oldest part that has none yet; blocks until it is there. Raises `ExchangeError`."""

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """Score a batch without training. Raises `ExchangeError`."""

    def close(self) -> None:
        """Leave the round. The tail no longer waits for this client."""

    def train_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> StepReply:
        """Train the tail on a batch in one piece; blocks until it is done. `step` counts the round's steps from 0.

        Raises `ExchangeError`.
        """
        self.send_part(BatchPart(step), activations, attention_mask, labels)
        return self.receive_part()
