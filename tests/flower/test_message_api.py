"""The Message API's face: the same run as on the legacy face, and what failing clients and nodes do to it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from hsplit_flwr.errors import RunFailedError
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.run_output import RunOutput
from hsplit_flwr.federation.sample_texts import Sample
from hsplit_flwr.flower import watched_grid
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.local_federation import LocalNode
from hsplit_flwr.flower.message_client import client_app
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.flower.messages import TASK_KEY
from hsplit_flwr.flower.server import HSplitLoRAServer
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.flower.watched_grid import WatchedGrid
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.costs.model_costs import ModelCosts
from hsplit_flwr.planning.replanning import AdaptivePlanning
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload
from tests.helpers.federation import build_one_at_a_time, comparable, random_batches, weights_of
from tests.helpers.grid import Handler, ThreadGrid

pytestmark = pytest.mark.timeout(180)

TRAINING = TrainingConfig(rounds=2, local_steps=3, learning_rate=0.02, warmup_steps=2)
CLIENTS = ("0", "1", "2")
PLANS = {"0": ClientPlan(1, LoraSpec(1, 2.0)), "1": ClientPlan(2, LoraSpec(2, 3.0)), "2": ClientPlan(3, LoraSpec(4))}
DATA = {c: ClientData(random_batches(3, seed=int(c), rows=2 + int(c)), random_batches(1, 10 + int(c))) for c in CLIENTS}
EVALUATION = random_batches(2, seed=20)
WORKLOAD = Workload(batch_size=4, sequence_length=10, local_steps=3)
LIMITS = BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0)
MODEL = str(tiny_checkpoint())


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def budgets(client: str, round_number: int) -> Budget:
    memory = (40, 80, 160)[int(client)] * 1_000_000
    return Budget(
        memory_bytes=memory, flops_per_s=1e9, uplink_bytes_per_s=1e6, downlink_bytes_per_s=2e6, latency_s=0.01
    )


def planning() -> AdaptivePlanning:
    server = Budget(
        memory_bytes=8 << 30, flops_per_s=1e12, uplink_bytes_per_s=1e8, downlink_bytes_per_s=1e8, latency_s=0.0
    )
    return AdaptivePlanning(ModelCosts(ModelFiles.resolve(MODEL).config, WORKLOAD), server)


def app_of(*clients: str, with_budgets: bool = False) -> ClientApp:
    def node(context: Context) -> ClientNode:
        return ClientNode(
            MODEL, DATA.__getitem__, context, client_ids=clients, budgets=budgets if with_budgets else None
        )

    return client_app(node)


def options(**config: Any) -> dict[str, Any]:
    return {"config": StrategyConfig(wait_for_nodes_s=5.0, **config), "limits": LIMITS, "eval_batches": EVALUATION}


def message_strategy(plans: Any = PLANS, output: RunOutput | None = None, **config: Any) -> HSplitLoRAMessageStrategy:
    model = GlobalModel(ModelFiles.resolve(MODEL))
    return HSplitLoRAMessageStrategy(model, plans, TRAINING, output=output, **options(**config))


# --- both faces ---


@pytest.mark.parametrize("planned", [False, True], ids=["configured", "planned"])
def test_both_faces_give_bit_equal_runs(planned: bool) -> None:
    legacy = HSplitLoRAStrategy(
        GlobalModel(ModelFiles.resolve(MODEL)), planning() if planned else PLANS, TRAINING, **options()
    )
    server = HSplitLoRAServer(legacy)
    for client in CLIENTS:
        node = LocalNode(client, [client], MODEL, DATA.__getitem__, budgets=budgets if planned else None)
        server.client_manager().register(node)
    server.fit(TRAINING.rounds, 60.0)

    message = message_strategy(planning() if planned else PLANS)
    message.start(ThreadGrid({100 + int(c): app_of(c, with_budgets=planned) for c in CLIENTS}))

    assert comparable(message.history) == comparable(legacy.history)
    assert message.rounds.initial_score == legacy.rounds.initial_score
    assert all(record.federated_perplexity and not record.failures for record in message.history)
    assert bool(message.history[0].plan) == planned
    theirs = weights_of(legacy.rounds)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(message.rounds).items())


def test_one_node_with_three_clients_plays_too() -> None:
    strategy = message_strategy()
    strategy.start(ThreadGrid({1: app_of(*CLIENTS)}))
    assert [[client.client_id for client in record.clients] for record in strategy.history] == [list(CLIENTS)] * 2


def test_results_are_there_after_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    model = GlobalModel(ModelFiles.resolve(MODEL))
    output = RunOutput(model, MODEL, tmp_path / "run", samples=[Sample("name[The Mill] =>", "The Mill.")])
    after_round = output.after_round

    def spy(rounds: Any) -> None:
        after_round(rounds)
        seen.append(json.loads((output.folder / "summary.json").read_text())["rounds"])

    monkeypatch.setattr(output, "after_round", spy)
    strategy = HSplitLoRAMessageStrategy(model, PLANS, TRAINING, output=output, **options())
    strategy.start(ThreadGrid({100 + int(c): app_of(c) for c in CLIENTS}))
    assert seen == [1, 2]
    assert (output.folder / "adapter" / "adapter_model.safetensors").exists()
    assert (output.folder / "merged_model" / "model.safetensors").exists()


# --- what fails ---


def failing(app: ClientApp, error: Callable[[Message], Message | None]) -> Handler:
    """`app`, whose training replies `error` may replace."""

    def handle(message: Message, context: Context) -> Message:
        instead = error(message) if message.metadata.message_type == "train" else None
        return instead or app(message, context)

    return handle


def junk(message: Message) -> Message:
    return Message(RecordDict({"config": ConfigRecord({"client": "1"})}), reply_to=message)


def refusal(message: Message) -> Message:
    return Message(RecordDict({"config": ConfigRecord({"client": "1", "refused": "no room"})}), reply_to=message)


def broken(message: Message) -> Message:
    return Message(Error(code=0, reason="disk full"), reply_to=message)


def pickled(message: Message) -> Message:
    record = ArrayRecord({"a|A": torch_array()})
    record["a|A"].data = b"\x80\x04N."
    figures = ConfigRecord({"client": "1", "tokens": 1, "loss": 1.0, "hsplit-layers": "[]"})
    return Message(RecordDict({"arrays": record, "config": figures}), reply_to=message)


def torch_array() -> Any:
    from flwr.app import Array

    return Array(torch.ones(1).numpy())


@pytest.mark.parametrize(
    ("fault", "line"),
    [(junk, "figures of a trained head"), (refusal, "refused: no room"), (broken, "disk full"), (pickled, "client 1")],
)
def test_a_bad_client_is_left_out_and_nobody_waits_for_it(fault: Any, line: str) -> None:
    """Flower's own loop sees replies when all are in: the others would wait 30 s at the gate."""
    strategy = message_strategy(federated_evaluation=False)
    nodes: dict[int, Any] = {100: app_of("0"), 101: failing(app_of("1"), fault), 102: app_of("2")}
    started = time.monotonic()
    strategy.start(ThreadGrid(nodes), num_rounds=1)
    record = strategy.history[0]
    assert [client.client_id for client in record.clients] == ["0", "2"]
    assert len(record.failures) == 1
    assert record.failures[0].startswith("client 1: ")
    assert line in record.failures[0]
    assert time.monotonic() - started < LIMITS.start_gate_s


