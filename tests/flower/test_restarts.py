"""A SuperNode that is killed and started again at once: what it had been sent is lost, and nobody waits for it.

Flower (1.42) counts such a node as there, and answers the message when its time is over: a run of `faults.py` stood
still for all of round-limit-s, 600 s.
"""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client import Client
from flwr.clientapp import ClientApp
from flwr.server.compat.grid_client_proxy import GridClientProxy

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.roster import NodeAnswer, Roster
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower import nodes, restarts
from hsplit_flwr.flower.client import HSplitLoRAClient
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.message_client import client_app
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.flower.messages import TASK_KEY
from hsplit_flwr.flower.nodes import ask_nodes, wait_for_nodes
from hsplit_flwr.flower.restarts import Restarts, Watched
from hsplit_flwr.flower.server import HSplitLoRAServer
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from tests.helpers.federation import build_one_at_a_time, random_batches
from tests.helpers.grid import Handler, ThreadGrid

pytestmark = pytest.mark.timeout(180)

TRAINING = TrainingConfig(rounds=2, local_steps=3, learning_rate=0.02, warmup_steps=2)
CLIENTS = ("0", "1", "2")
PLANS = {client: ClientPlan(1 + index, LoraSpec(2)) for index, client in enumerate(CLIENTS)}
DATA = {c: ClientData(random_batches(3, seed=int(c)), random_batches(1, 10 + int(c))) for c in CLIENTS}
MODEL = str(tiny_checkpoint())
GATE_S = 3.0
ROUND_LIMIT_S = 120.0


@pytest.fixture(autouse=True)
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")
    monkeypatch.setattr(restarts, "LOOK_S", 0.2)


def message_app(client: str) -> ClientApp:
    return client_app(lambda context: ClientNode(MODEL, DATA.__getitem__, context, client_ids=[client]))


def legacy_app(client: str) -> ClientApp:
    def client_fn(context: Context) -> Client:
        return HSplitLoRAClient(MODEL, DATA.__getitem__, context, client_ids=[client]).to_client()

    return ClientApp(client_fn)


def options() -> dict[str, Any]:
    limits = BarrierLimits(start_gate_s=GATE_S, straggler_limit_s=20.0, step_limit_s=40.0)
    return {"config": StrategyConfig(wait_for_nodes_s=5.0, round_limit_s=ROUND_LIMIT_S), "limits": limits}


def run_messages(grid: ThreadGrid) -> RoundServer:
    strategy = HSplitLoRAMessageStrategy(GlobalModel(ModelFiles.resolve(MODEL)), PLANS, TRAINING, **options())
    strategy.start(grid)
    return strategy.rounds


def run_legacy(grid: ThreadGrid) -> RoundServer:
    strategy = HSplitLoRAStrategy(GlobalModel(ModelFiles.resolve(MODEL)), PLANS, TRAINING, **options())
    server = HSplitLoRAServer(strategy)
    for node in grid.nodes:
        server.client_manager().register(GridClientProxy(node, grid, 1))
    server.fit(TRAINING.rounds, ROUND_LIMIT_S)
    return strategy.rounds


@pytest.fixture
def over() -> Iterator[threading.Event]:
    """The end of the test: then threads end that wait for ever."""
    event = threading.Event()
    yield event
    event.set()


Losing = Callable[[Message, Context, ClientApp], None]
FACES = pytest.mark.parametrize(
    ("run", "app"), [(run_messages, message_app), (run_legacy, legacy_app)], ids=["messages", "legacy"]
)


def losing_a_message(app: ClientApp, grids: list[ThreadGrid], over: threading.Event, trained: bool) -> Handler:
    """A node that dies with the first task it is given, before its app begins or after it has trained."""
    lost: list[Message] = []

    def handle(message: Message, context: Context) -> Message:
        if lost or not restarts.client_of(message):
            return app(message, context)
        lost.append(message)
        if trained:
            app(message, context)
        grids[0].activated[message.metadata.dst_node_id] = "again"
        over.wait()
        raise AssertionError

    return handle


