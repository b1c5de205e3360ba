"""The tail that `hostile.py` attacks, in a process of its own, so that its memory is a server's alone."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import _repository  # noqa: F401
import torch
from _child import answer
from torch import Tensor

from hsplit_flwr.exchange.grpc_transport import ServiceConfig
from hsplit_flwr.exchange.tail_service import TailService
from hsplit_flwr.lora.delta_update import OwnRound
from hsplit_flwr.lora.segment_adapters import SegmentAdapters
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.models.segments import segment_from_model
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.host_memory import return_freed_tensors
from hsplit_flwr.training.tail import SharedTail
from hsplit_flwr.training.workload import Workload
from tests.helpers.models import tiny_model

CUT, STEPS, ROWS, WIDTH = 2, 3, 2, 6
RUN = "hostile"
MAX_FRAME_BYTES = 1 << 20
HONEST = "honest"
LORA = LoraSpec(2, 4.0)
TRAINING = TrainingConfig(rounds=1, local_steps=STEPS, learning_rate=1e-2, warmup_steps=0)
LIMITS = BarrierLimits(start_gate_s=5.0, straggler_limit_s=2.0, step_limit_s=60.0, reconnect_grace_s=2.0)
PEAK, NOW = "VmHWM", "VmRSS"


def nothing(have: int, cut: int, own: OwnRound | None) -> tuple[int, bool, dict[str, Tensor]]:
    """A run whose weights have not changed yet."""
    return 0, True, {}


class Served:
    """A tail behind gRPC, and its rounds."""

    def __init__(self) -> None:
        return_freed_tensors()
        segment = segment_from_model(tiny_model("llama"), CUT)
        self._tail = SharedTail(segment, SegmentAdapters(segment, LORA), TRAINING, LIMITS)
        config = ServiceConfig(max_frame_bytes=MAX_FRAME_BYTES, reconnect_grace_s=LIMITS.reconnect_grace_s)
        self._service = TailService(self._tail, nothing, RUN, config)

    def open(self, round_number: int, clients: list[str]) -> dict[str, Any]:
        """Admit `clients` to a round; the peak of memory counts from now on."""
        Path("/proc/self/clear_refs").write_text("5")
        tokens = self._service.open_round(
            round_number,
            "train",
            dict.fromkeys(clients, CUT),
            first_step=0,
            steps=STEPS,
            workload=Workload(ROWS, WIDTH),
        )
        self._tail.open_training(clients, 1, adapter_seed=7)  # every round begins alike
        return {"address": self._service.address, "tokens": tokens}

    def close(self) -> dict[str, Any]:
        """End the round: what the tail has learned, what it counted of whom, the most memory that this took."""
        tickets = self._service.close_round()
        self._tail.close_training()
        trained = {client: ticket.steps for client, ticket in tickets.items() if ticket.steps}
        return {"learned": self._learned(), "trained": trained, "peak_bytes": memory_bytes(PEAK)}

    def stop(self) -> None:
        """Let nobody in any more."""
        self._service.stop()

    def _learned(self) -> str:
        """Adapters and AdamW state, as a digest."""
        digest = hashlib.sha256()
        for parameter in self._tail.adapters.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        for key, saved in sorted(self._tail.state()["optimizer"]["parameters"].items()):
            for name, value in sorted(saved["values"].items()):
                digest.update(f"{key} {name}".encode() + torch.as_tensor(value).numpy().tobytes())
        return digest.hexdigest()


def memory_bytes(key: str) -> int:
    """Resident memory of this process, now or its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def main() -> None:
    """One order a line, until there are no more."""
    torch.set_num_threads(1)
    served = Served()
    answer({"now_bytes": memory_bytes(NOW)})
    for line in sys.stdin:
        order = json.loads(line)
        answer(getattr(served, order.pop("do"))(**order))
    served.stop()


if __name__ == "__main__":
    main()
