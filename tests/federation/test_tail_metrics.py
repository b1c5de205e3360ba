"""Metrics and health of a run over real gRPC, scraped over real HTTP while it trains."""

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flwr.common import FitIns, FitRes
from prometheus_client.parser import text_string_to_metric_families

from hsplit_flwr.common.log_lines import JsonLines
from hsplit_flwr.errors import ConfigError, ExchangeError, RunFailedError
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.transport import connect
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.tail_metrics import TailMetrics
from hsplit_flwr.flower.messages import TASK_KEY
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.tail_step import TailTrainer
from tests.helpers.federation import EMPTY, Fit, Node, build_one_at_a_time, manager_of, play_round, random_batches

pytestmark = pytest.mark.timeout(120)

CLIENTS = ("0", "1")
TRAINING = TrainingConfig(rounds=2, local_steps=3, learning_rate=0.01)
LIMITS = BarrierLimits(start_gate_s=20.0, straggler_limit_s=20.0, step_limit_s=40.0)
BATCHES = random_batches(3, seed=0)
Figures = dict[str, float]


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def made(**config: Any) -> HSplitLoRAStrategy:
    return HSplitLoRAStrategy(
        GlobalModel(ModelFiles.resolve(str(tiny_checkpoint()))),
        {client: ClientPlan(2, LoraSpec(2)) for client in CLIENTS},
        TRAINING,
        config=StrategyConfig(wait_for_nodes_s=5.0, **config),
        limits=LIMITS,
        eval_batches=BATCHES[:1],
        metrics_bind="127.0.0.1:0",
    )


@pytest.fixture
def strategy(caplog: pytest.LogCaptureFixture) -> Iterator[HSplitLoRAStrategy]:
    caplog.set_level("INFO")
    strategy = made()
    yield strategy
    strategy.close()


def port_of(strategy: HSplitLoRAStrategy, caplog: pytest.LogCaptureFixture) -> str:
    (line,) = [one.getMessage() for one in caplog.get_records("setup") if "metrics and health" in one.getMessage()]
    return line.rpartition(" ")[2]


