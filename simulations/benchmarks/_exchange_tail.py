"""The tail of `exchange.py` in a process of its own: opens a round when it is told to, and closes it."""

import json
import sys
from typing import Any

from _child import answer
from _deployment import ROUND, RUN, SEED, Deployment

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.models.segments import Segment, block_of, linear_shapes, load_segment
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.host_memory import return_freed_tensors
from hsplit_flwr.training.step import StepReport
from hsplit_flwr.training.tail import SharedTail

STEP_LIMIT_S = 120.0


class Round:
    """An open round: a tail that trains, and a service that listens everywhere in this process's namespace."""

    def __init__(
        self, deployment: Deployment, adapters: SegmentAdapters, segment: Segment, training: dict[str, Any]
    ) -> None:
        config = TrainingConfig(**training)
        self._reports: list[StepReport] = []
        limits = BarrierLimits(straggler_limit_s=STEP_LIMIT_S, step_limit_s=STEP_LIMIT_S)
        self._tail = SharedTail(segment, adapters, config, limits, self._reports.append)
        self._tail.open_training(deployment.clients, concurrency=deployment.heads, adapter_seed=SEED)
        # The address that it tells is of no use: every head has its own link.
        served = ServiceConfig(
            "0.0.0.0:0",
            "127.0.0.1",
            activation_codec=config.activation_codec,
            gradient_codec=config.gradient_codec,
            frames_ahead=config.micro_batches_in_flight - 1 if config.micro_batches > 1 else 0,
        )
        self._service = TailService(self._tail, lambda have, cut, own: (0, True, {}), RUN, served)
        self.port = int(self._service.address.rpartition(":")[2])
        cuts = dict.fromkeys(deployment.clients, deployment.cut)
        self.tokens = self._service.open_round(ROUND, "train", cuts, 0, steps=config.local_steps)
        self.probe_tokens = {client: self._service.open_probe(client, ROUND) for client in deployment.clients}

    def close(self) -> float:
        """End it; the seconds that the tail computed."""
        self._service.stop()
        self._tail.close_training()
        return sum(report.compute_s for report in self._reports)


def main() -> None:
    """Load the tail; then by line: the training settings open a round, an empty order closes it."""
    deployment = Deployment(**json.loads(sys.argv[1]))
    return_freed_tensors()
    segment = load_segment(deployment.files())
    names = [name for name in linear_shapes(segment) if block_of(name) >= deployment.cut]
    adapters = SegmentAdapters(segment, deployment.lora, names)
    answer({})
    for line in sys.stdin:
        opened = Round(deployment, adapters, segment, json.loads(line))
        answer({"port": opened.port, "tokens": opened.tokens, "probe_tokens": opened.probe_tokens})
        sys.stdin.readline()
        answer({"compute_s": opened.close()})


if __name__ == "__main__":
    main()
