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
from hsplit_flwr.lora.factors import LoraFactors, changes
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
    sent_ranks: dict[str, int] = field(default_factory=dict)
    """of what it handed in"""
    start: Mapping[str, LoraFactors] = field(default_factory=dict)
    """what its adapters started the round from, where they were kept"""

    @classmethod
    def of(cls, task: RoundTask, whole: Segment) -> Self:
        """A head by the task's plan with fresh adapters; it shares the tensors of `whole`, the newest weights."""
        segment = segment_from_model(whole.model, 0, task.plan.cut)
        adapters = SegmentAdapters(segment, task.plan.lora, segment.linear_modules())
        adapters.reset(task.adapter_seed)
        optimizer = Optimizer(adapters.parameters(), task.training)
        return cls(plan=task.plan, segment=segment, adapters=adapters, optimizer=optimizer)

    def go_on(self, kept: KeptAdapters | None, model: GlobalModel) -> None:
        """Train on with the adapters `kept`, if any, on weights of its own: those of `model` without what they bring."""
        self.start = kept.resume(self.adapters, self.optimizer) if kept else {}
        names = [name for name in model.log.total.names() if name in self.segment.linear_modules()]
        merge_beneath(self.segment, model.files, model.log.total, self.start, names)

    def kept(self) -> KeptAdapters:
        """What a later round may go on from."""
        return KeptAdapters.of(self.adapters, self.optimizer)

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
            factors=changes(self.adapters.factors(), self.start),
            importance=report.importance,
            tokens=report.tokens,
            loss=float(np.mean(report.losses)),
        )
        self.sent_ranks = {name: pair.rank for name, pair in trained.factors.items()}
        return HeadReply(
            client=task.client,
            arrays=trained.to_arrays(),
            layers=tuple(trained.importance),
            tokens=trained.tokens,
            loss=trained.loss,
            seconds=trained.seconds,
            budget=None,
            upload_bytes=0,
        )

    def _with_snapshot(self, batches: Iterator[Batch], steps: int) -> Iterator[Batch]:
        """`batches`; as the last one is asked for, the adapters are kept as they are then."""
        for step, batch in enumerate(batches):
            if step == steps - 1:
                self.snapshot = self.adapters.factors()
            yield batch
