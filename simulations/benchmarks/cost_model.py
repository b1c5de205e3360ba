"""Is the cost model right? Predicted against measured: memory, FLOPs and bytes of a client's head.

python simulations/benchmarks/cost_model.py --json OUT
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from _models import MODELS
from torch import Tensor

from hsplit_flwr.costs import ModelCosts, Workload
from hsplit_flwr.exchange import ScoreReply, StepReply
from hsplit_flwr.host_memory import CLIENT_TUNABLES
from hsplit_flwr.lora import LoraSpec
from hsplit_flwr.model_files import ModelFiles
from hsplit_flwr.plan import ClientPlan, RoundTask, TrainingConfig
from hsplit_flwr.tail_service import ServiceConfig, TailService

SEED = 0
STEPS = 3
THREADS = "2"
POINT_LIMIT_S = 300.0


@dataclass(frozen=True)
class Point:
    """One row: a head, its adapters, its batches."""

    model: str
    cut: int
    rank: int
    batch_size: int
    length: int
    checkpointing: bool = False
    targets: str = ""

    @property
    def workload(self) -> Workload:
        return Workload(self.batch_size, self.length, STEPS, gradient_checkpointing=self.checkpointing)

    @property
    def lora(self) -> LoraSpec:
        return LoraSpec(self.rank, 2.0 * self.rank, tuple(self.targets.split()) if self.targets else "all-linear")


class _RandomGradients:
    """Stands in for the tail, which the head's memory has nothing to do with: answers with noise."""

    def __init__(self, files: ModelFiles) -> None:
        config = files.config.get_text_config()
        self.segment = SimpleNamespace(hidden_size=config.hidden_size, vocab_size=config.vocab_size)

    def join(self, client: str, cut: int, first_step: int) -> "_RandomGradients":
        return self

    def train_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> StepReply:
        return StepReply(1e-3 * torch.randn_like(activations), 1.0, labels.numel())

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        raise NotImplementedError

    def close(self) -> None:
        pass


def measure_memory(point: Point) -> dict[str, int]:
    files = ModelFiles.resolve(MODELS[point.model]())
    service = TailService(cast(Any, _RandomGradients(files)), lambda have, cut: (0, True, {}), "bench", ServiceConfig())
    config = TrainingConfig(rounds=1, local_steps=STEPS, learning_rate=1e-4, seed=SEED)
    cuts = {"warm-up": 1, "client": point.cut}
    tokens = service.open_round(1, "train", cuts, 0)
    tasks = {
        client: RoundTask(
            "bench", 1, client, "train", service.address, tokens[client], POINT_LIMIT_S, 256 << 20,
            ClientPlan(cut, point.lora), config,
        ).to_json()
        for client, cut in cuts.items()
    }  # fmt: skip
    order = {
        "model": point.model,
        "workload": asdict(point.workload),
        "warm_up": tasks["warm-up"],
        "task": tasks["client"],
    }
    script = Path(__file__).with_name("_memory_process.py")
    try:
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(order)],
            env={"GLIBC_TUNABLES": CLIENT_TUNABLES, "OMP_NUM_THREADS": THREADS, **os.environ},
            timeout=POINT_LIMIT_S, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        service.stop()
    return json.loads(done.stdout)


if __name__ == "__main__":
    pts = [
        Point("tiny-gpt2", 1, 8, 8, 64),
        Point("tiny-gpt2", 4, 8, 8, 64),
        Point("tiny-gpt2", 4, 8, 8, 64, True),
        Point("tiny-gpt2", 7, 16, 8, 128),
        Point("tiny-gpt2", 7, 16, 1, 16),
        Point("smollm2-135m", 1, 8, 8, 64),
        Point("smollm2-135m", 4, 8, 8, 64),
        Point("smollm2-135m", 4, 8, 8, 64, True),
        Point("smollm2-135m", 15, 16, 8, 64),
        Point("smollm2-135m", 15, 16, 8, 64, True),
        Point("smollm2-135m", 15, 64, 1, 16),
    ]
    for p in pts:
        c = ModelCosts(ModelFiles.resolve(MODELS[p.model]()).config, p.workload)
        e = c.head_memory(p.cut, {m.name: p.rank for m in c.matrices})
        m = measure_memory(p)
        print(
            p,
            {k: round(v / 2**20, 1) for k, v in asdict(e).items()},
            round(e.total_bytes / 2**20, 1),
            "measured",
            round(m["peak_bytes"] / 2**20, 1),
            round(e.total_bytes / m["peak_bytes"], 3),
            m["baseline_bytes"] >> 20,
            flush=True,
        )
