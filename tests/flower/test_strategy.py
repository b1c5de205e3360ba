"""The strategy against an independent dense reference: rounds as Flower plays them, over real gRPC, without Ray."""

import io
import json
import logging
import math
import shutil
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.common import Code, FitIns, FitRes, GetPropertiesIns, GetPropertiesRes, Parameters, Status
from flwr.server import SimpleClientManager
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hsplit_flwr.common.reasons import describe_failure
from hsplit_flwr.errors import ConfigError, ExchangeError, RunFailedError
from hsplit_flwr.exchange.grpc_transport import ServiceConfig, connect
from hsplit_flwr.exchange.remote_tail import DeltaTensors, RemoteTail
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.federation import head_client as client_module
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.trained_head import TrainedHead
from hsplit_flwr.flower import task_proxy
from hsplit_flwr.flower.messages import ARRAYS_KEY, CLIENTS_KEY, CONCURRENCY_KEY, TASK_KEY, pack_trained
from hsplit_flwr.flower.server import HSplitLoRAServer
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.flower.task_proxy import ClientFailureError, TaskProxy
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import Segment
from hsplit_flwr.planning.budgets.probe import stated_budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.head import train_head
from hsplit_flwr.training.workload import Workload
from tests.helpers.cuttable_proxy import CuttableProxy
from tests.helpers.federation import (
    Batch,
    Fault,
    Fit,
    Node,
    build_one_at_a_time,
    manager_of,
    play_round,
    random_batches,
    weights_of,
)
from tests.helpers.flower import free_port
from tests.helpers.models import NUM_BLOCKS, tiny_model

pytestmark = pytest.mark.timeout(120)

EXACT = 1e-5
"""largest absolute difference between a float32 weight and the float64 reference"""
SAME = 1e-6
"""largest absolute difference between a weight of the server and a client's copy of it"""
RELATIVE = 1e-5
"""of perplexities"""
STEPS = 3
TRAINING = TrainingConfig(rounds=3, local_steps=STEPS, learning_rate=0.02, warmup_steps=2)
PLANS = {
    "0": ClientPlan(1, LoraSpec(1, 2.0)),
    "1": ClientPlan(2, LoraSpec(2, 3.0, rank_pattern={r"h\.0\.attn\.c_attn": 4})),
    "2": ClientPlan(3, LoraSpec(1, 4.0, target_modules=("c_attn", "c_fc"))),
}
TAIL = LoraSpec(2, 5.0)
LEAVES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""the linear layers of a GPT-2 block, in its order"""
LONG_S, SHORT_S = 30.0, 0.3
"""start gates: for those who must train together, and for those who need not"""
DATA = {c: random_batches(STEPS, seed=int(c), rows=2 + int(c), prompt=2 + int(c)) for c in PLANS}
EVALUATION = {c: random_batches(1 + int(c), seed=10 + int(c), rows=1 + int(c)) for c in PLANS}
NOTHING = Parameters([], "")
Array = NDArray[Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def data(client: str) -> ClientData:
    return ClientData(train=DATA[client], evaluate=EVALUATION[client])


def node_per_client(model: Path, faults: dict[str, Fault] | None = None) -> list[Node]:
    return [Node(f"{100 + int(c)}", [c], model, data, (faults or {}).get(c)) for c in PLANS]


def lose_state(node: Node) -> None:
    """All that it kept between messages."""
    node.context.state.clear()
    shutil.rmtree(str(node.context.node_config["state-dir"]))


def make_strategy(model: Path, seed: int = 0, gate_s: float = LONG_S, **config: Any) -> HSplitLoRAStrategy:
    return HSplitLoRAStrategy(
        GlobalModel(ModelFiles.resolve(str(model))),
        PLANS,
        TrainingConfig(**{**vars(TRAINING), "seed": seed}),
        tail_lora=TAIL,
        config=StrategyConfig(**{"min_nodes": 1, "wait_for_nodes_s": 5.0, **config}),
        limits=BarrierLimits(start_gate_s=gate_s, straggler_limit_s=20.0, step_limit_s=40.0),
        eval_batches=[batch for batches in EVALUATION.values() for batch in batches],
    )


@pytest.fixture
def strategy(model: Path) -> Iterator[HSplitLoRAStrategy]:
    made = make_strategy(model)
    yield made
    made.close()


# --- the independent reference: float64, dense, from what was on the wire ---


def target_tokens(batches: list[Batch]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def client_updates(client: str, res: FitRes) -> dict[str, Array]:
    """Module name -> c_i B_i A_i in float64, from the bytes of a FitRes: A, B of each adapted module in order."""
    plan = PLANS[client]
    arrays = iter([np.load(io.BytesIO(tensor)) for tensor in res.parameters.tensors])
    updates = {}
    for block in range(plan.cut):
        for leaf in LEAVES:
            name = f"transformer.h.{block}.{leaf}"
            targets = plan.lora.target_modules
            if targets == "all-linear" or leaf.split(".")[1] in targets:
                A, B = next(arrays).astype(np.float64), next(arrays).astype(np.float64)
                rank = 4 if client == "1" and name.endswith("h.0.attn.c_attn") else plan.lora.r
                assert A.shape[0] == rank
                updates[name] = plan.lora.lora_alpha / rank * (B @ A)
    importance = next(arrays)
    assert importance.shape == (plan.cut * len(LEAVES),)
    assert (importance > 0).all()
    assert next(arrays, None) is None
    return updates


def expected_weights(
    start: dict[str, Tensor],
    results: dict[str, FitRes],
    tail: dict[str, LoraFactors],
    base: dict[str, Tensor] | None = None,
) -> dict[str, Array]:
    """start + sum_i p_i c_i B_i A_i + p_tail c_t B_t A_t for every linear layer, (d_out, d_in), by client id.

    What the tail alone trains goes on from round to round: there the last term is of all rounds since `base`.
    """
    tokens = {client: target_tokens(DATA[client]) for client in results}
    p = {client: count / sum(tokens.values()) for client, count in tokens.items()}
    start = {name: (base or start)[name] if tail_only(name) else weight for name, weight in start.items()}
    expected = {name: weight.T.double().numpy() for name, weight in start.items()}  # Conv1D: stored transposed
    for client, res in results.items():
        for name, update in client_updates(client, res).items():
            expected[name] = expected[name] + p[client] * update
    for name, factors in tail.items():
        block = int(name.split(".")[2])
        p_tail = sum(p[client] for client in results if PLANS[client].cut <= block)
        update = TAIL.lora_alpha / TAIL.r * (factors.B.double() @ factors.A.double()).numpy()
        expected[name] = expected[name] + p_tail * update
    return expected


def tail_only(name: str) -> bool:
    """Of a block that no client's head holds."""
    return int(name.split(".")[2]) >= max(plan.cut for plan in PLANS.values())


