"""What splitting costs one client: tokens/s against monolithic PEFT, bytes on the wire, and the head's peak memory.

    python simulations/benchmarks/split_overhead.py --json OUT

One client over gRPC (a head process of its own, the tail in this process) and monolithic PEFT (whole model, in this
process too) train on the same tokens with the same LoRA, alternating block by block in one run on the same cores; while
one computes, the others wait. Columns:

* ``ratio_to_monolithic``: median seconds of a monolithic step / median seconds of a split step (target >= 0.90)
* ``bytes_over_payload``: bytes of both frames of a step / bytes of activations, gradient, mask and labels (<= 1.02)
* ``exchange_ms``: what a step spends neither in the head nor in the tail: encode, transfer, check, wake up
* ``head_peak_over_held``: growth of the head process's peak resident memory over its import baseline / bytes it must
  hold: weights of the segment, adapters, their gradients and AdamW state, and tensors that autograd keeps (<= 1.25)

The head is started as `hsplit_flwr/training/host_memory.py` recommends; set GLIBC_TUNABLES yourself to measure
something else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _models import source_of
from _provenance import provenance
from torch import Tensor

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import block_of, linear_shapes, load_segment
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import ClientPlan, TrainingConfig
from hsplit_flwr.training.host_memory import CLIENT_TUNABLES
from hsplit_flwr.training.step import StepReport
from hsplit_flwr.training.tail import SharedTail

SEED = 0
BLOCKS, WARM_UP = 5, 1
HEAD_LIMIT_S = 1800.0


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    model: str
    cut: int
    batch: int
    length: int
    rank: int
    steps: int
    dtype: str
    device: str
    training: dict[str, Any] = field(default_factory=dict)
    """other fields of `TrainingConfig` than its defaults; codecs that are not named here are those of `dtype`"""


def random_batch(setting: Setting, vocab_size: int) -> dict[str, Tensor]:
    """Random tokens, no padding, loss everywhere: the time and the bytes of a step do not depend on the text."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, vocab_size, (setting.batch, setting.length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def monolithic(setting: Setting, files: ModelFiles, config: TrainingConfig) -> Callable[[], list[float]]:
    """A block of steps of PEFT on the whole model, as a user would write it; returns the seconds of each."""
    import peft
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[setting.dtype]
    model = AutoModelForCausalLM.from_pretrained(files.folder, dtype=dtype).to(setting.device)
    spec = peft.LoraConfig(r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear")
    model = peft.get_peft_model(model, spec)
    model.eval()  # no dropout, as in the split: the same work on both sides
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    batch = {k: v.to(setting.device) for k, v in random_batch(setting, model.config.vocab_size).items()}

    def run_block() -> list[float]:
        seconds = []
        for _ in range(setting.steps):
            started = time.perf_counter()
            optimizer.zero_grad()
            model(**batch, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if setting.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds

    return run_block


class SplitClient:
    """The head in a process of its own, told block by block when to go on."""

    def __init__(self, task: RoundTask, setting: Setting) -> None:
        script = Path(__file__).with_name("_head_process.py")
        order = json.dumps({"task": task.to_json(), "blocks": BLOCKS + WARM_UP, **setting.__dict__})
        self._process = subprocess.Popen(
            [sys.executable, str(script), order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"GLIBC_TUNABLES": CLIENT_TUNABLES, **os.environ},
        )
        self._watchdog = threading.Timer(HEAD_LIMIT_S, self._process.kill)
        self._watchdog.start()
        self._ask("ready")

    def run_block(self) -> list[float]:
        """The seconds of each step of the next block."""
        return [float(s) for s in self._ask("go")["seconds"]]

    def finish(self) -> dict[str, Any]:
        """Bytes and memory of the head."""
        report = self._ask("finish")
        self._process.wait(60)
        return report

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._watchdog.cancel()
        self._process.kill()
        self._process.wait(60)

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the head process ended with exit code {self._process.wait(60)}")
        report: dict[str, Any] = json.loads(line)
        return report


def measure(setting: Setting) -> dict[str, Any]:
    """One row."""
    files = ModelFiles.resolve(source_of(setting.model))
    total = setting.steps * (BLOCKS + WARM_UP)
    codecs = {"activation_codec": setting.dtype, "gradient_codec": setting.dtype}
    config = TrainingConfig(
        rounds=1, local_steps=total, learning_rate=1e-4, seed=SEED, **{**codecs, **setting.training}
    )
    lora = LoraSpec(setting.rank, 2.0 * setting.rank)
    run_monolithic = monolithic(setting, files, config)

    segment = load_segment(files, dtype=DTYPES[setting.dtype], device=setting.device)
    names = [name for name in linear_shapes(segment) if block_of(name) >= setting.cut]
    tail_reports: list[StepReport] = []
    limits = BarrierLimits(straggler_limit_s=HEAD_LIMIT_S)
    tail = SharedTail(segment, SegmentAdapters(segment, lora, names), config, limits, tail_reports.append)
    tail.open_training(["0"], concurrency=1, adapter_seed=SEED)
    service = TailService(
        tail,
        lambda have, cut, own: (0, True, {}),
        "bench",
        ServiceConfig(activation_codec=config.activation_codec, gradient_codec=config.gradient_codec),
    )
    token = service.open_round(1, "train", {"0": setting.cut}, 0)["0"]
    plan = ClientPlan(setting.cut, lora)
    task = RoundTask("bench", 1, "0", "train", service.address, token, HEAD_LIMIT_S, 64 << 20, plan, config)
    client = SplitClient(task, setting)
    try:
        split_s, whole_s = [], []
        for block in range(BLOCKS + WARM_UP):
            whole, split = run_monolithic(), client.run_block()
            if block >= WARM_UP:
                whole_s += whole
                split_s += split
        head = client.finish()
    finally:
        client.kill()
        service.stop()
        tail.close_training()
    steps = len(split_s)
    exchange = [e - r.compute_s for e, r in zip(head["exchange_s"], tail_reports, strict=True)][-steps:]
    tokens = setting.batch * setting.length
    return {
        "model": setting.model,
        "cut": setting.cut,
        "ratio_to_monolithic": statistics.median(whole_s) / statistics.median(split_s),
        "split_tokens_per_s": tokens / statistics.median(split_s),
        "monolithic_tokens_per_s": tokens / statistics.median(whole_s),
        "bytes_over_payload": head["step_bytes"] / head["payload_bytes"],
        "bytes_per_step": head["step_bytes"],
        "exchange_ms": 1000 * statistics.median(exchange),
        "head_peak_over_held": head["peak_bytes"] / sum(head["held_bytes"].values()),
        "head_peak_bytes": head["peak_bytes"],
        "head_held_bytes": head["held_bytes"],
        "steps": steps,
    }


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """SmolLM2-135M at cuts 4 and 15 of 30, the tiny model at 2 and 4 of 8."""
    cuts = {"smollm2-135m": (4, 15), "tiny-gpt2": (2, 4)}
    steps = {"smollm2-135m": arguments.steps, "tiny-gpt2": 4 * arguments.steps}
    for model in arguments.models.split(","):
        for cut in cuts[model]:
            yield Setting(model, cut, 8, 64, 8, steps[model], arguments.dtype, arguments.device)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--models", default="tiny-gpt2,smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, help="steps per block; 5 blocks are measured")
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    rows = []
    print(f"{'model':14}{'cut':>4}{'split tok/s':>13}{'PEFT tok/s':>12}{'ratio':>8}{'bytes/payload':>15}"
          f"{'exchange ms':>13}{'peak/held':>11}")  # fmt: skip
    for setting in settings(arguments):
        row = measure(setting)
        rows.append(row)
        print(
            f"{row['model']:14}{row['cut']:>4}{row['split_tokens_per_s']:>13.0f}{row['monolithic_tokens_per_s']:>12.0f}"
            f"{row['ratio_to_monolithic']:>8.3f}{row['bytes_over_payload']:>15.4f}{row['exchange_ms']:>13.1f}"
            f"{row['head_peak_over_held']:>11.3f}",
            flush=True,
        )
    result = {"rows": rows, **provenance(SEED)}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
