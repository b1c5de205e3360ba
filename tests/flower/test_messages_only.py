"""The exchange over Flower's messages: the same run as over gRPC, bit by bit, on both faces; and who fails in it."""

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from hsplit_flwr.errors import ConfigError, RunFailedError
from hsplit_flwr.exchange import message_transport, tail_service, turns
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower import watched_grid
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.local_federation import LocalNode
from hsplit_flwr.flower.message_client import client_app, config_of
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.flower.messages import FRAME_KEY, MORE_KEY, TASK_KEY, TURN_KEY
from hsplit_flwr.flower.server import HSplitLoRAServer
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.planner import PlannerConfig
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.head import HeadTraining
from hsplit_flwr.training.workload import Workload
from tests.helpers.federation import build_one_at_a_time, comparable, random_batches, weights_of
from tests.helpers.grid import Handler, ThreadGrid

pytestmark = pytest.mark.timeout(180)

TRAINING = TrainingConfig(rounds=2, local_steps=3, learning_rate=0.02, warmup_steps=2)
CLIENTS = ("0", "1", "2")
PLANS = {"0": ClientPlan(1, LoraSpec(1, 2.0)), "1": ClientPlan(2, LoraSpec(2, 3.0)), "2": ClientPlan(3, LoraSpec(4))}
DATA = {c: ClientData(random_batches(3, seed=int(c), rows=2 + int(c)), random_batches(3, 10 + int(c))) for c in CLIENTS}
LIMITS = BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0, reconnect_grace_s=0.0)
MODEL = str(tiny_checkpoint())
SERVER = Budget(memory_bytes=8 << 30, flops_per_s=1e12, uplink_bytes_per_s=1e8, downlink_bytes_per_s=1e8, latency_s=0.0)
COSTS = ModelCosts(ModelFiles.resolve(MODEL).config, Workload(batch_size=4, sequence_length=10, local_steps=3))
GRPC, MESSAGES = ServiceConfig(), ServiceConfig(bind="messages://")


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def options(**changes: Any) -> dict[str, Any]:
    limits = {name: changes.pop(name) for name in list(changes) if name in BarrierLimits.__dataclass_fields__}
    return {
        "config": StrategyConfig(wait_for_nodes_s=5.0, **changes),
        "limits": replace(LIMITS, **limits),
        "eval_batches": random_batches(2, seed=20),
    }


def legacy_run(service: ServiceConfig, training: TrainingConfig = TRAINING) -> RoundServer:
    model = GlobalModel(ModelFiles.resolve(MODEL))
    strategy = HSplitLoRAStrategy(model, PLANS, training, service=service, **options())
    server = HSplitLoRAServer(strategy)
    for client in CLIENTS:
        server.client_manager().register(LocalNode(client, [client], MODEL, DATA.__getitem__))
    server.fit(training.rounds, 60.0)
    return strategy.rounds


def message_run(
    service: ServiceConfig,
    training: TrainingConfig = TRAINING,
    grid: ThreadGrid | None = None,
    plans: dict[str, ClientPlan] = PLANS,
    first_rounds: int | None = None,
    **changes: Any,
) -> RoundServer:
    model = GlobalModel(ModelFiles.resolve(MODEL))
    strategy = HSplitLoRAMessageStrategy(model, plans, training, service=service, **options(**changes))
    strategy.start(grid or ThreadGrid(nodes()), num_rounds=first_rounds)
    return strategy.rounds


def app_of(*clients: str, data: Any = DATA.__getitem__, **node_config: Any) -> ClientApp:
    def node(context: Context) -> ClientNode:
        context.node_config.update(node_config)
        return ClientNode(MODEL, data, context, client_ids=clients)

    return client_app(node)


def nodes(**changed: Handler) -> dict[int, Any]:
    """A node for each client; ``c1=...``: what answers for client 1 instead."""
    return {100 + int(c): changed.get(f"c{c}", app_of(c)) for c in CLIENTS}


def assert_equal_runs(run: RoundServer, other: RoundServer) -> None:
    assert comparable(run.history) == comparable(other.history)
    theirs = weights_of(other)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(run).items())


def assert_equal_first_rounds(run: RoundServer, other: RoundServer) -> None:
    """By every figure of theirs, losses and perplexities to the last bit among them."""
    assert comparable(run.history) == comparable(other.history[: len(run.history)])


@pytest.fixture(scope="module")
def over_grpc() -> RoundServer:
    """The run that those over messages are compared with: three clients with unequal cuts and ranks."""
    with pytest.MonkeyPatch.context() as patch:
        build_one_at_a_time(patch, "load_segment", "SegmentAdapters")
        return message_run(GRPC)


# --- the same run ---


@pytest.mark.parametrize("run", [legacy_run, message_run])
def test_a_run_over_messages_is_bit_equal_to_one_over_grpc(run: Any, over_grpc: RoundServer) -> None:
    over_messages = run(MESSAGES)
    assert_equal_runs(over_messages, over_grpc)
    assert all(record.federated_perplexity and not record.failures for record in over_messages.history)
    assert all(c.steps == TRAINING.local_steps for record in over_messages.history for c in record.clients)


