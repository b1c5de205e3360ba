"""What the planner takes for progress: by hand, by the stored runs, and what plans make of it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.evidence.store import Store
from hsplit_flwr.experiments.experiment_file import read_experiment
from hsplit_flwr.experiments.main import SETTING_NAMES
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.records import Evaluation, RunSpec
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts, Workload
from hsplit_flwr.planning.paced_plans import paced_plan
from hsplit_flwr.planning.planner import PlannerConfig, plan, plan_exact, plan_problem
from hsplit_flwr.planning.round_plan import RoundPlan, progress_per_s
from hsplit_flwr.planning.solver.depths import depths, within
from hsplit_flwr.planning.solver.greedy import solve
from hsplit_flwr.planning.solver.objective import gain
from hsplit_flwr.planning.solver.pace import (
    FIT_ERROR,
    RANK_WORTH,
    TAIL_STEPS,
    WORST_FIT_ERROR,
    pace,
    pace_of_cuts,
)
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.random_problems import equipped, random_problem
from hsplit_flwr.planning.solver.solution import Solution
from tests.helpers.benchmarks import benchmark

CONFIG = LlamaConfig(hidden_size=64, intermediate_size=172, num_hidden_layers=8, num_attention_heads=4, vocab_size=100)
EVIDENCE = Path(__file__).parents[2] / "simulations" / "evidence"
PACE_FILES = ("pace", "pace_short", "pace_twenty")
SERVER = Budget(10**12, 1e13, 1e9, 1e9)


@pytest.fixture(scope="module")
def costs() -> ModelCosts:
    return ModelCosts(CONFIG, Workload(batch_size=4, sequence_length=32, local_steps=10))


@pytest.fixture(scope="module")
def importance(costs: ModelCosts) -> dict[str, float]:
    return {matrix.name: 1.0 + matrix.block for matrix in costs.matrices}


def device(memory: float = 1e12, flops: float = 1e11, link: float = 1e7) -> Budget:
    return Budget(int(memory), flops, link, link, 0.01)


def fleet(count: int = 5, **figures: float) -> dict[str, Budget]:
    return {str(number): device(**figures) for number in range(count)}


def cuts(found: RoundPlan) -> list[int]:
    return [client.cut for client in found.clients.values()]


# ---------------------------------------------------------------------------------------------- the model of progress


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("joint", [False, True])
def test_pace_matrix_by_matrix(seed: int, joint: bool) -> None:
    problem = random_problem(seed, clients=4, blocks=6, matrices=3)
    problem = replace(problem, workload=replace(problem.workload, joint_steps=joint))
    rng = np.random.default_rng(seed)
    solution_cuts = rng.integers(1, 6, 4)
    held = problem.matrices.block < solution_cuts[:, None]
    levels = np.where(held, rng.integers(0, len(problem.levels), held.shape), 0).astype(np.int8)
    expected, top = 0.0, gain(max(problem.ranks))
    for m, weight in enumerate(problem.matrices.importance):
        behind = sum(int(cut) <= problem.matrices.block[m] for cut in solution_cuts)
        ranks = [problem.levels[levels[i, m]] for i in range(4)]
        heads = sum((gain(rank) / top) ** RANK_WORTH for rank in ranks) / 4
        steps = behind / 4 * (1.0 if joint else behind**TAIL_STEPS)
        expected += weight * (heads + steps * (gain(problem.tail.ranks[m]) / top) ** RANK_WORTH)
    assert pace(problem, Solution(solution_cuts, levels)) == pytest.approx(expected)
    full = np.where(held, len(problem.ranks), 0).astype(np.int8)
    assert pace_of_cuts(problem, solution_cuts) == pytest.approx(pace(problem, Solution(solution_cuts, full)))


def test_its_constants_are_those_of_the_stored_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = benchmark("pace", monkeypatch)
    (*_, tail_steps, rank_worth), off = fitted.fit(list(fitted.points()))
    assert tail_steps == pytest.approx(TAIL_STEPS, abs=0.005)
    assert rank_worth == pytest.approx(RANK_WORTH, abs=0.005)
    assert float(np.sqrt((off**2).mean())) == pytest.approx(FIT_ERROR, abs=0.0005)
    assert abs(off).max() == pytest.approx(WORST_FIT_ERROR, abs=0.0005)


def test_the_runs_are_enough_to_tell_the_constants_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of runs that the model of progress holds for, the fit finds the constants that they were made with."""
    fitted = benchmark("pace", monkeypatch)
    made = (0.9, 0.05, 0.8, 0.6, 0.3)
    files = {name: read_experiment(EVIDENCE / f"{name}.toml", METHODS, SETTING_NAMES) for name in fitted.STORES}
    for name, specs in files.items():
        store = Store(tmp_path / f"{name}.csv")
        for spec in specs:
            clients = 20 if spec.setting == "twenty_clients" else 5
            point = fitted.Point(spec.cut, spec.rank, spec.rounds * spec.local_steps, clients, 0.0)
            perplexity = math.exp(fitted.loss(point, *made))
            before = Evaluation.untrained(400.0)
            store.append(spec, [before, replace(before, round=1, clients=clients, perplexity=perplexity)])
    constants, off = fitted.fit(list(fitted.points(tmp_path)))
    assert constants == pytest.approx(made, rel=1e-3)
    assert abs(off).max() < 1e-6


