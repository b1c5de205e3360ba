"""The attacker of `hostile.py` on the wire: gRPC streams as an admitted client or a stranger opens them."""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch
from _hostile_server import CUT, HONEST, LORA, MAX_FRAME_BYTES, ROWS, RUN, TRAINING, WIDTH
from torch import Tensor

from hsplit_flwr.exchange.batches import batch_tensors
from hsplit_flwr.exchange.codecs import CODECS
from hsplit_flwr.exchange.frames import Header, encode
from hsplit_flwr.exchange.grpc_transport import METHOD, SERVICE, connect
from hsplit_flwr.exchange.remote_tail import RemoteTail
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.training.config import ClientPlan
from tests.helpers.models import HIDDEN_SIZE, VOCAB_SIZE

STREAM_LIMIT_S = 20.0
"""who is neither answered nor refused by then is held to hang"""
HONEST_LIMIT_S = 60.0


@dataclass
class Tally:
    """What became of an attack's frames or streams. Safe to use from many threads."""

    attempts: int = 0
    accepted_wrong: int = 0
    hangs: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """of what was accepted, or hung"""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def note(self, what: str, code: str) -> None:
        """One attempt and what was said to it: a refusal's code, ``accepted``, ``hang`` or ``ended``."""
        with self._lock:
            self.attempts += 1
            self.refusals[code] += 1
            self.accepted_wrong += code == "accepted"
            self.hangs += code == "hang"
            if code in ("accepted", "hang") and len(self.examples) < 20:
                self.examples.append(f"{code}: {what}")


class Attacker:
    """A channel of the attacker's own; use as a context manager."""

    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(address, options)
        self._call = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")

    def __enter__(self) -> "Attacker":
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()

    def stream(self, token: str, frames: Iterable[bytes], limit_s: float = STREAM_LIMIT_S) -> Any:
        """A stream with this token; iterate for the answers."""
        return self._call(iter(frames), timeout=limit_s, metadata=(("authorization", f"Bearer {token}"),))

    def say(self, token: str, frames: Sequence[bytes], answers: int) -> str:
        """What is said to the last of `frames`: ``accepted`` if more than `answers` came, see `Tally.note`."""
        came = 0
        try:
            for _ in self.stream(token, frames):
                came += 1
        except grpc.RpcError as error:
            status: Any = error
            if status.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return "hang"
            details = str(status.details())
            refused = details[1 : details.index("]")] if details.startswith("[") else status.code().name.lower()
            return "accepted" if came > answers else refused
        return "accepted" if came > answers else "ended"


def header(kind: str, client: str, **fields: Any) -> Header:
    """Of a frame of the open round."""
    return Header(kind, RUN, 1, client, CUT, **fields)


def hello(client: str) -> bytes:
    """The first frame of a stream."""
    return encode(header("hello", client))


def batch(client: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, mask and labels that depend on nothing but the names."""
    generator = torch.Generator().manual_seed(1000 * sum(map(ord, client)) + step)
    activations = torch.randn(ROWS, WIDTH, HIDDEN_SIZE, generator=generator)
    mask = torch.ones(ROWS, WIDTH, dtype=torch.int64)
    mask[1, 4:] = 0
    labels = torch.randint(0, VOCAB_SIZE, (ROWS, WIDTH), generator=generator).masked_fill(mask == 0, -100)
    return activations, mask, labels


def train_frame(client: str, step: int = 0, **tensors: Tensor) -> bytes:
    """A right frame of a batch, but for `tensors` in place of its own."""
    return encode(
        header("train", client, step=step), {**batch_tensors(*batch(client, step), CODECS["fp32"]), **tensors}
    )


def task_of(client: str, address: str, token: str) -> RoundTask:
    """What the server tells a client."""
    plan = ClientPlan(CUT, LORA)
    return RoundTask(RUN, 1, client, "train", address, token, 600.0, MAX_FRAME_BYTES, plan, TRAINING)


class Honest:
    """The client whose round counts."""

    def __init__(self, address: str, token: str) -> None:
        self._tail = RemoteTail(task_of(HONEST, address, token), MAX_FRAME_BYTES, connect)
        self.longest_s = 0.0
        """the longest that it waited for anything"""

    def join(self) -> None:
        """Connect and take part."""
        self._timed(self._tail.__enter__)
        self._timed(lambda: self._tail.fetch_delta(0))

    def step(self, number: int) -> None:
        """Train."""
        self._timed(lambda: self._tail.train_step(number, *batch(HONEST, number)))

    def leave(self) -> None:
        """Say goodbye."""
        self._timed(self._tail.close)

    def _timed(self, action: Any) -> None:
        started = time.monotonic()
        action()
        self.longest_s = max(self.longest_s, time.monotonic() - started)
