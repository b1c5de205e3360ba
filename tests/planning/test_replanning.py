"""Plans that follow budgets and importance: when they change, why, and that nothing learnt is lost by it."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange.grpc_transport import connect
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.flower.messages import TASK_KEY
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.budgets.probe import measure_link
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.exchange_choice import CHOICES
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.replanning import AdaptivePlanning, ReplanConfig
from hsplit_flwr.planning.report import plan_table
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload
from tests.helpers.federation import (
    EMPTY,
    Node,
    build_one_at_a_time,
    manager_of,
    play_round,
    random_batches,
    weights_of,
)
from tests.helpers.models import tiny_model

pytestmark = pytest.mark.timeout(180)

SAME = 1e-6
"""relative difference of perplexities that only a plan lies between"""
STEPS = 3
CLIENTS = ("0", "1", "2")
TRAINING = TrainingConfig(rounds=3, local_steps=STEPS, learning_rate=0.02, warmup_steps=2, importance_rows=0)
WORKLOAD = Workload.of(TRAINING, batch_size=2, sequence_length=10)
SERVER = Budget(10**10, 1e12, 1e9, 1e9)
CONFIG = PlannerConfig(ranks=(1, 2, 4), tail_rank=2, tail_worth=0.0, deadline_s=math.inf)
DATA = {c: random_batches(STEPS, seed=int(c)) for c in CLIENTS}
EVALUATION = random_batches(3, seed=9)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def costs(model: Path) -> ModelCosts:
    return ModelCosts(ModelFiles.resolve(str(model)).config, WORKLOAD)


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters", "_model_costs")


def budget(costs: ModelCosts, cut: int, rank: int = 4) -> Budget:
    """Just what a head of `cut` blocks with adapters of `rank` takes, on a slow device."""
    ranks = {m.name: rank for m in costs.matrices if m.block < cut}
    return Budget(costs.head_memory(cut, ranks).total_bytes, 1e9, 1e7, 1e7, 0.001)


def budgets(costs: ModelCosts) -> dict[str, Budget]:
    return {"0": budget(costs, 1), "1": budget(costs, 2), "2": budget(costs, 3)}


def planning(costs: ModelCosts, drift_threshold: float = 1.0, **options: Any) -> AdaptivePlanning:
    return AdaptivePlanning(costs, SERVER, CONFIG, ReplanConfig(drift_threshold=drift_threshold), **options)


def make_strategy(
    model: Path, plans: AdaptivePlanning, gate_s: float = 30.0, training: TrainingConfig = TRAINING, **config: Any
) -> HSplitLoRAStrategy:
    return HSplitLoRAStrategy(
        GlobalModel(ModelFiles.resolve(str(model))),
        plans,
        training,
        config=StrategyConfig(wait_for_nodes_s=10.0, **config),
        limits=BarrierLimits(start_gate_s=gate_s, straggler_limit_s=20.0, step_limit_s=40.0),
        eval_batches=EVALUATION,
    )


def node(model: Path, client: str, means: Callable[[str, int], Budget] | None, **node_config: Any) -> Node:
    data = ClientData(train=DATA[client], evaluate=EVALUATION)
    return Node(f"{100 + int(client)}", [client], model, lambda _: data, budgets=means, node_config=node_config)


@pytest.fixture
def close() -> Iterator[list[HSplitLoRAStrategy]]:
    made: list[HSplitLoRAStrategy] = []
    yield made
    for strategy in made:
        strategy.close()


# --- when a plan changes ---


def observed(plans: AdaptivePlanning, means: Mapping[str, Budget]) -> AdaptivePlanning:
    for client, mean in means.items():
        plans.observe_budget(client, mean)
    return plans


def test_the_first_plan_follows_the_budgets(costs: ModelCosts) -> None:
    decision = observed(planning(costs), budgets(costs)).decide(CLIENTS)
    assert decision.reasons == ("first plan",)
    assert [decision.plan.clients[c].cut for c in CLIENTS] == [1, 2, 3]
    for client, planned in decision.plan.clients.items():
        assert planned.memory_bytes <= budgets(costs)[client].memory_bytes
    assert {int(name.split(".")[2]) for name in decision.plan.tail.ranks} == {1, 2, 3}


def test_a_plan_stays_in_force_while_nothing_changes(costs: ModelCosts) -> None:
    plans = observed(planning(costs), budgets(costs))
    first = plans.decide(CLIENTS)
    again = plans.decide(reversed(CLIENTS))
    assert again.reasons == ()
    assert again.plan is first.plan


def test_forced_drift_triggers_exactly_one_new_plan(costs: ModelCosts) -> None:
    plans = observed(planning(costs, drift_threshold=0.2), budgets(costs))
    plans.decide(CLIENTS)
    names = [m.name for m in costs.matrices]
    plans.observe_importance({name: 100.0 if name == names[0] else 1.0 for name in names})
    moved = plans.decide(CLIENTS)
    assert moved.drift > 0.2
    assert len(moved.reasons) == 1
    assert f"importance drifted by {moved.drift:.3f} (threshold 0.2)" in moved.reasons[0]
    for _ in range(3):
        plans.observe_importance({name: 100.0 if name == names[0] else 1.0 for name in names})
        after = plans.decide(CLIENTS)
        assert (after.reasons, after.plan) == ((), moved.plan)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"memory_bytes": 0.7}, "client 2: its head needs"),
        ({"memory_bytes": 2.0}, r"client 2: memory_bytes [\d,]+"),
        ({"flops_per_s": 0.5}, r"client 2: flops_per_s 1e\+09 -> 5e\+08"),
        ({"uplink_bytes_per_s": 3.0}, r"client 2: uplink_bytes_per_s"),
        ({"latency_s": 9.0}, r"client 2: latency_s 0\.001 -> 0\.009"),
        ({"memory_bytes": 1.04}, None),
        ({"flops_per_s": 0.97}, None),
    ],
)
def test_a_changed_budget_is_a_reason_beyond_the_tolerance(
    costs: ModelCosts, change: dict[str, float], reason: str | None
) -> None:
    means = budgets(costs)
    plans = observed(planning(costs), means)
    plans.decide(CLIENTS)
    figures = {key: type(getattr(means["2"], key))(getattr(means["2"], key) * factor) for key, factor in change.items()}
    plans.observe_budget("2", replace(means["2"], **figures))
    reasons = plans.decide(CLIENTS).reasons
    if reason is None:
        assert reasons == ()
    else:
        assert len(reasons) == 1
        assert re.search(reason, reasons[0])


def test_who_comes_and_goes_is_named(costs: ModelCosts) -> None:
    plans = observed(planning(costs), budgets(costs))
    plans.decide(["0", "1"])
    assert plans.decide(["1", "2"]).reasons == ("new clients: 2", "clients gone: 0")


def test_a_client_without_a_budget_is_an_error(costs: ModelCosts) -> None:
    with pytest.raises(ConfigError, match=r"Expected a budget from every client, found none from \['7'\]"):
        observed(planning(costs), budgets(costs)).decide(["0", "7"])


def test_importance_of_another_model_is_an_error(costs: ModelCosts) -> None:
    with pytest.raises(ConfigError, match="Expected importance for the 16 linear layers"):
        planning(costs, importance={"h.0.attn": 1.0})


def test_importance_known_before_training_counts(costs: ModelCosts) -> None:
    names = [m.name for m in costs.matrices]
    tight = {c: budget(costs, 1, rank=1) for c in CLIENTS}
    favourite = names[2]
    plan = observed(planning(costs, importance={n: 50.0 if n == favourite else 1.0 for n in names}), tight)
    ranks = plan.decide(CLIENTS).plan.clients["0"].ranks
    assert ranks[favourite] == max(ranks.values()) > min(ranks.values())


# --- whole rounds ---


def test_importance_reaches_the_plan_and_the_record(
    model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]
) -> None:
    plans = planning(costs, drift_threshold=0.0)
    strategy = make_strategy(model, plans)
    close.append(strategy)
    means = budgets(costs)
    manager = manager_of(*(node(model, c, lambda client, round_number: means[client]) for c in CLIENTS))
    for number in (1, 2):
        assert play_round(strategy, manager, number).metrics["clients"] == 3
    first, second = strategy.history
    assert first.plan_reasons == ("first plan",)
    assert first.drift == 0.0
    assert first.importance.keys() == {m.name for m in costs.matrices}
    assert sum(first.importance.values()) == pytest.approx(1.0)
    assert min(first.importance.values()) > 0
    assert second.plan_reasons[0].startswith("importance drifted")
    assert second.drift
    assert second.plan is not None


def test_a_new_plan_loses_nothing_learnt(model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]) -> None:
    """After round 1 the budgets turn round: every cut changes, and with it who holds what of the deltas."""
    means, turned = budgets(costs), dict(zip(CLIENTS, reversed(budgets(costs).values()), strict=True))
    strategy = make_strategy(model, planning(costs))
    close.append(strategy)
    manager = manager_of(
        *(node(model, c, lambda c, round_number: (means if round_number == 1 else turned)[c]) for c in CLIENTS)
    )
    before = play_round(strategy, manager, 1)
    strategy.configure_fit(server_round=2, parameters=EMPTY, client_manager=manager)
    strategy.aggregate_fit(server_round=2, results=[], failures=[])  # nobody trained: only the plan lies between
    record = strategy.history[1]
    assert record.plan
    assert [record.plan.clients[c].cut for c in CLIENTS] == [3, 2, 1]
    central = strategy.evaluate(server_round=2, parameters=EMPTY)
    assert central
    assert central[1]["perplexity"] == pytest.approx(before.central["perplexity"], rel=SAME)
    asked = strategy.configure_evaluate(server_round=2, parameters=EMPTY, client_manager=manager)
    assert [json.loads(str(ins.config[TASK_KEY]))["plan"]["cut"] for _, ins in asked] == [3, 2, 1]
    scores = [(proxy, proxy.evaluate(ins, timeout=60.0, group_id=2)) for proxy, ins in asked]
    loss, metrics = strategy.aggregate_evaluate(server_round=2, results=scores, failures=[])
    assert metrics["clients"] == 3
    assert loss == pytest.approx(before.federated_loss, rel=SAME)
    for name, weight in weights_of(strategy).items():
        if int(name.split(".")[2]) < 3:
            assert torch.equal(weight, before.weights[name]), name
        else:  # the tail alone trained it: not merged before, and now it is
            assert (weight - before.weights[name]).abs().max() <= SAME, name


def test_an_exchange_that_the_plan_chooses_is_that_of_one_who_states_it(
    model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]
) -> None:
    """Heads, tail and door follow the plan: the same weights as in a run whose training says the same."""
    links = {client: replace(mean, uplink_bytes_per_s=1e4) for client, mean in budgets(costs).items()}
    chosen = AdaptivePlanning(costs, SERVER, replace(CONFIG, choose=CHOICES))
    exchange = observed(chosen, links).decide(CLIENTS).plan.exchange
    assert exchange.activation_codec == exchange.gradient_codec != TRAINING.activation_codec
    assert exchange.tail_passes > 1
    stated = exchange.of(TRAINING)
    same = AdaptivePlanning(costs.under(exchange.of(costs.workload)), SERVER, CONFIG)
    found = []
    for plans, training in ((chosen, TRAINING), (same, stated)):
        strategy = make_strategy(model, plans, training=training)
        close.append(strategy)
        manager = manager_of(*(node(model, c, lambda client, round_number: links[client]) for c in CLIENTS))
        played = [play_round(strategy, manager, number) for number in (1, 2)]
        assert [one.metrics["clients"] for one in played] == [3, 3]
        assert strategy.rounds.training == stated
        found.append(played[-1].weights)
    for name, weight in found[1].items():
        assert torch.equal(found[0][name], weight), name


SMALL = UpdateCoding("bf16", 4)


def slow_links(costs: ModelCosts, up: float = 1e4, down: float = 1e4) -> dict[str, Budget]:
    return {c: replace(b, uplink_bytes_per_s=up, downlink_bytes_per_s=down) for c, b in budgets(costs).items()}


def test_updates_that_the_plan_makes_small_are_those_of_one_who_states_it(
    model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]
) -> None:
    """Where a link decides; the tail's weights after three rounds, and what clients were sent, to the bit."""
    links = slow_links(costs)
    chosen = AdaptivePlanning(costs, SERVER, replace(CONFIG, choose_update=True))
    same = AdaptivePlanning(costs, SERVER, replace(CONFIG, update=SMALL))
    found, sent = [], []
    told: tuple[dict[str, Any], ...] = ({}, {"update_codec": SMALL.codec, "update_rank": SMALL.rank})
    for plans, config in zip((chosen, same), told, strict=True):
        strategy = make_strategy(model, plans, **config)
        close.append(strategy)
        manager = manager_of(*(node(model, c, lambda client, round_number: links[client]) for c in CLIENTS))
        played = [play_round(strategy, manager, number) for number in (1, 2, 3)]
        assert plans.in_force
        assert plans.in_force.update == SMALL
        found.append(played[-1].weights)
        sent.append([c.bytes_down for record in strategy.history for c in record.clients])
    assert sent[0] == sent[1]
    for name, weight in found[1].items():
        assert torch.equal(found[0][name], weight), name


