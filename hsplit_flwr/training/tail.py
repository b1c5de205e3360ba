"""The shared tail: one set of blocks and adapters that all clients of a round train together.

In a step the tail takes one AdamW step on each client's mean loss S_i / n_i, one client after another (S_i: summed
loss, n_i: target tokens of client i; SplitFedV2, arXiv:2004.12088): as many tokens, and N times the optimizer steps.
With `TrainingConfig.joint_steps` it takes one on the token-weighted mean over all clients, J = sum_i S_i / sum_i n_i;
clients of equal cut and length then run as one batch, groups accumulate. Either way client i gets the gradient of its
own mean loss. Further passes over the same batches (`tail_passes`) are for the tail alone.
In its first steps of a round the importance of the tail's weights is measured too, on each client's rows apart.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.training.barrier import BarrierLimits, StepBarrier
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.importance import ImportanceProbe, MeanImportance, SampledRows, sample_rows
from hsplit_flwr.training.loss import target_tokens, token_losses
from hsplit_flwr.training.optimizer import Optimizer
from hsplit_flwr.training.session import ScoreReply, StepReply

_log = logging.getLogger("hsplit_flwr")


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
    """client by client: the tail's own forward, backward and optimizer steps until the client had its answer"""
    round_clients: int
    """clients that were given this round's task"""

    @property
    def compute_s(self) -> float:
        """Until the last client had its answer; further passes are not in it."""
        return max(self.answered_s)


@dataclass
class _Request:
    client: str
    cut: int
    run_step: int
    activations: Tensor
    attention_mask: Tensor
    labels: Tensor
    measured: bool = False
    """the tail's importance is measured on it"""
    reply: "Future[StepReply]" = field(default_factory=Future)


