"""Connections that break, over real gRPC through a proxy that cuts them: who comes back in time loses no step.

What heads and tail learn is bit for bit what they learn when nothing breaks.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.admission import Ticket
from hsplit_flwr.exchange.grpc_transport import ServiceConfig, connect
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.batch import Batch
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.head import TrainReport, score_head, train_head
from hsplit_flwr.training.session import ScoreReply
from hsplit_flwr.training.step import StepReport
from hsplit_flwr.training.tail import SharedTail
from tests.helpers.cuttable_proxy import CuttableProxy
from tests.helpers.models import HIDDEN_SIZE, VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.timeout(120)

CUT, STEPS, ROWS, LENGTH = 2, 4, 4, 6
LORA = LoraSpec(r=2, lora_alpha=4)
CONFIG = TrainingConfig(rounds=1, local_steps=STEPS, learning_rate=1e-2, warmup_steps=0, max_grad_norm=1.0)
IN_PARTS = replace(CONFIG, micro_batches=4, micro_batches_in_flight=3)
MAX_FRAME = 1 << 20
SOON_S = 20.0
CLIENTS = ("a", "b", "c")
DELTA = {f"t{number}": torch.arange(5000.0) for number in range(4)}
State = dict[str, Tensor]


def batches(client: str) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(ord(client))
    while True:
        ids = torch.randint(1, VOCAB_SIZE, (ROWS, LENGTH), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def state_of(adapters: SegmentAdapters, prefix: str) -> State:
    return {f"{prefix}.{i}": parameter.detach().clone() for i, parameter in enumerate(adapters.parameters())}


@dataclass
class Outcome:
    """What a round left."""

    learned: State = field(default_factory=dict)
    reports: dict[str, TrainReport | ExchangeError] = field(default_factory=dict)
    tickets: dict[str, Ticket] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    passed: dict[str, dict[str, int]] = field(default_factory=dict)
    connections: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Round:
    """A tail behind gRPC in an open round, and a proxy before it for every client."""

    tail: SharedTail
    service: TailService
    proxies: dict[str, CuttableProxy]
    tokens: dict[str, str]
    training: TrainingConfig
    grace_s: float
    mode: str = "train"

    def task(self, client: str) -> RoundTask:
        return RoundTask(
            run="run",
            round=1,
            client=client,
            mode=self.mode,  # type: ignore[arg-type]
            address=self.proxies[client].address,
            token=self.tokens[client],
            time_limit_s=60.0,
            max_frame_bytes=MAX_FRAME,
            plan=ClientPlan(CUT, LORA),
            training=self.training,
            reconnect_grace_s=self.grace_s,
        )


@contextmanager
def opened(
    training: TrainingConfig = CONFIG,
    grace_s: float = 20.0,
    on_step: Callable[[StepReport], None] | None = None,
    mode: str = "train",
    clients: tuple[str, ...] = CLIENTS,
) -> Iterator[Round]:
    segment = segment_from_model(tiny_model("llama"), CUT)
    tail = SharedTail(segment, SegmentAdapters(segment, LORA), training, BarrierLimits(30.0, 30.0, 60.0), on_step)
    config = ServiceConfig(
        max_frame_bytes=MAX_FRAME, frames_ahead=training.micro_batches_in_flight - 1, reconnect_grace_s=grace_s
    )
    service = TailService(tail, lambda have, cut, own: (7, True, DELTA), "run", config)
    tokens = service.open_round(1, mode, dict.fromkeys(clients, CUT), 0, steps=STEPS)  # type: ignore[arg-type]
    if mode == "train":
        tail.open_training(clients, len(clients), adapter_seed=7)
    with ExitStack() as stack:
        proxies = {client: stack.enter_context(CuttableProxy(service.address)) for client in clients}
        try:
            yield Round(tail, service, proxies, tokens, training, grace_s, mode)
        finally:
            tail.close_training()
            service.stop()


def train_client(opened_round: Round, client: str, adapters: SegmentAdapters, head: torch.nn.Module) -> TrainReport:
    with RemoteTail(opened_round.task(client), MAX_FRAME, connect) as session:
        delta = session.fetch_delta(0)
        assert (delta.version, delta.tensors.keys()) == (7, DELTA.keys())
        assert all(torch.equal(delta.tensors[name], tensor) for name, tensor in DELTA.items())
        return train_head(head, adapters, batches(client), session, opened_round.training)  # type: ignore[arg-type]


def run(current: Round, disturb: Callable[[], object] = lambda: None) -> Outcome:
    """All clients train; `disturb` runs beside them."""
    outcome = Outcome()
    with ThreadPoolExecutor(len(current.proxies) + 1) as pool:
        heads, adapters = {}, {}
        for client in current.proxies:
            heads[client] = segment_from_model(tiny_model("llama"), 0, CUT)
            adapters[client] = SegmentAdapters(heads[client], LORA)
            adapters[client].reset(ord(client))
        started = time.monotonic()
        futures: dict[str, Future[TrainReport]] = {
            client: pool.submit(train_client, current, client, adapters[client], heads[client])
            for client in current.proxies
        }
        beside = pool.submit(disturb)
        for client, future in futures.items():
            try:
                outcome.reports[client] = future.result(60.0)
            except ExchangeError as error:
                outcome.reports[client] = error
        beside.result(SOON_S)
        outcome.seconds = time.monotonic() - started
    outcome.dropped = current.tail.close_training()
    outcome.tickets = current.service.close_round()
    for client in current.proxies:
        outcome.learned |= state_of(adapters[client], client)
        outcome.passed[client] = dict(current.proxies[client].passed)
        outcome.connections[client] = current.proxies[client].connections
    outcome.learned |= state_of(current.tail.adapters, "tail")
    for number, saved in current.tail.state()["optimizer"]["parameters"].items():
        outcome.learned |= {f"adamw.{number}.{k}": torch.as_tensor(v) for k, v in saved["values"].items()}
    return outcome


@pytest.fixture(scope="module", params=["whole batches", "parts in flight"])
def undisturbed(request: pytest.FixtureRequest) -> tuple[TrainingConfig, Outcome]:
    training = CONFIG if request.param == "whole batches" else IN_PARTS
    with opened(training) as current:
        outcome = run(current)
    assert set(outcome.connections.values()) == {1}
    return training, outcome


def assert_same(found: Outcome, expected: Outcome) -> None:
    """Nothing lost, nothing twice, and nobody was told so."""
    assert found.learned.keys() == expected.learned.keys()
    assert any("exp_avg" in name for name in expected.learned)
    for name, tensor in expected.learned.items():
        assert torch.equal(found.learned[name], tensor), name
    for client, report in expected.reports.items():
        assert isinstance(report, TrainReport)
        got = found.reports[client]
        assert isinstance(got, TrainReport), got
        assert got.losses == report.losses
        counted, due = found.tickets[client], expected.tickets[client]
        assert (counted.steps, counted.tokens, counted.nll) == (due.steps, due.tokens, due.nll)
        assert counted.errors == []
    assert found.dropped == {}


# ---------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("client", ["a", "c"])
def test_cuts_at_any_place_cost_nothing(undisturbed: tuple[TrainingConfig, Outcome], client: str, way: str) -> None:
    """In the handshake, the delta, a frame that goes up and an answer that comes down."""
    training, expected = undisturbed
    total = expected.passed[client][way]
    with opened(training) as current:
        current.proxies[client].cut_at(way, *(int(total * share) for share in (0.0, 0.3, 0.5, 0.65, 0.8, 0.95)))
        found = run(current)
    assert found.connections[client] >= 5
    assert_same(found, expected)


def test_a_cut_of_two_seconds_for_all_costs_five_at_most(undisturbed: tuple[TrainingConfig, Outcome]) -> None:
    """It cost every client its round."""
    training, expected = undisturbed
    at_step_two = threading.Event()

    def note(report: StepReport) -> None:
        at_step_two.set()

    with opened(training, on_step=note) as current:

        def cut_all() -> None:
            assert at_step_two.wait(SOON_S)
            for proxy in current.proxies.values():
                proxy.cut(stay_down=True)
            time.sleep(2.0)
            for proxy in current.proxies.values():
                proxy.mend()

        found = run(current, cut_all)
    assert_same(found, expected)
    assert max(found.connections.values()) > 1
    assert found.seconds < expected.seconds + 2.0 + 5.0


def test_who_stays_away_too_long_loses_its_round_and_nobody_else_does() -> None:
    away_s, at_step_one = 0.5, threading.Event()
    with opened(grace_s=away_s, on_step=lambda report: at_step_one.set()) as current:

        def cut_one() -> None:
            assert at_step_one.wait(SOON_S)
            current.proxies["b"].cut(stay_down=True)

        found = run(current, cut_one)
    lost = found.reports["b"]
    assert isinstance(lost, ExchangeError)
    assert lost.code == "tail_lost"
    assert f"Expected the tail back within {away_s} s" in str(lost)
    assert "[tail_unreachable]" in str(lost)  # and what it found when it tried last
    for client in ("a", "c"):
        assert isinstance(found.reports[client], TrainReport)
        assert (found.tickets[client].steps, found.dropped.get(client, 0)) == (STEPS, 0)
    assert found.tickets["b"].steps < STEPS
    assert found.seconds < SOON_S  # not the straggler limit of every step


def test_a_tail_that_has_not_noticed_the_break_takes_its_client_back() -> None:
    """A half-dead connection locks nobody out: the newest stream counts."""
    with opened() as current:
        expected = run(current)
    at_step_one = threading.Event()
    with opened(on_step=lambda report: at_step_one.set()) as current:

        def break_one_end() -> None:
            assert at_step_one.wait(SOON_S)
            current.proxies["b"].cut(near_only=True)

        found = run(current, break_one_end)
    assert found.connections["b"] == 2
    assert_same(found, expected)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------------- whose token it is


def refused(action: Callable[[], object], code: str) -> None:
    with pytest.raises(ExchangeError, match="Expected") as refusal:
        action()
    assert refusal.value.code == code


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    return torch.randn(ROWS, LENGTH, HIDDEN_SIZE, generator=generator), mask, mask


@pytest.mark.parametrize("own_key", [False, True])
def test_a_stranger_with_a_used_token_stays_out(own_key: bool) -> None:
    """While its owner is connected, and while it is away; the owner goes on."""
    with opened(clients=("a",)) as current:
        task = current.task("a")
        stolen = replace(task, address=current.service.address, reconnect_grace_s=5.0 if own_key else 0.0)
        with RemoteTail(task, MAX_FRAME, connect) as owner:
            owner.fetch_delta(0)
            owner.train_step(0, *batch(0))
            with RemoteTail(stolen, MAX_FRAME, connect) as thief:
                refused(lambda: thief.fetch_delta(0), "unauthenticated")
            current.proxies["a"].cut(stay_down=True)
            with RemoteTail(stolen, MAX_FRAME, connect) as thief:
                refused(lambda: thief.fetch_delta(0), "unauthenticated")
            current.proxies["a"].mend()
            owner.train_step(1, *batch(1))
        with RemoteTail(stolen, MAX_FRAME, connect) as thief:
            refused(lambda: thief.fetch_delta(0), "unauthenticated")
        assert current.service.close_round()["a"].steps == 2


def test_where_nobody_may_come_back_a_cut_costs_the_round() -> None:
    with opened(grace_s=0.0, clients=("a",)) as current, RemoteTail(current.task("a"), MAX_FRAME, connect) as session:
        session.fetch_delta(0)
        session.train_step(0, *batch(0))
        current.proxies["a"].cut()
        with pytest.raises(ExchangeError) as lost:
            session.train_step(1, *batch(1))
        assert lost.value.code == "tail_lost"


def test_a_client_that_answered_its_task_while_away_is_waited_for_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    """Flower says that its process has died: nobody waits for the grace period."""
    caplog.set_level(logging.INFO, "hsplit_flwr")
    with opened(clients=("a", "b")) as current, ThreadPoolExecutor(2) as pool:
        sessions = {client: RemoteTail(current.task(client), MAX_FRAME, connect) for client in ("a", "b")}
        for session in sessions.values():
            session.__enter__()
            session.fetch_delta(0)
        for step in (pool.submit(session.train_step, 0, *batch(0)) for session in sessions.values()):
            step.result(SOON_S)
        current.proxies["a"].cut(stay_down=True)
        waiting = pool.submit(sessions["b"].train_step, 1, *batch(1))
        until(lambda: "the connection of a broke" in caplog.text)
        started = time.monotonic()
        current.service.answered("b")  # connected: nothing changes
        current.service.answered("a")
        waiting.result(SOON_S)
        assert time.monotonic() - started < 10.0
        sessions["b"].close()


# ---------------------------------------------------------------------------------------------- evaluation, probes


def test_cuts_change_no_score() -> None:
    head = segment_from_model(tiny_model("llama"), 0, CUT)

    def score(*cuts: float) -> tuple[ScoreReply, Ticket, int]:
        with opened(mode="evaluate", clients=("a",)) as current:
            for way, total in passed.items():
                current.proxies["a"].cut_at(way, *(int(total * cut) for cut in cuts))
            with RemoteTail(current.task("a"), MAX_FRAME, connect) as session:
                session.fetch_delta(0)
                reply = score_head(head, list(islice(batches("a"), STEPS)), session)
            passed.update(current.proxies["a"].passed)
            return reply, current.service.close_round()["a"], current.proxies["a"].connections

    passed: dict[str, int] = {}
    expected, counted, _ = score()
    found, counted_with_cuts, connections = score(0.4, 0.6, 0.9)
    assert connections >= 4
    assert found == expected
    assert (counted_with_cuts.nll, counted_with_cuts.tokens) == (counted.nll, counted.tokens)


def test_a_probe_is_repeated_after_a_cut(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever ends in good order is not missed."""
    caplog.set_level(logging.INFO, "hsplit_flwr")
    with opened(clients=("a",)) as current:
        token = current.service.open_probe("a", 1)
        task = replace(current.task("a"), mode="probe", token=token, plan=ClientPlan(1, LoraSpec(0)))
        current.proxies["a"].cut_at("down", 30_000)
        with RemoteTail(task, MAX_FRAME, connect) as session:
            session.probe(0, 20_000)
            session.probe(10_000, 20_000)
        assert current.proxies["a"].connections == 2
        with RemoteTail(current.task("a"), MAX_FRAME, connect):
            pass  # says nothing at all
    assert caplog.text.count("the connection of a broke") == caplog.text.count("a is back") <= 1
