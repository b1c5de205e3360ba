"""HSplitLoRA in the engine against a deployment, its ablations against their rules; runs repeat, who is away rests."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hsplit_flwr.experiments import split_model
from hsplit_flwr.experiments.engine import RunResult, run
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.records import Evaluation, RunSpec
from hsplit_flwr.experiments.split_model import SplitTrainer
from hsplit_flwr.experiments.split_plans import SplitPlans, plans_of
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.federation import tail_rounds
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.flower.local_federation import LocalNode, run_federation
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.planning.planner import PlannerConfig, plan
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.planning.round_plan import RoundPlan
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan
from tests.helpers.references import ALGEBRA, SPEC, Floats, token_shares, tokens_of

DEPLOYED = 1e-6
"""relative difference of perplexity between the engine and a deployment"""
CLIENTS = ("0", "1", "2", "3", "4")
PLANNER = PlannerConfig((1, 2, 4, 8, 16), tail_rank=16)
"""as the engine's, stated again"""
OF_OURS = ("hsplitlora_all", "hsplitlora_keep_pipelined", "hsplitlora_int4", "with_fedex", "with_ffa", "with_fair")
OF_RIVALS = (
    "one_model_pipelined",
    "splitlora_as_released",
    "splitlora_joint",
    "cenlora",
    "ft",
    "hetlora",
    "flora",
    "flexlora",
)
DIFFERENT = (*OF_OURS, *OF_RIVALS)
"""methods that do something of their own: all others do what some of these do"""
RunWithPlans = tuple[RunResult, list[RoundPlan]]
"""a run, and the plan in force in every round"""


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.of(SPEC)


def run_with_plans(spec: RunSpec) -> RunWithPlans:
    planners: list[AdaptivePlanning] = []
    plans: list[RoundPlan] = []
    original: Callable[..., SplitPlans] = vars(split_model)["plans_of"]

    def note(*arguments: Any) -> SplitPlans:
        found = original(*arguments)
        assert isinstance(found.plans, AdaptivePlanning)
        planners.append(found.plans)
        return found

    def after_round(_: Evaluation) -> None:
        assert planners[0].in_force
        plans.append(planners[0].in_force)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_model, "plans_of", note)
        return run(spec, after_round), plans


@pytest.fixture(scope="module")
def hsplitlora() -> RunWithPlans:
    return run_with_plans(SPEC)


def numbers(result: RunResult) -> list[Evaluation]:
    return [replace(evaluation, wall_s=0.0) for evaluation in result.evaluations]


def choices(round_plan: RoundPlan) -> tuple[dict[str, tuple[int, Mapping[str, int]]], Mapping[str, int]]:
    """Cuts and ranks; the objective's last digits depend on importance, which travels as float32."""
    return {c: (planned.cut, planned.ranks) for c, planned in round_plan.clients.items()}, round_plan.tail.ranks


@pytest.mark.parametrize(
    ("method", "planner"),
    [("hsplitlora", PLANNER), ("with_deep_heads", replace(PLANNER, tail_worth=0.0, deadline_s=math.inf))],
)
def test_hsplitlora_is_what_a_deployment_computes(task: Task, method: str, planner: PlannerConfig) -> None:
    """The real strategy, clients and gRPC: same plans, same perplexity after every round."""
    planner = replace(planner, round_weight=task.round_weight)
    strategy = HSplitLoRAStrategy(
        GlobalModel(task.files),
        AdaptivePlanning(task.costs, task.server, planner, lora_alpha=16.0),
        task.training,
        config=StrategyConfig(federated_evaluation=False),
        limits=BarrierLimits(straggler_limit_s=300.0),
        eval_batches=task.eval_batches,
    )
    nodes = [
        LocalNode(
            client,
            [client],
            tiny_checkpoint(),
            lambda client: ClientData(task.streams[client]),
            budgets=lambda client, _: task.devices[client],
        )
        for client in CLIENTS
    ]
    run_federation(strategy, nodes)
    result, plans = run_with_plans(replace(SPEC, method=method))
    assert [record.failures for record in strategy.history] == [(), ()]
    planned = [record.plan for record in strategy.history if record.plan]
    assert len(planned) == len(plans) == 2  # planned anew after the first round
    assert [choices(plan) for plan in planned] == [choices(plan) for plan in plans]
    assert (len({client.cut for client in plans[1].clients.values()}) > 1) == (method == "with_deep_heads")
    assert strategy.rounds.initial_score is not None
    deployed = [strategy.rounds.initial_score.perplexity, *(record.central_perplexity for record in strategy.history)]
    assert [evaluation.perplexity for evaluation in result.evaluations] == pytest.approx(deployed, rel=DEPLOYED)
    assert result.evaluations[2].tokens == sum(record.tokens for record in strategy.history)


def test_a_run_repeats_itself(hsplitlora: RunWithPlans) -> None:
    again = run(SPEC)
    assert numbers(again) == numbers(hsplitlora[0])
    assert again.timelines == hsplitlora[0].timelines


@pytest.mark.slow
@pytest.mark.parametrize("method", DIFFERENT)
def test_a_run_repeats_itself_whatever_the_method_does(method: str) -> None:
    spec = replace(SPEC, method=method, setting="highly_heterogeneous")
    first, second = run(spec), run(spec)
    assert numbers(first) == numbers(second)
    assert first.timelines == second.timelines