@FACES
@pytest.mark.parametrize("trained", [False, True], ids=["before-it-began", "before-it-answered"])
def test_what_a_restarted_node_lost_costs_its_client_the_round(
    run: Callable[[ThreadGrid], RoundServer], app: Callable[[str], ClientApp], over: threading.Event, trained: bool
) -> None:
    grids: list[ThreadGrid] = []
    apps: dict[int, ClientApp | Handler] = {100 + int(client): app(client) for client in CLIENTS}
    apps[101] = losing_a_message(app("1"), grids, over, trained)
    grids.append(ThreadGrid(apps))
    started = time.monotonic()
    rounds = run(grids[0])
    assert time.monotonic() - started < ROUND_LIMIT_S / 2
    first, second = rounds.history
    assert [client.client_id for client in first.clients] == ["0", "2"]
    assert any("client 1" in line and "its SuperNode was restarted" in line for line in first.failures)
    assert [client.client_id for client in second.clients] == list(CLIENTS)
    assert second.failures == ()


class Clock:
    """Of which a test has the hands."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    monotonic = __call__

    def sleep(self, seconds: float) -> None:
        self.now += seconds


# --- nodes that the SuperLink counts, and that do not answer ---


@pytest.fixture
def roster() -> Roster:
    return Roster()


def test_a_node_that_does_not_answer_is_asked_again_where_it_is_needed(
    roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run went on with one of the two nodes of min-nodes: the other one was about to go."""
    monkeypatch.setattr(nodes, "NODES_POLL_S", 0.0)
    asked: list[list[str]] = []

    def ask(new: list[str]) -> dict[str, NodeAnswer | Exception]:
        asked.append(new)
        mute = ValueError("no answer")
        return {node: mute if node == "2" and len(asked) < 4 else NodeAnswer((f"of-{node}",), 0, {}) for node in new}

    ask_nodes(roster, lambda: ["1", "2"], ask, StrategyConfig(min_nodes=2))
    assert sorted(roster.clients) == ["of-1", "of-2"]
    assert asked == [["1", "2"], ["2"], ["2"], ["2"]]