def test_updates_are_small_where_that_is_worth_it_and_stay_so(costs: ModelCosts) -> None:
    """What small updates lack is carried, and only small updates carry it: a link that got better changes nothing."""
    asked = AdaptivePlanning(costs, SERVER, replace(CONFIG, choose_update=True))
    stated = AdaptivePlanning(costs, SERVER, replace(CONFIG, update=SMALL))
    exact = observed(asked, slow_links(costs, 1e9, 1e9)).decide(CLIENTS).plan
    assert exact.update == UpdateCoding()
    small = observed(asked, slow_links(costs)).decide(CLIENTS).plan
    assert small == observed(stated, slow_links(costs)).decide(CLIENTS).plan
    assert "updates in bf16 of rank 4" in plan_table(small)
    assert "updates" not in plan_table(exact)
    again = observed(asked, slow_links(costs, 1e9, 1e9)).decide(CLIENTS)
    assert again.reasons
    assert again.plan.update == SMALL
    resumed = AdaptivePlanning(costs, SERVER, replace(CONFIG, choose_update=True))
    resumed.load_state(asked.state())
    assert resumed.in_force == again.plan


def test_a_head_beyond_the_budget_is_refused_with_the_figures_and_planned_anew(
    model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]
) -> None:
    """Client 2's memory shrinks at the moment its round starts: it must not load what it cannot hold."""
    means = budgets(costs)
    shrunk = {"2": False}

    def now(client: str, round_number: int) -> Budget:
        return means["0"] if shrunk.get(client) else means[client]

    strategy = make_strategy(model, planning(costs), gate_s=60.0)
    close.append(strategy)
    manager = manager_of(*(node(model, c, now) for c in CLIENTS))
    told = strategy.configure_fit(server_round=1, parameters=EMPTY, client_manager=manager)
    shrunk["2"] = True
    results = []
    threads = [
        threading.Thread(target=lambda p=p, i=i: results.append((p, p.fit(i, timeout=60.0, group_id=1))))
        for p, i in reversed(told)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)  # less than the start gate: nobody waits for who refused
    strategy.aggregate_fit(server_round=1, results=results, failures=[])
    record = strategy.history[0]
    assert [c.client_id for c in record.clients] == ["0", "1"]
    (failure,) = record.failures
    assert failure.startswith("client 2: ")
    assert "Expected a head within this client's" in failure
    played = play_round(strategy, manager, 2)
    assert played.metrics["clients"] == 3
    second = strategy.history[1]
    assert any("client 2: its head needs" in reason for reason in second.plan_reasons)
    assert [c.cut for c in second.clients] == [1, 2, 1]