def scrape(address: str) -> Figures:
    """As Prometheus reads it: name{labels} -> value."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value for sample in samples}


def health(address: str) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def nodes(fault: Callable[[Fit, FitIns], FitRes] | None = None) -> list[Node]:
    data = ClientData(train=BATCHES, evaluate=BATCHES[:1])
    return [Node(c, [c], tiny_checkpoint(), lambda client: data, fault if c == "1" else None) for c in CLIENTS]


def fresh() -> None:
    """A page is a second old at most."""
    time.sleep(1.1)


def test_a_run_is_seen_from_its_first_moment_to_its_last(
    strategy: HSplitLoRAStrategy, caplog: pytest.LogCaptureFixture
) -> None:
    address = port_of(strategy, caplog)
    assert health(address)[1]["doing"] == "idle"
    assert scrape(address)["hsplit_round"] == 0
    held, go_on = threading.Event(), threading.Event()

    def holding(fit: Fit, ins: FitIns) -> FitRes:
        held.set()
        assert go_on.wait(30)
        return fit(ins)

    manager = manager_of(*nodes(holding))
    playing = threading.Thread(target=play_round, args=(strategy, manager, 1))
    playing.start()
    assert held.wait(30)
    deadline = time.monotonic() + 30
    while (during := health(address)[1])["clients"]["waiting"] < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (during["status"], during["round"], during["rounds"], during["doing"]) == ("ok", 1, 2, "waiting")
    assert during["clients"] == {"to_come": 1, "joined": 1, "waiting": 1}, "client 0 waits at the gate for client 1"
    fresh()
    figures = scrape(address)
    assert figures["hsplit_streams"] == figures["hsplit_admitted_streams_total"] == 1
    assert figures["hsplit_tail_seconds_total waiting"] > 0.5
    assert figures["hsplit_steps_total"] == 0
    go_on.set()
    playing.join(60)
    fresh()
    figures = scrape(address)
    (record,) = strategy.history
    assert figures["hsplit_steps_total"] == TRAINING.local_steps
    assert figures["hsplit_batches_total"] == len(CLIENTS) * TRAINING.local_steps
    assert figures["hsplit_tokens_total"] == figures["hsplit_trained_tokens_total"] == record.tokens
    assert figures["hsplit_admitted_streams_total"] == 2 * len(CLIENTS), "to train and to score"
    assert figures["hsplit_perplexity central"] == pytest.approx(record.central_perplexity)
    assert figures["hsplit_perplexity federated"] == pytest.approx(record.federated_perplexity)
    assert figures["hsplit_best_round"] == 1
    assert figures["hsplit_incidents_total"] == 0
    assert figures["hsplit_tail_ok"] == 1
    assert figures["hsplit_resident_memory_bytes"] > 50e6
    strategy.close()
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(address)


def test_bytes_are_those_of_the_records() -> None:
    strategy = made(federated_evaluation=False)
    played = play_round(strategy, manager_of(*nodes()), 1)
    strategy.close()
    (record,) = strategy.history
    traffic = strategy.rounds.traffic
    assert traffic
    assert traffic.bytes_down == sum(client.bytes_down for client in record.clients) > 0
    uploads = sum(len(tensor) for res in played.results.values() for tensor in res.parameters.tensors)
    assert traffic.bytes_up == sum(client.bytes_up for client in record.clients) - uploads > 0
    assert (traffic.streams, traffic.refusals) == (0, {})


def test_refusals_are_counted_by_their_code(strategy: HSplitLoRAStrategy, caplog: pytest.LogCaptureFixture) -> None:
    address = port_of(strategy, caplog)
    ((_, told), *_) = strategy.configure_fit(1, EMPTY, manager_of(*nodes()))
    tail = RoundTask.from_json(str(told.config[TASK_KEY])).address
    for _ in range(3):
        stream = connect(tail, "a token of nobody", 10.0, 1 << 20)
        with pytest.raises(ExchangeError, match="unauthenticated"):
            stream.receive()
        stream.close()
    fresh()
    assert scrape(address)["hsplit_refusals_total unauthenticated"] == 3
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    refused = [line for line in lines if line["event"] == "refused"]
    assert [line["code"] for line in refused] == ["unauthenticated"] * 3


def test_a_tail_that_cannot_go_on_is_not_healthy(
    strategy: HSplitLoRAStrategy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = port_of(strategy, caplog)

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(TailTrainer, "train", no_memory)
    with pytest.raises(RunFailedError, match="Expected a tail that takes steps"):
        play_round(strategy, manager_of(*nodes()), 1)
    fresh()
    code, told = health(address)
    assert (code, told["status"], told["reason"]) == (503, "failed", "MemoryError('no room')")
    assert scrape(address)["hsplit_tail_ok"] == 0
    assert scrape(address)["hsplit_incidents_total"] == 2


def test_a_step_without_end_is_not_healthy(strategy: HSplitLoRAStrategy, monkeypatch: pytest.MonkeyPatch) -> None:
    train, go_on = TailTrainer.train, threading.Event()

    def late(*arguments: Any, **options: Any) -> Any:
        go_on.wait(30)
        return train(*arguments, **options)

    monkeypatch.setattr(TailTrainer, "train", late)
    metrics = TailMetrics(strategy.rounds, "0", step_limit_s=0.2)
    playing = threading.Thread(target=play_round, args=(strategy, manager_of(*nodes()), 1))
    playing.start()
    deadline = time.monotonic() + 30
    while (found := health(f"http://{metrics.address}"))[0] == 200 and time.monotonic() < deadline:
        time.sleep(0.2)
    go_on.set()
    playing.join(60)
    metrics.stop()
    code, told = found
    assert code == 503
    assert "longer than step-limit-s = 0.2" in told["reason"]


def test_without_its_package_metrics_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    model = GlobalModel(ModelFiles.resolve(str(tiny_checkpoint())))
    with pytest.raises(ConfigError, match=r'found none. Install "hsplit_flwr\[metrics\]"'):
        HSplitLoRAStrategy(model, ClientPlan(2, LoraSpec(2)), TRAINING, metrics_bind="0")
