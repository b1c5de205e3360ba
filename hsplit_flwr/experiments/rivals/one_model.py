"""One model at every step: what heads of given depth could reach if everybody always held the newest adapters.

Nobody can deploy it: heads would exchange all their adapters at every step, for nothing. It shows what depth itself
costs. A block that the server alone holds takes an optimizer step on each client's batch, one that some head holds a
single step on the mean gradient of all clients. Adapters and optimizer go on over the whole run.
"""

from collections.abc import Sequence
from itertools import islice, zip_longest

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.rivals.whole_training import backward
from hsplit_flwr.experiments.task import LARGEST_RANK, LORA_ALPHA, Task
from hsplit_flwr.experiments.work import RoundOutcome, length_factor, recorded, whole_flops
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import block_of
from hsplit_flwr.training.batch import Batch, part_rows
from hsplit_flwr.training.loss import Score, score_segment, target_tokens
from hsplit_flwr.training.optimizer import Optimizer


class OneModelTrainer:
    """One LoRA of one rank on the whole model, on the server. See `engine.Trainer`.

    The deepest head is as deep as the run's spec says, or its setting; else one block.
    """

    def __init__(self, task: Task, method: Method) -> None:
        self._task = task
        self._parts = method.micro_batches if method.micro_steps else 1
        self._segment = GlobalModel(task.files, device=task.device).segment
        self._adapters = SegmentAdapters(self._segment, LoraSpec(task.spec.rank or LARGEST_RANK, LORA_ALPHA))
        self._adapters.reset(derive_seed(task.training.seed, "tail"))
        stated = task.setting.cuts(task.costs.num_blocks).values()
        deepest = task.spec.cut or max(stated, default=1)
        names = self._adapters.module_names
        self._shared = list(self._adapters.parameters([name for name in names if block_of(name) < deepest]))
        tail_only = self._adapters.parameters([name for name in names if block_of(name) >= deepest])
        self._shared_optimizer = Optimizer(self._shared, task.training)
        self._tail_optimizer = Optimizer(tail_only, task.training)

    def round(self, round_number: int, present: Sequence[str]) -> RoundOutcome:
        """The batches of the clients that are there, a step of all of them after the other."""
        local_steps = self._task.training.local_steps
        first = (round_number - 1) * local_steps
        forms: list[list[BatchForm]] = []
        streams = [recorded(islice(self._task.streams[c](first), local_steps), forms) for c in present]
        losses: list[tuple[float, int]] = []
        for step, batches in enumerate(zip(*streams, strict=True)):
            split = [[_rows(batch, rows) for rows in part_rows(len(batch["labels"]), self._parts)] for batch in batches]
            for parts in zip_longest(*split):  # at the end of an epoch a batch may have fewer rows
                losses += self._step([part for part in parts if part], first + step)
        tokens = sum(count for _, count in losses)
        costs = self._task.costs
        ranks = {name: pair.rank for name, pair in self._adapters.factors().items()}
        return RoundOutcome(
            work=(),
            tokens=tokens,
            train_loss=sum(loss * count for loss, count in losses) / tokens,
            too_large=0,
            server_flops=len(forms) * length_factor(costs, forms) * whole_flops(costs, ranks),
        )

    def _step(self, batches: Sequence[Batch], run_step: int) -> list[tuple[float, int]]:
        """One step on a batch of each client; returns each one's mean loss and target tokens."""
        losses = []
        total = sum(target_tokens(batch["labels"]) for batch in batches)
        means = [torch.zeros_like(parameter) for parameter in self._shared]
        for batch in batches:
            tokens = target_tokens(batch["labels"])
            loss = self._backward(batch, tokens)
            _add_gradients(self._shared, means, tokens / max(1, total))
            self._tail_optimizer.step(run_step)
            losses.append((loss, tokens))
        for parameter, mean in zip(self._shared, means, strict=True):
            parameter.grad = mean
        self._shared_optimizer.step(run_step)
        return losses

    def _backward(self, batch: Batch, tokens: int) -> float:
        """Fresh gradients on all adapters of the mean loss of `batch`, which has so many target tokens."""
        self._shared_optimizer.zero_grad()
        self._tail_optimizer.zero_grad()
        return backward(self._segment, batch, tokens)

    def score(self) -> Score:
        """Score of the model with its adapters."""
        return score_segment(self._segment, self._task.eval_batches)

    def global_model(self) -> PreTrainedModel:
        """The model with its adapters, to generate with."""
        return self._segment.model


def _rows(batch: Batch, rows: slice) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def _add_gradients(parameters: Sequence[nn.Parameter], sums: Sequence[Tensor], share: float) -> None:
    for parameter, total in zip(parameters, sums, strict=True):
        if parameter.grad is not None:
            total.add_(parameter.grad, alpha=share)
