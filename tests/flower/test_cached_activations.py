"""`activation_cache_mib` on both faces: whole runs with frozen heads, to the same weights with fewer bytes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Context
from flwr.clientapp import ClientApp

from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.round_server import RoundServer
from hsplit_flwr.flower.client_node import ClientNode
from hsplit_flwr.flower.local_federation import LocalNode, run_federation
from hsplit_flwr.flower.message_client import client_app
from hsplit_flwr.flower.message_strategy import HSplitLoRAMessageStrategy
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from tests.helpers.federation import build_one_at_a_time, random_batches, weights_of
from tests.helpers.grid import ThreadGrid

pytestmark = pytest.mark.timeout(180)

TRAINING = TrainingConfig(rounds=3, local_steps=2, learning_rate=0.02, warmup_steps=2)
CLIENTS = ("0", "1")
FROZEN = ClientPlan(1, LoraSpec(0))
ALONE = {"0": FROZEN, "1": FROZEN}
WITH_ANOTHER = {"0": FROZEN, "1": ClientPlan(2, LoraSpec(2, 3.0))}
DATA = {c: ClientData(random_batches(2, seed=int(c), rows=3), random_batches(1, 10 + int(c))) for c in CLIENTS}
"""the same batches in every round"""
MODEL = str(tiny_checkpoint())


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def app_of(client: str) -> ClientApp:
    def node(context: Context) -> ClientNode:
        return ClientNode(MODEL, DATA.__getitem__, context, client_ids=[client])

    return client_app(node)


def run(face: str, plans: Mapping[str, ClientPlan], cache_mib: int) -> RoundServer:
    model, training = GlobalModel(ModelFiles.resolve(MODEL)), replace(TRAINING, activation_cache_mib=cache_mib)
    options: dict[str, Any] = {
        "config": StrategyConfig(wait_for_nodes_s=5.0, min_nodes=len(CLIENTS)),
        "limits": BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0),
        "eval_batches": random_batches(2, seed=20),
    }
    if face == "legacy":
        legacy = HSplitLoRAStrategy(model, plans, training, **options)
        run_federation(legacy, [LocalNode(c, [c], MODEL, DATA.__getitem__) for c in CLIENTS])
        return legacy.rounds
    messages = HSplitLoRAMessageStrategy(model, plans, training, **options)
    messages.start(ThreadGrid({100 + int(c): app_of(c) for c in CLIENTS}), None, TRAINING.rounds)
    return messages.rounds


def bytes_up(rounds: RoundServer, client: str) -> list[int]:
    return [record.bytes_up for r in rounds.history for record in r.clients if record.client_id == client]


@pytest.mark.parametrize("plans", [ALONE, WITH_ANOTHER], ids=["all heads frozen", "another trains its blocks"])
@pytest.mark.parametrize("face", ["legacy", "messages"])
def test_a_run_learns_the_same_with_fewer_bytes(face: str, plans: Mapping[str, ClientPlan]) -> None:
    """Where another client trains blocks of the frozen head, its weights change, and what was kept is given up."""
    found, expected = run(face, plans, 1), run(face, plans, 0)
    due = weights_of(expected)
    assert all(torch.equal(weight, due[name]) for name, weight in weights_of(found).items())
    for got, without in zip(found.history, expected.history, strict=True):
        assert got.train_loss == without.train_loss
        assert got.central_perplexity == without.central_perplexity
        assert got.federated_perplexity == without.federated_perplexity
        assert got.importance == without.importance
    first, *others = bytes_up(expected, "0")
    assert others == [first, first]
    if plans is WITH_ANOTHER:
        assert bytes_up(found, "0") == [first, first, first]
        assert bytes_up(found, "1") == bytes_up(expected, "1")
    else:
        once, *again = bytes_up(found, "0")
        assert once == first
        assert max(again) < 0.3 * first
