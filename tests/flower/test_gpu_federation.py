"""A federation on a GPU learns what one on the CPU learns: heads, tail, what travels. Skipped where there is no GPU."""

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
from hsplit_flwr.training.workload import Workload
from tests.helpers.federation import build_one_at_a_time, random_batches
from tests.helpers.grid import ThreadGrid

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
    pytest.mark.timeout(300),
]

SAME = 2e-3
"""relative, of perplexities: both add up in different orders, and AdamW makes much of small gradients' signs"""
ROUGH = 0.05
"""the same where chance (dropout's masks) or a quantised base's kernels differ"""
TRAINING = TrainingConfig(rounds=2, local_steps=4, learning_rate=0.01, warmup_steps=2)
PLANS = {"0": ClientPlan(1, LoraSpec(2, 4.0)), "1": ClientPlan(3, LoraSpec(5, 8.0))}
FROZEN = {"0": ClientPlan(1, LoraSpec(0)), "1": ClientPlan(1, LoraSpec(0))}
DATA = {c: ClientData(random_batches(4, seed=int(c), rows=4), random_batches(1, 10 + int(c))) for c in PLANS}
MODEL = str(tiny_checkpoint())
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bf16 on the wire": {"activation_codec": "bf16", "gradient_codec": "bf16"},
    "int8": {"activation_codec": "int8", "gradient_codec": "int8"},
    "int4": {"activation_codec": "int4_stochastic", "gradient_codec": "int4_stochastic"},
    "a step a part": {"micro_batches": 4, "micro_batches_in_flight": 2, "micro_steps": True},
    "joint": {"joint_steps": True, "micro_batches": 2},
    "four passes": {"tail_passes": 4},
    "kept adapters": {"keep_adapters": True},
    "importance": {"importance_steps": 2, "importance_rows": 2},
    "cache": {"activation_cache_mib": 1},
}


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def run(
    device: str, face: str, training: TrainingConfig, plans: dict[str, ClientPlan], method: str, again: bool
) -> RoundServer:
    files = ModelFiles.resolve(MODEL).quantized_by(method)
    model = GlobalModel(files, device=device)
    options: dict[str, Any] = {
        "config": StrategyConfig(wait_for_nodes_s=5.0, min_nodes=len(plans)),
        "limits": BarrierLimits(start_gate_s=30.0, straggler_limit_s=20.0, step_limit_s=40.0),
        "eval_batches": random_batches(2, seed=20),
        "workload": Workload.of(training, quantization=method, gradient_checkpointing=again),
    }
    if face == "legacy":
        legacy = HSplitLoRAStrategy(model, plans, training, **options)
        run_federation(legacy, [LocalNode(c, [c], MODEL, DATA.__getitem__, quantization=method) for c in plans])
        return legacy.rounds

    def app_of(client: str) -> ClientApp:
        def node(context: Context) -> ClientNode:
            return ClientNode(MODEL, DATA.__getitem__, context, client_ids=[client], quantization=method)

        return client_app(node)

    messages = HSplitLoRAMessageStrategy(model, plans, training, **options)
    messages.start(ThreadGrid({100 + int(c): app_of(c) for c in plans}), None, training.rounds)
    return messages.rounds


def both(
    monkeypatch: pytest.MonkeyPatch,
    face: str,
    training: TrainingConfig,
    plans: dict[str, ClientPlan] = PLANS,
    method: str = "none",
    again: bool = False,
) -> tuple[list[float], list[float]]:
    """Perplexities of the global model and over the clients, round by round: on the GPU, and on the CPU."""
    found = run("cuda", face, training, plans, method, again)
    assert torch.cuda.max_memory_allocated() > 0
    assert found.model.segment.device.type == "cuda"
    with monkeypatch.context() as here:
        here.setattr(torch.cuda, "is_available", lambda: False)
        expected = run("cpu", face, training, plans, method, again)
    for server in (found, expected):
        assert all(len(record.clients) == len(plans) for record in server.history)
        assert not any(record.failures for record in server.history)
    return perplexities(found), perplexities(expected)


def perplexities(server: RoundServer) -> list[float]:
    return [p for r in server.history for p in (r.central_perplexity, r.federated_perplexity) if p is not None]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("face", ["legacy", "messages"])
def test_a_gpu_learns_what_a_cpu_does(monkeypatch: pytest.MonkeyPatch, face: str, options: dict[str, Any]) -> None:
    found, expected = both(monkeypatch, face, replace(TRAINING, **options))
    assert len(expected) == 2 * TRAINING.rounds
    assert found == pytest.approx(expected, rel=SAME)


def test_activations_that_are_computed_again_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = both(monkeypatch, "messages", TRAINING, again=True)
    assert found == pytest.approx(expected, rel=SAME)


def test_frozen_heads_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = both(monkeypatch, "messages", replace(TRAINING, activation_cache_mib=1), FROZEN)
    assert found == pytest.approx(expected, rel=SAME)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"autocast": "bf16"}, {"optimizer": "adamw_8bit"}], ids=str)
def test_what_rounds_or_draws_otherwise_on_a_gpu(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    found, expected = both(monkeypatch, "messages", replace(TRAINING, **options))
    assert found == pytest.approx(expected, rel=ROUGH)


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_a_quantised_base_on_a_gpu(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    found, expected = both(monkeypatch, "messages", TRAINING, method=method)
    assert found == pytest.approx(expected, rel=ROUGH)
