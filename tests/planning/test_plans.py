"""The plans in force: who takes part, what is refused at the start, and that a restored planner decides the same."""

import json
import logging
import math
from dataclasses import replace
from typing import Any

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.planning.adaptive_plans import AdaptivePlans
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.configured_plans import ConfiguredPlans
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.plans import PlansInForce, plans_in_force
from hsplit_flwr.planning.replanning import AdaptivePlanning, ReplanConfig
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload
from tests.helpers.models import tiny_config

TRAINING = TrainingConfig(local_steps=3)
WORKLOAD = Workload.of(TRAINING, batch_size=2, sequence_length=10)
SERVER = Budget(10**10, 1e12, 1e9, 1e9)
LORA = LoraSpec(2)
PLANNER = PlannerConfig(ranks=(1, 2, 4), tail_rank=2, tail_worth=0.0, deadline_s=math.inf)
PAIR = {"0": ClientPlan(1, LORA), "1": ClientPlan(3, LORA)}


@pytest.fixture(scope="module")
def costs() -> ModelCosts:
    return ModelCosts(tiny_config("llama", True), WORKLOAD)


@pytest.fixture(scope="module")
def modules(costs: ModelCosts) -> list[str]:
    return [matrix.name for matrix in costs.matrices]


def planning(costs: ModelCosts, planner: PlannerConfig = PLANNER, **options: Any) -> AdaptivePlanning:
    return AdaptivePlanning(costs, SERVER, planner, ReplanConfig(drift_threshold=0.1), **options)


def budget(costs: ModelCosts, cut: int, rank: int = 4) -> Budget:
    ranks = {m.name: rank for m in costs.matrices if m.block < cut}
    return Budget(costs.head_memory(cut, ranks).total_bytes, 1e9, 1e7, 1e7, 0.001)


# --- configured ---


def test_one_plan_is_everybodys(modules: list[str]) -> None:
    plans = plans_in_force(ClientPlan(2, LORA), None, None, TRAINING, modules)
    assert plans.settle(["0", "stranger"], {}) is None
    assert plans.takes_part("stranger")
    assert plans.plan("stranger") == ClientPlan(2, LORA)
    assert (plans.deepest_cut, plans.tail_lora, plans.workload) == (2, LoraSpec(), None)
    assert isinstance(plans, ConfiguredPlans)
    assert plans.adaptive is None
    assert not plans.asks_budgets


