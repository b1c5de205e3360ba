"""What a client takes of a server's delta: no more than its head's linear layers can change."""

import pytest
import torch

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.lora.spec import LoraSpec
from hsplit_flwr.training.config import ClientPlan, TrainingConfig

TASK = RoundTask("run", 1, "0", "train", "", "", 9.0, 1 << 20, ClientPlan(1, LoraSpec()), TrainingConfig())
ROW_BYTES = 400


class Flood:
    """A tail that goes on sending parts of a delta."""

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self.sent = 0

    def send(self, frame: bytes) -> None:
        pass

    def receive(self) -> bytes:
        self.sent += 1
        header = Header("delta", "run", 1, "0", 1, version=1, whole=True, left=self.frames - self.sent)
        return encode(header, {f"replace|m{self.sent}|dense": torch.ones(ROW_BYTES // 4)})

    def close(self) -> None:
        pass


def fetch(flood: Flood, most_bytes: int | None) -> int:
    with RemoteTail(TASK, 1 << 20, lambda *args: flood, most_bytes) as tail:
        return len(tail.fetch_delta(0).tensors)


def test_a_delta_within_the_head_is_taken() -> None:
    assert fetch(Flood(5), 5 * ROW_BYTES) == fetch(Flood(5), None) == 5


@pytest.mark.parametrize("frames", [6, 10**9])
def test_a_delta_without_end_is_refused_as_soon_as_it_is_too_large(frames: int) -> None:
    """A malicious server filled the memory of a client, frame by frame."""
    flood = Flood(frames)
    with pytest.raises(AggregationError, match="at most 2000 bytes, all of the head's linear layers, found 2400"):
        fetch(flood, 5 * ROW_BYTES)
    assert flood.sent == 6