def test_a_larger_batch_than_planned_for_is_refused(
    model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]
) -> None:
    means = budgets(costs)
    strategy = make_strategy(model, planning(costs), gate_s=0.5)
    close.append(strategy)
    nodes = [node(model, c, lambda client, round_number: means[client]) for c in CLIENTS]
    wide = ClientData(train=random_batches(STEPS, seed=4, width=11), evaluate=EVALUATION)
    nodes[1]._data = lambda _: wide
    play_round(strategy, manager_of(*nodes), 1)
    (failure,) = strategy.history[0].failures
    assert "Expected batches of at most 2 x 10 tokens" in failure
    assert "found 2 x 11" in failure


def test_clients_state_or_measure_their_own_budget(
    model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]
) -> None:
    stated = {"memory-mb": 500.0, "gflops": 5.0, "uplink-mbps": 80.0, "downlink-mbps": 80.0, "latency-ms": 2.0}
    plans = planning(costs)
    strategy = make_strategy(model, plans)
    close.append(strategy)
    manager = manager_of(node(model, "0", None, **stated), node(model, "1", None))
    assert play_round(strategy, manager, 1).metrics["clients"] == 2
    assert plans.budgets["0"] == Budget(500_000_000, 5e9, 1e7, 1e7, 0.002)
    measured = plans.budgets["1"]
    assert 1e8 < measured.memory_bytes < 1e13
    assert 1e8 < measured.flops_per_s < 1e15
    assert 1e6 < measured.uplink_bytes_per_s < 1e11  # loopback
    assert 0 < measured.latency_s < 0.5