@pytest.mark.parametrize(("min_nodes", "under_way"), [(1, False), (1, True), (2, True), (2, False)])
def test_a_node_that_never_answers_ends_no_run_that_is_under_way(
    roster: Roster, min_nodes: int, under_way: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor one that is content with the others; a run that asks for it does not begin with fewer, in silence."""
    monkeypatch.setattr(nodes, "NODES_POLL_S", 0.01)
    monkeypatch.setattr(nodes, "ASK_AGAIN_S", 0.1)
    asked: list[str] = []

    def ask(new: list[str]) -> dict[str, NodeAnswer | Exception]:
        asked.extend(new)
        return {node: ValueError("broken") if node == "2" else NodeAnswer((f"of-{node}",), 0, {}) for node in new}

    if under_way:
        roster.update(["1"], {"1": NodeAnswer(("of-1",), 0, {})})
    if min_nodes == 2 and not under_way:
        said = r"at least 2 SuperNodes that say whom they host, found 1 \(node 2: broken\)\. Restart"
        with pytest.raises(ConfigError, match=said):
            ask_nodes(roster, lambda: ["1", "2"], ask, StrategyConfig(min_nodes=min_nodes))
    else:
        ask_nodes(roster, lambda: ["1", "2"], ask, StrategyConfig(min_nodes=min_nodes))
        assert list(roster.clients) == ["of-1"]
    assert caplog.text.count("left out node 2: ValueError('broken')") == 1
    assert (asked.count("2") > 1) == (min_nodes == 2)


# --- nodes that leave ---


def waited_for(
    roster: Roster, monkeypatch: pytest.MonkeyPatch, *online: list[str], min_nodes: int = 3
) -> tuple[list[str], int]:
    """The nodes that `wait_for_nodes` has found, and how often it looked, a second apart, as they come `online`."""
    clock, looks = Clock(), iter(online)
    monkeypatch.setattr(nodes, "time", clock)
    found = wait_for_nodes(roster, lambda: next(looks), StrategyConfig(min_nodes=min_nodes, wait_for_nodes_s=60.0))
    return list(found), round(clock.now) + 1


def known(*names: str) -> dict[str, NodeAnswer]:
    return {name: NodeAnswer((f"of-{name}",), 0, {}) for name in names}


def test_a_run_begins_with_min_nodes(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert waited_for(roster, monkeypatch, [], ["1"], ["1", "2"], ["1", "2", "3"]) == (["1", "2", "3"], 4)
    with pytest.raises(
        ConfigError, match=r"at least 3 SuperNodes within 60 s, found 2\. Start more, or lower min-nodes"
    ):
        waited_for(roster, monkeypatch, *[["1", "2"]] * 100)


def test_a_node_that_stays_away_ends_nobody_s_run(
    roster: Roster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With min-nodes = 3 of three, one that was away for wait-for-nodes-s ended the run for the other two."""
    roster.update(["1", "2", "3"], known("1", "2", "3"))
    found, looks = waited_for(roster, monkeypatch, *[["1", "2"]] * 100)
    assert (found, looks) == (["1", "2"], nodes.ASK_AGAIN_S + 1)
    assert "2 of 3 nodes (min-nodes) are connected: the run goes on" in caplog.text
    roster.update(["1", "2"], {})
    assert waited_for(roster, monkeypatch, ["1", "2"]) == (["1", "2"], 1)  # it is not waited for in every round
    assert waited_for(roster, monkeypatch, ["1", "2", "3"]) == (["1", "2", "3"], 1)


def test_a_node_that_is_started_again_is_waited_for(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    roster.update(["1", "2"], known("1", "2"))
    assert waited_for(roster, monkeypatch, ["1"], ["1"], ["1", "7"], min_nodes=2) == (["1", "7"], 3)


def test_a_run_whose_nodes_have_all_left_waits_for_one_and_ends(
    roster: Roster, monkeypatch: pytest.MonkeyPatch
) -> None:
    roster.update(["1", "2"], known("1", "2"))
    assert waited_for(roster, monkeypatch, *[[]] * 50, ["1"])[0] == ["1"]
    with pytest.raises(ConfigError, match=r"at least 1 SuperNodes within 60 s, found 0\."):
        waited_for(roster, monkeypatch, *[[]] * 100)


# --- which messages are lost ---


def watched(grid: ThreadGrid, heard: set[str], clock: Clock) -> tuple[Restarts, Watched]:
    found = Restarts(grid, heard.__contains__, 60.0, clock)
    return found, Watched(Message(RecordDict(), 1, "train", ttl=600.0, group_id="1"), "0", "first")


def test_a_node_that_came_online_anew_is_given_some_time() -> None:
    grid, clock = ThreadGrid({1: lambda message, context: message}), Clock()
    found, sent = watched(grid, set(), clock)
    times = {}
    for clock.now in range(0, 300, 15):
        if clock.now == 60:
            grid.activated[1] = "again"
        times[clock.now] = found.has_lost(sent)
    assert [now for now, lost in times.items() if lost] == list(range(120, 300, 15))


def test_a_client_that_is_heard_of_has_its_message() -> None:
    """Its node was away for a while, and not its app: a machine that slept, a link that was cut."""
    grid, clock, heard = ThreadGrid({1: lambda message, context: message}), Clock(), {"0"}
    found, sent = watched(grid, heard, clock)
    grid.activated[1] = "again"
    for clock.now in range(0, 200, 20):
        assert not found.has_lost(sent)
    heard.clear()
    for clock.now in range(200, 260, 20):
        assert not found.has_lost(sent)
    clock.now = 260
    assert found.has_lost(sent)


def test_a_node_that_is_away_is_flowers_to_report() -> None:
    grid, clock = ThreadGrid({1: lambda message, context: message}), Clock()
    found, sent = watched(grid, set(), clock)
    grid.nodes.clear()
    for clock.now in range(0, 1000, 20):
        assert not found.has_lost(sent)


def test_what_is_no_task_is_not_watched() -> None:
    question = Message(RecordDict({"config": ConfigRecord({"x": 1})}), 1, "query", ttl=9.0, group_id="0")
    grid = ThreadGrid({1: lambda message, context: message})
    assert TASK_KEY not in question.content["config"]
    assert Restarts(grid, lambda client: False, 0.0).watch(question) == Watched(question, "", "")
