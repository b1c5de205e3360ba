"""Is the cost model right? What `ModelCosts` predicts from the config against what real heads do.

    python simulations/benchmarks/cost_model.py --json OUT [--quick | --passes]

One row for each head (model, cut, ranks, batch, gradient checkpointing, a quantised base, dropout, autocast):

* memory: growth of a fresh client process' peak resident memory (VmHWM) over the same process idle. It has imported
  everything and been through one smallest round (cut 1, 1 x 4 tokens), so that libraries, threads and channels are up:
  a `Budget` excludes what the idle client takes. It loads its weights, trains for three steps over gRPC and returns its
  adapters; the other end answers with random gradients. Beside a quantised base stands as much of earlier rounds as
  there may be. Two threads, started as `host_memory` recommends (set
  GLIBC_TUNABLES or OMP_NUM_THREADS yourself to measure something else). glibc's heap depends on the addresses that
  the system deals out, by up to 10 % from run to run for small models: the median of `--repeats` runs counts.
* FLOPs: `torch.utils.flop_counter` around a real step of the head, and of the tail behind it
* bytes: the frames that passed, and the arrays of Flower's `Parameters`

``worst_relative_error`` has the keys ``memory`` (target <= 0.10), ``flops`` (<= 0.05) and ``wire_bytes`` (0). What a
process takes beside its tensors is measured, not derived: rows with ``held_out`` true had no part in that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from _memory_process import batches
from _models import MODELS
from _provenance import provenance
from _step_flops import head_flops, tail_flops
from torch import Tensor

from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import load_segment
from hsplit_flwr.planning.costs.model_costs import ModelCosts, Workload
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.host_memory import CLIENT_TUNABLES
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession

SEED = 0
STEPS = 3
PROCESS = {"GLIBC_TUNABLES": CLIENT_TUNABLES, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
"""environment of a measured process. Passive: on busy cores, threads that spin take three times as long"""
POINT_LIMIT_S = 900.0
WARM_UP, CLIENT = "warm-up", "client"


@dataclass(frozen=True)
class Point:
    """One row: a head, its adapters, its batches."""

    model: str
    cut: int
    rank: int
    batch_size: int
    length: int
    checkpointing: bool = False
    targets: tuple[str, ...] | str = "all-linear"
    dtype: str = "fp32"
    quantization: str = "none"
    lora_dropout: float = 0.0
    autocast: str = "none"

    @property
    def workload(self) -> Workload:
        """What is trained on."""
        return Workload.of(
            self.training,
            batch_size=self.batch_size,
            sequence_length=self.length,
            dtype=self.dtype,
            quantization=self.quantization,
            gradient_checkpointing=self.checkpointing,
        )

    @property
    def training(self) -> TrainingConfig:
        """How it is trained on."""
        return TrainingConfig(
            rounds=1,
            local_steps=STEPS,
            learning_rate=1e-4,
            seed=SEED,
            lora_dropout=self.lora_dropout,
            autocast=self.autocast,
        )

    @property
    def how(self) -> str:
        """What is not plain about the head, in a word."""
        dropout = f"dropout {self.lora_dropout:g}" if self.lora_dropout else ""
        autocast = f"autocast {self.autocast}" if self.autocast != "none" else ""
        said = [self.quantization, dropout, autocast, "checkpointed" if self.checkpointing else ""]
        return ", ".join(word for word in said if word not in ("", "none")) or "plain"

    @property
    def counted(self) -> bool:
        """Whether its FLOPs are counted: where passes are plain. Torch's counter knows no product of bitsandbytes."""
        return (self.quantization, self.lora_dropout, self.autocast) == ("none", 0.0, "none")

    def files(self) -> ModelFiles:
        """The base model, held as the point says."""
        return ModelFiles.resolve(MODELS[self.model]()).quantized_by(self.quantization)

    @property
    def lora(self) -> LoraSpec:
        """The head's adapters."""
        return LoraSpec(self.rank, 2.0 * self.rank, self.targets)


