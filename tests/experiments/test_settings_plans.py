"""What the planner chooses in the settings of the experiments, and by how much it is ahead: stories, and the table."""

from types import ModuleType

import pytest

from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.settings import SETTINGS
from tests.experiments.test_shown_tables import rows, section
from tests.helpers.benchmarks import benchmark

AS_GOOD = 0.995
"""of a hand search's progress per second: it has 1 % more memory"""
COARSE = {"LLaMA-2-7B": (1, 4, 8), "embedded": (1, 2, 4)}
each_model = pytest.mark.parametrize("model", COARSE)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return benchmark("settings_plans", monkeypatch)


@each_model
@pytest.mark.parametrize("setting", ["small_server", "twenty_clients", "phones"])
def test_one_block_each_where_a_hand_search_finds_nothing_better(plans: ModuleType, setting: str, model: str) -> None:
    """Deep, unequal heads were expected where the server is small or clients are many. By our model of progress they do
    not pay: each block that leaves the tail costs steps, and no combination of a few cuts makes up for it."""
    chosen, method = SETTINGS[setting], METHODS["hsplitlora_all"]
    costs = plans.costs_of(model, "hsplitlora_all")
    found = plans.ours(chosen, costs, method)
    shallow, middle, deep = COARSE[model]
    many = len(chosen.clients) > 5  # played one by one, that takes its time
    by_hand = plans.hand_searched(chosen, costs, method, (shallow, deep) if many else (shallow, middle, deep))
    assert set(found.cuts) == {1}
    assert found.per_second >= AS_GOOD * by_hand.per_second


@each_model
def test_a_small_server_is_the_bottleneck_and_still_trains_what_it_can(plans: ModuleType, model: str) -> None:
    """Deeper heads make a shorter round there, as the issue says, and less progress in it."""
    costs = plans.costs_of(model, "splitlora_16_pipelined")
    small = plans.Uniform(SETTINGS["small_server"], costs)
    large = plans.Uniform(SETTINGS["heterogeneous"], costs)
    assert small.at(1).round_s > 1.5 * large.at(1).round_s
    shortest = min(map(small.at, small.cuts), key=lambda pace: pace.round_s)
    assert shortest.progress <= small.at(1).progress
    assert small.best.cuts[0] == 1


@each_model
def test_a_privacy_floor_is_taken_and_no_more(plans: ModuleType, model: str) -> None:
    chosen, method = SETTINGS["privacy_floor"], METHODS["hsplitlora_all"]
    costs = plans.costs_of(model, "hsplitlora_all")
    found = plans.ours(chosen, costs, method)
    assert set(found.cuts) == {chosen.min_cut(costs.num_blocks)} == {costs.num_blocks // 4}
    assert plans.Uniform(chosen, costs).cuts[0] == costs.num_blocks // 4


@each_model
def test_ranks_follow_importance_where_memory_is_tight(plans: ModuleType, model: str) -> None:
    """Everybody has the floor's cut, and its ranks by memory; the most important matrices keep the largest rank."""
    chosen, costs = SETTINGS["tight_memory"], plans.costs_of(model, "hsplitlora")
    block = {matrix.name: matrix.block for matrix in costs.matrices}
    important = {name: 30.0 if "attn.c_proj" in name or "o_proj" in name else 1.0 for name in block}
    found = plans.planned(chosen, costs, METHODS["hsplitlora"], important)
    sides = {matrix.name: matrix.sides for matrix in costs.matrices}
    means = []
    for client in chosen.clients:
        ranks = found.clients[client].ranks
        means.append(sum(sides[n] * rank for n, rank in ranks.items()) / sum(sides[n] for n in ranks))
        assert found.clients[client].cut == costs.num_blocks // 4
        assert min(ranks[name] for name in ranks if important[name] > 1) >= 8
        assert max(ranks[name] for name in ranks if important[name] > 1) == 16
    assert means == sorted(means)
    assert means[0] < 4 < 15.9 < means[-1]  # what its device was made to hold: 2 and 16
    assert min(found.clients["0"].ranks.values()) < 2


@each_model
def test_ranks_bind_only_as_long_as_whole_batches_travel(plans: ModuleType, model: str) -> None:
    """Parts keep fewer activations, and what they leave is more than all ranks take."""
    found = plans.ours(SETTINGS["tight_memory"], plans.costs_of(model, "hsplitlora_all"), METHODS["hsplitlora_all"])
    assert {rank for of_head in found.ranks.values() for rank in of_head} == {16}


@pytest.mark.parametrize("wire", ["bf16", "int8, parts"])
@pytest.mark.parametrize("setting", ["small_server", "twenty_clients", "privacy_floor", "tight_memory", "phones"])
def test_the_table_is_what_the_planner_says(plans: ModuleType, setting: str, wire: str) -> None:
    """Made by ``python simulations/benchmarks/settings_plans.py --markdown``; the embedded model's rows."""
    shown = [" ".join(line.split()) for line in section("settings plans").splitlines()]
    expected = plans.row(setting, "embedded", wire)
    assert f"| {' | '.join(expected)} |" in shown
    assert rows(section("settings plans"))