def _require_finite(what: str, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise ExchangeError("non_finite", f"Expected finite {what}, found NaN or Inf. Lower the learning rate.")


class SharedTail:
    """The tail in the server's process. Rounds are opened and closed; in between, sessions train or score."""

    def __init__(
        self,
        segment: Segment,
        adapters: SegmentAdapters,
        config: TrainingConfig,
        limits: BarrierLimits | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        self.segment = segment
        self.adapters = adapters
        self._config = config
        self._limits = limits or BarrierLimits()
        self._on_step = on_step
        self._compute = threading.Lock()
        self._optimizer: Optimizer | None = None
        self._at_open: dict[str, LoraFactors] = {}
        """the adapters when the round was opened"""
        self._barrier: StepBarrier[_Request] | None = None
        self._worker: threading.Thread | None = None
        self._importance: dict[str, MeanImportance] = {}
        self._round_clients = 0

    @property
    def device(self) -> torch.device:
        """Where the tail computes."""
        return next(self.segment.parameters()).device

    def open_training(
        self,
        clients: Iterable[str],
        concurrency: int,
        adapter_seed: int,
        keep: Collection[str] = (),
    ) -> None:
        """Start a training round: a barrier over `clients`, fresh adapters and optimizer state.

        Args:
            clients: who is expected.
            concurrency: how many of them train at a time.
            adapter_seed: of the adapters.
            keep: modules whose adapters and optimizer state stay as they are.
        """
        self.close_training()
        fresh = [name for name in self.adapters.module_names if name not in keep]
        self.adapters.reset(adapter_seed, fresh)
        if self._optimizer is None:
            self._optimizer = Optimizer(self.adapters.parameters(), self._config)
        self._optimizer.forget(self.adapters.parameters(fresh))
        self._at_open = self.adapters.factors()
        self._importance = defaultdict(MeanImportance)
        members = list(clients)
        self._round_clients = len(members)
        self._barrier = StepBarrier(members, concurrency, self._limits)
        self._worker = threading.Thread(target=self._run_steps, args=(self._barrier,), name="tail-steps", daemon=True)
        self._worker.start()

    def close_training(self) -> dict[str, int]:
        """End the round: refuse further steps, wait for the one under way. Returns dropped steps per straggler."""
        if self._barrier is None or self._worker is None:
            return {}
        _refuse(self._barrier.close())
        self._worker.join(self._limits.step_limit_s)
        dropped = self._barrier.dropped
        self._barrier = self._worker = None
        return dropped

    def undo_training(self) -> None:
        """Make the adapters what they were when the round was opened; the optimizer restarts."""
        self.adapters.set(self._at_open)
        self._optimizer = None

    def replace_adapters(self, adapters: SegmentAdapters, keep: Iterable[str] = ()) -> None:
        """Train `adapters` from now on, which are in the segment already.

        Args:
            adapters: all new, but for the tensors of `keep`.
            keep: modules whose optimizer state stays.
        """
        former, self._optimizer = self._optimizer, Optimizer(adapters.parameters(), self._config)
        if former:
            self._optimizer.adopt(former, adapters.parameters(keep))
        self.adapters = adapters

    def importance(self) -> dict[str, dict[str, float]]:
        """Client id -> whole-model module name -> importance, from the client's cut on (`training/importance.py`).

        Of the round that `close_training` ended, on the rows of that client alone; clients whose first steps held no
        target tokens are missing.
        """
        means = {client: importance.mean() for client, importance in self._importance.items()}
        return {client: mean for client, mean in means.items() if mean}

    def join(self, client: str, cut: int, first_step: int) -> "LocalSession":
        """`client` enters the open training round with a head of `cut` blocks; its step 0 is run step `first_step`."""
        if self._barrier is None:
            raise ExchangeError("round_closed", "Expected an open training round, found none.")
        self._barrier.join(client)
        return LocalSession(self, self._barrier, client, cut, first_step)

    def withdraw(self, client: str) -> None:
        """`client` failed before it joined: the start gate no longer waits for it. It may still join."""
        if barrier := self._barrier:
            barrier.withdraw(client)

    def scorer(self, client: str, cut: int) -> "LocalSession":
        """A session that can only score."""
        return LocalSession(self, None, client, cut, 0)

    def score(self, cut: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """Loss of a batch that enters before block `cut`, without gradients."""
        labels = labels.to(self.device, torch.int64)
        with self._compute, torch.no_grad():
            losses = token_losses(self._logits(activations, attention_mask, cut), labels)
        _require_finite("loss", losses)
        return ScoreReply(float(losses.double().sum()), target_tokens(labels))

    def _logits(self, activations: Tensor, attention_mask: Tensor, cut: int) -> Tensor:
        dtype = next(self.segment.parameters()).dtype
        hidden = activations.to(self.device, dtype)
        logits: Tensor = self.segment(hidden, attention_mask.to(self.device, torch.int64), entry=cut)
        return logits

    def _run_steps(self, barrier: StepBarrier[_Request]) -> None:
        try:
            while (requests := barrier.take()) is not None:
                with self._compute:
                    batches = [requests] if self._config.joint_steps else [[request] for request in requests]
                    done = [(b, report) for b in batches if (report := self._train_without_poison(b))]
                    self._train_again([[r for r in b if r.client in report.clients] for b, report in done])
                if done and self._on_step:
                    self._on_step(_merged([report for _, report in done]))
        finally:  # whatever ends this thread, no client may wait for it
            _refuse(barrier.close())

    def _train_without_poison(self, requests: list[_Request]) -> StepReport | None:
        """Train on `requests`; who fails even alone is refused, and the step is taken as if it had not asked."""
        while requests:
            try:
                replies, report = self._train(requests)
            except Exception as error:
                failures = [self._failure_alone(request) for request in requests] if len(requests) > 1 else [error]
                if not any(failures):
                    failures = [error] * len(requests)
                for request, failure in zip(requests, failures, strict=True):
                    if failure:
                        request.reply.set_exception(failure)
                requests = [r for r, failure in zip(requests, failures, strict=True) if not failure]
                continue
            for request in requests:
                request.reply.set_result(replies[request.client])
            return report
        return None

    def _train_again(self, batches: Sequence[list[_Request]]) -> None:
        """The further passes over a step's batches, whose clients have their answers."""
        assert self._optimizer is not None
        try:
            for batch in (batch for _ in range(self._config.tail_passes - 1) for batch in batches):
                self._accumulate_all([replace(request, measured=False) for request in batch])
                if sum(target_tokens(request.labels) for request in batch):
                    self._optimizer.step(max(request.run_step for request in batch))
        except ExchangeError as error:
            _log.warning("the tail leaves out further passes of this step: %s", error)

    def _failure_alone(self, request: _Request) -> Exception | None:
        try:
            self._accumulate_all([request])
        except Exception as error:
            return error
        return None

    def _train(self, requests: list[_Request]) -> tuple[dict[str, StepReply], StepReport]:
        assert self._optimizer is not None
        started = time.perf_counter()
        replies, importance = self._accumulate_all(requests)
        total = sum(reply.tokens for reply in replies.values())
        loss = sum(r.loss * r.tokens for r in replies.values()) / max(1, total)
        run_step = max(request.run_step for request in requests)
        if total:
            self._optimizer.step(run_step)
        for client, values in importance.items():  # only now: a step that failed is taken again
            self._importance[client].add(values)
        answered_s = (time.perf_counter() - started,) * len(replies)
        return replies, StepReport(run_step, tuple(replies), loss, total, answered_s, self._round_clients)

    def _accumulate_all(self, requests: list[_Request]) -> tuple[dict[str, StepReply], dict[str, dict[str, float]]]:
        """The gradients of one step's objective in the tail's adapters; every client's reply and importance."""
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        total = sum(target_tokens(request.labels) for request in requests)
        groups: dict[tuple[int, int], list[_Request]] = defaultdict(list)
        for request in requests:
            groups[request.cut, request.labels.shape[1]].append(request)
        replies: dict[str, StepReply] = {}
        importance: dict[str, dict[str, float]] = {}
        for key in sorted(groups):
            samples = self._samples(groups[key], total)
            entry, length = key
            shape = (sum(len(r.labels) for r in groups[key]), length)
            with ImportanceProbe(self.segment, list(samples.values()), shape, entry) as probe:
                replies |= self._accumulate(groups[key], total)
            importance |= dict(zip(samples, probe.values(), strict=True))
        gradients = [p.grad for p in self.adapters.parameters() if p.grad is not None]
        _require_finite("adapter gradients", torch.nn.utils.get_total_norm(gradients))
        return replies, importance

    def _samples(self, group: list[_Request], total: int) -> dict[str, SampledRows]:
        """The rows of a group's batch on which each client's importance is measured in this step."""
        samples: dict[str, SampledRows] = {}
        start = 0
        for request in group:
            sample = sample_rows(request.labels, self._config.importance_rows, start, total)
            if request.measured and sample:
                samples[request.client] = sample
            start += len(request.labels)
        return samples

    def _accumulate(self, group: list[_Request], total: int) -> Mapping[str, StepReply]:
        """Forward and backward for clients of one cut and length; tail gradients add up over groups."""
        dtype = next(self.segment.parameters()).dtype
        hidden = torch.cat([r.activations for r in group]).to(self.device, dtype).requires_grad_()
        mask = torch.cat([r.attention_mask for r in group])
        labels = torch.cat([r.labels for r in group]).to(self.device, torch.int64)
        losses = token_losses(self._logits(hidden, mask, group[0].cut), labels)
        sizes = [len(r.labels) for r in group]
        sums = torch.stack([part.sum() for part in torch.split(losses, sizes)])
        _require_finite("loss", sums)
        (sums.sum() / max(1, total)).backward()  # type: ignore[no-untyped-call]
        assert hidden.grad is not None
        _require_finite("activation gradients", hidden.grad)
        replies = {}
        for request, nll, gradient in zip(group, sums.tolist(), torch.split(hidden.grad, sizes), strict=True):
            tokens = target_tokens(request.labels)
            own_mean = gradient * (total / tokens) if tokens else gradient
            replies[request.client] = StepReply(own_mean, nll / max(1, tokens), tokens)
        return replies


def _merged(reports: Sequence[StepReport]) -> StepReport:
    """One report of a step whose clients were trained on one after another."""
    tokens = sum(report.tokens for report in reports)
    ends = list(accumulate(report.compute_s for report in reports))
    return StepReport(
        step=max(report.step for report in reports),
        clients=tuple(client for report in reports for client in report.clients),
        loss=sum(report.loss * report.tokens for report in reports) / max(1, tokens),
        tokens=tokens,
        answered_s=tuple(
            begun + own for begun, report in zip([0.0, *ends[:-1]], reports, strict=True) for own in report.answered_s
        ),
        round_clients=reports[0].round_clients,
    )


def _refuse(untaken: Iterable[_Request]) -> None:
    for request in untaken:
        request.reply.set_exception(ExchangeError("round_closed", "The round ended before this step was taken."))


class LocalSession:
    """A `TailSession` in the tail's own process."""

    def __init__(
        self, tail: SharedTail, barrier: StepBarrier[_Request] | None, client: str, cut: int, first_step: int
    ) -> None:
        self._tail = tail
        self._barrier = barrier
        self._client = client
        self._cut = cut
        self._first_step = first_step
        self._next_step = 0

    def train_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> StepReply:
        """See `TailSession`."""
        if self._barrier is None:
            raise ExchangeError("wrong_kind", "Expected evaluate frames in an evaluation round, found a train frame.")
        self._expect_step(step)
        run_step = self._first_step + step
        measured = step < self._tail._config.importance_steps
        request = _Request(self._client, self._cut, run_step, activations, attention_mask, labels, measured)
        self._barrier.ask(self._client, request)
        try:
            return request.reply.result(self._tail._limits.step_limit_s)
        except FutureTimeoutError:
            raise ExchangeError(
                "step_timeout",
                f"Expected the tail's answer within {self._tail._limits.step_limit_s} s, found none. "
                "Raise step_limit_s or use smaller batches.",
            ) from None

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        self._expect_step(step)
        return self._tail.score(self._cut, activations, attention_mask, labels)

    def close(self) -> None:
        """See `TailSession`."""
        if self._barrier is not None and (untaken := self._barrier.leave(self._client)):
            _refuse([untaken])

    def _expect_step(self, step: int) -> None:
        if step != self._next_step:
            raise ExchangeError("wrong_step", f"Expected step {self._next_step}, found {step}.")
        self._next_step += 1
