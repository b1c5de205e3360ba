"""A head that trains nothing is sent no gradients, by the plan and not by its own word; nothing else changes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.grpc_transport import ServiceConfig, connect
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.training.batch import part_rows
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.head import TrainReport, train_head
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.workload import Workload
from tests.exchange.test_protocol import no_delta
from tests.helpers.federation import random_batches
from tests.helpers.models import HIDDEN_SIZE, tiny_model

pytestmark = pytest.mark.timeout(60)

CUT, STEPS, ROWS, WIDTH = 2, 4, 4, 10
NONE, LORA = LoraSpec(r=0), LoraSpec(r=2, lora_alpha=4)
CONFIG = TrainingConfig(1, STEPS, 1e-2, warmup_steps=0, importance_steps=1, importance_rows=3)
BATCHES = random_batches(STEPS, seed=0, rows=ROWS, width=WIDTH)


@dataclass
class Seen:
    """What a round of one client makes."""

    report: TrainReport
    tail: dict[str, Tensor]
    tail_importance: dict[str, float]
    bytes_down: int


def play(config: TrainingConfig, lora: LoraSpec = NONE, frozen: Sequence[str] = ("0",), name: str = "llama") -> Seen:
    """Over gRPC."""
    model = tiny_model(name)
    head = segment_from_model(copy.deepcopy(model), 0, CUT)
    whole = segment_from_model(model)
    names = [n for n in whole.linear_modules() if n not in head.linear_modules()]
    adapters = SegmentAdapters(head, lora)
    adapters.reset(5)
    tail = SharedTail(whole, SegmentAdapters(whole, LORA, names), config)
    tail.open_training(["0"], concurrency=1, adapter_seed=77)
    service = TailService(tail, no_delta, "run", ServiceConfig(frames_ahead=1))
    token = service.open_round(1, "train", {"0": CUT}, 0, frozen)["0"]
    task = RoundTask("run", 1, "0", "train", service.address, token, 60.0, 1 << 22, ClientPlan(CUT, lora), config)
    try:
        with RemoteTail(task, 1 << 22, connect) as remote:
            remote.fetch_delta(0)
            report = train_head(head, adapters, BATCHES, remote, config)
    finally:
        service.stop()
        tail.close_training()
    factors = {f"{n}.{side}": getattr(p, side) for n, p in tail.adapters.factors().items() for side in "AB"}
    return Seen(report, factors, tail.importance()["0"] if config.importance_steps else {}, remote.bytes_down)


def predicted_bytes_down(config: TrainingConfig, with_gradient: int) -> int:
    """Of a round in which the first `with_gradient` parts have gradients."""
    workload = Workload.of(config, batch_size=ROWS, sequence_length=WIDTH)
    parts = [
        BatchForm.of(batch["attention_mask"][rows], batch["labels"][rows])
        for batch in BATCHES
        for rows in part_rows(ROWS, config.micro_batches)
    ]
    return len(encode(Header("delta", "run", 1, "0", CUT, version=7))) + sum(
        frame_bytes.step_bytes_down(workload, HIDDEN_SIZE, form, wants_gradient=number < with_gradient)
        for number, form in enumerate(parts)
    )


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, importance_steps=0),
        replace(CONFIG, micro_batches=2),
        replace(CONFIG, micro_batches=2, micro_steps=True),
        replace(CONFIG, tail_passes=2, joint_steps=True),
    ],
    ids=["one measured step", "none", "parts", "micro-steps", "further passes, joint"],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_all_is_learned_without_gradients_that_nobody_uses(config: TrainingConfig, name: str) -> None:
    """A frozen head got a gradient for every step and threw it away."""
    found, before = play(config, name=name), play(config, frozen=(), name=name)
    assert found.report.losses == before.report.losses
    assert found.report.importance == before.report.importance
    assert found.tail_importance == before.tail_importance
    assert bool(found.report.importance) == bool(config.importance_steps)
    assert found.tail.keys() == before.tail.keys()
    assert all(torch.equal(found.tail[key], tensor) for key, tensor in before.tail.items())
    assert any(tensor.any() for key, tensor in found.tail.items() if key.endswith(".B"))
    assert found.bytes_down == predicted_bytes_down(config, with_gradient=config.importance_steps)
    assert before.bytes_down == predicted_bytes_down(config, with_gradient=STEPS * config.micro_batches)


def test_a_head_with_adapters_does_not_train_without_gradients() -> None:
    """Server and client may only differ by a fault: it must not pass for training."""
    with pytest.raises(ExchangeError, match=r"Expected the gradient of step 1, .*found none") as error:
        play(CONFIG, lora=LORA)
    assert error.value.code == "wrong_tensors"