def test_a_client_without_a_plan_is_left_out_by_name_and_once(
    modules: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It announced another id than the plans are for: the run went on for nobody."""
    plans = plans_in_force(PAIR, LORA, WORKLOAD, TRAINING, modules)
    with caplog.at_level(logging.WARNING, "hsplit_flwr"):
        for _ in range(3):
            assert plans.settle(["0", "1", "17"], {}) is None
    assert [plans.takes_part(client) for client in ("0", "1", "17")] == [True, True, False]
    (record,) = caplog.records
    assert record.message.startswith("client 17 is left out: planned are ['0', '1'].")
    with pytest.raises(ConfigError, match=r"among the planned \['0', '1'\], found '17'"):
        plans.plan("17")
    with caplog.at_level(logging.WARNING, "hsplit_flwr"):
        plans.settle(["0", "17", "18"], {})
    assert [record.message.split()[1] for record in caplog.records] == ["17", "18"]


def test_nobody_has_a_plan(modules: list[str]) -> None:
    plans = plans_in_force(PAIR, LORA, None, TRAINING, modules)
    with pytest.raises(ConfigError, match=r"among the planned \['0', '1'\], found \['7', '12'\]\. Add plans"):
        plans.settle(["12", "7"], {})


@pytest.mark.parametrize("cut", [4, 9])
def test_a_cut_beyond_the_model_is_refused(modules: list[str], cut: int) -> None:
    for plans in (ClientPlan(cut, LORA), {**PAIR, "2": ClientPlan(cut, LORA)}):
        with pytest.raises(ConfigError, match=rf"Expected a cut in 1\.\.3 for this model of 4 blocks, found {cut}"):
            plans_in_force(plans, None, None, TRAINING, modules)


BAD_SPECS = {
    "rank": (LoraSpec(rank_pattern={"mlp.c_porj": 8}), r"rank_pattern to match .* found 'mlp\.c_porj'"),
    "alpha": (LoraSpec(alpha_pattern={r"layers\.9\..*": 8.0}), r"alpha_pattern to match .* found 'layers\\\\\.9"),
    "target": (LoraSpec(target_modules=("nosuch",)), r"target_modules among .*q_proj.*, found \['nosuch'\]"),
}


@pytest.mark.parametrize(("spec", "message"), BAD_SPECS.values(), ids=BAD_SPECS)
def test_what_matches_nothing_is_refused_at_the_start(modules: list[str], spec: LoraSpec, message: str) -> None:
    """A misspelt pattern trained with the other ranks, and nobody heard of it."""
    with pytest.raises(ConfigError, match=message):
        plans_in_force({**PAIR, "2": ClientPlan(1, spec)}, None, None, TRAINING, modules)
    with pytest.raises(ConfigError, match=message):
        plans_in_force(PAIR, spec, None, TRAINING, modules)


def test_a_pattern_for_a_late_block_is_right_for_every_head(modules: list[str]) -> None:
    late = LoraSpec(2, rank_pattern={r"layers\.3\.mlp\.up_proj": 4})
    assert plans_in_force(ClientPlan(1, late), late, None, TRAINING, modules).plan("0").lora == late


def test_costs_of_another_training_are_refused(costs: ModelCosts, modules: list[str]) -> None:
    other = replace(TRAINING, importance_rows=1)
    for plans, workload in ((planning(costs), None), (PAIR, WORKLOAD)):
        with pytest.raises(ConfigError, match="Expected a workload of measured_rows=1 as in training, found 2"):
            plans_in_force(plans, None, workload, other, modules)


def test_configured_plans_go_on_with_the_importance_of_before(modules: list[str]) -> None:
    plans, restored = (plans_in_force(PAIR, LORA, None, TRAINING, modules) for _ in range(2))
    measure(plans, modules, 1.0)
    restored.load_state(json.loads(json.dumps(plans.state(), allow_nan=False)))
    measure(plans, modules, 5.0)
    measure(restored, modules, 5.0)
    assert restored.state() == plans.state()
    assert restored.history.profile == plans.history.profile != {}
    with pytest.raises(ConfigError, match=r"Expected HistoryRecord of a saved state to have the fields"):
        restored.load_state({"budgets": {}})


# --- adaptive ---


def measure(plans: PlansInForce, modules: list[str], first: float) -> None:
    """A round in which two clients of unequal shares measured; a third one measured the head alone."""
    whole = {name: first if index == 0 else 1 / (3 + index) for index, name in enumerate(modules)}
    head = {name: value for name, value in whole.items() if ".0." in name}
    tail = {name: value for name, value in whole.items() if ".0." not in name}
    other = {name: value * 0.7 for name, value in head.items()}
    plans.observe_importance(
        {"0": head, "1": other, "2": head}, {"0": tail, "1": tail}, {"0": 0.31, "1": 0.29, "2": 0.4}, modules
    )


def adaptive(costs: ModelCosts, modules: list[str]) -> PlansInForce:
    plans = plans_in_force(planning(costs), None, None, TRAINING, modules)
    assert isinstance(plans, AdaptivePlans)
    return plans


def test_heads_and_tail_follow_the_plan(costs: ModelCosts, modules: list[str]) -> None:
    plans = adaptive(costs, modules)
    assert plans.asks_budgets
    assert plans.adaptive is not None
    assert (plans.deepest_cut, plans.takes_part("0")) == (1, False)
    decision = plans.settle(["0", "1"], {"0": budget(costs, 1), "1": budget(costs, 3)})
    assert decision is not None
    assert decision.reasons == ("first plan",)
    assert (plans.plan("0").cut, plans.plan("1").cut, plans.deepest_cut) == (1, 3, 3)
    for name, rank in decision.plan.clients["1"].ranks.items():
        assert plans.plan("1").lora.rank(name) == rank
    assert {name: plans.tail_lora.rank(name) for name in decision.plan.tail.ranks} == decision.plan.tail.ranks
    assert not plans.takes_part("2")
    with pytest.raises(ConfigError, match=r"the plan in force is for \['0', '1'\], found '2'"):
        plans.plan("2")


def test_nobody_can_take_part(costs: ModelCosts, modules: list[str]) -> None:
    tiny = Budget(1000, 1e9, 1e7, 1e7)
    with pytest.raises(ConfigError, match="can take part, found none: client 0: memory: expected at least"):
        adaptive(costs, modules).settle(["0"], {"0": tiny})


def test_a_restored_planner_decides_the_same_bit_by_bit(costs: ModelCosts, modules: list[str]) -> None:
    """Interrupted after round 2, it makes the plans of an uninterrupted run, for the same reasons."""
    tight, wide = budget(costs, 2, rank=1), budget(costs, 3)
    script: list[tuple[float, list[str], dict[str, Budget]]] = [
        (0.9, ["0", "1"], {"0": tight, "1": wide}),
        (1.1, ["0", "1"], {}),
        (7.3, ["0", "1"], {}),
        (7.3, ["0", "1", "2"], {"2": tight}),
        (7.1, ["1", "2"], {"1": budget(costs, 1)}),
    ]

    def play(plans: PlansInForce, first: int, last: int) -> list[Any]:
        found: list[Any] = []
        for value, known, budgets in script[first:last]:
            found.append(plans.settle(known, budgets))
            found.append({client: plans.plan(client) for client in known})
            found.append(plans.tail_lora)
            measure(plans, modules, value)
        return found

    whole = adaptive(costs, modules)
    expected = play(whole, 0, len(script))
    for stop in range(len(script) + 1):
        begun, resumed = adaptive(costs, modules), adaptive(costs, modules)
        before = play(begun, 0, stop)
        resumed.load_state(json.loads(json.dumps(begun.state(), allow_nan=False)))
        assert resumed.deepest_cut == begun.deepest_cut
        assert before + play(resumed, stop, len(script)) == expected
        assert resumed.state() == whole.state()
    assert sum(bool(decision.reasons) for decision in expected[::3]) >= 4


def test_a_state_of_another_model_or_kind_is_refused(costs: ModelCosts, modules: list[str]) -> None:
    plans, other = adaptive(costs, modules), adaptive(ModelCosts(tiny_config("gpt2", True), WORKLOAD), modules)
    plans.settle(["0"], {"0": budget(costs, 2)})
    with pytest.raises(ConfigError, match=r"for this model, found 28 modules .*'model\.layers\.0\..*Resume with"):
        other.load_state(plans.state())
    state = plans.state()
    with pytest.raises(ConfigError, match="Expected PlanningRecord of a saved state to have the fields"):
        plans.load_state({"history": state["history"]})
    with pytest.raises(ConfigError, match=r"Expected PlanningRecord\.budgets\['0'\] of a saved state"):
        plans.load_state({**state, "budgets": {"0": {"memory": 5}}})
    with pytest.raises(ConfigError, match=r"Expected PlanningRecord\.in_force of a saved state"):
        plans.load_state({**state, "in_force": {"clients": {"0": 5}}})
    assert plans.state() == state


def test_only_target_modules_get_adapters(costs: ModelCosts, modules: list[str]) -> None:
    """They were ignored wherever plans are made by the planner."""
    planner = replace(PLANNER, target_modules=("q_proj", "v_proj"))
    plans = plans_in_force(planning(costs, planner), None, None, TRAINING, modules)
    plans.settle(["0", "1"], {"0": budget(costs, 1), "1": budget(costs, 3)})
    for lora in (plans.tail_lora, plans.plan("0").lora, plans.plan("1").lora):
        adapted = {name for name in modules if lora.rank(name)}
        assert {name.rsplit(".", 1)[1] for name in adapted} == {"q_proj", "v_proj"}


def test_a_target_that_matches_nothing_is_refused_before_anything_starts(costs: ModelCosts) -> None:
    with pytest.raises(ConfigError, match=r"Expected target_modules among .*, found \['nosuch'\]"):
        planning(costs, replace(PLANNER, target_modules="nosuch"))
