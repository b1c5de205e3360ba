"""The maths of a tail's step, without threads: gradients, the optimizer, importance; who is refused, and what is not.

In a step the tail takes one optimizer step on each client's mean loss S_i / n_i, one client after another (S_i: summed
loss, n_i: target tokens of client i; SplitFedV2, arXiv:2004.12088): as many tokens, and N times the optimizer steps.
With `TrainingConfig.joint_steps` it takes one on the token-weighted mean over all clients, J = sum_i S_i / sum_i n_i;
clients of equal cut and length then run as one batch, groups accumulate. Either way client i gets the gradient of its
own mean loss, if it has a use for it. Further passes over the same batches (`tail_passes`) are for the tail alone.
A batch may come in parts (`micro_batches`). Their gradients add up, one client's apart from another's, and the step is
taken on their token-weighted mean once the last is there. All parts of a client's batch see the same adapters because
they have their turn in one go (`barrier`): gradients from before another client's step are worth nothing (measured,
docs/exchange.md).
In its first steps of a round the importance of the tail's weights is measured too, on each client's rows apart.
"""

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hsplit_flwr.common.finite import all_finite
from hsplit_flwr.common.optional_work import OptionalWork
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.gradient_mean import GradientMean
from hsplit_flwr.training.importance import ImportanceProbe, MeanImportance, SampledRows, sample_rows
from hsplit_flwr.training.loss import target_tokens, token_losses
from hsplit_flwr.training.optimizer import Optimizer
from hsplit_flwr.training.passes import training_pass
from hsplit_flwr.training.session import ScoreReply, StepReply
from hsplit_flwr.training.step import StepRequest, TrainedBatch