TINY, SMOL = "tiny-gpt2", "smollm2-135m"
CALIBRATION = (
    Point(TINY, 1, 8, 8, 64),
    Point(TINY, 2, 2, 4, 128),
    Point(TINY, 4, 8, 8, 64),
    Point(TINY, 4, 8, 8, 64, True),
    Point(TINY, 5, 32, 16, 64),
    Point(TINY, 5, 8, 8, 64, False, ("c_attn",)),
    Point(TINY, 6, 4, 8, 96, True),
    Point(TINY, 7, 16, 8, 128),
    Point(TINY, 7, 16, 1, 16),
    Point(SMOL, 1, 8, 8, 64),
    Point(SMOL, 4, 8, 8, 64),
    Point(SMOL, 4, 8, 8, 64, True),
    Point(SMOL, 8, 4, 4, 128),
    Point(SMOL, 10, 8, 8, 64, False, ("q_proj", "v_proj")),
    Point(SMOL, 15, 16, 8, 64),
    Point(SMOL, 15, 16, 8, 64, True),
    Point(SMOL, 15, 64, 1, 16),
    Point(SMOL, 22, 8, 2, 128),
)
"""on which the measured constants of `costs/memory.py` were set"""
HELD_OUT = (
    Point(TINY, 2, 8, 16, 96, True),
    Point(TINY, 3, 4, 8, 32),
    Point(TINY, 6, 24, 4, 160),
    Point(TINY, 7, 8, 8, 64, True),
    Point(SMOL, 3, 16, 16, 64),
    Point(SMOL, 5, 8, 8, 64, False, ("down_proj",)),
    Point(SMOL, 6, 8, 2, 256, True),
    Point(SMOL, 12, 2, 8, 32),
    Point(SMOL, 24, 8, 8, 32, True),
)
"""on which they were only tried"""
PASSES = (
    Point(TINY, 7, 16, 8, 128, dtype="bf16", quantization="nf4"),
    Point(SMOL, 4, 8, 8, 64, dtype="bf16", quantization="nf4"),
    Point(SMOL, 15, 16, 8, 64, dtype="bf16", quantization="nf4"),
    Point(SMOL, 15, 16, 8, 64, True, dtype="bf16", quantization="nf4"),
    Point(SMOL, 15, 16, 8, 64, dtype="bf16", quantization="int8"),
    Point(TINY, 7, 16, 8, 128, lora_dropout=0.1),
    Point(SMOL, 4, 8, 8, 64, lora_dropout=0.1),
    Point(SMOL, 15, 16, 8, 64, lora_dropout=0.1),
    Point(SMOL, 15, 16, 8, 64, True, lora_dropout=0.1),
    Point(TINY, 7, 16, 8, 128, autocast="bf16"),
    Point(SMOL, 4, 8, 8, 64, autocast="bf16"),
    Point(SMOL, 15, 16, 8, 64, autocast="bf16"),
    Point(SMOL, 15, 16, 8, 64, True, autocast="bf16"),
)
"""a quantised base, dropout and autocast, on which they were only tried, too"""
QUICK = (
    Point(TINY, 4, 8, 8, 64),
    Point(TINY, 7, 16, 8, 128),
    Point(SMOL, 4, 8, 8, 64),
    Point(SMOL, 8, 4, 4, 128, True),
)


class RandomGradients(TailSession):
    """Stands in for the tail, which the head's memory has nothing to do with: answers with noise."""

    def __init__(self, files: ModelFiles) -> None:
        config = files.config.get_text_config()
        self.segment = SimpleNamespace(hidden_size=config.hidden_size, vocab_size=config.vocab_size)

    def join(self, client: str, cut: int, first_step: int, *, trains: bool = True) -> "RandomGradients":
        """It is its own session."""
        return self

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """See `TailSession`."""
        self._reply = StepReply(1e-3 * torch.randn_like(activations), 1.0, labels.numel())

    def receive_part(self) -> StepReply:
        """See `TailSession`."""
        return self._reply

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        raise NotImplementedError

    def close(self) -> None:
        """See `TailSession`."""


def ranks_of(point: Point, costs: ModelCosts) -> dict[str, int]:
    """Rank of every matrix that gets an adapter."""
    return dict.fromkeys(point.lora.targets(matrix.name for matrix in costs.matrices), point.rank)