def test_so_it_is_with_joint_steps_rounded_codecs_and_a_head_that_trains_nothing() -> None:
    """The tail waits for all, int4 rounds by chance, and by the same chance twice; client 1 gets no gradients."""
    training = replace(
        TRAINING, rounds=1, joint_steps=True, activation_codec="int4_stochastic", gradient_codec="bf16", tail_passes=2
    )
    plans = {**PLANS, "1": ClientPlan(2, LoraSpec(0))}
    assert_equal_runs(*(message_run(service, training, plans=plans) for service in (MESSAGES, GRPC)))


def test_a_delta_of_many_frames_comes_in_several_messages(
    over_grpc: RoundServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_transport, "MESSAGE_BYTES", 9000)
    monkeypatch.setattr(turns, "MESSAGE_BYTES", 9000)
    monkeypatch.setattr(tail_service, "packed", lambda tensors: [{name: t} for name, t in tensors.items()] or [{}])
    grid = ThreadGrid(nodes())
    run = message_run(MESSAGES, grid=grid, first_rounds=1)
    (record,), (theirs, _) = run.history, over_grpc.history
    assert record.federated_perplexity == theirs.federated_perplexity
    parts = [message for message in grid.sent if config_of(message).get(MORE_KEY)]
    assert len(parts) > 5
    frames = [[v for k, v in config_of(message).items() if k.startswith(FRAME_KEY)] for message in grid.sent]
    assert all(len(said) < 2 or sum(map(len, said)) <= 9000 for said in frames)


