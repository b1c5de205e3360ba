"""FT: federated fine-tuning of all weights, by FedAvg (arXiv:1602.05629)."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.rivals.whole_training import WholeReport, client_steps, train_whole
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.experiments.work import RoundOutcome, full_flops, whole_work
from hsplit_flwr.lora.aggregation import token_shares
from hsplit_flwr.models.segments import load_segment
from hsplit_flwr.training.loss import Score, score_segment
from hsplit_flwr.training.optimizer import Optimizer


class FullTrainer:
    """Every client trains all weights of the whole model; the server averages them. See `engine.Trainer`."""

    def __init__(self, task: Task, method: Method) -> None:
        self._task = task
        self._segment = load_segment(task.files, device=task.device)
        for parameter in self._segment.parameters():
            parameter.data = parameter.data.clone()  # mapped from disk: may not be written to
            parameter.requires_grad_()
        self._bytes = sum(parameter.nbytes for parameter in self._segment.parameters())

    def round(self, round_number: int, present: Sequence[str]) -> RoundOutcome:
        """Every client from the same weights; then their mean by tokens."""
        parameters = list(self._segment.parameters())
        start = [parameter.detach().clone() for parameter in parameters]
        trained: dict[str, list[torch.Tensor]] = {}
        reports: dict[str, WholeReport] = {}
        forms: dict[str, list[list[BatchForm]]] = {}
        first = (round_number - 1) * self._task.training.local_steps
        for client in present:
            _assign(parameters, start)
            forms[client] = []
            steps = client_steps(self._task, client, first, forms[client])
            optimizer = Optimizer(parameters, self._task.training)
            reports[client] = train_whole(self._segment, optimizer, steps, first)
            trained[client] = [parameter.detach().clone() for parameter in parameters]
        shares = token_shares({client: report.tokens for client, report in reports.items()})
        _assign(parameters, [sum_of([trained[c][i] for c in present], shares, present) for i in range(len(start))])
        costs = self._task.costs
        return RoundOutcome(
            work=tuple(
                whole_work(
                    client,
                    costs,
                    full_flops(costs),
                    forms[client],
                    download_bytes=self._bytes if round_number > 1 else 0,
                    upload_bytes=self._bytes,
                )
                for client in present
            ),
            tokens=sum(report.tokens for report in reports.values()),
            train_loss=sum(shares[client] * report.loss for client, report in reports.items()),
            too_large=sum(self._too_large(client) for client in present),
            server_flops=2.0 * len(present) * self._bytes / start[0].element_size(),
        )

    def score(self) -> Score:
        """Score of the averaged model."""
        return score_segment(self._segment, self._task.eval_batches)

    def global_model(self) -> PreTrainedModel:
        """The averaged model, to generate with."""
        return self._segment.model

    def _too_large(self, client: str) -> bool:
        """LoRA's activations and weights, and a gradient and two moments of AdamW for every weight."""
        needed = self._task.costs.tail_memory([1], {}).total_bytes + 3 * self._bytes
        return needed > self._task.devices[client].memory_bytes


def sum_of(tensors: Sequence[torch.Tensor], shares: dict[str, float], clients: Sequence[str]) -> torch.Tensor:
    """The mean of `tensors`, one per client, weighted by `shares`."""
    total = torch.zeros_like(tensors[0])
    for client, tensor in zip(clients, tensors, strict=True):
        total.add_(tensor, alpha=shares[client])
    return total


def _assign(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