@pytest.mark.parametrize("method", ["hsplitlora", "splitlora", "hetlora", "ft"])
def test_who_is_away_does_not_train(method: str) -> None:
    """Client 2 alone, then 0 to 3: client 3's rank is larger than any of the round before."""
    spec = replace(SPEC, method=method, setting="highly_heterogeneous", local_steps=1)
    result = run(spec)
    task = Task.of(spec)
    trained = 0
    for number, present in ((1, "2"), (2, "0123")):
        assert task.setting.present(SPEC.seed, number) == tuple(present)
        trained += sum(tokens_of([next(task.streams[client](number - 1))]) for client in present)
        assert result.evaluations[number].clients == len(present)
        assert result.evaluations[number].tokens == trained
        assert {interval.who for interval in result.timelines[number - 1].intervals} == {*present, "server"}


def test_shuffled_importance_is_as_unequal_and_of_other_weights(task: Task) -> None:
    def profile_of(method: str, seed: int) -> Mapping[str, float]:
        plans = plans_of(replace(task, spec=replace(SPEC, seed=seed)), METHODS[method]).plans
        assert isinstance(plans, AdaptivePlanning)
        for _ in range(2):  # always for the same one's, else they would draw level
            plans.observe_importance({matrix.name: 1.0 + i for i, matrix in enumerate(task.costs.matrices)})
        return plans.profile

    measured, shuffled = profile_of("hsplitlora", 0), profile_of("with_shuffled_iwi", 0)
    assert shuffled.keys() == measured.keys()
    assert sorted(shuffled.values()) == pytest.approx(sorted(measured.values()))
    kept = [name for name in measured if shuffled[name] == pytest.approx(measured[name])]
    assert len(kept) < len(measured) / 4
    assert shuffled == profile_of("with_shuffled_iwi", 0) != profile_of("with_shuffled_iwi", 1)


def test_without_iwi_plans_as_if_all_weights_were_alike(hsplitlora: RunWithPlans) -> None:
    task = Task.of(SPEC)
    result, plans = run_with_plans(replace(SPEC, method="without_iwi"))
    uniform = {matrix.name: 1.0 for matrix in task.costs.matrices}
    planner = replace(PLANNER, round_weight=task.round_weight)
    alike = plan(task.costs, uniform, task.devices, task.server, planner)
    assert plans == [alike, alike]
    assert result.evaluations[1].perplexity == hsplitlora[0].evaluations[1].perplexity  # nothing is known yet
    assert choices(plans[1]) != choices(hsplitlora[1][1])


@pytest.mark.parametrize("setting", ["homogeneous", "heterogeneous", "highly_heterogeneous"])
def test_without_armsc_has_the_deepest_cut_that_all_devices_afford(setting: str) -> None:
    task = Task.of(replace(SPEC, setting=setting))
    common, tail_lora, _ = plans_of(task, METHODS["without_armsc"])
    assert isinstance(common, ClientPlan)
    assert tail_lora is not None
    names = [matrix.name for matrix in task.costs.matrices]
    cut, ranks = common.cut, {name: common.lora.rank(name) for name in names}
    assert set(ranks.values()) == {8}
    assert {tail_lora.rank(name) for name in names} == {8}
    assert {common.lora.scaling(name) for name in names} == {2.0}

    def affordable(cut: int) -> list[bool]:
        held = {name: rank for name, rank in ranks.items() if int(name.split(".")[2]) < cut}
        needed = task.costs.head_memory(cut, held).total_bytes
        return [needed <= device.memory_bytes for device in task.devices.values()]

    assert all(affordable(cut))
    assert cut == task.costs.num_blocks - 1 or not all(affordable(cut + 1))


def test_without_naa_adds_the_product_of_averaged_factors(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SplitTrainer(task, METHODS["without_naa"])
    before = weights_of(trainer)
    sent: list[Any] = []
    original: Callable[..., Any] = vars(tail_rounds)["aggregate"]

    def note(contributions: Any, tail: Any, *others: Any) -> Any:
        sent.append((dict(zip(CLIENTS, contributions, strict=True)), tail))
        return original(contributions, tail, *others)

    monkeypatch.setattr(tail_rounds, "aggregate", note)
    trainer.round(1, CLIENTS)
    heads, tail = sent[0]
    shares = token_shares(task, CLIENTS)
    unlike_exact = []
    for name, weight in weights_of(trainer).items():
        terms = [(shares[c], head.factors[name]) for c, head in heads.items() if name in head.factors]
        left = 1 - sum(shares[c] for c, head in heads.items() if int(name.split(".")[2]) < head.cut)
        if name in tail and left > 1e-9:
            terms.append((left, tail[name]))
        if not terms:  # the tail's alone: it goes on, unmerged
            assert np.array_equal(weight, before[name])
            continue
        rank = max(pair.rank for _, pair in terms)
        A, B = np.zeros((rank, weight.shape[1])), np.zeros((weight.shape[0], rank))
        exact = np.zeros_like(weight)
        for share, pair in terms:
            own_A, own_B = pair.A.double().numpy(), pair.scaling * pair.B.double().numpy()
            A[: pair.rank] += share * own_A
            B[:, : pair.rank] += share * own_B
            exact += share * own_B @ own_A
        assert np.abs(weight - before[name] - B @ A).max() < ALGEBRA, name
        unlike_exact.append(np.abs(B @ A - exact).max() / np.abs(exact).max())
    assert min(unlike_exact[: len(heads["0"].factors)]) > 0.01  # block 0, of which everybody has an adapter


def weights_of(trainer: SplitTrainer) -> dict[str, Floats]:
    """(d_out, d_in) of every linear layer of the global model."""
    layers = trainer.server.model.segment.linear_modules()
    return {n: layer.weight.detach().double().numpy().T.copy() for n, layer in layers.items()}  # type: ignore[operator]