def test_a_node_that_flower_does_not_reach_is_a_failure_at_once() -> None:
    again = message_strategy(federated_evaluation=False, round_limit_s=45.0)
    again.nodes.refresh(ThreadGrid({100 + int(c): app_of(c) for c in CLIENTS}))  # knows all three; then one is gone
    lost = ThreadGrid({100 + int(c): app_of(c) for c in CLIENTS}, refused=[102])
    again.start(lost, num_rounds=1)
    assert [client.client_id for client in again.history[0].clients] == ["0", "1"]
    assert again.history[0].failures == ("client 2: no answer within round-limit-s = 45 s",)


def test_a_run_in_which_nobody_finished_has_failed() -> None:
    strategy = message_strategy(federated_evaluation=False)
    nodes: dict[int, Any] = {100 + int(c): failing(app_of(c), broken) for c in CLIENTS}
    with pytest.raises(RunFailedError, match=r"found none in 2 rounds.*disk full"):
        strategy.start(ThreadGrid(nodes))


def test_a_node_that_answers_junk_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def mute(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query":
            return Message(RecordDict({"config": ConfigRecord({"hsplit-clients": "no json"})}), reply_to=message)
        raise AssertionError("nobody lives here")

    strategy = message_strategy(federated_evaluation=False)
    strategy.start(ThreadGrid({100: app_of("0"), 101: mute}), num_rounds=1)
    assert [client.client_id for client in strategy.history[0].clients] == ["0"]
    assert "left out node 101" in caplog.text


# --- a simulation's dead actor ---


def actor_died(message: Message) -> Message:
    return Message(Error(code=0, reason="<class 'ray.exceptions.ActorDiedError'>:<The actor died>"), reply_to=message)


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Message, Message | None]]:
    monkeypatch.setattr(watched_grid, "RETRY_S", 0.01)
    return []


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def question() -> Message:
    return Message(RecordDict({"config": ConfigRecord({TASK_KEY: "x"})}), 1, "train", ttl=60.0, group_id="1")


def test_a_message_to_a_dead_actor_is_sent_again(replies: list[tuple[Message, Message | None]]) -> None:
    left = [actor_died, actor_died]
    grid = ThreadGrid({1: lambda message, context: left.pop()(message) if left else echo(message, context)})
    (reply,) = WatchedGrid(grid, lambda *pair: replies.append(pair)).send_and_receive(
        [sent := question()], timeout=30.0
    )
    assert not reply.has_error()
    assert [told is sent for told, _ in replies] == [True] * 3
    assert len(grid.sent) == 3


def test_of_a_client_that_died_at_work_the_first_failure_is_told(replies: list[tuple[Message, Message | None]]) -> None:
    left = [broken, actor_died]
    grid = ThreadGrid({1: lambda message, context: left.pop()(message)})
    (reply,) = WatchedGrid(grid, lambda *pair: replies.append(pair)).send_and_receive([question()], timeout=30.0)
    assert "ActorDiedError" in (reply.error.reason or "")


def test_a_grid_is_not_waited_for_longer_than_the_timeout() -> None:
    def slow(message: Message, context: Context) -> Message:
        time.sleep(3.0)
        return echo(message, context)

    started = time.monotonic()
    assert list(WatchedGrid(ThreadGrid({1: slow}), lambda *_: None).send_and_receive([question()], timeout=0.3)) == []
    assert time.monotonic() - started < 2.0
