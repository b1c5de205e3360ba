"""A client's part of a split model in the engine's process."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.experiments.work import recorded
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.trained_head import HeadReply, TrainedHead
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.merge import merge_beneath
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment, segment_from_model
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.config import ClientPlan
from hsplit_flwr.training.head import train_head
from hsplit_flwr.training.kept_adapters import KeptAdapters
from hsplit_flwr.training.optimizer import Optimizer
from hsplit_flwr.training.session import TailSession


@dataclass(kw_only=True)
class SplitHead:
    """A head, and what it did in a round."""

    plan: ClientPlan
    segment: Segment
    adapters: SegmentAdapters
    optimizer: Optimizer
    download_bytes: int = 0
    """what it was sent before its first step"""
    forms: list[list[BatchForm]] = field(default_factory=list)
    """forms of the round's batches, of each its parts"""
    snapshot: dict[str, LoraFactors] = field(default_factory=dict)
    """its adapters before its last step"""
    kept_from: int = 0
    """the round whose adapters it goes on from; 0: they restarted"""

    @classmethod
    def of(cls, task: RoundTask, whole: Segment) -> Self:
        """A head by the task's plan with fresh adapters; it shares the tensors of `whole`, the newest weights."""
        segment = segment_from_model(whole.model, 0, task.plan.cut)
        adapters = SegmentAdapters(segment, task.plan.lora, segment.linear_modules())
        adapters.reset(task.adapter_seed)
        optimizer = Optimizer(adapters.parameters(), task.training)
        return cls(plan=task.plan, segment=segment, adapters=adapters, optimizer=optimizer)

    def go_on(self, task: RoundTask, kept: KeptAdapters | None, model: GlobalModel) -> None:
        """Train on with the adapters `kept`, if `task` says so, on the weights of `model` without what they bring."""
        start: Mapping[str, LoraFactors] = {}
        if kept and kept.round_number == task.kept_from:
            start, self.kept_from = kept.resume(self.adapters, self.optimizer), kept.round_number
        names = [name for name in model.log.total.names() if name in self.segment.linear_modules()]
        merge_beneath(self.segment, model.files, model.log.total, start, names)

    def kept(self, round_number: int) -> KeptAdapters:
        """What a later round may go on from."""
        return KeptAdapters.of(round_number, self.adapters, self.optimizer)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of its matrices; 0: no adapter."""
        return {name: self.plan.lora.rank(name) for name in self.segment.linear_modules()}

    def train(self, task: RoundTask, batches: Iterator[Batch], session: TailSession) -> HeadReply:
        """One round against the tail; the reply is what a deployed client sends."""
        self.forms.clear()
        noted = self._with_snapshot(
            recorded(batches, self.forms, task.training.micro_batches), task.training.local_steps
        )
        report = train_head(self.segment, self.adapters, noted, session, task.training, task.first_step, self.optimizer)
        trained = TrainedHead(
            client=task.client,
            factors=self.adapters.factors(),
            importance=report.importance,
            tokens=report.tokens,
            loss=float(np.mean(report.losses)),
        )
        return HeadReply(
            client=task.client,
            arrays=trained.to_arrays(),
            layers=tuple(trained.importance),
            tokens=trained.tokens,
            loss=trained.loss,
            seconds=trained.seconds,
            budget=None,
            upload_bytes=0,
            kept_from=self.kept_from,
        )

    def _with_snapshot(self, batches: Iterator[Batch], steps: int) -> Iterator[Batch]:
        """`batches`; as the last one is asked for, the adapters are kept as they are then."""
        for step, batch in enumerate(batches):
            if step == steps - 1:
                self.snapshot = self.adapters.factors()
            yield batch
