"""The tail from round to round: which of its adapters are merged and restart, and which are kept.

A matrix that a head may hold, too, is aggregated: the sum goes into the weights, and its adapter restarts. With
`TrainingConfig.keep_adapters` it is kept, and what it has moved by is aggregated. Everybody's adapter then is a part of
the sum, and lies on weights that lack this part: ``W = round(W_0 + delta - c B A)``, with the holder's own A and B.

A matrix that no plan in force gives to a head is trained by the tail alone. Its adapter is the whole update, so it is
kept, and the optimizer's state with it, until a new plan gives the matrix to a head or changes the rank, or to the end.
Then it is merged.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hsplit_flwr.common.seeds import tail_seed
from hsplit_flwr.common.state import State
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.lora.aggregation import RULES, Contribution, aggregate, stacked_parts, tail_weight
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.factors import LoraFactors, changes
from hsplit_flwr.lora.places import MEMORY
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment, block_of, segment_from_model
from hsplit_flwr.planning.plans import PlansInForce
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.loss import Score, score_segment
from hsplit_flwr.training.step import StepReport
from hsplit_flwr.training.tail import SharedTail

Factors = Mapping[str, LoraFactors]


class TailRounds:
    """A tail, what becomes of its adapters between rounds, and the model as it is with those that are not merged yet.

    Args:
        model: what rounds are merged into. It stays plain: the tail has a segment of its own, on the same weights.
        plans: those in force.
        training: see `SharedTail`, as are `limits` and `on_step`.
    """

    def __init__(
        self,
        model: GlobalModel,
        plans: PlansInForce,
        training: TrainingConfig,
        limits: BarrierLimits | None = None,
        on_step: Callable[[StepReport], None] | None = None,
    ) -> None:
        self._model = model
        self._segment = _on_the_same_weights(model.segment)
        self._plans = plans
        self._seed = training.seed
        self._keeps = training.keep_adapters
        self.tail = SharedTail(self._segment, self._adapters(), training, limits, on_step)
        self._kept: frozenset[str] = frozenset()
        """adapters that the delta lacks"""
        self._round_number = 0

    def open(self, round_number: int, clients: Iterable[str], concurrency: int) -> None:
        """Open a training round; see `SharedTail.open_training`."""
        self._round_number = round_number
        self.tail.open_training(clients, concurrency, tail_seed(self._seed, round_number), self._staying())

    def train_by(self, training: TrainingConfig) -> None:
        """See `SharedTail.train_by`."""
        self.tail.train_by(training)

    def replan(self) -> None:
        """Adapters by the new plans in force. Nothing learnt is lost: what cannot be kept is merged."""
        alike = {name: pair for name, pair in self._lasting().items() if self._alike(name, pair)}
        deepest = self._plans.deepest_cut
        apart = [name for name in alike if name in self._kept and block_of(name) >= deepest]
        shared = {name: pair for name, pair in alike.items() if self._keeps and block_of(name) < deepest}
        self._merge_all_but(apart, shared)
        self._replace_adapters({name: self.tail.adapters.parameters([name]) for name in (*apart, *shared)})

    def merge(self, contributions: Sequence[Contribution], trained: Factors, rule: str) -> dict[str, LoraFactors]:
        """End a round: aggregate what heads may hold by `rule` of `RULES`; returns the update of the weights.

        Args:
            contributions: of the clients that finished.
            trained: what training changed in the tail's adapters; see `trained`.
            rule: see `aggregation`.
        """
        self.keep_tail_only()
        shared = {name: factors for name, factors in trained.items() if name not in self._kept}
        update = aggregate(contributions, shared, block_of, RULES[rule])
        parts = stacked_parts(contributions, shared, block_of, rule, self._round_number)
        brought = self._still_brought(contributions, shared)
        self._model.apply_update(update, parts, brought)
        self.tail.adapters.reset(self._seed, shared.keys() - brought.keys())
        return update

    def trained(self) -> dict[str, LoraFactors]:
        """What training changed in the tail's adapters since the last round was merged, or they restarted.

        Those that only the tail trains are given as they are.
        """
        return changes(self.tail.adapters.factors(), self._model.brought)

    def keep_tail_only(self) -> None:
        """The adapters of what no plan in force gives to a head are kept from now on."""
        names = self.tail.adapters.module_names
        self._kept = frozenset(name for name in names if block_of(name) >= self._plans.deepest_cut)

    def merge_remaining(self) -> None:
        """Merge the adapters that were kept; all are empty afterwards."""
        self._merge_all_but([], {})
        self.tail.adapters.reset(self._seed)

    def unmerged(self) -> dict[str, LoraFactors]:
        """The adapters that are kept and that the delta lacks."""
        return {name: pair for name, pair in self.tail.adapters.factors().items() if name in self._kept}

    def score(self, batches: Iterable[Batch]) -> Score:
        """Score of the global model on `batches`, with what is not merged yet. Between rounds.

        Raises:
            ConfigError: see `score_segment`.
        """
        return score_segment(self._segment, batches)

    def evaluated_delta(self) -> WeightDelta:
        """What the model that `score` scores has learnt, merged or not: a snapshot that shares its tensors."""
        total = self._model.log.total
        learnt = total.restricted(total.names())
        learnt.place = MEMORY
        learnt.add(self.unmerged())
        return learnt

    def evaluated_model(self) -> PreTrainedModel:
        """The model that `score` scores, to generate with. The next round changes it."""
        return self._segment.model

    def state(self) -> State:
        """Which adapters are kept, and the tail."""
        return {"kept": sorted(self._kept), "brought": sorted(self._model.brought), "tail": self.tail.state()}

    def load_state(self, state: State) -> None:
        """Go on from what `state` gave, under the plans and at the version of the weights of that time.

        Raises:
            ConfigError: other plans are in force, or a round is open.
        """
        self._replace_adapters({})
        self.tail.load_state(state["tail"])
        self._kept = frozenset(state["kept"])
        adapters = self.tail.adapters.factors()
        self._model.bring({name: adapters[name] for name in state["brought"]})

    def _staying(self) -> frozenset[str]:
        return self._kept.union(self._model.brought)

    def _lasting(self) -> dict[str, LoraFactors]:
        """The adapters that are kept, whether the delta has them or not; between rounds."""
        return {**self._model.brought, **self.unmerged()}

    def _still_brought(self, contributions: Sequence[Contribution], shared: Factors) -> dict[str, LoraFactors]:
        """The adapters on matrices that heads hold which are kept: those of which all is in the delta by now.

        Not one that moved for clients alone who are not among the contributions.
        """
        if not self._keeps:
            return {}
        cuts = [(c.cut, c.weight) for c in contributions]
        moved = {name: pair for name, pair in self.tail.adapters.factors().items() if name in shared}
        unmoved = {name: pair for name, pair in self._model.brought.items() if _same(pair, moved.get(name))}
        return {**{name: pair for name, pair in moved.items() if tail_weight(cuts, block_of(name)) > 0}, **unmoved}

    def _alike(self, name: str, pair: LoraFactors) -> bool:
        spec = self._plans.tail_lora
        return spec.rank(name) == pair.rank and spec.scaling(name) == pair.scaling

    def _merge_all_but(self, stays: Iterable[str], brought: Factors) -> None:
        """The delta lacks the adapters `stays`, and the weights those and `brought`; all else is in both."""
        kept = frozenset(stays)
        if ended := {name: pair for name, pair in self.unmerged().items() if name not in kept}:
            self._model.apply(ended, brought=brought)
        else:
            self._model.bring(brought)
        self._kept = kept

    def _replace_adapters(self, kept: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Adapters by the plans in force, new but for the tensors `kept` (A and B by module)."""
        self.tail.adapters.remove()
        adapters = self._adapters()
        adapters.adopt(kept)
        self.tail.replace_adapters(adapters, kept)

    def _adapters(self) -> SegmentAdapters:
        names = [name for name in self._segment.linear_modules() if block_of(name) >= 1]  # block 0 is always a head's
        return SegmentAdapters(self._segment, self._plans.tail_lora, names)


def _same(one: LoraFactors, other: LoraFactors | None) -> bool:
    return other is not None and torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


def _on_the_same_weights(whole: Segment) -> Segment:
    """All blocks once more, without memory of their own; what is merged into `whole` is merged into both."""
    segment = segment_from_model(whole.model)
    segment.model.generation_config = whole.model.generation_config
    weights = whole.linear_modules()
    for name, layer in segment.linear_modules().items():
        layer.weight = weights[name].weight  # the parameter itself: merging gives it new data
    return segment
