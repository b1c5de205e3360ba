"""Training steps on a whole model, whatever of it is trainable."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from torch import Tensor

from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.experiments.work import recorded
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.loss import target_tokens, tensors_of, token_losses
from hsplit_flwr.training.optimizer import Optimizer


@dataclass(frozen=True)
class WholeReport:
    """What training the whole model for a round did."""

    loss: float
    """mean of the steps' mean losses"""
    tokens: int


def train_whole(
    segment: Segment,
    optimizer: Optimizer,
    steps: Iterable[Sequence[Batch]],
    first_step: int,
    extra_loss: Callable[[], Tensor] | None = None,
) -> WholeReport:
    """Train what of `segment` (a whole model) requires gradients.

    Args:
        segment: holds all blocks.
        optimizer: of its trainable parameters.
        steps: the batches of each step; a step's loss is the mean over the target tokens of all of them.
        first_step: run step of the first one.
        extra_loss: added to every step's loss.
    """
    losses: list[float] = []
    trained = 0
    for step, batches in enumerate(steps):
        optimizer.zero_grad()
        tokens = sum(target_tokens(batch["labels"]) for batch in batches)
        total = 0.0
        for batch in batches:
            total += backward(segment, batch, tokens)
        if extra_loss is not None and (extra := extra_loss()).requires_grad:
            extra.backward()  # type: ignore[no-untyped-call]
        optimizer.step(first_step + step)
        losses.append(total)
        trained += tokens
    return WholeReport(fmean(losses), trained)


def backward(segment: Segment, batch: Batch, tokens: int) -> float:
    """Add the gradients of the loss of `batch` over `tokens` to those of `segment`; returns that loss."""
    input_ids, mask, labels = tensors_of(batch, segment)
    loss = token_losses(segment(input_ids, mask), labels).sum() / max(1, tokens)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def client_steps(task: Task, client: str, first_step: int, forms: list[list[BatchForm]]) -> Iterable[list[Batch]]:
    """The batches of `client` in a round, one per step, their forms noted."""
    batches = islice(task.streams[client](first_step), task.training.local_steps)
    return ([batch] for batch in recorded(batches, forms))
