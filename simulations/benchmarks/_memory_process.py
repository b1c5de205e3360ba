"""The head of `cost_model.py` in a fresh process: how far its resident memory grows, and what it sends."""

import gc
import json
import sys
from dataclasses import replace
from typing import Any

# All imports of a client first: the memory baseline is taken after them.
import numpy as np
import peft  # noqa: F401
import torch
from _head_process import forget_peak, resident_bytes
from _models import MODELS
from flwr.common import ndarrays_to_parameters
from torch import Tensor

from hsplit_flwr.exchange.grpc_transport import connect
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.lora.deltas import WeightDelta
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.lora.merge import merge_delta
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.quantized import QuantizedLayer
from hsplit_flwr.models.segments import Segment, load_segment
from hsplit_flwr.training.head import train_head
from hsplit_flwr.training.host_memory import return_freed_tensors, trim_heap
from hsplit_flwr.training.workload import Workload


def batches(workload: Workload, vocab_size: int) -> list[dict[str, Tensor]]:
    """Random tokens, one of padding at the end of each row: with padding, models make attention masks."""
    generator = torch.Generator().manual_seed(0)
    shape = (workload.batch_size, workload.sequence_length)
    drawn = [torch.randint(0, vocab_size, shape, generator=generator) for _ in range(workload.local_steps)]
    mask = torch.ones(shape, dtype=torch.int64)
    mask[:, -1] = 0
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)} for ids in drawn]


def touch(head: Segment) -> None:
    """Bring all weights in: of those mapped from disk, embeddings become resident only as their tokens turn up."""
    for parameter in head.parameters():
        parameter.sum()


def let_delta_stand(head: Segment, files: ModelFiles, rank: int) -> None:
    """What earlier rounds have trained stands beside each quantised weight, as much of it as there may be."""
    delta = WeightDelta()
    for name, layer in head.linear_modules().items():
        if isinstance(layer, QuantizedLayer):
            A, B = torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
            delta.add({name: LoraFactors(A, B, 1e-3)})
    merge_delta(head, files, delta, delta.names())


def train_round(files: ModelFiles, task: RoundTask, workload: Workload) -> dict[str, int]:
    """What a client does between task and result; bytes of a step's frames and of the result's arrays."""
    head = load_segment(files, 0, task.plan.cut, dtype=DTYPES[workload.dtype])
    head.gradient_checkpointing = workload.gradient_checkpointing
    touch(head)
    let_delta_stand(head, files, workload.delta_rank)
    with RemoteTail(task, task.max_frame_bytes, connect) as tail:
        tail.fetch_delta(0)
        hello_up, delta_down = tail.bytes_up, tail.bytes_down
        adapters = SegmentAdapters(head, task.plan.lora, head.linear_modules())
        adapters.reset(task.adapter_seed)
        report = train_head(head, adapters, batches(workload, head.vocab_size), tail, task.training)
    arrays = [f.numpy() for factors in adapters.factors().values() for f in (factors.A, factors.B)]
    arrays.append(np.array([report.importance[name] for name in head.linear_modules()], np.float32))
    return {
        "hello": hello_up,
        "step_up": (tail.bytes_up - hello_up) // workload.local_steps,
        "step_down": (tail.bytes_down - delta_down) // workload.local_steps,
        "update": sum(map(len, ndarrays_to_parameters(arrays).tensors)),
    }


def main() -> None:
    """A smallest round to start the runtime, then the one that counts."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    workload = Workload(**order["workload"])
    warm_up, task = (RoundTask.from_json(order[key]) for key in ("warm_up", "task"))
    return_freed_tensors()  # as HSplitLoRAClient does; leaves GLIBC_TUNABLES alone where it is set
    path = MODELS[order["model"]]()

    def files() -> ModelFiles:
        return ModelFiles.resolve(path).quantized_by(workload.quantization)

    train_round(files(), warm_up, replace(workload, batch_size=1, sequence_length=4))
    gc.collect()
    trim_heap()
    forget_peak()
    baseline = resident_bytes("VmRSS")
    wire_bytes = train_round(files(), task, workload)
    peak = resident_bytes("VmHWM") - baseline
    print(json.dumps({"peak_bytes": peak, "baseline_bytes": baseline, "wire_bytes": wire_bytes}), flush=True)


if __name__ == "__main__":
    main()