def test_the_runs_of_the_fit_are_no_tables() -> None:
    """Scored on the validation half, of seeds that no table of their data has, and no more than 40.

    A seed draws devices' texts and adapters' start, so what the fit saw is a seed together with its data: seed 20
    on restaurants says nothing of seed 20 in the new language, which ten-seed tables there have.
    """
    files = [read_experiment(EVIDENCE / f"{name}.toml", METHODS, SETTING_NAMES) for name in PACE_FILES]
    specs = [spec for found in files for spec in found]
    assert len(specs) <= 40
    assert {spec.held_out for spec in specs} == {"validation"}
    seen = {(spec.data, spec.seed) for spec in specs}
    restaurants = RunSpec.data
    assert {data for data, _ in seen} == {restaurants}
    others = {
        (spec.data, spec.seed)
        for path in EVIDENCE.glob("*.toml")
        if path.stem not in PACE_FILES
        for spec in read_experiment(path, METHODS, SETTING_NAMES)
    }
    assert not seen & (others | {(restaurants, seed) for seed in range(5)})


# ---------------------------------------------------------------------------------------------- what plans make of it


def test_a_strong_server_trains_what_it_can(costs: ModelCosts, importance: Mapping[str, float]) -> None:
    assert cuts(plan(costs, importance, fleet(), SERVER, PlannerConfig())) == [1] * 5


def test_a_slow_server_is_relieved(costs: ModelCosts, importance: Mapping[str, float]) -> None:
    """Devices that are ten times as fast as the server: as shallow as ever with a stated worth, deeper by the clock."""
    server, clients = replace(SERVER, flops_per_s=1e9), fleet(flops=1e10, link=1e9)
    found = plan(costs, importance, clients, server, PlannerConfig())
    shallow = plan(costs, importance, clients, server, PlannerConfig(tail_worth=2.0))
    assert cuts(shallow) == [1] * 5
    assert min(cuts(found)) > 1
    assert progress_per_s(found) > 1.2 * progress_per_s(shallow)
    assert found.pace < shallow.pace  # it learns less in a round, which is shorter


def test_a_server_too_small_for_all_blocks_takes_what_there_is_room_for(importance: Mapping[str, float]) -> None:
    joint = ModelCosts(CONFIG, Workload(batch_size=4, sequence_length=32, local_steps=10, joint_steps=True))
    whole = plan(joint, importance, fleet(), SERVER, PlannerConfig(tail_worth=2.0)).tail.memory_bytes
    found = plan(joint, importance, fleet(), replace(SERVER, memory_bytes=int(whole * 0.8)), PlannerConfig())
    assert len(found.clients) == 5
    assert sum(cuts(found)) > 5
    assert found.tail.memory_bytes <= whole * 0.8


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("tight", ["memory", "deadline", "both", "none"])
def test_never_less_progress_a_second_than_where_the_tail_takes_what_it_can(seed: int, tight: Any) -> None:
    """Nobody more is left out, and memory of devices and server is enough."""
    problem = random_problem(seed, clients=4, blocks=6, matrices=3, tight=tight)
    stated_s = problem.deadline_s

    def make(changed: Problem) -> RoundPlan:
        return plan_problem(changed, solve)

    shallow, found = make(problem), paced_plan(problem, stated_s, make)
    assert found.clients.keys() == shallow.clients.keys()
    assert found.left_out == shallow.left_out
    assert progress_per_s(found) >= progress_per_s(shallow)
    assert found.tail.memory_bytes <= problem.devices.server_memory * (1 + 1e-8)
    for client in found.clients.values():
        assert client.memory_bytes <= client.memory_budget_bytes