def measure_head(point: Point, files: ModelFiles) -> dict[str, Any]:
    """Peak memory and traffic of one head process."""
    service = TailService(
        cast(Any, RandomGradients(files)), lambda have, cut, own: (0, True, {}), "bench", ServiceConfig()
    )
    config = point.training
    cuts = {WARM_UP: 1, CLIENT: point.cut}
    tokens = service.open_round(1, "train", cuts, 0)

    def task(client: str) -> str:
        plan = ClientPlan(cuts[client], point.lora)
        address, token = service.address, tokens[client]
        return RoundTask("bench", 1, client, "train", address, token, POINT_LIMIT_S, 64 << 20, plan, config).to_json()

    order = {
        "model": point.model,
        "workload": asdict(point.workload),
        "warm_up": task(WARM_UP),
        "task": task(CLIENT),
    }
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("_memory_process.py")), json.dumps(order)],
            env={**PROCESS, **os.environ},
            timeout=POINT_LIMIT_S,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        service.stop()
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def memory_row(point: Point, costs: ModelCosts, files: ModelFiles, repeats: int) -> dict[str, Any]:
    """Memory and wire bytes, predicted and measured."""
    ranks = ranks_of(point, costs)
    estimate = costs.head_memory(point.cut, ranks)
    runs = [measure_head(point, files) for _ in range(repeats)]
    peaks = [run["peak_bytes"] for run in runs]
    measured = statistics.median(peaks)
    work = point.workload  # its rows have padding, which the planner's upper bound does not count on
    batch = batches(work, files.config.get_text_config().vocab_size)[0]
    form = BatchForm.of(batch["attention_mask"], batch["labels"])
    predicted_wire = {
        "hello": costs.hello_bytes,
        "step_up": frame_bytes.step_bytes_up(work, costs.hidden_size, form),
        "step_down": frame_bytes.step_bytes_down(work, costs.hidden_size, form),
        "update": costs.update_bytes(point.cut, ranks),
    }
    wire = runs[-1]["wire_bytes"]
    return {
        "memory": {
            "predicted": estimate.total_bytes,
            "measured": measured,
            "relative_error": estimate.total_bytes / measured - 1,
            "parts": asdict(estimate),
            "runs": peaks,
        },
        "wire_bytes": {
            "predicted": predicted_wire,
            "measured": wire,
            "relative_error": max(abs(predicted_wire[key] / wire[key] - 1) for key in wire),
        },
    }


def flops_row(point: Point, costs: ModelCosts, files: ModelFiles) -> dict[str, Any]:
    """FLOPs of head and tail, predicted and counted."""
    ranks = ranks_of(point, costs)
    batch = batches(point.workload, files.config.get_text_config().vocab_size)[0]
    head = load_segment(files, 0, point.cut)
    head.gradient_checkpointing = point.checkpointing
    SegmentAdapters(head, point.lora, head.linear_modules())
    tail = load_segment(files, point.cut)
    SegmentAdapters(tail, point.lora, tail.linear_modules())
    predicted = {"head": costs.head_flops(point.cut, ranks), "tail": costs.tail_flops(point.cut, ranks)}
    counted = {"head": head_flops(head, batch), "tail": tail_flops(tail, batch)}
    errors = {side: predicted[side] / counted[side] - 1 for side in counted}
    worst = max(errors.values(), key=abs)
    return {"flops": {"predicted": predicted, "measured": counted, "relative_error": worst}}


def row_of(point: Point, repeats: int) -> dict[str, Any]:
    """All of one point."""
    files = point.files()
    costs = ModelCosts(files.config, point.workload)
    return {
        "point": asdict(point),
        "held_out": point not in CALIBRATION,
        **memory_row(point, costs, files, repeats),
        **(flops_row(point, costs, files) if point.counted else {}),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true", help="four points instead of the whole grid")
    chosen.add_argument("--passes", action="store_true", help="quantised bases, dropout and autocast alone")
    parser.add_argument("--repeats", type=int, default=1, help="processes per point; the median counts")
    arguments = parser.parse_args()
    rows = []
    print(f"{'model':14}{'cut':>4}{'rank':>5}{'batch':>8}  {'how':20}{'predicted MiB':>15}{'measured MiB':>14}"
          f"{'error':>8}{'FLOPs error':>13}{'bytes error':>13}")  # fmt: skip
    points = QUICK if arguments.quick else PASSES if arguments.passes else (*CALIBRATION, *HELD_OUT, *PASSES)
    for point in points:
        row = row_of(point, arguments.repeats)
        rows.append(row)
        memory, wire = row["memory"], row["wire_bytes"]
        flops = f"{row['flops']['relative_error']:+.2%}" if "flops" in row else "-"
        print(
            f"{point.model:14}{point.cut:>4}{point.rank:>5}{f'{point.batch_size}x{point.length}':>8}  {point.how:20}"
            f"{memory['predicted'] / 2**20:>15.1f}{memory['measured'] / 2**20:>14.1f}{memory['relative_error']:>+8.1%}"
            f"{flops:>13}{wire['relative_error']:>13.2%}",
            flush=True,
        )
    kinds = ("memory", "flops", "wire_bytes")
    worst = {
        key: max(abs(row[key]["relative_error"]) for row in rows if key in row)
        for key in kinds
        if any(key in row for row in rows)
    }
    result: dict[str, Any] = {
        "worst_relative_error": worst,
        "rows": rows,
        "threads_of_heads": int(PROCESS["OMP_NUM_THREADS"]),
        **provenance(SEED),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(", ".join(f"worst {key}: {value:.2%}" for key, value in worst.items()))


if __name__ == "__main__":
    main()
