"""Heads that may train nothing: when a plan takes them, by the clock and by hand, and what a run does with it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from hsplit_flwr.cli import main
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.experiments.engine import run
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.clock import ClientWork, play_round
from hsplit_flwr.planning.costs.model_costs import ModelCosts, Workload
from hsplit_flwr.planning.exchange_choice import WORTH
from hsplit_flwr.planning.planner import PlannerConfig, plan, plan_exact
from hsplit_flwr.planning.round_plan import RoundPlan, progress_per_s
from hsplit_flwr.planning.solver.frozen import frozen
from hsplit_flwr.planning.solver.pace import TAIL_STEPS
from hsplit_flwr.planning.solver.random_problems import equipped, random_problem
from tests.helpers.references import SPEC

CONFIG = LlamaConfig(hidden_size=64, intermediate_size=172, num_hidden_layers=8, num_attention_heads=4, vocab_size=100)
SERVER = Budget(10**12, 1e13, 1e9, 1e9)
ALLOWED = PlannerConfig(ranks=(4, 8), frozen_heads=True)
SLOW, FAST = 1e6, 1e11
"""bytes per second of a link"""


@pytest.fixture(scope="module")
def costs() -> ModelCosts:
    return ModelCosts(CONFIG, Workload(batch_size=4, sequence_length=32, local_steps=10, importance_steps=0))


@pytest.fixture(scope="module")
def importance(costs: ModelCosts) -> dict[str, float]:
    return {matrix.name: 1.0 for matrix in costs.matrices}


def fleet(link: float, count: int = 5, memory: float = 1e12) -> dict[str, Budget]:
    return {str(number): Budget(int(memory), 1e11, link, link, 0.0) for number in range(count)}


def trains(found: RoundPlan) -> bool:
    return any(any(client.ranks.values()) for client in found.clients.values())


@pytest.mark.parametrize("find", [plan, plan_exact])
def test_where_a_link_decides_heads_train_nothing(
    costs: ModelCosts, importance: Mapping[str, float], find: Any
) -> None:
    """By hand: a block of eight is lost to progress, and all that comes down but an answer to each step's frame."""
    clients = fleet(SLOW)
    trained = find(costs, importance, clients, SERVER, replace(ALLOWED, frozen_heads=False))
    found = find(costs, importance, clients, SERVER, ALLOWED)
    assert trains(trained)
    assert not trains(found)
    assert {client.cut for client in found.clients.values()} == {1}
    assert progress_per_s(found) > (1 + WORTH) * progress_per_s(trained)
    assert found.pace == pytest.approx(7 / 8 * len(clients) ** TAIL_STEPS)
    steps = costs.workload.local_steps
    work = [
        ClientWork(
            client=client,
            steps=steps,
            forward_flops=costs.head_flops(1, {}),
            backward_flops=0.0,
            step_bytes_up=costs.step_bytes_up,
            step_bytes_down=costs.answer_bytes_down,
            tail_flops=costs.tail_flops(1, found.tail.ranks),
            download_bytes=0.0,
            upload_bytes=costs.hello_bytes + costs.update_bytes(1, {}),
        )
        for client in clients
    ]
    by_hand = play_round(work, clients, SERVER, workload=costs.workload)
    assert found.round_s == pytest.approx(by_hand.duration_s, rel=0.01)
    assert costs.answer_bytes_down < 0.02 * costs.step_bytes_down


def test_where_nothing_waits_for_a_link_they_train(costs: ModelCosts, importance: Mapping[str, float]) -> None:
    """A server that is busy all the time: a block that trains nothing saves it nothing."""
    slow = replace(SERVER, flops_per_s=1e9)
    assert trains(plan(costs, importance, fleet(FAST), slow, ALLOWED))


def test_a_floor_and_memory_hold_for_them_too(costs: ModelCosts, importance: Mapping[str, float]) -> None:
    found = plan(costs, importance, fleet(SLOW), SERVER, replace(ALLOWED, min_cut=3))
    assert not trains(found)
    assert {client.cut for client in found.clients.values()} == {3}
    weak = {**fleet(SLOW), "weak": replace(fleet(SLOW)["0"], memory_bytes=1000)}
    found = plan(costs, importance, weak, SERVER, ALLOWED)
    assert not trains(found)
    assert list(found.left_out) == ["weak"]


@pytest.mark.parametrize("seed", range(8))
def test_the_problem_of_frozen_heads_has_one_cut_that_is_affordable(seed: int) -> None:
    drawn = random_problem(seed, clients=4, blocks=6, matrices=3)
    memory = np.full(4, drawn.heads.base_bytes[2 + seed % 3])  # of cut 3, 4 or 5
    problem = replace(equipped(drawn, memory=memory, server_memory=1e18), deadline_s=math.inf)
    found = frozen(problem)
    assert found is not None
    (cut,) = np.flatnonzero(np.isfinite(found.heads.base_bytes)) + 1
    assert (problem.heads.base_bytes[cut - 1] <= problem.devices.memory).all()
    assert not found.matrices.importance[problem.matrices.block < cut].any()
    kept = problem.matrices.block >= cut
    assert (found.matrices.importance[kept] == problem.matrices.importance[kept]).all()
    assert frozen(equipped(problem, server_memory=1.0)) is None
    assert frozen(replace(problem, deadline_s=1e-9)) is None


def test_a_stated_worth_leaves_nothing_to_weigh() -> None:
    with pytest.raises(ConfigError, match=r"tail_worth = auto where frozen-heads = true.*found 2.0"):
        PlannerConfig(tail_worth=2.0, frozen_heads=True)


def test_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.save_pretrained(tmp_path)
    profiles = tmp_path / "devices.toml"
    slow = "uplink_mbps = 1\ndownlink_mbps = 1"
    profiles.write_text(f'[server]\ndevice = "workstation"\n\n[[client]]\ndevice = "laptop-gpu"\ncount = 3\n{slow}\n')
    options = ["plan", "--model", str(tmp_path), "--profiles", str(profiles), "--batch-size", "4"]
    options += ["--sequence-length", "32"]
    assert main(options) == 0
    assert "7/7" in capsys.readouterr().out
    assert main([*options, "--frozen-heads"]) == 0
    said = capsys.readouterr().out
    assert "0/7" in said
    assert "heads train nothing" in said


@pytest.mark.slow
def test_a_planned_run_equals_one_that_is_told_to_freeze() -> None:
    """Round by round to the bit: the tail's training, tokens, bytes and the clock."""
    spec = replace(SPEC, setting="phones")
    planned, told = (run(replace(spec, method=name)) for name in ("hsplitlora_auto_heads", "frozen_head_pipelined"))
    assert Task.of(spec).min_cut == 1
    assert [e.perplexity for e in planned.evaluations] == [e.perplexity for e in told.evaluations]
    assert [e.tokens for e in planned.evaluations] == [e.tokens for e in told.evaluations]
    assert [e.bytes_up for e in planned.evaluations] == [e.bytes_up for e in told.evaluations]
    assert planned.evaluations[-1].perplexity < planned.evaluations[0].perplexity
