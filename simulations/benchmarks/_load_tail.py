"""The tail of `load.py` in a process of its own: one round of many clients, and what it cost."""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from _child import answer
from _deployment import ROUND, RUN, SEED, Deployment
from _load_heads import activations_of

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment, block_of, linear_shapes, load_segment
from hsplit_flwr.training.activity import TailActivity
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.step import StepReport, StepRequest
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.tail_step import TailTrainer

LIMIT_S = 300.0
ALONE = 30
"""batches to time the tail alone with"""
WORKER, STREAMS, GRPC = "worker", "streams", "grpc"
"""groups of the process's threads: the tail's steps, a thread for every client, and all others, which are gRPC's"""


class Watched:
    """Notes memory, time and CPU seconds at the end of every step, in the tail's own thread."""

    def __init__(self) -> None:
        self.tail: SharedTail | None = None
        self._process = psutil.Process()
        self._first: tuple[dict[str, float], TailActivity] | None = None
        self._last: tuple[dict[str, float], TailActivity] | None = None
        self._resident = 0
        self._steps = self._done = 0

    def begin(self, tail: SharedTail, steps: int) -> None:
        """Watch the round of so many steps that begins."""
        self.tail, self._steps = tail, steps

    def on_step(self, report: StepReport) -> None:
        """Note a step's end; threads only at the first one and the last, since there may be many."""
        assert self.tail
        self._done += 1
        if self._done == 1:
            self._first = self._cpu(), self.tail.activity()
        if self._done == self._steps:
            self._last = self._cpu(), self.tail.activity()
            self._resident = self._process.memory_info().rss

    def figures(self) -> dict[str, Any]:
        """From the end of the first step, by when all are there, to that of the last."""
        assert self._first
        assert self._last
        (cpu, before), (cpu_after, after) = self._first, self._last
        return {
            # By the tail's own clock, which is read with its counts: on busy cores another one was 19 ms off.
            "seconds": sum(after.seconds.values()) - sum(before.seconds.values()),
            "steps": self._done - 1,
            "batches": after.batches - before.batches,
            "computing_s": after.seconds["computing"] - before.seconds["computing"],
            "waiting_s": after.seconds["waiting"] - before.seconds["waiting"],
            "cpu_s": {group: cpu_after[group] - cpu[group] for group in cpu},
            "resident_bytes": self._resident,
        }

    def _cpu(self) -> dict[str, float]:
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        spent = {WORKER: 0.0, STREAMS: 0.0, GRPC: 0.0}
        for task in Path("/proc/self/task").iterdir():
            name = names.get(int(task.name), "")
            group = WORKER if name == "tail-steps" else STREAMS if name.startswith("tail-stream") else GRPC
            spent[group] += _cpu_of(task)
        return spent


def _cpu_of(task: Path) -> float:
    """CPU seconds of a thread, to the nanosecond: many spend less than a tick of psutil's; 0 once it has ended."""
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0


def alone(deployment: Deployment, segment: Segment, adapters: SegmentAdapters, training: TrainingConfig) -> float:
    """CPU seconds of a batch at this tail without clients, called directly."""
    trainer = TailTrainer(segment, adapters, training)
    batches = activations_of(deployment)
    requests = [
        StepRequest(client="0", cut=deployment.cut, run_step=0, activations=hidden, attention_mask=mask, labels=labels)
        for hidden, mask, labels in batches
    ]
    trainer.open_round(SEED)
    trainer.train(requests[:1])
    started = time.thread_time()
    for number in range(ALONE):
        trainer.train([requests[number % len(requests)]])
    return (time.thread_time() - started) / ALONE


def main() -> None:
    """Load the tail, say what it does alone; open the round; at a line, close it and report."""
    order = json.loads(sys.argv[1])
    steps = order.pop("steps")
    deployment = Deployment(**order)
    torch.set_num_threads(1)
    segment = load_segment(deployment.files())
    names = [name for name in linear_shapes(segment) if block_of(name) >= deployment.cut]
    adapters = SegmentAdapters(segment, deployment.lora, names)
    training = TrainingConfig(rounds=1, local_steps=steps, learning_rate=1e-4, importance_steps=0, seed=SEED)
    alone_cpu_s = alone(deployment, segment, adapters, training)
    watched = Watched()
    limits = BarrierLimits(start_gate_s=LIMIT_S, straggler_limit_s=LIMIT_S, step_limit_s=LIMIT_S)
    tail = SharedTail(segment, adapters, training, limits, watched.on_step)
    watched.begin(tail, steps)
    tail.open_training(deployment.clients, concurrency=deployment.heads, adapter_seed=SEED)
    service = TailService(
        tail, lambda have, cut, own: (0, True, {}), RUN, ServiceConfig(reconnect_grace_s=limits.reconnect_grace_s)
    )
    tokens = service.open_round(ROUND, "train", dict.fromkeys(deployment.clients, deployment.cut), 0, steps=steps)
    before = psutil.Process().memory_info().rss
    answer({"address": service.address, "tokens": tokens, "alone_cpu_s": alone_cpu_s})
    sys.stdin.readline()
    threads = psutil.Process().num_threads()
    joined = psutil.Process().memory_info().rss
    answer({"threads": threads, "idle_bytes_per_client": (joined - before) / deployment.heads})
    sys.stdin.readline()
    dropped = tail.close_training()
    traffic = service.traffic.figures()
    service.stop()
    figures = watched.figures()
    answer(
        {
            **figures,
            "bytes_per_client": (figures.pop("resident_bytes") - before) / deployment.heads,
            "dropped": len(dropped),
            "refusals": traffic.refusals,
            "bytes_up": traffic.bytes_up,
            "bytes_down": traffic.bytes_down,
        }
    )


if __name__ == "__main__":
    main()