@pytest.mark.parametrize("share", [0.6, 1.0, 1.5, 3.0])
def test_a_stated_deadline_is_kept(costs: ModelCosts, importance: Mapping[str, float], share: float) -> None:
    """By a deep plan, too, and with as many clients as a shallow one has in that time."""
    server, clients = replace(SERVER, flops_per_s=1e9), fleet(flops=1e10, link=1e9)
    deadline_s = share * plan(costs, importance, clients, server, PlannerConfig()).round_s
    shallow, found = (
        plan(costs, importance, clients, server, PlannerConfig(deadline_s=deadline_s, tail_worth=worth))
        for worth in (2.0, None)
    )
    assert found.round_s <= deadline_s
    assert len(found.clients) >= len(shallow.clients)
    assert share < 1.5 or len(found.clients) == 5


def test_many_clients_in_seconds(costs: ModelCosts, importance: Mapping[str, float]) -> None:
    found = plan(costs, importance, fleet(1000), replace(SERVER, flops_per_s=1e15), PlannerConfig())
    assert len(found.clients) == 1000


@pytest.mark.parametrize("seed", range(8))
def test_depths_are_what_the_server_has_room_for(seed: int) -> None:
    problem = random_problem(seed, clients=4, blocks=6, matrices=3)
    all_found = depths(problem, 99)
    assert [depth.deepest for depth in depths(problem, 2)] == [depth.deepest for depth in all_found[:2]]
    assert {depth.deepest for depth in all_found} <= set(range(1, 6))
    little = equipped(problem, server_memory=problem.server_bytes(4, 4) * (1 + 1e-9))
    assert {depth.deepest for depth in depths(little, 99)} <= {5}  # a block each at the tail
    assert depths(equipped(problem, server_memory=1.0), 99) == []


# ---------------------------------------------------------------------------------------------- a floor for the cut


@pytest.mark.parametrize("find", [plan, plan_exact])
@pytest.mark.parametrize("worth", [None, 0.0, 2.0])
def test_no_head_holds_less_than_the_floor(
    costs: ModelCosts, importance: Mapping[str, float], find: Any, worth: float | None
) -> None:
    config = PlannerConfig(ranks=(4,), min_cut=3, tail_worth=worth)
    found = find(costs, importance, fleet(2), SERVER, config)
    assert min(cuts(found)) >= 3
    if worth == 2.0:
        assert cuts(found) == [3, 3]


def test_who_cannot_hold_the_floor_is_left_out(costs: ModelCosts, importance: Mapping[str, float]) -> None:
    clients = {"strong": device(), "weak": device(memory=costs.head_base_bytes(2))}
    assert len(plan(costs, importance, clients, SERVER, PlannerConfig(min_cut=2)).clients) == 2
    found = plan(costs, importance, clients, SERVER, PlannerConfig(min_cut=3))
    assert list(found.clients) == ["strong"]
    assert f"{costs.head_base_bytes(3):,.0f} bytes for the smallest head (cut 3" in found.left_out["weak"]


def test_a_rounds_transfers_count_as_often_as_stated(costs: ModelCosts, importance: Mapping[str, float]) -> None:
    """Of a model that stands for a larger one; all other seconds stay."""
    clients, config = fleet(1, link=1e5), PlannerConfig(ranks=(4,), tail_worth=2.0, deadline_s=math.inf)
    once, often = (
        plan(costs, importance, clients, SERVER, replace(config, round_weight=weight)) for weight in (1.0, 10.0)
    )
    (head,) = once.clients.values()
    assert cuts(once) == cuts(often) == [1]
    up = costs.update_bytes(1, head.ranks) + costs.hello_bytes
    stacked = {name: 4 + once.tail.ranks.get(name, 0) for name in head.ranks}
    down = costs.delta_bytes(1, PlannerConfig().update, stacked, 4)
    assert often.round_s - once.round_s == pytest.approx(9 * (up + down) / 1e5, rel=1e-3)
    assert often.step_s == pytest.approx(once.step_s)
    with pytest.raises(ConfigError, match="round_weight"):
        PlannerConfig(round_weight=0.0)


def test_a_floor_that_is_none(costs: ModelCosts, importance: Mapping[str, float]) -> None:
    with pytest.raises(ConfigError, match="min_cut"):
        PlannerConfig(min_cut=0)
    with pytest.raises(ConfigError, match=r"min-cut\) <= 7, the deepest cut of 8 blocks, found 8"):
        plan(costs, importance, fleet(), SERVER, PlannerConfig(min_cut=8))


def test_a_problem_within_cuts() -> None:
    problem = within(random_problem(1, clients=2, blocks=6, matrices=2), 2, 4)
    assert np.isinf(problem.heads.base_bytes).tolist() == [True, False, False, False, True]
    assert all(2 <= cut <= 4 for cut in cuts(plan_problem(problem, solve)))
    assert math.isfinite(plan_problem(problem, solve).round_s)
