"""What a plan chooses where people write auto: the mildest exchange whose round is hardly longer than the shortest."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.evidence.paired import perplexity_changes
from hsplit_flwr.experiments.evidence.store import Store
from hsplit_flwr.experiments.evidence.stored_runs import StoredRuns
from hsplit_flwr.experiments.evidence.summary import mean
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.exchange_choice import CHOICES, CODEC_COST, IDLE, MOST_COST, WORTH, describe
from hsplit_flwr.planning.planner import PlannerConfig, plan
from hsplit_flwr.planning.round_plan import Exchange, RoundPlan
from hsplit_flwr.training.workload import Workload
from tests.helpers.models import tiny_config

SERVER = Budget(10**12, 1e14, 1e9, 1e9)
WIRE = ("activation_codec", "gradient_codec")


@pytest.fixture(scope="module")
def costs() -> ModelCosts:
    return ModelCosts(tiny_config("llama", tied=False), Workload(8, 16, local_steps=6))


def device(link: float, *, flops: float = 1e9, memory: int = 10**9) -> Budget:
    return Budget(memory, flops, link, link, 0.0)


def made(costs: ModelCosts, choose: tuple[str, ...], *devices: Budget, server: Budget = SERVER) -> RoundPlan:
    importance = {matrix.name: 1.0 for matrix in costs.matrices}
    clients = {str(number): budget for number, budget in enumerate(devices)}
    return plan(costs, importance, clients, server, PlannerConfig(deadline_s=math.inf, choose=choose))


def test_a_fast_link_needs_no_coarse_codec(costs: ModelCosts) -> None:
    found = made(costs, WIRE, device(1e9), device(1e9))
    assert found.exchange == Exchange(activation_codec="bf16", gradient_codec="bf16")


def test_where_a_link_decides_the_codec_is_the_coarsest_that_costs_little(costs: ModelCosts) -> None:
    found = made(costs, WIRE, device(1e4), device(1e9))
    coarsest = [codec for codec, cost in CODEC_COST.items() if cost <= MOST_COST][-1]
    assert found.exchange == Exchange(activation_codec=coarsest, gradient_codec=coarsest)
    milder = made(costs.under(replace(costs.workload, activation_codec="bf16", gradient_codec="bf16")), (), device(1e4))
    assert found.round_s < milder.round_s / (1 + WORTH)


def test_what_is_stated_stays(costs: ModelCosts) -> None:
    stated = costs.under(replace(costs.workload, gradient_codec="fp16", micro_batches=2))
    found = made(stated, ("activation_codec",), device(1e4))
    assert found.exchange.gradient_codec == "fp16"
    assert found.exchange.micro_batches == 2
    assert found.exchange.activation_codec in CODEC_COST


def test_parts_overlap_compute_and_transfer(costs: ModelCosts) -> None:
    """A client alone whose head computes about as long as its link carries: parts bring what codecs need not."""
    step = costs.head_base_flops(1) / 1e9
    link = (costs.step_bytes_up + costs.step_bytes_down) / step
    found = made(costs, ("micro_batches",), device(link))
    whole = made(costs, (), device(link))
    assert found.exchange.micro_batches > 1
    assert found.exchange.micro_batches_in_flight == found.exchange.micro_batches
    assert found.exchange.activation_codec == "fp32"
    assert found.round_s < whole.round_s / (1 + WORTH)


def test_parts_let_a_client_in_that_has_no_memory_for_a_whole_batch(costs: ModelCosts) -> None:
    """Gradient accumulation: who takes part comes before how long it takes."""
    parts = costs.under(replace(costs.workload, micro_batches=8, micro_batches_in_flight=1))
    small = (parts.head_base_bytes(1) + costs.head_base_bytes(1)) // 2
    weak = device(1e9, memory=small)
    assert not made(costs, (), weak, device(1e9)).clients.keys() >= {"0"}
    found = made(costs, ("micro_batches",), weak, device(1e9))
    assert found.clients.keys() == {"0", "1"}
    assert found.exchange.micro_batches > 1


def test_further_tail_passes_fill_idle_time_alone(costs: ModelCosts) -> None:
    slow_link, one = device(1e5), made(costs, (), device(1e5))
    found = made(costs, ("tail_passes",), slow_link)
    assert found.exchange.tail_passes == 4
    assert found.round_s <= one.round_s * (1 + IDLE)
    weak = replace(SERVER, flops_per_s=1e9)
    assert made(costs, ("tail_passes",), device(1e9), device(1e9), server=weak).exchange.tail_passes == 1


def test_parts_that_are_optimizer_steps_are_not_for_the_plan_to_choose(costs: ModelCosts) -> None:
    micro = costs.under(replace(costs.workload, micro_steps=True))
    with pytest.raises(ConfigError, match="Expected micro-batches as a number where micro-steps = true, found auto"):
        made(micro, ("micro_batches",), device(1e9))
    assert made(micro, WIRE, device(1e9)).exchange.activation_codec == "bf16"


def test_only_what_can_be_chosen(costs: ModelCosts) -> None:
    with pytest.raises(ConfigError, match="choose"):
        PlannerConfig(choose=("micro_steps",))
    assert set(CHOICES) <= vars(Exchange()).keys()


def test_an_exchange_in_words() -> None:
    assert describe(Exchange()) == "fp32"
    exchange = Exchange(activation_codec="int8", micro_batches=4, micro_batches_in_flight=3, tail_passes=2)
    assert describe(exchange) == "int8 up and fp32 down, 4 parts, 3 in flight, 2 tail passes"


def test_what_codecs_cost_is_what_stored_runs_say() -> None:
    """The largest mean of a setting, against fp32; bf16's is within what seeds differ by."""
    path = Path(__file__).parents[2] / "simulations" / "evidence" / "exchange.csv"
    runs = StoredRuns.of(Store(path).rows())

    def worst(method: str) -> float:
        means = []
        for of_scenario in runs.scenarios().values():
            mine, plain = ([r for r in of_scenario if r.spec.method == m] for m in (method, "hsplitlora_fp32"))
            means.append(mean(perplexity_changes(mine, plain)) / 100)
        return max(means)

    assert worst("hsplitlora") < 0.004
    assert worst("hsplitlora_int8") <= CODEC_COST["int8"] < worst("hsplitlora_int8") + 0.001
    assert worst("hsplitlora_int4") == pytest.approx(0.008, abs=0.0005)
