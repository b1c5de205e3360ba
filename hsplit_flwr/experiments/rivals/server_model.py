"""CenLoRA: LoRA on the whole model, on the server, with everybody's data."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.rivals.whole_training import client_steps, train_whole
from hsplit_flwr.experiments.task import LARGEST_RANK, SCALING, Task
from hsplit_flwr.experiments.work import RoundOutcome, length_factor, whole_flops
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.loss import Score, score_segment
from hsplit_flwr.training.optimizer import Optimizer


class ServerTrainer:
    """CenLoRA: one LoRA on the pooled data, without rounds but for the evaluation. See `engine.Trainer`."""

    def __init__(self, task: Task, method: Method) -> None:
        self._task = task
        self._joint = method.joint_steps
        self._segment = GlobalModel(task.files, device=task.device).segment
        rank = task.spec.rank or LARGEST_RANK
        self._adapters = SegmentAdapters(self._segment, LoraSpec(rank, SCALING * rank))
        self._adapters.reset(derive_seed(task.training.seed, "tail"))
        times = 1 if self._joint else len(task.devices)
        training = replace(
            task.training,
            local_steps=times * task.training.local_steps,
            warmup_steps=times * task.training.warmup_steps,
        )
        self._optimizer = Optimizer(self._adapters.parameters(), training)

    def round(self, round_number: int, present: Sequence[str]) -> RoundOutcome:
        """As many batches of every client as in a round of the others; the server has them all, whoever is away."""
        first = (round_number - 1) * self._task.training.local_steps
        forms: list[list[BatchForm]] = []
        streams = [client_steps(self._task, client, first, forms) for client in self._task.devices]
        joint = ([batch for batches in together for batch in batches] for together in zip(*streams, strict=True))
        steps = joint if self._joint else ([batch] for batches in joint for batch in batches)
        start = first if self._joint else first * len(streams)
        report = train_whole(self._segment, self._optimizer, steps, start)
        ranks = {name: pair.rank for name, pair in self._adapters.factors().items()}
        costs = self._task.costs
        flops = len(forms) * length_factor(costs, forms) * whole_flops(costs, ranks)
        return RoundOutcome(work=(), tokens=report.tokens, train_loss=report.loss, too_large=0, server_flops=flops)

    def score(self) -> Score:
        """Score of the model with its adapters."""
        return score_segment(self._segment, self._task.eval_batches)

    def global_model(self) -> PreTrainedModel:
        """The model with its adapters, to generate with."""
        return self._segment.model