def test_a_process_that_ends_before_its_work_is_done_costs_nothing(
    over_grpc: RoundServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each training message of client 1 finds an actor that dies while the head computes, then a living one."""
    monkeypatch.setattr(watched_grid, "RETRY_S", 0.01)
    app, step = app_of("1"), HeadTraining.step
    dead: set[str] = set()
    dying: set[int] = set()

    def step_or_die(training: HeadTraining, *batch: Any) -> None:
        if threading.get_ident() in dying:
            raise RuntimeError("killed")
        step(training, *batch)

    def mortal(message: Message, context: Context) -> Message:
        told = config_of(message)
        turn = f"{hash(told.get(TASK_KEY))} {told.get(TURN_KEY, 1)}"
        if message.metadata.message_type != "train" or turn in dead:
            return app(message, context)
        dead.add(turn)
        dying.add(threading.get_ident())
        try:
            return app(message, context)
        except RuntimeError:
            return Message(Error(code=0, reason="<class 'ray.exceptions.ActorDiedError'>"), reply_to=message)
        finally:
            dying.discard(threading.get_ident())

    monkeypatch.setattr(HeadTraining, "step", step_or_die)
    grid = ThreadGrid(nodes(c1=mortal))
    assert_equal_first_rounds(message_run(MESSAGES, grid=grid, first_rounds=1), over_grpc)
    assert len(dead) == TRAINING.local_steps + 2


def test_a_message_that_is_sent_again_changes_nothing(over_grpc: RoundServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor of Flower's simulation that dies after its work, before its answer: the message goes to another one."""
    monkeypatch.setattr(watched_grid, "RETRY_S", 0.01)
    asked = itertools.count()
    grid = ThreadGrid(nodes(c1=dying_every_third_time(app_of("1"), asked)))
    assert_equal_first_rounds(message_run(MESSAGES, grid=grid, first_rounds=1), over_grpc)
    assert next(asked) > 10


def test_nor_does_it_where_adapters_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round that is played again goes on from the round before, not from what it left itself."""
    monkeypatch.setattr(watched_grid, "RETRY_S", 0.01)
    training = replace(TRAINING, keep_adapters=True)
    grid = ThreadGrid(nodes(c1=dying_every_third_time(app_of("1"), itertools.count())))
    assert_equal_runs(message_run(MESSAGES, training, grid), message_run(GRPC, training))


def dying_every_third_time(app: ClientApp, asked: Iterator[int]) -> Handler:
    def handle(message: Message, context: Context) -> Message:
        reply = app(message, context)
        if next(asked) % 3 != 2 or message.metadata.message_type == "query":
            return reply
        return Message(Error(code=0, reason="<class 'ray.exceptions.ActorDiedError'>"), reply_to=message)

    return handle


# --- who fails ---


def failing_at(turn: int, app: ClientApp, fail: Callable[[Message], Message]) -> Handler:
    """`app` until turn `turn` of its first training round."""

    def handle(message: Message, context: Context) -> Message:
        is_due = message.metadata.message_type == "train" and config_of(message)[TASK_KEY].count('"round": 1,')
        return fail(message) if is_due and config_of(message).get(TURN_KEY, 1) == turn else app(message, context)

    return handle


def dead(message: Message) -> Message:
    return Message(Error(code=0, reason="disk full"), reply_to=message)


def mute(message: Message) -> Message:
    time.sleep(6.0)
    return dead(message)


def early(message: Message) -> Message:
    figures = ConfigRecord({TURN_KEY: 9, f"{FRAME_KEY}0": b"early"})
    return Message(RecordDict({"config": figures}), reply_to=message)


def wordless(message: Message) -> Message:
    return Message(RecordDict({"config": ConfigRecord({TURN_KEY: 3})}), reply_to=message)


def garbled(message: Message) -> Message:
    return Message(RecordDict({"config": ConfigRecord({TURN_KEY: 3, f"{FRAME_KEY}0": b"?" * 99})}), reply_to=message)


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (dead, "disk full"),
        (mute, "Message Unavailable"),
        (early, r"[wrong_turn] Expected the answer to turn 3, found that to 9"),
        (wordless, "[malformed_frame] Expected frames in a client's message, found none"),
        (garbled, "[malformed_frame] Expected a frame of hsplit_flwr"),
    ],
)
def test_a_client_that_fails_in_the_middle_is_left_out_and_nobody_waits_for_it(fault: Any, line: str) -> None:
    training = replace(TRAINING, rounds=1)
    grid = ThreadGrid(nodes(c1=failing_at(3, app_of("1"), fault)))
    started = time.monotonic()
    changes: dict[str, Any] = {"federated_evaluation": False, "straggler_limit_s": 1.0 if fault is mute else 20.0}
    run = message_run(MESSAGES, training, grid, message_limit_s=4.0 if fault is mute else 300.0, **changes)
    (record,) = run.history
    assert [(client.client_id, client.steps) for client in record.clients] == [("0", 3), ("2", 3)]
    assert len(record.failures) == (2 if fault is mute else 1)  # the other one counts the steps that went without it
    assert all(failure.startswith("client 1: ") for failure in record.failures)
    assert line in record.failures[0]
    assert time.monotonic() - started < LIMITS.straggler_limit_s


def test_a_client_whose_state_is_lost_or_changed_within_a_round_is_told(tmp_path: Path) -> None:
    """0's state-dir is emptied after its first step, 1's cannot be written, and 2 has other data in each message."""
    first, unwritable = tmp_path / "first", tmp_path / "unwritable"
    unwritable.write_text("a file")
    whole, numbers = app_of("0", **{"state-dir": str(first)}), itertools.count()

    def forgetful(message: Message, context: Context) -> Message:
        reply = whole(message, context)
        if config_of(message).get(TURN_KEY) == 3:
            shutil.rmtree(first)
        return reply

    def other_data(client: str) -> ClientData:
        return ClientData(random_batches(3, seed=next(numbers)))

    strange = app_of("2", data=other_data)
    changed: dict[str, Handler] = {"c0": forgetful, "c1": app_of("1", **{"state-dir": str(unwritable)}), "c2": strange}
    with pytest.raises(RunFailedError) as failure:
        message_run(MESSAGES, replace(TRAINING, rounds=1), ThreadGrid(nodes(**changed)), federated_evaluation=False)
    said = str(failure.value)
    assert "client 0: " in said
    assert "[lost_round] Expected a kept round before turn 4 in this client's state-dir, found none" in said
    assert (
        f'Expected a state-dir that can be written, for a round kept with exchange = "messages", found {unwritable}'
        in said
    )
    assert "[not_repeatable] Expected to compute again, bit for bit" in said


# --- what has no sense over messages ---


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"micro_batches": 2}, "micro-batches = 1 .*found 2"),
        ({"micro_steps": True}, "micro-steps = False .*found True"),
        ({"activation_cache_mib": 8}, "activation-cache-mib = 0 .*found 8"),
    ],
)
def test_what_messages_do_not_carry_is_refused(setting: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=rf'Expected {line}.*exchange = "grpc"'):
        message_run(MESSAGES, replace(TRAINING, **setting))


def test_parts_that_the_plan_would_choose_are_refused() -> None:
    planning = AdaptivePlanning(COSTS, SERVER, PlannerConfig(choose=("micro_batches",)))
    with pytest.raises(ConfigError, match=r"micro-batches = 1 .*found 'auto'"):
        HSplitLoRAMessageStrategy(GlobalModel(ModelFiles.resolve(MODEL)), planning, TRAINING, service=MESSAGES)


def test_a_link_that_nobody_states_cannot_be_measured(caplog: pytest.LogCaptureFixture) -> None:
    """Its figures are the node's to state; who states them is planned for as over gRPC."""
    model = GlobalModel(ModelFiles.resolve(MODEL))
    strategy = HSplitLoRAMessageStrategy(
        model, AdaptivePlanning(COSTS, SERVER), replace(TRAINING, rounds=1), service=MESSAGES, **options()
    )
    stated = {"memory-mb": 160, "gflops": 1.0, "uplink-mbps": 8.0, "downlink-mbps": 8.0, "latency-ms": 10.0}
    strategy.start(ThreadGrid({100: app_of("0"), 101: app_of("1", **stated)}))
    assert "left out node 100" in caplog.text
    assert 'found exchange = "messages". State what the node can afford in its node config (uplink-mbps' in caplog.text
    assert [client.client_id for client in strategy.history[0].clients] == ["1"]
