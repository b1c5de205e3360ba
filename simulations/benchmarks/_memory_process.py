"""The head of `cost_model.py` in a fresh process: how far its resident memory grows while it trains."""

import gc
import json
import sys
from dataclasses import replace
from typing import Any

# All imports of a client first: the memory baseline is taken after them.
import peft  # noqa: F401
import torch
from _head_process import forget_peak, resident_bytes
from _models import MODELS
from torch import Tensor

from hsplit_flwr.adapters import SegmentAdapters
from hsplit_flwr.client_head import train_head
from hsplit_flwr.host_memory import return_freed_tensors, trim_heap
from hsplit_flwr.model_files import ModelFiles
from hsplit_flwr.plan import RoundTask
from hsplit_flwr.segments import Segment, load_segment
from hsplit_flwr.tail_client import RemoteTail
from hsplit_flwr.wire import DTYPES
from hsplit_flwr.workload import Workload


def batches(workload: Workload, vocab_size: int) -> list[dict[str, Tensor]]:
    """Random tokens, no padding: as much of everything as the workload allows."""
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, workload.sequence_length)
    drawn = [torch.randint(0, vocab_size, shape, generator=generator) for _ in range(workload.local_steps)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()} for ids in drawn]


def touch(head: Segment) -> None:
    """Bring all weights in: of those mapped from disk, embeddings become resident only as their tokens turn up."""
    for parameter in head.parameters():
        parameter.sum()


def train_round(files: ModelFiles, task: RoundTask, workload: Workload) -> None:
    """What a client does between task and result."""
    head = load_segment(files, 0, task.plan.cut, dtype=DTYPES[workload.dtype])
    head.gradient_checkpointing = workload.gradient_checkpointing
    touch(head)
    with RemoteTail(task, task.max_frame_bytes) as tail:
        tail.fetch_delta(0)
        adapters = SegmentAdapters(head, task.plan.lora, head.linear_modules())
        adapters.reset(task.adapter_seed)
        train_head(head, adapters, batches(workload, head.vocab_size), tail, task.training)


def main() -> None:
    """A smallest round to start the runtime, then the one that counts."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    workload = Workload(**order["workload"])
    warm_up, task = (RoundTask.from_json(order[key]) for key in ("warm_up", "task"))
    return_freed_tensors()  # as HSplitLoRAClient does; leaves GLIBC_TUNABLES alone where it is set
    path = MODELS[order["model"]]()
    train_round(ModelFiles.resolve(path), warm_up, replace(workload, batch_size=1, sequence_length=4))
    gc.collect()
    trim_heap()
    forget_peak()
    baseline = resident_bytes("VmRSS")
    train_round(ModelFiles.resolve(path), task, workload)
    print(json.dumps({"peak_bytes": resident_bytes("VmHWM") - baseline, "baseline_bytes": baseline}), flush=True)


if __name__ == "__main__":
    main()
