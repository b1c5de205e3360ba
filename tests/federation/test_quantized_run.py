"""Two rounds on a base in 4 or 8 bits, in this process: heads and server agree, and the result is for that base."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hsplit_flwr.errors import RunFailedError
from hsplit_flwr.federation.client_data import ClientData
from hsplit_flwr.federation.global_model import GlobalModel
from hsplit_flwr.federation.round_config import StrategyConfig
from hsplit_flwr.federation.run_output import RunOutput
from hsplit_flwr.flower.server import HSplitLoRAServer
from hsplit_flwr.flower.strategy import HSplitLoRAStrategy
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.assets import tiny_checkpoint
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import QUANTIZATION_FILE, QuantizedLayer
from hsplit_flwr.models.trained import load_trained
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.workload import Workload
from tests.helpers.federation import Node, build_one_at_a_time, random_batches
from tests.helpers.states import through_disk

pytestmark = pytest.mark.timeout(180)

EXACT = 1e-4
"""largest absolute difference of logits between the run's model and the exported adapter on its base"""
SAME = 1e-5
"""relative, of perplexities: heads on the clients and tail, or the server's whole model"""
TRAINING = TrainingConfig(rounds=2, local_steps=3, learning_rate=0.05, warmup_steps=0)
PLANS = {"0": ClientPlan(1, LoraSpec(2, 4.0)), "1": ClientPlan(3, LoraSpec(5, 8.0))}
BATCHES = random_batches(3, seed=0, rows=4, width=16)
LIMITS = BarrierLimits(start_gate_s=20.0)


class Run:
    """A run with its results."""

    def __init__(self, folder: Path, method: str, delta_rank: int, client_method: str | None = None) -> None:
        self.folder = folder
        self.model = GlobalModel(ModelFiles.resolve(str(tiny_checkpoint())).quantized_by(method))
        output = RunOutput(self.model, str(tiny_checkpoint()), folder, command="flwr run here")
        strategy = HSplitLoRAStrategy(
            self.model,
            PLANS,
            TRAINING,
            tail_lora=LoraSpec(3, 6.0),
            workload=Workload.of(TRAINING, quantization=method, delta_rank=delta_rank),
            config=StrategyConfig(delta_rank=delta_rank),
            limits=LIMITS,
            eval_batches=BATCHES,
        )
        server = HSplitLoRAServer(strategy, output)
        data = ClientData(train=BATCHES, evaluate=BATCHES)
        for client in PLANS:
            server.client_manager().register(
                Node(
                    client,
                    [client],
                    tiny_checkpoint(),
                    lambda client: data,
                    quantization=client_method or method,
                )
            )
        server.fit(num_rounds=TRAINING.rounds, timeout=60.0)
        self.history = strategy.history
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())


@pytest.fixture(autouse=True)
def building_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build_one_at_a_time(monkeypatch, "load_segment", "SegmentAdapters")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=BATCHES[0]["input_ids"], attention_mask=BATCHES[0]["attention_mask"]).logits
    return found


@pytest.mark.parametrize(("method", "delta_rank"), [("nf4", 64), ("nf4", 12), ("int8", 12)])
def test_a_run_trains_beside_the_base_and_its_adapter_is_for_that_base(
    method: str, delta_rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hsplit_flwr")
    run = Run(tmp_path / "run", method, delta_rank)
    for record in run.history:
        assert len(record.clients) == 2
        assert record.federated_perplexity == pytest.approx(record.central_perplexity, rel=SAME)
    assert run.summary["final_perplexity"] < 0.9 * run.summary["initial_perplexity"]

    forms = [run.model.log.total.form(name) for name in run.model.log.total.names()]
    ranks = [form.rank for form in forms if isinstance(form, LoraFactors)]
    lost = run.summary["adapter"]["delta_error"]
    errors = [record.delta_error for record in run.history]
    if delta_rank == 64:
        assert (lost, errors) == (0, [0, 0])
        assert max(ranks) == 2 * (5 + 3)  # two rounds of what a client and the tail trained, exactly
    else:
        assert max(ranks) == 12
        assert errors[0] == 0
        assert errors[1] > 0  # type: ignore[operator]
        assert 0 < lost < 1

    adapter = tmp_path / "run" / "adapter"
    stated = json.loads((adapter / QUANTIZATION_FILE).read_text())
    assert stated["load_in_8bit"] == (method == "int8")
    assert not (tmp_path / "run" / "merged_model").exists()
    assert "no merged model is written" in caplog.text
    card = (adapter / "README.md").read_text()
    assert f"quantised by bitsandbytes ({method})" in card
    assert "quantization_config=quantized" in card
    assert ("of what was trained (relative error)" in card) == (lost > 0)

    base = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint(), dtype=torch.float32, quantization_config=BitsAndBytesConfig.from_dict(stated)
    )
    ours = logits(run.model.segment.model)
    assert (logits(PeftModel.from_pretrained(base, adapter).train()) - ours).abs().max() < EXACT
    assert (logits(load_trained(str(adapter))[0]) - ours).abs().max() < EXACT


def test_a_resumed_server_has_the_same_model(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "nf4", 12)
    again = GlobalModel(ModelFiles.resolve(str(tiny_checkpoint())).quantized_by("nf4"))
    again.load_state(through_disk(run.model.state(), tmp_path))
    assert torch.equal(logits(again.segment.model), logits(run.model.segment.model))
    assert again.delta_error == pytest.approx(run.model.delta_error, rel=1e-6)
    beside = [layer.beside for layer in again.segment.linear_modules().values() if isinstance(layer, QuantizedLayer)]
    assert all(beside)
    assert again.identity == run.model.identity
    assert again.identity != GlobalModel(ModelFiles.resolve(str(tiny_checkpoint()))).identity


def test_a_client_on_another_base_is_told_so(tmp_path: Path) -> None:
    """Its head would train on other weights than those that its adapters are merged into."""
    with pytest.raises(RunFailedError, match=r"quantization = 'nf4', as the server holds it, found 'int8' at client"):
        Run(tmp_path / "run", "nf4", 64, client_method="int8")