def assert_equal_weights(found: dict[str, Tensor], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert np.abs(weight.T.double().numpy() - expected[name]).max() <= EXACT, name


def base_weights(model: Path) -> dict[str, Tensor]:
    stored = load_file(model / "model.safetensors")
    names = [f"transformer.h.{block}.{leaf}" for block in range(NUM_BLOCKS) for leaf in LEAVES]
    return {name: stored[f"{name}.weight"] for name in names}


def by_client(results: dict[str, FitRes]) -> dict[str, FitRes]:
    return {str(int(cid) - 100): res for cid, res in results.items()}


# --- aggregation ---


def test_two_rounds_equal_the_dense_reference(model: Path, strategy: HSplitLoRAStrategy) -> None:
    manager = manager_of(*node_per_client(model))
    base = start = base_weights(model)
    for number in (1, 2):
        played = play_round(strategy, manager, number)
        assert played.metrics["clients"] == 3
        assert_equal_weights(played.weights, expected_weights(start, by_client(played.results), played.tail, base))
        moved = [float((played.weights[name] - start[name]).abs().max()) for name in start]
        assert min(moved) > 100 * EXACT  # every layer was trained by somebody: the comparison is not of rest
        start = played.weights
    record = strategy.history[0]
    assert not record.failures
    assert [(c.client_id, c.cut, c.steps, c.tokens) for c in record.clients] == [
        (c, PLANS[c].cut, STEPS, target_tokens(DATA[c])) for c in PLANS
    ]


def test_one_node_with_three_clients_equals_the_dense_reference(model: Path, strategy: HSplitLoRAStrategy) -> None:
    manager = manager_of(Node("100", list(PLANS), model, data))
    told = strategy.configure_fit(server_round=1, parameters=NOTHING, client_manager=manager)
    assert sorted(json.loads(str(ins.config[TASK_KEY]))["client"] for _, ins in told) == ["0", "1", "2"]
    results = [(proxy, proxy.fit(ins, timeout=60.0, group_id=1)) for proxy, ins in told]  # in waves of one
    tail = strategy.rounds.tail_rounds.tail.adapters.factors()
    strategy.aggregate_fit(server_round=1, results=results, failures=[])
    sent = {str(res.metrics["client"]): res for _, res in results}
    assert_equal_weights(weights_of(strategy), expected_weights(base_weights(model), sent, tail))


# --- what clients hold ---


def test_heads_follow_the_server_by_increments_and_after_losing_their_state(
    model: Path, strategy: HSplitLoRAStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = node_per_client(model)
    manager = manager_of(*nodes)
    heads: dict[str, dict[str, Tensor]] = {}
    updates: dict[str, tuple[int, DeltaTensors]] = {}
    fetch_delta = RemoteTail.fetch_delta

    def spy_on_head(head: Segment, *arguments: Any) -> Any:
        client = next(c for c, plan in PLANS.items() if plan.cut == head.stop)
        heads[client] = {n: layer.weight.detach().clone() for n, layer in head.linear_modules().items()}  # type: ignore[operator]
        return train_head(head, *arguments)

    def spy_on_delta(tail: RemoteTail, have: int, *aside: Any) -> DeltaTensors:
        update = fetch_delta(tail, have, *aside)
        updates[tail._task.client] = have, update
        return update

    monkeypatch.setattr(client_module, "train_head", spy_on_head)
    monkeypatch.setattr(RemoteTail, "fetch_delta", spy_on_delta)
    start = base_weights(model)
    for number in (1, 2, 3):
        if number == 3:
            lose_state(nodes[0])
        played = play_round(strategy, manager, number)
        for client, head in heads.items():
            assert {int(name.split(".")[2]) for name in head} == set(range(PLANS[client].cut))
            for name, weight in head.items():
                assert (weight - start[name]).abs().max() <= SAME, (number, client, name)
        # `updates` is of the round's evaluation, which comes after its merge
        kinds = {client: (have, update.version, update.whole) for client, (have, update) in updates.items()}
        assert kinds == dict.fromkeys(PLANS, (number - 1, number, number == 1))
        start = played.weights
    assert any(key.startswith("add|") for key in updates["1"][1].tensors)  # factors only, not the dense sum again
    assert heads.keys() == PLANS.keys()


def test_a_client_without_its_state_gets_the_whole(
    model: Path, strategy: HSplitLoRAStrategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = node_per_client(model)
    manager = manager_of(*nodes)
    play_round(strategy, manager, 1)
    lose_state(nodes[1])
    asked: dict[str, tuple[int, bool]] = {}
    fetch_delta = RemoteTail.fetch_delta

    def spy(tail: RemoteTail, have: int, *aside: Any) -> DeltaTensors:
        update = fetch_delta(tail, have, *aside)
        asked.setdefault(tail._task.client, (have, update.whole))
        return update

    monkeypatch.setattr(RemoteTail, "fetch_delta", spy)
    play_round(strategy, manager, 2)
    assert asked == {"0": (1, False), "1": (0, True), "2": (1, False)}


# --- bad clients ---


def test_the_tail_takes_no_more_of_a_client_than_the_plan(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An admitted client may send neither more steps than the round has nor larger batches than were planned."""
    opened: list[dict[str, Any]] = []
    open_round = TailService.open_round

    def spy(service: TailService, *args: Any, **limits: Any) -> dict[str, str]:
        opened.append(limits)
        return open_round(service, *args, **limits)

    monkeypatch.setattr(TailService, "open_round", spy)
    workload = Workload(8, 32, local_steps=STEPS)
    files = ModelFiles.resolve(str(model))
    strategy = HSplitLoRAStrategy(GlobalModel(files), PLANS, TRAINING, tail_lora=TAIL, workload=workload)
    play_round(strategy, manager_of(*node_per_client(model)), 1)
    strategy.close()
    assert opened == [{"steps": STEPS, "workload": workload}, {"steps": None, "workload": workload}]


def test_heads_without_adapters_are_known_to_the_tail_by_their_plans(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[Collection[str]] = []
    open_round = TailService.open_round

    def spy(service: TailService, *args: Any, **limits: Any) -> dict[str, str]:
        frozen.append(args[-1])
        return open_round(service, *args, **limits)

    monkeypatch.setattr(TailService, "open_round", spy)
    plans = PLANS | {"1": ClientPlan(2, LoraSpec(2, 3.0, rank_pattern={r"h\.[01]\..*": 0}))}
    files = ModelFiles.resolve(str(model))
    strategy = HSplitLoRAStrategy(GlobalModel(files), plans, TRAINING, tail_lora=TAIL)
    played = play_round(strategy, manager_of(*node_per_client(model)), 1)
    strategy.close()
    assert frozen[0] == ["1"]
    assert len(played.results) == 3


def stored(array: Array, **how: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def zipped(array: Array) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


def header_of(*shape: int) -> bytes:
    """A file that promises an array of `shape` and holds nothing."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def first_tensor(change: Callable[[Array], bytes]) -> Fault:
    """A fault that sends something else as the first adapter tensor."""

    def fault(fit: Fit, ins: FitIns) -> FitRes:
        res = fit(ins)
        tensors = res.parameters.tensors
        tensors[0] = change(np.load(io.BytesIO(tensors[0])))
        return res

    return fault


def importance(values: Array) -> Fault:
    """A fault that sends something else as the importance of its eight layers."""

    def fault(fit: Fit, ins: FitIns) -> FitRes:
        res = fit(ins)
        res.parameters.tensors[-1] = stored(values)
        return res

    return fault


def with_nan(array: Array) -> bytes:
    array[0, 0] = math.nan
    return stored(array)


def too_few_tensors(fit: Fit, ins: FitIns) -> FitRes:
    res = fit(ins)
    res.parameters.tensors.pop()
    return res


def raising(fit: Fit, ins: FitIns) -> FitRes:
    raise RuntimeError("disk full")


def not_ok(fit: Fit, ins: FitIns) -> FitRes:
    return FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "cannot fit"), NOTHING, 0, {})


def lying_about(**metrics: Any) -> Fault:
    def fault(fit: Fit, ins: FitIns) -> FitRes:
        res = fit(ins)
        res.metrics.update(metrics)
        return res

    return fault


def named_otherwise(fit: Fit, ins: FitIns) -> FitRes:
    res = fit(ins)
    res.metrics[ARRAYS_KEY] = str(res.metrics[ARRAYS_KEY]).replace("h.0", "h.7", 1)
    return res


def nameless(fit: Fit, ins: FitIns) -> FitRes:
    res = fit(ins)
    res.metrics.clear()
    return res


def idle(fit: Fit, ins: FitIns) -> FitRes:
    """Adapters of the right shapes, from a client that never came to the tail."""
    plan = PLANS["1"]
    shapes = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}
    factors = {}
    for block in range(plan.cut):
        for leaf, (d_out, d_in) in shapes.items():
            rank = plan.lora.rank(name := f"transformer.h.{block}.{leaf}")
            factors[name] = LoraFactors(torch.ones(rank, d_in), torch.ones(d_out, rank), 1.0)
    arrays, figures = pack_trained(
        TrainedHead(client="1", factors=factors, importance=dict.fromkeys(factors, 1.0), tokens=1000, loss=0.1)
    )
    tensors = [stored(array) for array in arrays.values()]
    metrics = {**figures, ARRAYS_KEY: json.dumps(list(arrays))}
    return FitRes(Status(Code.OK, ""), Parameters(tensors, "numpy.ndarray"), 1000, metrics)


def lazy(fit: Fit, ins: FitIns) -> FitRes:
    task = json.loads(str(ins.config[TASK_KEY]))
    task["training"]["local_steps"] = STEPS - 1
    return fit(FitIns(ins.parameters, {TASK_KEY: json.dumps(task)}))


FAULTS: dict[str, tuple[Fault, str]] = {
    "raises": (raising, "disk full"),
    "not-ok": (not_ok, "cannot fit"),
    "wrong-shape": (first_tensor(lambda a: stored(a[:, :-1])), "Expected float32 A"),
    "broadcastable-shape": (first_tensor(lambda a: stored(a[:1])), "Expected float32 A"),
    "scalar": (first_tensor(lambda a: stored(a[0, 0])), "Expected float32 A"),
    "float64": (first_tensor(lambda a: stored(a.astype(np.float64))), "Expected float32 A"),
    "nan": (first_tensor(with_nan), "NaN"),
    "pickled-objects": (first_tensor(lambda a: stored(np.array([{}]), allow_pickle=True)), "allow_pickle"),
    "bare-pickle": (first_tensor(lambda a: b"\x80\x04N."), "client 1"),
    "truncated": (first_tensor(lambda a: stored(a)[:-5]), "client 1"),
    "empty": (first_tensor(lambda a: b""), "client 1"),
    "archive": (first_tensor(zipped), "client 1"),
    "huge-header": (first_tensor(lambda a: header_of(1 << 40, 1 << 20)), "MemoryError"),
    "wrong-count": (too_few_tensors, "Expected a name for each of 16 arrays"),
    "other-arrays": (named_otherwise, "Expected 17 arrays, A and B of every planned module and the importance"),
    "importance-of-fewer": (importance(np.ones(7, np.float32)), "importance of 8 linear layers, found float32 (7,)"),
    "importance-in-float64": (importance(np.ones(8)), "importance of 8 linear layers, found float64"),
    "importance-nan": (importance(np.full(8, np.nan, np.float32)), "Expected finite importance >= 0"),
    "importance-negative": (importance(np.full(8, -1, np.float32)), "Expected finite importance >= 0"),
    "importance-nothing": (importance(np.zeros(8, np.float32)), "not all of it 0"),
    "other-name": (lying_about(client="2"), "names client '1', found '2'"),
    "unknown-name": (lying_about(client="77"), "names client '1', found '77'"),
    "no-name": (lying_about(client=""), "names client '1', found ''"),
    "no-figures": (nameless, "Expected a name for each of 17 arrays"),
    "junk-figures": (lying_about(load_s="soon"), "could not convert string to float"),
    "importance-absurd": (importance(np.full(8, 1e30, np.float32)), "importance of at most 1e+15, found 1e+30"),
    "adapter-absurd": (first_tensor(lambda a: stored(a * np.float32(1e30))), "without figures beyond 1e+06, found"),
    "tokens-negative": (lying_about(tokens=-1), "Expected tokens of a trained head in 0..1e+12, found -1"),
    "tokens-absurd": (lying_about(tokens=1e308), "Expected tokens of a trained head in 0..1e+12, found 1e+308"),
    "tokens-infinite": (lying_about(tokens=math.inf), "cannot convert float infinity to integer"),
    "tokens-nan": (lying_about(tokens=math.nan), "cannot convert float NaN to integer"),
    "loss-nan": (lying_about(loss=math.nan), "Expected loss of a trained head in 0..1e+06, found nan"),
    "loss-absurd": (lying_about(loss=1e308), "Expected loss of a trained head in 0..1e+06, found 1e+308"),
    "loss-negative": (lying_about(loss=-0.5), "Expected loss of a trained head in 0..1e+06, found -0.5"),
    "seconds-negative": (lying_about(load_s=-1.0), "Expected load_s of a trained head in 0.."),
    "seconds-nan": (lying_about(compute_s=math.nan), "Expected compute_s of a trained head in 0.."),
    "seconds-absurd": (lying_about(exchange_s=1e308), "Expected exchange_s of a trained head in 0.."),
    "idle": (idle, f"Expected {STEPS} steps at the tail, found 0"),
    "lazy": (lazy, f"Expected {STEPS} steps at the tail, found {STEPS - 1}"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_client_is_left_out_and_the_weights_renormalised(model: Path, kind: str) -> None:
    fault, message = FAULTS[kind]
    strategy = make_strategy(model, gate_s=SHORT_S, federated_evaluation=False)
    nodes = node_per_client(model, {"1": fault})
    manager = manager_of(*nodes)
    played = play_round(strategy, manager, 1)
    good = {client: res for client, res in by_client(played.results).items() if client != "1"}
    assert_equal_weights(played.weights, expected_weights(base_weights(model), good, played.tail))
    record = strategy.history[0]
    assert [client.client_id for client in record.clients] == ["0", "2"]
    assert len(record.failures) == 1
    assert record.failures[0].startswith("client 1: ")
    assert message in record.failures[0]
    assert len(record.failures[0]) < 600
    nodes[1].fault = None
    played = play_round(strategy, manager, 2)
    strategy.close()
    assert played.metrics["clients"] == 3
    assert not strategy.history[1].failures


@pytest.mark.parametrize(
    ("rule", "starts"), [("noise_free", 3), ("fedavg", 1), ("zero_pad", 1), ("svd", 1), ("norm_clipped", 3)]
)
def test_what_is_averaged_starts_alike(model: Path, rule: str, starts: int) -> None:
    """The average of factors that start from unrelated A's is of unrelated things."""
    strategy = make_strategy(model, rule=rule)
    told = strategy.configure_fit(
        server_round=1, parameters=NOTHING, client_manager=manager_of(*node_per_client(model))
    )
    tasks = [RoundTask.from_json(str(ins.config[TASK_KEY])) for _, ins in told]
    strategy.close()
    assert len({task.adapter_seed for task in tasks}) == starts


def test_a_client_whose_connection_breaks_is_let_in_again(model: Path, strategy: HSplitLoRAStrategy) -> None:
    """What it says then is refused for what it is, not for its used token."""
    told = strategy.configure_fit(
        server_round=1, parameters=NOTHING, client_manager=manager_of(*node_per_client(model))
    )
    task = RoundTask.from_json(str(told[0][1].config[TASK_KEY]))
    assert task.reconnect_grace_s == BarrierLimits.reconnect_grace_s
    with CuttableProxy(task.address) as proxy:
        with RemoteTail(replace(task, address=proxy.address), task.max_frame_bytes * 4, connect) as session:
            session.fetch_delta(0)
            proxy.cut()
            with pytest.raises(ExchangeError) as refusal:
                session.score_step(0, torch.zeros(1, 2, 4), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64))
        assert (refusal.value.code, proxy.connections) == ("wrong_kind", 2)


def test_nobody_finishes_and_the_run_goes_on(model: Path, strategy: HSplitLoRAStrategy) -> None:
    """All clients train, so the tail has moved, and then send junk: neither heads nor tail may leave a trace."""
    nodes = node_per_client(model, dict.fromkeys(PLANS, too_few_tensors))
    manager = manager_of(*nodes)
    before = strategy.evaluate(server_round=0, parameters=NOTHING)
    start = weights_of(strategy)
    played = play_round(strategy, manager, 1)
    assert any(factors.B.any() for factors in played.tail.values())
    assert all(torch.equal(played.weights[name], weight) for name, weight in start.items())
    assert before is not None
    assert played.central == before[1]
    assert len(strategy.history[0].failures) == 3
    for node in nodes:
        node.fault = None
    played = play_round(strategy, manager, 2)
    assert played.metrics["clients"] == 3
    assert_equal_weights(played.weights, expected_weights(start, by_client(played.results), played.tail))


def test_all_nodes_raise_and_the_run_goes_on(model: Path, strategy: HSplitLoRAStrategy) -> None:
    played = play_round(strategy, manager_of(*node_per_client(model, dict.fromkeys(PLANS, raising))), 1)
    assert played.metrics == {}
    assert all(torch.equal(weight, base_weights(model)[name]) for name, weight in played.weights.items())
    assert sum("disk full" in failure for failure in strategy.history[0].failures) == 3


# --- a simulation's dead actor ---


DIED = ValueError("Message contains an Error (reason: <class 'ray.exceptions.ActorDiedError'>:<'The actor died'>)")


class MovingNode(Node):
    """A node whose messages fail with the given errors first."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__("1", [], Path(), data)
        self.timeouts: list[float | None] = []
        self._errors = list(errors)

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        self.timeouts.append(timeout)
        if self._errors:
            raise self._errors.pop(0)
        return FitRes(Status(Code.OK, ""), NOTHING, 0, {})


def test_a_message_to_a_dead_actor_is_sent_again_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_proxy, "RETRY_S", 0.01)
    node = MovingNode(DIED, DIED)
    assert TaskProxy(node, "a").fit(FitIns(NOTHING, {}), timeout=30.0, group_id=1).status.code == Code.OK
    assert len(node.timeouts) == 3
    assert node.timeouts == sorted(node.timeouts, key=lambda left: -(left or 0.0))  # the limit is the round's
    forever = MovingNode(*[DIED] * 100)
    with pytest.raises(ClientFailureError, match=r"^client a: ValueError: .*ActorDiedError"):
        TaskProxy(forever, "a").fit(FitIns(NOTHING, {}), timeout=0.1, group_id=1)
    assert 2 <= len(forever.timeouts) <= 11


def test_any_other_failure_is_final_and_the_first_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_proxy, "RETRY_S", 0.01)
    node = MovingNode(RuntimeError("no such file"))
    with pytest.raises(ClientFailureError, match=r"^client a: RuntimeError: no such file$"):
        TaskProxy(node, "a").fit(FitIns(NOTHING, {}), timeout=30.0, group_id=1)
    assert len(node.timeouts) == 1
    died_at_work = MovingNode(DIED, RuntimeError("[unauthenticated] Expected an unused token"))
    with pytest.raises(ClientFailureError, match="ActorDiedError"):
        TaskProxy(died_at_work, "a").fit(FitIns(NOTHING, {}), timeout=30.0, group_id=1)


def test_a_long_failure_keeps_its_start_and_its_end() -> None:
    text = describe_failure("a", "Traceback\n" + "\x1b[36mline\x1b[39m\n" * 1000 + "KeyError: 'mr'")
    assert text.startswith("client a: Traceback line line")
    assert text.endswith("line KeyError: 'mr'")
    assert len(text) < 600
    assert "\x1b" not in text


# --- the whole run, through Flower's own server ---


def run(model: Path, seed: int) -> dict[str, Tensor]:
    strategy = make_strategy(model, seed)
    server = HSplitLoRAServer(strategy)
    for node in node_per_client(model):
        server.client_manager().register(node)
    server.fit(num_rounds=2, timeout=60.0)
    return weights_of(strategy)


def test_a_run_in_which_nobody_finished_has_failed(model: Path) -> None:
    """It ended as "completed", with an untouched model."""
    strategy = make_strategy(model, gate_s=SHORT_S)
    server = HSplitLoRAServer(strategy)
    for node in node_per_client(model, dict.fromkeys(PLANS, raising)):
        server.client_manager().register(node)
    with pytest.raises(RunFailedError, match=r"found none in 2 rounds.*disk full"):
        server.fit(num_rounds=2, timeout=60.0)


def test_the_seed_decides_the_weights_bit_for_bit(model: Path) -> None:
    first, again, other = run(model, 0), run(model, 0), run(model, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


class MeetingNode(Node):
    """A node whose fit ends once all others are inside theirs."""

    meeting: threading.Barrier

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        self.meeting.wait(30.0)
        raise RuntimeError("met everybody")

    def get_properties(self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None) -> GetPropertiesRes:
        return GetPropertiesRes(Status(Code.OK, ""), hosts(self.cid))


def test_a_hundred_clients_are_under_way_at_a_time(model: Path) -> None:
    """With 64 workers, 100 clients lost the start gate in every round."""
    plan = ClientPlan(1, LoraSpec(1))
    strategy = HSplitLoRAStrategy(GlobalModel(ModelFiles.resolve(str(model))), plan, TRAINING)
    server = HSplitLoRAServer(strategy)
    MeetingNode.meeting = threading.Barrier(100)
    for number in range(100):
        server.client_manager().register(MeetingNode(str(number), [], model, data))
    server.fit_round(server_round=1, timeout=60.0)
    strategy.close()
    assert sum("met everybody" in failure for failure in strategy.history[0].failures) == 100


def test_the_tail_is_opened_once_for_all_nodes(model: Path) -> None:
    """Each node was asked in a thread that opened a tail: three of four found the port in use and were left out."""
    port = free_port()
    costs = ModelCosts(ModelFiles.resolve(str(model)).config, Workload(4, 10, STEPS))
    server = stated_budget({"memory-gb": 8, "gflops": 100, "uplink-mbps": 1000, "downlink-mbps": 1000, "latency-ms": 0})
    assert server is not None
    strategy = HSplitLoRAStrategy(
        GlobalModel(ModelFiles.resolve(str(model))),
        AdaptivePlanning(costs, server),
        TRAINING,
        service=ServiceConfig(bind=f"127.0.0.1:{port}"),
        limits=BarrierLimits(start_gate_s=LONG_S),
    )
    device = {"memory-gb": 1, "gflops": 10, "uplink-mbps": 100, "downlink-mbps": 100, "latency-ms": 1}
    nodes = [
        Node(str(n), [str(n)], model, lambda c: ClientData(random_batches(STEPS, int(c))), node_config=device)
        for n in range(4)
    ]
    played = play_round(strategy, manager_of(*nodes), 1)
    strategy.close()
    assert played.metrics["clients"] == 4
    with socket.socket() as probe:  # nothing listens on
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


# --- perplexities ---


def test_perplexities_equal_transformers_own_loss(model: Path, strategy: HSplitLoRAStrategy, tmp_path: Path) -> None:
    played = play_round(strategy, manager_of(*node_per_client(model)), 1)
    strategy.close()
    strategy.rounds.tail_rounds.merge_remaining()
    strategy.rounds.model.segment.model.save_pretrained(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    nll, tokens = 0.0, 0
    for batch in [batch for batches in EVALUATION.values() for batch in batches]:
        count = target_tokens([batch])
        with torch.no_grad():
            nll += merged(**batch).loss.double().item() * count
        tokens += count
    perplexity = math.exp(nll / tokens)
    assert played.central["perplexity"] == pytest.approx(perplexity, rel=RELATIVE)
    assert strategy.history[0].central_perplexity == pytest.approx(perplexity, rel=RELATIVE)
    # the clients hold the same batches between them
    assert strategy.history[0].federated_perplexity == pytest.approx(perplexity, rel=RELATIVE)
    assert played.federated_loss == pytest.approx(math.log(perplexity), rel=RELATIVE)


def without_targets(batches: list[Batch]) -> list[Batch]:
    return [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches]


def test_an_evaluation_set_without_targets_ends_the_run_before_its_first_round(model: Path) -> None:
    """The story: its perplexity was 1.0."""
    strategy = HSplitLoRAStrategy(
        GlobalModel(ModelFiles.resolve(str(model))), PLANS, TRAINING, eval_batches=without_targets(EVALUATION["0"])
    )
    server = HSplitLoRAServer(strategy)
    with pytest.raises(ConfigError, match=r"Expected batches to score, found 1 with no target tokens\. Labels must"):
        server.fit(num_rounds=1, timeout=5.0)


def test_clients_without_targets_are_not_measured(model: Path, strategy: HSplitLoRAStrategy) -> None:
    """Alone they give no federated perplexity; beside others they weigh nothing."""

    def untargeted(client: str) -> ClientData:
        return ClientData(train=DATA[client], evaluate=without_targets(EVALUATION[client]))

    nodes = [Node(f"{100 + int(c)}", [c], model, untargeted) for c in PLANS]
    played = play_round(strategy, manager_of(*nodes), 1)
    assert played.federated_loss is None
    assert strategy.history[0].federated_perplexity is None
    played = play_round(strategy, manager_of(Node("100", ["0"], model, data), *nodes[1:]), 2)
    assert played.federated_loss is not None
    assert played.federated_loss > 1.0


# --- who takes part ---


class StubNode(Node):
    """A node that only says who it hosts."""

    def __init__(self, cid: str, properties: dict[str, Any] | Exception) -> None:
        super().__init__(cid, [], Path(), data)
        self._properties = properties

    def get_properties(self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None) -> GetPropertiesRes:
        if isinstance(self._properties, Exception):
            raise self._properties
        return GetPropertiesRes(Status(Code.OK, ""), self._properties)


def hosts(*clients: str, concurrency: Any = 0) -> dict[str, Any]:
    return {CLIENTS_KEY: json.dumps(clients), CONCURRENCY_KEY: concurrency}


def hosted(strategy: HSplitLoRAStrategy, manager: SimpleClientManager) -> dict[str, str]:
    """Client -> cid of its node, as the strategy's next round sees them."""
    roster = strategy.nodes.refresh(manager)
    return {client: strategy.nodes.proxy(client).cid for client in roster.clients}


@pytest.fixture
def asking(model: Path) -> Iterator[HSplitLoRAStrategy]:
    made = make_strategy(model, wait_for_nodes_s=1.0)
    yield made
    made.close()


def test_a_second_node_with_the_same_client_is_left_out(
    asking: HSplitLoRAStrategy, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the run for everybody."""
    manager = manager_of(StubNode("1", hosts("a", "b")), StubNode("2", hosts("c", "b")))
    assert hosted(asking, manager) == {"a": "1", "b": "1"}
    assert "left out node 2" in caplog.text


@pytest.mark.parametrize(
    "junk",
    [
        {},
        {CLIENTS_KEY: "no json", CONCURRENCY_KEY: 0},
        {CLIENTS_KEY: '{"a": 1}', CONCURRENCY_KEY: 0},
        {CLIENTS_KEY: "[1, 2]", CONCURRENCY_KEY: 0},
        hosts("b", concurrency="many"),
        hosts("b", concurrency=-3),
        hosts("b", "b"),
        RuntimeError("no such app"),
    ],
    ids=["nothing", "no-json", "no-list", "no-texts", "no-number", "negative", "twice", "raises"],
)
def test_a_node_that_answers_junk_is_left_out(asking: HSplitLoRAStrategy, junk: dict[str, Any] | Exception) -> None:
    assert hosted(asking, manager_of(StubNode("1", hosts("a")), StubNode("2", junk))) == {"a": "1"}
    assert asking.nodes.roster.concurrency(["a"]) == 1


def test_nobody_but_junk_is_an_error(asking: HSplitLoRAStrategy) -> None:
    with pytest.raises(ConfigError, match="at least one SuperNode that hosts clients of hsplit_flwr, found none"):
        hosted(asking, manager_of(StubNode("1", {})))


def test_too_few_nodes_is_an_error(model: Path) -> None:
    strategy = make_strategy(model, wait_for_nodes_s=1.0, min_nodes=2)
    with pytest.raises(ConfigError, match=r"Expected at least 2 SuperNodes within 1 s, found 1\."):
        hosted(strategy, manager_of(StubNode("1", hosts("a"))))


def test_a_node_that_left_is_forgotten_and_a_new_one_is_asked(asking: HSplitLoRAStrategy) -> None:
    first, second = StubNode("1", hosts("a")), StubNode("2", hosts("b"))
    manager = manager_of(first, second)
    assert hosted(asking, manager) == {"a": "1", "b": "2"}
    replacement = StubNode("3", hosts("a"))
    manager.register(replacement)
    assert hosted(asking, manager) == {"a": "1", "b": "2"}  # "a" stays with its node while that is there
    manager.unregister(first)
    assert hosted(asking, manager) == {"b": "2", "a": "3"}


def test_fraction_clients(model: Path) -> None:
    chosen = []
    for seed in (0, 0, 1):
        strategy = make_strategy(model, seed, fraction_clients=0.4)
        manager = manager_of(StubNode("1", hosts(*PLANS)))
        rounds = []
        for number in range(1, 9):
            told = strategy.configure_fit(server_round=number, parameters=NOTHING, client_manager=manager)
            rounds.append([json.loads(str(ins.config[TASK_KEY]))["client"] for _, ins in told])
        strategy.close()
        chosen.append(rounds)
    assert chosen[0] == chosen[1] != chosen[2]
    assert {len(clients) for clients in chosen[0]} == {1}  # 0.4 of 3
    assert {client for clients in chosen[0] for client in clients} == set(PLANS)


def test_an_unplanned_client_is_left_out_by_name(
    strategy: HSplitLoRAStrategy, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the run for everybody."""
    manager = manager_of(StubNode("1", hosts("0", "stranger")))
    with caplog.at_level(logging.WARNING, "hsplit_flwr"):
        told = strategy.configure_fit(server_round=1, parameters=NOTHING, client_manager=manager)
    assert [json.loads(str(ins.config[TASK_KEY]))["client"] for _, ins in told] == ["0"]
    assert "client stranger is left out: planned are ['0', '1', '2']" in caplog.text


def test_only_unplanned_clients_are_an_error_that_lists_both_sides(strategy: HSplitLoRAStrategy) -> None:
    manager = manager_of(StubNode("1", hosts("stranger", "other")))
    expected = r"Expected a client among the planned \['0', '1', '2'\], found \['other', 'stranger'\]"
    with pytest.raises(ConfigError, match=expected):
        strategy.configure_fit(server_round=1, parameters=NOTHING, client_manager=manager)


def test_one_plan_serves_every_client(model: Path) -> None:
    strategy = HSplitLoRAStrategy(GlobalModel(ModelFiles.resolve(str(model))), PLANS["1"], TRAINING)
    manager = manager_of(StubNode("1", hosts("anybody", "else")))
    told = strategy.configure_fit(server_round=1, parameters=NOTHING, client_manager=manager)
    assert [json.loads(str(ins.config[TASK_KEY]))["plan"]["cut"] for _, ins in told] == [2, 2]
    strategy.close()


@pytest.mark.parametrize("cut", [NUM_BLOCKS, NUM_BLOCKS + 3])
def test_a_cut_beyond_the_model_is_refused(model: Path, cut: int) -> None:
    plans = {**PLANS, "2": ClientPlan(cut, LoraSpec())}
    with pytest.raises(ConfigError, match=rf"Expected a cut in 1\.\.3 for this model of 4 blocks, found {cut}"):
        HSplitLoRAStrategy(GlobalModel(ModelFiles.resolve(str(model))), plans, TRAINING)


def test_a_cut_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="Expected a cut >= 1"):
        ClientPlan(0, LoraSpec())
