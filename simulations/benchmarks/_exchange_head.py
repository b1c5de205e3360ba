"""A head of `exchange.py` in a process of its own: measures its link or trains, task by task."""

import json
import sys
import time
from itertools import islice
from typing import Any

from _child import answer
from _deployment import Deployment
from torch import Tensor

from hsplit_flwr.exchange.grpc_transport import connect
from hsplit_flwr.exchange.positions import BatchForm
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.experiments.work import recorded
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment, load_segment
from hsplit_flwr.planning.budgets.probe import measure_link
from hsplit_flwr.training.head import train_head
from hsplit_flwr.training.host_memory import return_freed_tensors


def probe(task: RoundTask) -> dict[str, Any]:
    """The link as a client measures it."""
    with RemoteTail(task, task.max_frame_bytes, connect) as tail:
        return measure_link(tail.probe)._asdict()


def train(task: RoundTask, head: Segment, adapters: SegmentAdapters, batches: list[dict[str, Tensor]]) -> None:
    """Connect, say so, wait for the parent's word, train, and report; all heads start together."""
    adapters.reset(task.adapter_seed)
    forms: list[list[BatchForm]] = []
    data = list(recorded(batches, forms, task.training.micro_batches))
    with RemoteTail(task, task.max_frame_bytes, connect) as tail:
        tail.fetch_delta(0)
        answer({})
        sys.stdin.readline()
        up, down = tail.bytes_up, tail.bytes_down
        started = time.perf_counter()
        report = train_head(head, adapters, data, tail, task.training)
        seconds = time.perf_counter() - started
        up, down = tail.bytes_up - up, tail.bytes_down - down
    answer(
        {
            "seconds": seconds,
            "compute_s": report.compute_s,
            "exchange_s": report.exchange_s,
            "bytes_up": up,
            "bytes_down": down,
            "forms": forms,
        }
    )


def main() -> None:
    """Load the head; then a task by line."""
    order = json.loads(sys.argv[1])
    client = order.pop("client")
    deployment = Deployment(**order)
    return_freed_tensors()
    head = load_segment(deployment.files(), 0, deployment.cut)
    adapters = SegmentAdapters(head, deployment.lora)
    answer({})
    for line in sys.stdin:
        told = json.loads(line)
        task = RoundTask.from_json(told["task"])
        if task.mode == "probe":
            answer(probe(task))
        else:
            stream = deployment.batches(client, padding_travels=told["padding_travels"])
            train(task, head, adapters, list(islice(stream, task.training.local_steps)))


if __name__ == "__main__":
    main()