class TailTrainer:
    """Trains the tail's adapters on what clients send. One thread at a time.

    Args:
        segment: the tail's blocks.
        adapters: those in `segment`.
        config: shared by heads and tail.
    """

    def __init__(self, segment: Segment, adapters: SegmentAdapters, config: TrainingConfig) -> None:
        self.segment = segment
        self.adapters = adapters
        self.config = config
        self._optimizer = Optimizer(adapters.parameters(), config)
        self._at_open: State = {}
        """what `state` gave when the round was opened"""
        self._open: dict[str, tuple[GradientMean, int]] = {}
        """gradients that no step was taken on yet, and the run step: by client, or of all together under ``""``"""
        self._importance: dict[str, MeanImportance] = {}
        self._further_passes = OptionalWork("the tail leaves out further passes of this step")
        self._measuring = OptionalWork("the tail does not measure importance in this step")

    @property
    def device(self) -> torch.device:
        """Where the tail computes."""
        return self.segment.device

    def open_round(self, adapter_seed: int, keep: Collection[str] = ()) -> None:
        """Restart the adapters by `adapter_seed`, and what the optimizer knows of them, but for the modules `keep`."""
        fresh = [name for name in self.adapters.module_names if name not in keep]
        self.adapters.reset(adapter_seed, fresh)
        self._optimizer.restart(self.adapters.parameters(fresh))
        self._at_open = self.state()
        self._open = {}
        self._importance = defaultdict(MeanImportance)

    def close_round(self) -> None:
        """Log how much of the optional work of the round was left out."""
        self._further_passes.close()
        self._measuring.close()

    def undo_round(self) -> None:
        """Make the adapters, and what the optimizer knows of them, what they were when the round was opened."""
        self.load_state(self._at_open)

    def replace_adapters(self, adapters: SegmentAdapters, keep: Iterable[str] = ()) -> None:
        """Train `adapters` from now on, which are in the segment already.

        Args:
            adapters: all new, but for the tensors of `keep`.
            keep: modules whose optimizer state stays.
        """
        former, self._optimizer = self._optimizer, Optimizer(adapters.parameters(), self.config)
        self._optimizer.adopt(former, adapters.parameters(keep))
        self.adapters = adapters

    def importance(self) -> dict[str, dict[str, float]]:
        """Client id -> whole-model module name -> importance, from the client's cut on (`training/importance.py`).

        Of this round, on the rows of that client alone; clients whose first steps held no target tokens are missing.
        """
        means = {client: importance.mean() for client, importance in self._importance.items()}
        return {client: mean for client, mean in means.items() if mean}

    def train(self, requests: Sequence[StepRequest], *, ends_step: bool = True) -> TrainedBatch:
        """Add the gradients of `requests`, and take the optimizer step if it is due.

        Who fails even alone is refused, and the step is taken as if it had not asked.

        Args:
            requests: of different clients; one, or none, unless the clients step jointly.
            ends_step: nobody else's are to come in this step: a joint step is taken.
        """
        asked, refused = list(requests), dict[str, Exception]()
        while asked:
            started = time.perf_counter()
            try:
                replies, importance = self._accumulate_all(asked)
            except Exception as error:
                asked = self._without_failing(asked, error, refused)
                continue
            try:
                self._collect(asked, ends_step)
            except Exception as error:  # not once more: the adapters may have moved
                return TrainedBatch(refused=refused | dict.fromkeys(replies, error))
            for client, values in importance.items():  # only now: a step that failed is taken again
                self._importance[client].add(values)
            seconds = time.perf_counter() - started
            return TrainedBatch(requests=asked, replies=replies, refused=refused, seconds=seconds)
        self._collect([], ends_step)  # what others brought to a joint step
        return TrainedBatch(refused=refused)

    def train_again(self, turns: Sequence[tuple[Sequence[StepRequest], bool]]) -> None:
        """The further passes over a step's turns, whose clients have their answers; the rest of them if one fails.

        Args:
            turns: the requests that were trained on at a time, and whether they ended the step.
        """
        under_way, self._open = self._open, {}  # of a client that is late with the rest of its batch
        with self._further_passes.spared():
            further = range(1, self.config.tail_passes)
            for number, (requests, ends_step) in ((number, turn) for number in further for turn in turns):
                again = [replace(r, measured=False, wants_gradient=False, pass_number=number) for r in requests]
                self._accumulate_all(again)
                self._collect(requests, ends_step)
        self._open = under_way

    def score(self, cut: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """Loss of a batch that enters before block `cut`, without gradients.

        Raises:
            ExchangeError: ``non_finite``.
        """
        labels = labels.to(torch.int64)
        with torch.no_grad():
            losses = token_losses(self._logits(activations, attention_mask, cut), labels)
        _require_finite("loss", losses)
        return ScoreReply(float(losses.double().sum()), target_tokens(labels))

    def state(self) -> State:
        """The adapters and what the optimizer knows of them."""
        return {"adapters": self.adapters.state(), "optimizer": self._optimizer.state()}

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave. Raises `ConfigError` if it is of other adapters or another optimizer."""
        self.adapters.load_state(state["adapters"])
        self._optimizer.load_state(state["optimizer"])

    def _collect(self, requests: Sequence[StepRequest], ends_step: bool) -> None:
        """Take over the gradients of `requests`; take the optimizer step on all that belongs to it, if it is due."""
        joint = self.config.joint_steps
        key = "" if joint or not requests else requests[0].client
        if requests:
            mean, run_step = self._open.get(key) or (GradientMean(list(self.adapters.parameters())), 0)
            mean.add(sum(target_tokens(request.labels) for request in requests))
            self._open[key] = mean, max(run_step, *(request.run_step for request in requests))
        due = ends_step if joint else all(request.ends_batch for request in requests)
        if due and key in self._open:
            mean, run_step = self._open.pop(key)
            if mean.tokens:
                mean.put()
                self._optimizer.step(run_step)

    def _without_failing(
        self, requests: list[StepRequest], error: Exception, refused: dict[str, Exception]
    ) -> list[StepRequest]:
        """What to try after `requests` failed with `error`: less of them, or the same and not measured."""
        left = []
        for request in requests:
            failure = self._failure_alone(request) if len(requests) > 1 else error
            if failure and request.measured:
                unmeasured = replace(request, measured=False)
                if self._failure_alone(unmeasured) is None:
                    self._measuring.failed(failure)
                    request, failure = unmeasured, None
            if failure:
                refused[request.client] = failure
            else:
                left.append(request)
        if left != requests:
            return left
        if any(request.measured for request in requests):  # each is fine by itself: measuring all takes more memory
            self._measuring.failed(error)
            return [replace(request, measured=False) for request in requests]
        refused.update({request.client: error for request in requests})
        return []

    def _failure_alone(self, request: StepRequest) -> Exception | None:
        try:
            self._accumulate_all([request])
        except Exception as error:
            return error
        return None

    def _accumulate_all(self, requests: list[StepRequest]) -> tuple[dict[str, StepReply], dict[str, dict[str, float]]]:
        """The gradients of one step's objective in the tail's adapters; every client's reply and importance."""
        self._optimizer.zero_grad()
        total = sum(target_tokens(request.labels) for request in requests)
        groups: dict[tuple[int, int], list[StepRequest]] = defaultdict(list)
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

    def _samples(self, group: list[StepRequest], total: int) -> dict[str, SampledRows]:
        """The rows of a group's batch on which each client's importance is measured in this step."""
        samples: dict[str, SampledRows] = {}
        start = 0
        for request in group:
            sample = sample_rows(request.labels, self.config.importance_rows, start, total)
            if request.measured and sample:
                samples[request.client] = sample
            start += len(request.labels)
        return samples

    def _accumulate(self, group: list[StepRequest], total: int) -> Mapping[str, StepReply]:
        """Forward and backward for clients of one cut and length; tail gradients add up over groups."""
        dtype = self.segment.dtype
        hidden = torch.cat([r.activations for r in group]).to(self.device, dtype)
        # Importance is measured in all layers, also in those before the first adapter.
        hidden.requires_grad_(any(request.wants_gradient or request.measured for request in group))
        mask = torch.cat([r.attention_mask for r in group])
        labels = torch.cat([r.labels for r in group]).to(torch.int64)
        config = self.config
        which = [part for r in group for part in (r.pass_number, r.client, r.run_step, r.number)]
        with training_pass(self.adapters, self.device, config.lora_dropout, config.autocast, *which):
            logits = self._logits(hidden, mask, group[0].cut)
        losses = token_losses(logits, labels)
        del logits
        sizes = [len(r.labels) for r in group]
        sums = torch.stack([part.sum() for part in torch.split(losses, sizes)])
        _require_finite("loss", sums)
        objective = sums.sum() / max(1, total)
        if objective.requires_grad:  # the tail may train nothing, too
            objective.backward()  # type: ignore[no-untyped-call]
        gradients: Sequence[Tensor | None] = [None] * len(group)
        if hidden.grad is not None:
            _require_finite("activation gradients", hidden.grad)
            gradients = torch.split(hidden.grad, sizes)
        replies = {}
        for request, nll, gradient in zip(group, sums.tolist(), gradients, strict=True):
            tokens = target_tokens(request.labels)
            own_mean = gradient if request.wants_gradient else None
            if own_mean is not None and tokens:
                own_mean = own_mean * (total / tokens)
            replies[request.client] = StepReply(own_mean, nll / max(1, tokens), tokens)
        return replies

    def _logits(self, activations: Tensor, attention_mask: Tensor, cut: int) -> Tensor:
        dtype = self.segment.dtype
        logits: Tensor = self.segment(activations.to(self.device, dtype), attention_mask.to(torch.int64), entry=cut)
        return logits


def _require_finite(what: str, *tensors: Tensor) -> None:
    if not all(map(all_finite, tensors)):
        raise ExchangeError("non_finite", f"Expected finite {what}, found NaN or Inf. Lower the learning rate.")
