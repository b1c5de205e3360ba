"""A head's part of a round, against any `TailSession`: forward, exchange, backward, step."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.lora.segment_adapters import Pairs, SegmentAdapters
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.training.batch import Batch, part_rows
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.host_memory import trim_after_step
from hsplit_flwr.training.importance import ImportanceProbe, MeanImportance, sample_rows
from hsplit_flwr.training.loss import target_tokens, tensors_of
from hsplit_flwr.training.optimizer import Optimizer
from hsplit_flwr.training.passes import training_pass
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession, is_measured


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
    """waiting for the exchange: transfer, others, the tail's compute, as far as nothing was computed meanwhile"""
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
    begin: Callable[["HeadTraining"], object] = lambda training: None,
) -> TrainReport:
    """Train `adapters` for ``config.local_steps`` steps on `batches`.

    The autograd graph of each step and the optimizer stay alive on the client; only activations, mask and labels go
    out and only the activation gradient comes in. `first_step` is the run step of the round's first step. The first
    ``config.importance_steps`` steps also measure the head's importance, which changes nothing in what is trained.
    `optimizer` goes on from an earlier round; by default it is a new one. `begin` is given the training before its
    first step, and may load the state of one that was interrupted: it goes on with the first batch that has no step.

    Raises:
        ConfigError: the batches run out, or see `tensors_of`.
        ExchangeError: the tail refused a step or could not be reached.
    """
    optimizer = optimizer or Optimizer(adapters.parameters(), config)
    training = HeadTraining(head, adapters, session, config, first_step, optimizer)
    begin(training)
    for step, batch in enumerate(islice(batches, config.local_steps)):
        if step >= training.steps:
            training.step(step, *tensors_of(batch, head))
    training.finish()
    if training.steps < config.local_steps:
        raise ConfigError(
            f"Expected at least {config.local_steps} training batches, found {training.steps}. "
            "Give an endless iterable (itertools.cycle) or lower local_steps."
        )
    return training.report()


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A part that is at the tail, or on its way there or back."""

    part: BatchPart
    hidden: Tensor
    share: float
    """of the batch's target tokens; 1 where each part has an optimizer step of its own"""
    adapters: Pairs | None
    """those it went through, where they have moved on when its gradient comes; None: they have not"""


