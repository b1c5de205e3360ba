"""Methods without a split: LoRA on the whole model, on every device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hsplit_flwr.common.seeds import derive_seed
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.experiments.methods import Method
from hsplit_flwr.experiments.rivals.adapted import adapted
from hsplit_flwr.experiments.rivals.corrections import correct, freeze_A
from hsplit_flwr.experiments.rivals.pruning import penalty, ranks_after
from hsplit_flwr.experiments.rivals.whole_training import WholeReport, client_steps, train_whole
from hsplit_flwr.experiments.task import LORA_ALPHA, RANK, SCALING, Task
from hsplit_flwr.experiments.work import RoundOutcome, factor_bytes, merge_flops, whole_flops, whole_work
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.lora.aggregation import RULES, Contribution, aggregate, terms_by_module, token_shares
from hsplit_flwr.lora.factors import LoraFactors, init_lora_A
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import Segment, block_of, linear_shapes, segment_from_model
from hsplit_flwr.training.loss import Score, score_segment
from hsplit_flwr.training.optimizer import Optimizer

Factors = Mapping[str, LoraFactors]


@dataclass(frozen=True)
class Trained:
    """What one client did in a round."""

    report: WholeReport
    factors: Factors
    forms: list[list[BatchForm]]

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of its adapters."""
        return {name: pair.rank for name, pair in self.factors.items()}


class WholeTrainer:
    """Every client trains LoRA on the whole model, of its own rank. See `engine.Trainer`."""

    def __init__(self, task: Task, method: Method) -> None:
        self._task = task
        self._method = method
        self._model = GlobalModel(task.files, device=task.device)
        """never has adapters"""
        shapes = linear_shapes(self._model.segment)
        by_device = dict.fromkeys(task.devices, RANK) if method.one_rank else task.setting.ranks
        ranks = {client: task.spec.rank or by_device[client] for client in task.devices}
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

    def round(self, round_number: int, present: Sequence[str]) -> RoundOutcome:
        """Hand out, train one client after another, aggregate."""
        downloads = {client: self._download(client) for client in present}
        trained = {client: self.train(client, round_number) for client in present}
        contributions = self.contributions(trained)
        update = aggregate(contributions, {}, block_of, RULES[self._method.rule])
        residual: Factors = {}
        if self._method.carried:
            terms = terms_by_module(contributions, {}, block_of)
            self._global, residual = correct(update, terms, self._method.correction)
            if residual:
                self._model.apply(residual)
        else:
            self._model.apply(update)
        costs = self._task.costs
        return RoundOutcome(
            work=tuple(
                whole_work(
                    client,
                    costs,
                    whole_flops(costs, done.ranks),
                    done.forms,
                    download_bytes=downloads[client],
                    upload_bytes=factor_bytes(done.factors, frozen_A=self._method.frozen_A),
                )
                for client, done in trained.items()
            ),
            tokens=sum(done.report.tokens for done in trained.values()),
            train_loss=sum(share * trained[client].report.loss for client, share in token_shares_of(trained).items()),
            too_large=sum(self._too_large(client, done.ranks) for client, done in trained.items()),
            server_flops=merge_flops(update) + merge_flops(residual),
        )

    def train(self, client: str, round_number: int) -> Trained:
        """Round `round_number` of one client."""
        segment, adapters = self._client_model(client, round_number)
        before = adapters.factors()
        forms: list[list[BatchForm]] = []
        report = self._train(client, round_number, segment, adapters, forms)
        after = adapters.factors()
        if self._method.self_pruning:
            self._ranks[client] = ranks_after(before, after)
        return Trained(report, after, forms)

    def contributions(self, trained: Mapping[str, Trained]) -> list[Contribution]:
        """What clients trained, weighted by their tokens."""
        shares = token_shares_of(trained)
        return [Contribution(shares[client], self._model.num_blocks, done.factors) for client, done in trained.items()]

    def score(self) -> Score:
        """Score of the global model."""
        return score_segment(self._evaluated(), self._task.eval_batches)

    def global_model(self) -> PreTrainedModel:
        """The global model, to generate with."""
        return self._evaluated().model

    def _evaluated(self) -> Segment:
        if not self._global:
            return self._model.segment
        return adapted(self._model, self._global)

    def _client_model(self, client: str, round_number: int) -> tuple[Segment, SegmentAdapters]:
        segment = segment_from_model(self._model.segment.model)
        ranks = self._ranks[client]
        carried = self._method.carried
        spec = LoraSpec.of_scaling(ranks, SCALING) if carried else LoraSpec.of_ranks(ranks, LORA_ALPHA)
        adapters = SegmentAdapters(segment, spec)
        adapters.reset(derive_seed(self._task.training.seed, "head", round_number, client))
        if self._global:
            adapters.set({name: resized(self._global[name], fresh) for name, fresh in adapters.factors().items()})
        if self._method.frozen_A:
            freeze_A(adapters)
        return segment, adapters

    def _train(
        self, client: str, round_number: int, segment: Segment, adapters: SegmentAdapters, forms: list[list[BatchForm]]
    ) -> WholeReport:
        training = self._task.training
        first = (round_number - 1) * training.local_steps
        steps = client_steps(self._task, client, first, forms)
        flat = adapters.parameters()
        pairs: list[tuple[Tensor, Tensor]] = list(zip(flat[::2], flat[1::2], strict=True))
        extra = (lambda: penalty(pairs)) if self._method.self_pruning else None
        return train_whole(segment, Optimizer(flat, training), steps, first, extra)

    def _download(self, client: str) -> int:
        handed_out = {n: truncated(self._global[n], rank) for n, rank in self._ranks[client].items() if self._global}
        version, _, lacking = self._model.since(self._versions.get(client, 0), self._model.num_blocks)
        self._versions[client] = version
        return factor_bytes(handed_out, frozen_A=self._method.frozen_A) + sum(part.nbytes for part in lacking.values())

    def _too_large(self, client: str, ranks: Mapping[str, int]) -> bool:
        return self._task.costs.tail_memory([1], ranks).total_bytes > self._task.devices[client].memory_bytes


def token_shares_of(trained: Mapping[str, Trained]) -> dict[str, float]:
    """Client -> p_i, its share of the tokens."""
    return token_shares({client: done.report.tokens for client, done in trained.items()})


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
