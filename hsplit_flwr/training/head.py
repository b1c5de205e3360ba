"""A head's part of a round, against any `TailSession`: forward, exchange, backward, step."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.host_memory import trim_heap
from hsplit_flwr.training.importance import ImportanceProbe, MeanImportance, sample_rows
from hsplit_flwr.training.loss import tensors_of
from hsplit_flwr.training.optimizer import Optimizer
from hsplit_flwr.training.session import ScoreReply, TailSession


@dataclass(frozen=True)
class TrainReport:
    """What a head did in a round."""

    steps: int
    tokens: int
    """target tokens trained on"""
    losses: tuple[float, ...]
    """own mean loss at each step, nats per token"""
    compute_s: float
    """forward, backward and optimizer of the head"""
    exchange_s: float
    """from activations out to gradient in: transfer, waiting for others, the tail's compute"""
    importance: dict[str, float] = field(default_factory=dict)
    """of every linear layer of the head by whole-model name (`training/importance.py`); empty if it was not measured"""


def train_head(
    head: Segment,
    adapters: SegmentAdapters,
    batches: Iterable[Batch],
    session: TailSession,
    config: TrainingConfig,
    first_step: int = 0,
    optimizer: Optimizer | None = None,
) -> TrainReport:
    """Train `adapters` for ``config.local_steps`` steps on `batches`.

    The autograd graph of each step and the optimizer stay alive on the client; only activations, mask and labels go
    out and only the activation gradient comes in. `first_step` is the run step of the round's first step. The first
    ``config.importance_steps`` steps also measure the head's importance, which changes nothing in what is trained.
    `optimizer` goes on from an earlier round; by default it is a new one.

    Raises:
        ConfigError: the batches run out, or see `tensors_of`.
        ExchangeError: the tail refused a step or could not be reached.
    """
    optimizer = optimizer or Optimizer(adapters.parameters(), config)
    importance = MeanImportance()
    losses: list[float] = []
    tokens = 0
    exchange_s = 0.0
    started = time.perf_counter()
    for step, batch in enumerate(islice(batches, config.local_steps)):
        input_ids, mask, labels = tensors_of(batch, head)
        optimizer.zero_grad()
        with _probe(head, labels, step, config) as probe:
            hidden = head(input_ids, mask)
            sent = time.perf_counter()
            reply = session.train_step(step, hidden.detach(), mask, labels)
            exchange_s += time.perf_counter() - sent
            if hidden.requires_grad:
                hidden.backward(reply.gradient.to(hidden.device, hidden.dtype))
                optimizer.step(first_step + step)
        for values in probe.values():
            importance.add(values)
        trim_heap()
        losses.append(reply.loss)
        tokens += reply.tokens
    if len(losses) < config.local_steps:
        raise ConfigError(
            f"Expected at least {config.local_steps} training batches, found {len(losses)}. "
            "Give an endless iterable (itertools.cycle) or lower local_steps."
        )
    total_s = time.perf_counter() - started
    return TrainReport(len(losses), tokens, tuple(losses), total_s - exchange_s, exchange_s, importance.mean())


def _probe(head: Segment, labels: Tensor, step: int, config: TrainingConfig) -> ImportanceProbe:
    """Measures this step if it is one of the round's first `importance_steps`; otherwise does nothing."""
    if step >= config.importance_steps:
        return ImportanceProbe(head, [], labels.shape)
    # The gradient that comes in is that of the mean loss over the whole batch.
    sample = sample_rows(labels, config.importance_rows)
    return ImportanceProbe(head, [sample] if sample else [], labels.shape)


def score_head(head: Segment, batches: Iterable[Batch], session: TailSession) -> ScoreReply:
    """Total negative log-likelihood and target tokens of `batches`; perplexity is exp(nll / tokens).

    No target tokens: nothing was measured.
    """
    nll, tokens = 0.0, 0
    with torch.no_grad():
        for step, batch in enumerate(batches):
            input_ids, mask, labels = tensors_of(batch, head)
            reply = session.score_step(step, head(input_ids, mask), mask, labels)
            nll += reply.nll
            tokens += reply.tokens
    return ScoreReply(nll, tokens)
