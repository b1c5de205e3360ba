"""Methods that split the model: heads against one shared tail, in one process, without a wire.

The same heads, tail, step barrier, planner and aggregation as in a deployment (`HSplitLoRAStrategy`); all segments
share the tensors of one model.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from hsplit_flwr.common.seeds import head_seed
from hsplit_flwr.experiments.clock import ClientWork
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.rivals.adapted import adapted
from hsplit_flwr.experiments.split_plans import plans_of
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.experiments.work import BatchShape, RoundOutcome, factor_bytes, merge_flops, recorded, split_work
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.tail_rounds import TailRounds
from hsplit_flwr.lora.aggregation import EXACT_RULE, RULES, Contribution, aggregate, token_shares
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment, block_of, linear_shapes, segment_from_model
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan
from hsplit_flwr.training.head import TrainReport, train_head
from hsplit_flwr.training.loss import Batch, Score, score_segment
from hsplit_flwr.training.optimizer import Optimizer

LIMITS = BarrierLimits(start_gate_s=60.0, straggler_limit_s=600.0, step_limit_s=600.0)
"""nobody is late here: a step always takes all clients, so that a run does not depend on the machine's load"""


@dataclass
class _Head:
    """A client's part, and what it did in a round."""

    plan: ClientPlan
    segment: Segment
    adapters: SegmentAdapters
    optimizer: Optimizer
    download_bytes: int = 0
    """what it was sent before its first step"""
    shapes: list[BatchShape] = field(default_factory=list)
    snapshot: dict[str, LoraFactors] = field(default_factory=dict)
    """its adapters before its last step"""

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of its matrices; 0: no adapter."""
        return {name: self.plan.lora.rank(name) for name in self.segment.linear_modules()}


class SplitTrainer:
    """See `engine.Trainer`."""

    def __init__(self, task: Task, method: Method) -> None:
        self._task = task
        self._method = method
        self._training = replace(task.training, joint_steps=method.joint_steps, tail_passes=method.tail_passes)
        self._model = GlobalModel(task.files)
        """never has adapters: what all segments take their tensors from"""
        self._book = plans_of(task, method)
        segment = segment_from_model(self._model.segment.model)
        self._shapes = linear_shapes(segment)
        self._rounds = TailRounds(self._model, segment, self._book, self._training, LIMITS)
        self._heads: dict[str, _Head] = {}
        self._average: dict[str, LoraFactors] = {}
        """of the heads' adapters, where they are carried"""
        self._versions: dict[str, int] = {}
        """of the weights that each client has"""

    def round(self, number: int, present: Sequence[str]) -> RoundOutcome:
        """Plan, train, aggregate."""
        decision = self._book.settle(present, self._task.devices)
        if decision and decision.reasons:
            self._rounds.replan()
        heads = {client: self._head(client, number) for client in present if self._book.takes_part(client)}
        reports = self._train(heads, number)
        update = self._carry(heads, reports) if self._method.carried else self._merge(heads, reports)
        tokens = {client: report.tokens for client, report in reports.items()}
        loss = sum(tokens[c] * sum(r.losses) / len(r.losses) for c, r in reports.items()) / sum(tokens.values())
        return RoundOutcome(
            work=tuple(self._work(client, head) for client, head in heads.items()),
            tokens=sum(tokens.values()),
            train_loss=loss,
            too_large=sum(self._too_large(client, head) for client, head in heads.items()),
            server_flops=merge_flops(update),
        )

    def score(self) -> Score:
        """Score of the global model."""
        return score_segment(self._evaluated(), self._task.eval_batches)

    def global_model(self) -> PreTrainedModel:
        """The global model, to generate with."""
        return self._evaluated().model

    def _evaluated(self) -> Segment:
        unmerged = {**self._average, **self._rounds.unmerged()}
        return adapted(self._model, unmerged) if unmerged else self._model.segment

    def _head(self, client: str, number: int) -> _Head:
        """`client`'s head of this round: at the newest weights, its adapters afresh or carried on."""
        if head := self._heads.get(client):
            head.shapes.clear()
            head.adapters.set(self._average)
            head.download_bytes = factor_bytes(self._average)
            return head
        plan = self._book.plan(client)
        segment = segment_from_model(self._model.segment.model, 0, plan.cut)
        adapters = SegmentAdapters(segment, plan.lora, segment.linear_modules())
        if self._average:
            adapters.set(self._average)
        else:
            common_start = self._method.rule != EXACT_RULE
            seed = head_seed(self._training.seed, number, client, common_start)
            adapters.reset(seed)
        optimizer = Optimizer(adapters.parameters(), self._training)
        version, _, lacking = self._model.since(self._versions.get(client, 0), plan.cut)
        self._versions[client] = version
        download = sum(tensor.nbytes for tensor in lacking.values()) + factor_bytes(self._average)
        head = _Head(plan, segment, adapters, optimizer, download)
        if self._method.carried:
            self._heads[client] = head
        return head

    def _train(self, heads: Mapping[str, _Head], number: int) -> dict[str, TrainReport]:
        training, tail = self._training, self._rounds.tail
        self._rounds.open(number, heads, len(heads))
        first = (number - 1) * training.local_steps

        def train(client: str) -> TrainReport:
            head = heads[client]
            try:
                session = tail.join(client, head.plan.cut, first)
            except BaseException:
                tail.withdraw(client)
                raise
            try:
                batches = recorded(self._task.streams[client](first), head.shapes)
                snapped = _with_snapshot(batches, head, training.local_steps)
                return train_head(head.segment, head.adapters, snapped, session, training, first, head.optimizer)
            finally:
                session.close()

        with ThreadPoolExecutor(len(heads)) as pool:
            reports = dict(zip(heads, pool.map(train, heads), strict=True))
        tail.close_training()
        return reports

    def _merge(self, heads: Mapping[str, _Head], reports: Mapping[str, TrainReport]) -> dict[str, LoraFactors]:
        """The round's update goes into the weights, by the method's rule."""
        shares = token_shares({client: report.tokens for client, report in reports.items()})
        contributions = [Contribution(shares[c], h.plan.cut, h.adapters.factors()) for c, h in heads.items()]
        tail = self._rounds.tail
        update = self._rounds.merge(contributions, tail.adapters.factors(), self._method.rule)
        if not self._method.keep_tail:
            self._rounds.settle()
        measured = {client: report.importance for client, report in reports.items()}
        self._book.observe_importance(measured, tail.importance(), shares, self._shapes)
        return update

    def _carry(self, heads: Mapping[str, _Head], reports: Mapping[str, TrainReport]) -> dict[str, LoraFactors]:
        """The heads' factors are averaged and go on; the tail's stay as they are."""
        if self._method.stale_snapshots:
            stale = [*heads.values(), next(iter(heads.values()))]
            contributions = [Contribution(1 / len(stale), head.plan.cut, head.snapshot) for head in stale]
        else:
            shares = token_shares({client: report.tokens for client, report in reports.items()})
            contributions = [Contribution(shares[c], h.plan.cut, h.adapters.factors()) for c, h in heads.items()]
        self._average = aggregate(contributions, {}, block_of, RULES[self._method.rule])
        self._rounds.go_on()
        return self._average

    def _work(self, client: str, head: _Head) -> ClientWork:
        ranks = head.ranks
        tail_ranks = {name: self._book.tail_lora.rank(name) for name in self._shapes}
        upload = self._task.costs.update_bytes(head.plan.cut, ranks)
        return split_work(
            client,
            self._task.costs,
            head.plan.cut,
            ranks,
            tail_ranks,
            head.shapes,
            download_bytes=head.download_bytes,
            upload_bytes=upload,
        )

    def _too_large(self, client: str, head: _Head) -> bool:
        needed = self._task.costs.head_memory(head.plan.cut, head.ranks).total_bytes
        return needed > self._task.devices[client].memory_bytes


def _with_snapshot(batches: Iterator[Batch], head: _Head, steps: int) -> Iterator[Batch]:
    """`batches`; as the last one is asked for, the head's adapters are kept as they are then."""
    for step, batch in enumerate(batches):
        if step == steps - 1:
            head.snapshot = head.adapters.factors()
        yield batch
