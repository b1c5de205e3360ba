"""Adapters that are kept, of unequal cuts and ranks, against the rule written out on dense weights."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsplit_flwr.common.seeds import derive_seed, head_seed, tail_seed
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.local_rounds import Everyone, LocalDoor
from hsplit_flwr.experiments.split_head import SplitHead
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.federation.tail_rounds import TailRounds
from hsplit_flwr.flower.local_federation import LocalNode
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.aggregation import Contribution
from hsplit_flwr.lora.factors import init_lora_A
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import weight_of
from hsplit_flwr.models.segments import block_of, linear_shapes
from hsplit_flwr.planning.configured_plans import ConfiguredPlans
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.workload import Workload
from tests.helpers.federation import build_one_at_a_time, manager_of, play_round, random_batches
from tests.helpers.models import tiny_model
from tests.helpers.states import through_disk

pytestmark = pytest.mark.timeout(300)

ROUNDS, STEPS = 3, 4
TOLERANCE = 1e-5
"""largest absolute difference of fp32 weights to the reference after 12 AdamW steps"""
SAME = 2e-6
"""largest absolute difference where only the form of a sum changes"""
SAME_SCORE = 1e-5
"""relative, of perplexities"""
TRAINING = TrainingConfig(
    ROUNDS, STEPS, 5e-3, warmup_steps=3, max_grad_norm=0.0, importance_steps=0, keep_adapters=True
)
TAIL = LoraSpec(4, 8.0)
PLANS = {
    "0": ClientPlan(1, LoraSpec(2, 8.0)),
    "1": ClientPlan(3, LoraSpec(3, 8.0, rank_pattern={r"layers\.1\..*": 5})),
    "2": ClientPlan(2, LoraSpec(4, 8.0)),
}
PRESENT = {1: "012", 2: "02", 3: "012"}
"""client 1 is away in round 2, and goes on in round 3 from what it trained in round 1"""
BATCHES = {c: random_batches(ROUNDS * STEPS, seed=int(c), rows=2 + int(c)) for c in PLANS}
Batch = Mapping[str, Tensor]
Weights = dict[str, Tensor]


def tokens_of(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


# ------------------------------------------------------------------------------------------- the rule, written out


@dataclass
class Holder:
    """Who trains adapters: a head, or the tail."""

    scaling: dict[str, float]
    pairs: dict[str, tuple[Tensor, Tensor]]
    start: Weights
    """of each module c B A when its change was last taken"""
    adamw: torch.optim.AdamW

    @classmethod
    def fresh(cls, spec: LoraSpec, shapes: Mapping[str, torch.Size], seed: int) -> "Holder":
        pairs = {}
        for name, (d_out, d_in) in shapes.items():
            rank = spec.rank(name)
            A = init_lora_A(rank, d_in, derive_seed(seed, name)).requires_grad_()
            pairs[name] = A, torch.zeros(d_out, rank, requires_grad=True)
        adamw = torch.optim.AdamW([t for pair in pairs.values() for t in pair], lr=1.0, weight_decay=0.0)
        scaling = {name: spec.scaling(name) for name in shapes}
        return cls(scaling, pairs, {name: torch.zeros(shape) for name, shape in shapes.items()}, adamw)

    def product(self, name: str) -> Tensor:
        A, B = self.pairs[name]
        return self.scaling[name] * (B @ A)

    def step(self, rate: float) -> None:
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad()


class Reference:
    """transformers' model and loss on dense weights, torch's AdamW; none of our training or aggregation."""

    def __init__(self, base: Weights | None = None) -> None:
        """`base`: the linear layers' weights, where they are not the model's own."""
        self.model = tiny_model("llama")
        names = [n for n, _ in self.model.named_modules() if n.endswith("_proj")]
        self.weights = base or {n: self.model.get_submodule(n).weight.detach().clone() for n in names}
        shapes = {n: weight.shape for n, weight in self.weights.items()}
        self.tail = Holder.fresh(TAIL, {n: s for n, s in shapes.items() if block_of(n) >= 1}, tail_seed(0, 1))
        self.heads = {
            c: Holder.fresh(
                plan.lora, {n: s for n, s in shapes.items() if block_of(n) < plan.cut}, head_seed(0, 1, c, False)
            )
            for c, plan in PLANS.items()
        }
        self.deepest = max(plan.cut for plan in PLANS.values())

    def round(self, number: int, present: Sequence[str], every: int) -> None:
        """Steps of all clients in their order; what changed is taken every so many steps."""
        tokens = dict.fromkeys(present, 0)
        for step in range((number - 1) * STEPS, number * STEPS):
            rate = TRAINING.learning_rate_at(step)
            for client in present:
                batch = BATCHES[client][step]
                tokens[client] += tokens_of(batch)
                held = {n: self.heads[client] if block_of(n) < PLANS[client].cut else self.tail for n in self.weights}
                moved = {
                    f"{n}.weight": self.weights[n] + holder.product(n) - self._taken(holder, n)
                    for n, holder in held.items()
                }
                torch.func.functional_call(self.model, moved, kwargs=dict(batch)).loss.backward()
                self.tail.step(rate)
                self.heads[client].step(rate)
            if (step + 1) % every == 0:
                self._take(tokens)
                tokens = dict.fromkeys(present, 0)

    def whole(self) -> Weights:
        """The global model, with what the tail alone trains."""
        alone = [n for n in self.weights if block_of(n) >= self.deepest]
        return {**self.weights, **{n: self.weights[n] + self.tail.product(n).detach() for n in alone}}

    def _taken(self, holder: Holder, name: str) -> Tensor:
        return holder.start[name] if block_of(name) < self.deepest else torch.zeros(())

    def _take(self, tokens: Mapping[str, int]) -> None:
        total = sum(tokens.values())
        for name, weight in self.weights.items():
            if block_of(name) >= self.deepest:
                continue
            shares = [
                (tokens[c] / total, self.heads[c] if block_of(name) < PLANS[c].cut else self.tail) for c in tokens
            ]
            moves = [share * (holder.product(name) - holder.start[name]).double() for share, holder in shares]
            self.weights[name] = (weight.double() + sum(moves)).float().detach()
        for holder in (self.tail, *(self.heads[c] for c in tokens)):
            holder.start = {n: holder.product(n).detach() for n in holder.pairs}


# ------------------------------------------------------------------------------------------- the server


class Rounds:
    """A round server and its heads in this process."""

    def __init__(self, model: GlobalModel, training: TrainingConfig) -> None:
        self._training = training
        self._workload = Workload.of(training, batch_size=4, sequence_length=10)
        self.server = RoundServer(
            model,
            PLANS,
            training,
            self._open_door,
            tail_lora=TAIL,
            workload=self._workload,
            config=StrategyConfig(federated_evaluation=False),
        )
        self.heads: dict[str, SplitHead] = {}
        self.last: dict[str, int] = {}

    def _open_door(self, tail: SharedTail, *_: object) -> LocalDoor:
        self._door = LocalDoor(tail, self._training, self._workload)
        return self._door

    def round(self, number: int, present: Sequence[str]) -> None:
        tasks = self.server.open_training(number, Everyone(present, {}))
        for client, task in tasks.items():
            former = self.heads.get(client)
            self.heads[client] = SplitHead.of(task, self.server.model.segment)
            self.heads[client].go_on(task, former.kept(self.last[client]) if former else None, self.server.model)
            self.last[client] = number

        def train(client: str) -> object:
            task = tasks[client]
            session = self._door.enter(task)
            try:
                return self.heads[client].train(task, iter(BATCHES[client][task.first_step :]), session)
            finally:
                session.close()

        with ThreadPoolExecutor(len(tasks)) as pool:
            replies = dict(zip(tasks, pool.map(train, tasks), strict=True))
        record = self.server.close_training(replies)  # type: ignore[arg-type]
        assert not record.failures


@pytest.fixture
def model(tmp_path: Path) -> GlobalModel:
    tiny_model("llama").save_pretrained(tmp_path)
    return GlobalModel(ModelFiles.resolve(str(tmp_path)))


def test_kept_adapters_equal_the_rule_written_out(model: GlobalModel) -> None:
    """Every tensor after every round: of the global model, and of the one that the tail scores."""
    rounds, reference = Rounds(model, TRAINING), Reference()
    start = reference.whole()
    for number, present in PRESENT.items():
        rounds.round(number, present)
        reference.round(number, present, every=STEPS)
        expected, found = reference.whole(), whole_weights(rounds.server)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert (found[name] - weight).abs().max() <= TOLERANCE, (number, name)
            assert (weight - start[name]).abs().max() > 100 * TOLERANCE, name
        require_tail_computes(rounds, expected)


def test_over_grpc_they_are_the_same(model: GlobalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that are built anew for every message, and keep their adapters and the optimizer's state on disk."""
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")
    strategy = HSplitLoRAStrategy(
        model,
        PLANS,
        TRAINING,
        tail_lora=TAIL,
        workload=Workload.of(TRAINING, batch_size=4, sequence_length=10),
        config=StrategyConfig(federated_evaluation=False),
    )
    data = {c: ClientData(lambda step, c=c: BATCHES[c][step:]) for c in PLANS}  # type: ignore[misc]
    nodes = {c: LocalNode(c, [c], tmp_path, data.__getitem__) for c in PLANS}
    reference = Reference()
    for number, present in PRESENT.items():
        play_round(strategy, manager_of(*(nodes[c] for c in present)), number)
        assert not strategy.history[-1].failures
        reference.round(number, present, every=STEPS)
        found = whole_weights(strategy.rounds)
        for name, weight in reference.whole().items():
            assert (found[name] - weight).abs().max() <= TOLERANCE, (number, name)
    strategy.rounds.close()


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_beside_a_quantised_base_they_are_the_same_rule(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W_0 is what the quantised layers hold, never quantised again; the reference trains on it in float32."""
    run = QuantizedRun(tmp_path, method, monkeypatch, delta_rank=0)
    reference = Reference(dict(run.base))
    for number, present in PRESENT.items():
        run.round(number, present)
        reference.round(number, present, every=STEPS)
        expected = reference.whole()
        for name, weight in run.global_weights().items():
            assert (weight - expected[name]).abs().max() <= TOLERANCE, (number, name)
            assert (expected[name] - run.base[name]).abs().max() > 100 * TOLERANCE, name
        run.require_tail_computes(expected)
    assert run.model.delta_error == 0


def test_where_a_quantised_base_bounds_the_delta_all_compute_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is cut off is cut off for everybody: heads on their clients score what the server's whole model does."""
    run = QuantizedRun(tmp_path, "nf4", monkeypatch, delta_rank=6)
    for number, present in PRESENT.items():
        run.round(number, present)
        run.require_tail_computes(run.global_weights())
        score = run.strategy.rounds.history[-1]
        assert score.federated_perplexity == pytest.approx(score.central_perplexity, rel=SAME_SCORE), number
    assert run.model.delta_error is not None
    assert 0 < run.model.delta_error < 1
    total = run.model.log.total
    ranks = [int(torch.linalg.matrix_rank(total.dense(name), rtol=1e-4)) for name in total.names()]
    assert max(ranks) == 6


class QuantizedRun:
    """Rounds on a quantised base over gRPC; clients are built anew for every message."""

    def __init__(self, folder: Path, method: str, monkeypatch: pytest.MonkeyPatch, delta_rank: int) -> None:
        build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")
        tiny_model("llama").save_pretrained(folder)
        self.model = GlobalModel(ModelFiles.resolve(str(folder)).quantized_by(method))
        self.base = {name: weight_of(layer).clone() for name, layer in self.model.segment.linear_modules().items()}
        scored = [BATCHES["0"][0]]
        self.strategy = HSplitLoRAStrategy(
            self.model,
            PLANS,
            TRAINING,
            tail_lora=TAIL,
            workload=Workload.of(
                TRAINING, batch_size=4, sequence_length=10, quantization=method, delta_rank=delta_rank
            ),
            config=StrategyConfig(delta_rank=delta_rank),
            eval_batches=scored,
        )
        data = {c: ClientData(lambda step, c=c: BATCHES[c][step:], scored) for c in PLANS}  # type: ignore[misc]
        self.nodes = {c: LocalNode(c, [c], folder, data.__getitem__, quantization=method) for c in PLANS}

    def round(self, number: int, present: Sequence[str]) -> None:
        """One round with these clients, none of which fails."""
        play_round(self.strategy, manager_of(*(self.nodes[c] for c in present)), number)
        assert not self.strategy.history[-1].failures

    def global_weights(self) -> Weights:
        """What the quantised layers hold, and all that was learnt."""
        learnt = self.strategy.rounds.tail_rounds.evaluated_delta()
        return {name: self.base[name] + learnt.dense(name) for name in learnt.names()}

    def require_tail_computes(self, expected: Weights) -> None:
        """The tail's weights and adapters together are the global model."""
        tail = self.strategy.rounds.tail_rounds.tail
        adapters = tail.adapters.factors()
        for name, layer in tail.segment.linear_modules().items():
            own = adapters[name].delta() if name in adapters else 0.0
            assert (weight_of(layer) + own - expected[name]).abs().max() <= TOLERANCE, name


def whole_weights(server: RoundServer) -> Weights:
    """W_0 and all that was learnt."""
    learnt = server.tail_rounds.evaluated_delta()
    return {n: server.model.files.read(f"{n}.weight") + learnt.dense(n) for n in learnt.names()}


def require_tail_computes(rounds: Rounds, expected: Weights) -> None:
    """The tail's weights and adapters together are the global model, as are each head's own."""
    layers = rounds.server.tail_rounds.tail.segment.linear_modules()
    adapters = rounds.server.tail_rounds.tail.adapters.factors()
    for name, weight in expected.items():
        own = adapters[name].delta() if name in adapters else 0.0
        assert (layers[name].weight + own - weight).abs().max() <= TOLERANCE, name  # type: ignore[operator]


def test_a_rule_that_takes_changes_for_adapters_is_refused(model: GlobalModel) -> None:
    config = StrategyConfig(rule="fedavg", federated_evaluation=False)
    with pytest.raises(ConfigError, match="keep-adapters"):
        RoundServer(model, PLANS, TRAINING, lambda *_: pytest.fail("no round was opened"), config=config)


def test_restarting_adapters_are_what_they_were(model: GlobalModel) -> None:
    """Without keep_adapters the weights have all of the heads' updates, and the tail's restart."""
    rounds = Rounds(model, replace(TRAINING, keep_adapters=False))
    rounds.round(1, "012")
    assert not model.brought
    idle = [pair for n, pair in rounds.server.tail_rounds.tail.adapters.factors().items() if block_of(n) < 3]
    assert idle
    assert not any(pair.B.any() for pair in idle)


# ------------------------------------------------------------------------------------------- new plans, states


def deeper(book: ConfiguredPlans) -> None:
    book.plans = {"0": ClientPlan(1, TAIL), "1": ClientPlan(3, TAIL)}


def shallower(book: ConfiguredPlans) -> None:
    book.plans = ClientPlan(1, TAIL)


def other_rank(book: ConfiguredPlans) -> None:
    book.tail_lora = LoraSpec(4, 8.0, rank_pattern={r"layers\.1\..*": 2})


def alike(book: ConfiguredPlans) -> None:
    """Another plan that is the old one."""


KEPT: dict[Callable[[ConfiguredPlans], None], set[int]] = {
    deeper: {1, 2},
    shallower: set(),
    other_rank: set(),
    alike: {1},
}
"""blocks whose adapters the tail keeps though heads hold them, after the plan has changed"""


def tail_rounds_of(model: GlobalModel) -> tuple[TailRounds, ConfiguredPlans]:
    plans = {"0": ClientPlan(1, TAIL), "1": ClientPlan(2, TAIL)}
    book = ConfiguredPlans(plans, TAIL, None, linear_shapes(model.segment))
    return TailRounds(model, book, TRAINING), book


def move(rounds: TailRounds, seed: int) -> None:
    """Something is learnt: every factor of the tail's adapters moves at random."""
    generator = torch.Generator().manual_seed(seed)
    for factor in rounds.tail.adapters.parameters():
        factor.data.add_(torch.randn(factor.shape, generator=generator), alpha=0.1)


def merge(rounds: TailRounds, cuts: Sequence[int]) -> None:
    """A round of two clients whose heads learnt nothing; the second has three quarters of the tokens."""
    contributions = [Contribution(share, cut, {}) for share, cut in zip((0.25, 0.75), cuts, strict=True)]
    rounds.merge(contributions, rounds.trained(), "noise_free")


def learnt(rounds: TailRounds) -> Weights:
    delta = rounds.evaluated_delta()
    return {name: delta.dense(name) for name in delta.names()}


def require_computed(model: GlobalModel, rounds: TailRounds) -> None:
    """What the tail computes with, weights and adapters, is W_0 and all that was learnt."""
    layers, adapters = rounds.tail.segment.linear_modules(), rounds.tail.adapters.factors()
    for name, delta in learnt(rounds).items():
        found = layers[name].weight + (adapters[name].delta() if name in adapters else 0.0)  # type: ignore[operator]
        assert (found - model.files.read(f"{name}.weight") - delta).abs().max() <= SAME, name


@pytest.mark.parametrize("change", KEPT, ids=lambda change: change.__name__)
def test_a_new_plan_loses_nothing(model: GlobalModel, change: Callable[[ConfiguredPlans], None]) -> None:
    """Block 1 is the tail's for a quarter of the tokens; block 2 is the tail's alone, until it is given to a head."""
    rounds, book = tail_rounds_of(model)
    rounds.open(1, ["0", "1"], 2)
    rounds.tail.close_training()
    move(rounds, 1)
    merge(rounds, (1, 2))
    before, adapters = learnt(rounds), rounds.tail.adapters.factors()
    assert {block_of(name) for name in model.brought} == {1}
    for name, pair in adapters.items():
        share = 0.25 if block_of(name) == 1 else 1.0
        assert (before[name] - share * pair.delta()).abs().max() <= SAME, name
    require_computed(model, rounds)
    change(book)
    rounds.replan()
    assert {block_of(name) for name in model.brought} == KEPT[change]
    for name, pair in rounds.tail.adapters.factors().items():
        stays = block_of(name) in KEPT[change] or block_of(name) >= max(2, book.deepest_cut)
        assert torch.equal(pair.B, adapters[name].B) if stays else not pair.B.any(), name
    for name, delta in learnt(rounds).items():
        assert (delta - before[name]).abs().max() <= SAME, name
    require_computed(model, rounds)
    require_next_round(model, rounds, book)
    rounds.merge_remaining()
    assert not model.brought
    require_computed(model, rounds)


def require_next_round(model: GlobalModel, rounds: TailRounds, book: ConfiguredPlans) -> None:
    """It adds the tail's change, by the tokens that the tail had of each block."""
    rounds.open(2, ["0", "1"], 2)
    rounds.tail.close_training()
    before, start = learnt(rounds), rounds.tail.adapters.factors()
    move(rounds, 2)
    moved = rounds.tail.adapters.factors()
    merge(rounds, (1, book.deepest_cut))
    for name, delta in learnt(rounds).items():
        share = 0.25 if block_of(name) < book.deepest_cut else 1.0
        change = share * (moved[name].delta() - start[name].delta())
        assert (delta - before.get(name, torch.zeros(())) - change).abs().max() <= SAME, name
    require_computed(model, rounds)


def test_what_moved_for_nobody_who_finished_restarts(model: GlobalModel) -> None:
    """The client that left block 1 to the tail was refused: nobody's share takes what the tail learnt there."""
    rounds, _ = tail_rounds_of(model)
    for number, seed in ((1, 1), (2, 2)):
        rounds.open(number, ["0", "1"], 2)
        rounds.tail.close_training()
        move(rounds, seed)
        if number == 1:
            merge(rounds, (1, 2))
    before = {name: delta for name, delta in learnt(rounds).items() if block_of(name) == 1}
    rounds.merge([Contribution(1.0, 2, {})], rounds.trained(), "noise_free")
    assert not model.brought
    after = learnt(rounds)
    assert all(torch.equal(after[name], delta) for name, delta in before.items())
    require_computed(model, rounds)


def test_rounds_go_on_from_their_state(model: GlobalModel, tmp_path: Path) -> None:
    rounds, _ = tail_rounds_of(model)
    rounds.open(1, ["0", "1"], 2)
    rounds.tail.close_training()
    move(rounds, 1)
    merge(rounds, (1, 2))
    again = GlobalModel(model.files)
    again.load_state(through_disk(model.state(), tmp_path))
    resumed, _ = tail_rounds_of(again)
    resumed.load_state(through_disk(rounds.state(), tmp_path))
    assert again.brought.keys() == model.brought.keys() != set()
    for name, layer in model.segment.linear_modules().items():
        assert torch.equal(layer.weight, again.segment.linear_modules()[name].weight), name  # type: ignore[arg-type]
    require_computed(again, resumed)