class HeadTraining:
    """A head's round under way: parts that were sent wait here, oldest first, for their gradients."""

    def __init__(
        self,
        head: Segment,
        adapters: SegmentAdapters,
        session: TailSession,
        config: TrainingConfig,
        first_step: int,
        optimizer: Optimizer,
    ) -> None:
        self._head = head
        self._adapters = adapters
        self._moves_on = config.micro_steps and config.parts_in_flight > 1
        self._session = session
        self._config = config
        self._first_step = first_step
        self._optimizer = optimizer
        self._in_flight: deque[_Sent] = deque()
        self._nll = 0.0
        self._step_tokens = 0
        self._losses: list[float] = []
        self._tokens = 0
        self._began = time.perf_counter()
        self._exchange_s = 0.0
        self._earlier_s = 0.0
        """of computing, before the state that was loaded"""
        self._importance = MeanImportance()

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return len(self._losses)

    def report(self) -> TrainReport:
        """What was done so far."""
        return TrainReport(
            steps=self.steps,
            tokens=self._tokens,
            losses=tuple(self._losses),
            compute_s=self._compute_s(),
            exchange_s=self._exchange_s,
            importance=self._importance.mean(),
        )

    def state(self) -> State:
        """All that the next step depends on. Of a step that has no answer yet nothing is in it: it is taken again."""
        return {
            "adapters": self._adapters.state(),
            "optimizer": self._optimizer.state(),
            "losses": list(self._losses),
            "tokens": self._tokens,
            "importance": self._importance.state(),
            "compute_s": self._compute_s(),
        }

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave; before the first step.

        Raises:
            ConfigError: it is of other adapters or another optimizer.
        """
        self._adapters.load_state(state["adapters"])
        self._optimizer.load_state(state["optimizer"])
        self._losses, self._tokens = list(state["losses"]), state["tokens"]
        self._importance.load_state(state["importance"])
        self._earlier_s = state["compute_s"]

    def step(self, step: int, input_ids: Tensor, mask: Tensor, labels: Tensor) -> None:
        """Compute and send a batch part by part; gradients that are there are used."""
        whole = target_tokens(labels)
        parts = part_rows(len(labels), self._config.micro_batches)
        for number, rows in enumerate(parts):
            while len(self._in_flight) >= self._config.micro_batches_in_flight:
                self._receive()
            part = BatchPart(step, number, len(parts))
            objective = target_tokens(labels[rows]) if self._config.micro_steps else whole
            with self._measured(part, labels[rows], objective):
                self._send(part, input_ids[rows], mask[rows], labels[rows], objective)
        if not self._config.micro_steps:
            self.finish()  # the next batch goes through the adapters that this one has moved

    def finish(self) -> None:
        """Wait for what is in flight, and use it."""
        while self._in_flight:
            self._receive()

    def _send(self, part: BatchPart, input_ids: Tensor, mask: Tensor, labels: Tensor, objective_tokens: int) -> None:
        copies = self._adapters.copies() if self._moves_on else None
        with self._adapters.standing_in(copies) if copies else nullcontext(), self._pass(part):
            hidden = self._head(input_ids, mask).to(self._head.dtype)
        share = target_tokens(labels) / objective_tokens if objective_tokens else 0.0
        self._in_flight.append(_Sent(part=part, hidden=hidden, share=share, adapters=copies))
        with self._exchanging():
            self._session.send_part(part, hidden.detach(), mask, labels)

    def _receive(self) -> None:
        with self._exchanging():
            reply = self._session.receive_part()
        sent = self._in_flight.popleft()
        ends_batch = self._config.micro_steps or sent.part.is_last
        if sent.hidden.requires_grad:  # it went through adapters, or importance is measured
            if reply.gradient is None:
                raise ExchangeError(
                    "wrong_tensors",
                    f"Expected the gradient of step {sent.part.step}, on which this head trains, found none. The "
                    "server takes it for a head without adapters: see that its task came from this server's plan.",
                )
            gradient = reply.gradient.to(sent.hidden.device, sent.hidden.dtype)
            # Gradient checkpointing computes the part again: with the adapters that it went through, and their masks.
            with self._adapters.standing_in(sent.adapters) if sent.adapters else nullcontext(), self._drop(sent.part):
                torch.autograd.backward(sent.hidden, gradient if sent.share == 1 else gradient * sent.share)
            if sent.adapters:
                self._adapters.take_gradients(sent.adapters)
            if ends_batch:
                self._optimizer.step(self._first_step + sent.part.step)
                self._optimizer.zero_grad()
        trim_after_step()
        self._count(sent.part, reply)

    def _pass(self, part: BatchPart) -> AbstractContextManager[None]:
        device, config = self._head.device, self._config
        return training_pass(self._adapters, device, config.lora_dropout, config.autocast, *self._which(part))

    def _drop(self, part: BatchPart) -> AbstractContextManager[None]:
        return self._adapters.dropping_out(self._config.lora_dropout, *self._which(part))

    def _which(self, part: BatchPart) -> tuple[int, int]:
        return self._first_step + part.step, part.number

    def _count(self, part: BatchPart, reply: StepReply) -> None:
        self._nll += reply.loss * reply.tokens
        self._step_tokens += reply.tokens
        self._tokens += reply.tokens
        if part.is_last:
            whole = reply.loss if part.parts == 1 else self._nll / max(1, self._step_tokens)
            self._losses.append(whole)
            self._nll, self._step_tokens = 0.0, 0

    @contextmanager
    def _measured(self, part: BatchPart, labels: Tensor, objective_tokens: int) -> Iterator[None]:
        """Measures importance on what is sent inside, if it is the first part of one of the round's first steps.

        The backward pass is measured too: nothing else may be in flight, and the gradient is waited for.
        """
        if not is_measured(part, self._config.importance_steps):
            yield
            return
        self.finish()
        sample = sample_rows(labels, self._config.importance_rows, objective_tokens=objective_tokens)
        with ImportanceProbe(self._head, [sample] if sample else [], labels.shape) as probe:
            yield
            self.finish()
        for values in probe.values():
            self._importance.add(values)

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._exchange_s += time.perf_counter() - started

    def _compute_s(self) -> float:
        return self._earlier_s + time.perf_counter() - self._began - self._exchange_s


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
