"""The exchange over Flower's messages: the same run as over gRPC, bit by bit, on both faces."""

import json
from typing import Any

import pytest
import torch
from flwr.clientapp import ClientApp

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.local_federation import LocalNode
from hsplit_flwr.flower.message_client import client_app
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.flower.server import HSplitLoRAServer
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from tests.helpers.federation import build_one_at_a_time, random_batches, weights_of
from tests.helpers.grid import ThreadGrid

pytestmark = pytest.mark.timeout(180)

TRAINING = TrainingConfig(rounds=3, local_steps=3, learning_rate=0.02, warmup_steps=2)
CLIENTS = ("0", "1", "2")
PLANS = {"0": ClientPlan(1, LoraSpec(1, 2.0)), "1": ClientPlan(2, LoraSpec(2, 3.0)), "2": ClientPlan(3, LoraSpec(4))}
DATA = {c: ClientData(random_batches(3, seed=int(c), rows=2 + int(c)), random_batches(3, 10 + int(c))) for c in CLIENTS}
LIMITS = BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0, reconnect_grace_s=0.0)
MODEL = str(tiny_checkpoint())
GRPC, MESSAGES = ServiceConfig(), ServiceConfig(bind="messages://")


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def options(**config: Any) -> dict[str, Any]:
    return {
        "config": StrategyConfig(wait_for_nodes_s=5.0, **config),
        "limits": LIMITS,
        "eval_batches": random_batches(2, seed=20),
    }


def legacy_run(service: ServiceConfig, training: TrainingConfig) -> RoundServer:
    strategy = HSplitLoRAStrategy(GlobalModel(ModelFiles.resolve(MODEL)), PLANS, training, service=service, **options())
    server = HSplitLoRAServer(strategy)
    for client in CLIENTS:
        server.client_manager().register(LocalNode(client, [client], MODEL, DATA.__getitem__))
    server.fit(training.rounds, 60.0)
    return strategy.rounds


def message_run(service: ServiceConfig, training: TrainingConfig) -> RoundServer:
    strategy = HSplitLoRAMessageStrategy(
        GlobalModel(ModelFiles.resolve(MODEL)), PLANS, training, service=service, **options()
    )
    strategy.start(ThreadGrid({100 + int(c): app_of(c) for c in CLIENTS}))
    return strategy.rounds


def app_of(*clients: str) -> ClientApp:
    return client_app(lambda context: ClientNode(MODEL, DATA.__getitem__, context, client_ids=clients))


def comparable(history: list[Any]) -> list[dict[str, Any]]:
    """Everything of a run's rounds but seconds."""
    timeless = json.loads(json.dumps([vars(record) for record in history], default=lambda value: vars(value)))
    for record in timeless:
        record.pop("seconds")
        record.pop("steps")
        for client in record["clients"]:
            client.pop("seconds")
    found: list[dict[str, Any]] = timeless
    return found


@pytest.mark.parametrize("run", [legacy_run, message_run])
def test_a_run_over_messages_is_bit_equal_to_one_over_grpc(run: Any) -> None:
    """Three clients with unequal cuts and ranks, three rounds, a tail step per client."""
    over_grpc, over_messages = (run(service, TRAINING) for service in (GRPC, MESSAGES))
    assert comparable(over_messages.history) == comparable(over_grpc.history)
    theirs = weights_of(over_grpc)
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights_of(over_messages).items())
    assert all(record.federated_perplexity and not record.failures for record in over_messages.history)
