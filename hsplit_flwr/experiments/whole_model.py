"""Methods without a split: LoRA on the whole model, on every device or on the server."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hsplit_flwr.adapters import SegmentAdapters
from hsplit_flwr.aggregation import RULES, Contribution, aggregate, token_shares
from hsplit_flwr.client_head import Batch
from hsplit_flwr.exchange import target_tokens
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.pruning import penalty, ranks_after
from hsplit_flwr.experiments.task import ALPHA_OVER_RANK, LARGEST_RANK, Task
from hsplit_flwr.experiments.work import BatchShape, RoundOutcome, factor_bytes, length_factor, whole_flops, whole_work
from hsplit_flwr.global_model import GlobalModel, Score, linear_shapes, score_segment
from hsplit_flwr.lora import LoraFactors, LoraSpec, init_lora_A
from hsplit_flwr.optimisation import Optimiser
from hsplit_flwr.plan import derive_seed
from hsplit_flwr.segments import Segment, block_of, segment_from_model
from hsplit_flwr.server_tail import token_losses

Factors = Mapping[str, LoraFactors]


@dataclass(frozen=True)
class WholeReport:
    """What training the whole model for a round did."""

    loss: float
    """mean of the steps' mean losses"""
    tokens: int


def train_whole(
    segment: Segment,
    optimiser: Optimiser,
    steps: Iterable[Sequence[Batch]],
    first_step: int,
    extra_loss: Callable[[], Tensor] | None = None,
) -> WholeReport:
    """Train what of `segment` (a whole model) requires gradients.

    Args:
        segment: holds all blocks.
        optimiser: of its trainable parameters.
        steps: the batches of each step; a step's loss is the mean over the target tokens of all of them.
        first_step: run step of the first one.
        extra_loss: added to every step's loss.
    """
    losses: list[float] = []
    trained = 0
    for step, batches in enumerate(steps):
        optimiser.zero_grad()
        tokens = sum(target_tokens(batch["labels"]) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = segment(batch["input_ids"], batch["attention_mask"])
            loss = token_losses(logits, batch["labels"]).sum() / max(1, tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if extra_loss is not None:
            extra_loss().backward()  # type: ignore[no-untyped-call]
        optimiser.step(first_step + step)
        losses.append(total)
        trained += tokens
    return WholeReport(fmean(losses), trained)


@dataclass(frozen=True)
class Trained:
    """What one client did in a round."""

    report: WholeReport
    factors: Factors
    shapes: list[BatchShape]

    @property
    def ranks(self) -> dict[str, int]:
        """Of its adapters."""
        return {name: pair.rank for name, pair in self.factors.items()}


class WholeTrainer:
    """Every client trains LoRA on the whole model, of its own rank. See `engine.Trainer`."""

    def __init__(self, task: Task, method: Method) -> None:
        self._task = task
        self._method = method
        self._model = GlobalModel(task.files)
        """never has adapters"""
        shapes = linear_shapes(self._model.segment)
        ranks = {client: task.spec.rank or task.setting.ranks[client] for client in task.devices}
        self._ranks = {
            client: {name: min(rank, *shape) for name, shape in shapes.items()} for client, rank in ranks.items()
        }
        largest = max(ranks.values())
        self._global: dict[str, LoraFactors] = {}
        """carried adapters of the largest rank, scaling 1"""
        if method.carried:
            self._global = {
                name: LoraFactors(
                    init_lora_A(min(largest, *shape), shape[1], derive_seed(task.spec.seed, "global", name)),
                    torch.zeros(shape[0], min(largest, *shape)),
                    1.0,
                )
                for name, shape in shapes.items()
            }
        self._versions: dict[str, int] = {}

    def round(self, number: int, present: Sequence[str]) -> RoundOutcome:
        """Hand out, train one client after another, aggregate."""
        downloads = {client: self._download(client) for client in present}
        trained = {client: self.train(client, number) for client in present}
        contributions = self.contributions(trained)
        update = aggregate(contributions, {}, block_of, RULES[self._method.rule])
        if self._method.carried:
            self._global = update
        else:
            self._model.apply(update)
        costs = self._task.costs
        return RoundOutcome(
            work=tuple(
                whole_work(
                    client,
                    costs,
                    whole_flops(costs, done.ranks),
                    done.shapes,
                    download_bytes=downloads[client],
                    upload_bytes=factor_bytes(done.factors),
                )
                for client, done in trained.items()
            ),
            tokens=sum(done.report.tokens for done in trained.values()),
            train_loss=sum(c.weight * t.report.loss for c, t in zip(contributions, trained.values(), strict=True)),
            too_large=sum(self._too_large(client, done.ranks) for client, done in trained.items()),
            server_flops=sum(2.0 * f.rank * f.A.shape[1] * f.B.shape[0] for f in update.values()),
        )

    def train(self, client: str, number: int) -> Trained:
        """Round `number` of one client."""
        segment, adapters = self._client_model(client, number)
        before = adapters.factors()
        shapes: list[BatchShape] = []
        report = self._train(client, number, segment, adapters, shapes)
        after = adapters.factors()
        if self._method.self_pruning:
            self._ranks[client] = ranks_after(before, after)
        return Trained(report, after, shapes)

    def contributions(self, trained: Mapping[str, Trained]) -> list[Contribution]:
        """What clients trained, weighted by their tokens."""
        shares = token_shares({client: done.report.tokens for client, done in trained.items()})
        return [Contribution(shares[client], self._model.num_blocks, done.factors) for client, done in trained.items()]

    def score(self) -> Score:
        """Of the global model."""
        return score_segment(self._evaluated(), self._task.eval_batches)

    def global_model(self) -> PreTrainedModel:
        """The global model, to generate with."""
        return self._evaluated().model

    def _evaluated(self) -> Segment:
        if not self._global:
            return self._model.segment
        whole = segment_from_model(self._model.segment.model)
        spec = LoraSpec.of_ranks({name: pair.rank for name, pair in self._global.items()}, 1.0)
        SegmentAdapters(whole, spec).set(self._global)
        return whole

    def _client_model(self, client: str, number: int) -> tuple[Segment, SegmentAdapters]:
        segment = segment_from_model(self._model.segment.model)
        adapters = SegmentAdapters(segment, LoraSpec.of_ranks(self._ranks[client], ALPHA_OVER_RANK))
        adapters.reset(derive_seed(self._task.training.seed, "head", number, client))
        if self._global:
            adapters.set({name: resized(self._global[name], fresh) for name, fresh in adapters.factors().items()})
        return segment, adapters

    def _train(
        self, client: str, number: int, segment: Segment, adapters: SegmentAdapters, shapes: list[BatchShape]
    ) -> WholeReport:
        training = self._task.training
        first = (number - 1) * training.local_steps
        steps = client_steps(self._task, client, first, shapes)
        flat = adapters.parameters()
        pairs: list[tuple[Tensor, Tensor]] = list(zip(flat[::2], flat[1::2], strict=True))
        extra = (lambda: penalty(pairs)) if self._method.self_pruning else None
        return train_whole(segment, Optimiser(flat, training), steps, first, extra)

    def _download(self, client: str) -> int:
        if self._global:
            return factor_bytes({n: truncated(self._global[n], rank) for n, rank in self._ranks[client].items()})
        version, _, lacking = self._model.since(self._versions.get(client, 0), self._model.num_blocks)
        self._versions[client] = version
        return sum(tensor.nbytes for tensor in lacking.values())

    def _too_large(self, client: str, ranks: Mapping[str, int]) -> bool:
        return self._task.costs.tail_memory([1], ranks).total_bytes > self._task.devices[client].memory_bytes


class ServerTrainer:
    """CenLoRA: one LoRA on the pooled data, without rounds but for the evaluation. See `engine.Trainer`."""

    def __init__(self, task: Task, method: Method) -> None:
        self._task = task
        self._joint = method.joint_batches
        self._segment = GlobalModel(task.files).segment
        rank = task.spec.rank or LARGEST_RANK
        self._adapters = SegmentAdapters(self._segment, LoraSpec(rank, ALPHA_OVER_RANK * rank))
        self._adapters.reset(derive_seed(task.training.seed, "tail"))
        times = 1 if self._joint else len(task.devices)
        training = replace(
            task.training,
            local_steps=times * task.training.local_steps,
            warmup_steps=times * task.training.warmup_steps,
        )
        self._optimiser = Optimiser(self._adapters.parameters(), training)

    def round(self, number: int, present: Sequence[str]) -> RoundOutcome:
        """As many batches of every client as in a round of the others; the server has them all, whoever is away."""
        first = (number - 1) * self._task.training.local_steps
        shapes: list[BatchShape] = []
        streams = [client_steps(self._task, client, first, shapes) for client in self._task.devices]
        joint = ([batch for batches in together for batch in batches] for together in zip(*streams, strict=True))
        steps = joint if self._joint else ([batch] for batches in joint for batch in batches)
        start = first if self._joint else first * len(streams)
        report = train_whole(self._segment, self._optimiser, steps, start)
        ranks = {name: pair.rank for name, pair in self._adapters.factors().items()}
        costs = self._task.costs
        flops = len(shapes) * length_factor(costs, shapes) * whole_flops(costs, ranks)
        return RoundOutcome((), report.tokens, report.loss, 0, flops)

    def score(self) -> Score:
        """Of the model with its adapters."""
        return score_segment(self._segment, self._task.eval_batches)

    def global_model(self) -> PreTrainedModel:
        """The model with its adapters, to generate with."""
        return self._segment.model


def client_steps(task: Task, client: str, first_step: int, shapes: list[BatchShape]) -> Iterable[list[Batch]]:
    """The batches of `client` in a round, one per step, their shapes noted."""
    for batch in islice(task.streams[client](first_step), task.training.local_steps):
        rows, positions = batch["input_ids"].shape
        shapes.append((rows, positions))
        yield [batch]


def truncated(factors: LoraFactors, rank: int) -> LoraFactors:
    """The first `rank` rows of A and columns of B."""
    return LoraFactors(factors.A[:rank], factors.B[:, :rank], factors.scaling)


def resized(factors: LoraFactors, fresh: LoraFactors) -> LoraFactors:
    """`factors` at the rank of `fresh`: truncated, or with rows of A from `fresh` and zero columns of B at the end.

    The second where the clients of the last round all had smaller ranks.
    """
    if fresh.rank <= factors.rank:
        return truncated(factors, fresh.rank)
    A, B = fresh.A.clone(), torch.zeros_like(fresh.B)
    A[: factors.rank], B[:, : factors.rank] = factors.A, factors.B
    return LoraFactors(A, B, factors.scaling)
