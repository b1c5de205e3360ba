"""The head of `split_overhead.py` in a process of its own, so that its peak memory is that of a client alone."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# All imports of a client first: the memory baseline is taken after them.
import peft  # noqa: F401
import torch
from _models import source_of
from split_overhead import Setting, random_batch
from torch import Tensor

from hsplit_flwr.exchange.grpc_transport import connect
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import Segment, load_segment
from hsplit_flwr.training.head import train_head
from hsplit_flwr.training.host_memory import return_freed_tensors
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession


def resident_bytes(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def forget_peak() -> None:
    """Let ``VmHWM`` start again from now."""
    Path("/proc/self/clear_refs").write_text("5")


class TimedTail(TailSession):
    """A `TailSession` that notes the seconds and the payload of each step."""

    def __init__(self, tail: RemoteTail) -> None:
        self.tail = tail
        self.exchange_s: list[float] = []
        self.payload_bytes = 0
        self._sent = (0.0, 0)

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        self._sent = time.perf_counter(), labels.numel()
        self.tail.send_part(part, activations, attention_mask, labels)

    def receive_part(self) -> StepReply:
        reply = self.tail.receive_part()
        started, positions = self._sent
        self.exchange_s.append(time.perf_counter() - started)
        assert reply.gradient is not None
        self.payload_bytes = 2 * reply.gradient.nbytes + positions * (1 + 4)  # mask uint8, labels int32
        return reply

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        return self.tail.score_step(step, activations, attention_mask, labels)

    def close(self) -> None:
        self.tail.close()


def answer(report: dict[str, Any]) -> None:
    """One line to the parent."""
    print(json.dumps(report), flush=True)


def blocks_on_demand(batch: dict[str, Tensor], blocks: int, steps: int) -> Iterator[dict[str, Tensor]]:
    """`steps` batches per ``go`` of the parent; a step has ended when the next batch is asked for."""
    for _ in range(blocks):
        assert sys.stdin.readline().strip() == "go"
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            yield batch
            seconds.append(time.perf_counter() - started)
        answer({"seconds": seconds})


def kept_for_backward(head: Segment, batch: dict[str, Tensor]) -> int:
    """Bytes of the tensors that autograd keeps of one forward pass, each storage once, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = head(batch["input_ids"], batch["attention_mask"])  # keeps its graph, and so every storage, alive
    assert hidden.requires_grad
    return sum(kept.values())


def main() -> None:
    """Follow the parent's words: ready, go (once per block), finish."""
    order = json.loads(sys.argv[1])
    task, blocks = RoundTask.from_json(order.pop("task")), order.pop("blocks")
    setting = Setting(**order)
    return_freed_tensors()  # as HSplitLoRAClient does
    files = ModelFiles.resolve(source_of(setting.model))
    files.skeleton()  # transformers imports a model's code when it is first built: part of the baseline too
    forget_peak()
    baseline = resident_bytes("VmRSS")
    head = load_segment(files, 0, setting.cut, dtype=DTYPES[setting.dtype], device=setting.device)
    adapters = SegmentAdapters(head, task.plan.lora)
    adapters.reset(task.adapter_seed)
    batch = random_batch(setting, head.vocab_size)
    assert sys.stdin.readline().strip() == "ready"
    answer({})
    with RemoteTail(task, task.max_frame_bytes, connect) as tail:
        tail.fetch_delta(0)
        timed = TimedTail(tail)
        greeting = tail.bytes_up + tail.bytes_down
        batches = blocks_on_demand(batch, blocks, setting.steps)
        train_head(head, adapters, batches, timed, task.training)
        next(batches, None)  # past its last batch, so that it reports the last block
        step_bytes = (tail.bytes_up + tail.bytes_down - greeting) / (blocks * setting.steps)
    peak = resident_bytes("VmHWM") - baseline
    adapter_bytes = sum(p.nbytes for p in adapters.parameters())
    held = {
        "weights": sum(p.nbytes for p in head.parameters()) - adapter_bytes,
        "adapters": adapter_bytes,
        "gradients": adapter_bytes,
        "adamw": 2 * adapter_bytes,
        "activations": kept_for_backward(head, {k: v.to(setting.device) for k, v in batch.items()}),
    }
    assert sys.stdin.readline().strip() == "finish"
    answer(
        {
            "exchange_s": timed.exchange_s,
            "payload_bytes": timed.payload_bytes,
            "step_bytes": step_bytes,
            "peak_bytes": peak,
            "held_bytes": held,
        }
    )


if __name__ == "__main__":
    main()