def test_a_probe_is_echoed_and_its_token_is_good_for_one_stream(
    model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]
) -> None:
    strategy = make_strategy(model, planning(costs))
    close.append(strategy)
    task = strategy.rounds.probe_task("node")
    assert task is not None
    with RemoteTail(task, task.max_frame_bytes, connect) as tail:
        tail.probe(10, 1 << 20)
        assert tail.bytes_down > 1 << 20
        link = measure_link(tail.probe)
    assert link.uplink_bytes_per_s > 1e6
    with pytest.raises(Exception, match="unused token"), RemoteTail(task, task.max_frame_bytes, connect) as tail:
        tail.probe(1, 1)


def test_a_workload_for_other_steps_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"Expected a workload of local_steps=3 .* found 5"):
        HSplitLoRAStrategy(
            GlobalModel(ModelFiles.resolve(str(model))),
            ClientPlan(1, LoraSpec()),
            TrainingConfig(local_steps=3),
            workload=Workload(local_steps=5),
        )


def test_nobody_can_take_part(model: Path, costs: ModelCosts, close: list[HSplitLoRAStrategy]) -> None:
    strategy = make_strategy(model, planning(costs))
    close.append(strategy)
    tiny = replace(SERVER, memory_bytes=1000)
    manager = manager_of(node(model, "0", lambda client, round_number: tiny))
    with pytest.raises(ConfigError, match="Expected a client that can take part, found none"):
        strategy.configure_fit(server_round=1, parameters=EMPTY, client_manager=manager)


def test_gradient_checkpointing_heads_train_the_same(model: Path, close: list[HSplitLoRAStrategy]) -> None:
    weights = []
    for checkpointing in (False, True):
        workload = replace(WORKLOAD, gradient_checkpointing=checkpointing)
        strategy = HSplitLoRAStrategy(
            GlobalModel(ModelFiles.resolve(str(model))),
            ClientPlan(3, LoraSpec(2, 4.0)),
            TrainingConfig(rounds=1, local_steps=STEPS, learning_rate=0.02),
            workload=workload,
        )
        close.append(strategy)
        weights.append(play_round(strategy, manager_of(node(model, "0", None)), 1).weights)
    for name, weight in weights[0].items():
        assert (weight - weights[1][name]).abs().max() <= SAME, name
