"""The tail as a client sees it: a `TailSession` over one gRPC stream. Contract: `exchange/frames.py`."""

import queue
import re
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
from torch import Tensor

from hsplit_flwr.errors import ExchangeError
from hsplit_flwr.exchange.frames import (
    Frame,
    Header,
    batch_tensors,
    check_gradient,
    decode,
    encode,
    expect_header,
    probe_filler,
)
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.training.session import ScoreReply, StepReply

_METHOD = "/hsplit_flwr.Tail/Exchange"
_CONNECT_S = 20.0


class DeltaTensors(NamedTuple):
    """A `delta_log.DeltaUpdate` as it comes in, not yet checked against the head."""

    version: int
    whole: bool
    """does not build on what the client holds"""
    tensors: dict[str, Tensor]


class RemoteTail:
    """One client's stream for one round. Use as a context manager; first `fetch_delta`, then the steps.

    Args:
        task: what the Strategy sent.
        max_receive_bytes: the largest frame this client accepts.
        root_certificates: PEM bytes of the authority that signed the tail's certificate; None: no TLS.
    """

    def __init__(self, task: RoundTask, max_receive_bytes: int, connect: Any = None) -> None:
        root_certificates = connect.keywords["root_certificates"] if connect else None
        self._task = task
        self._dtype = DTYPES[task.training.activation_dtype]
        self._max_bytes = max_receive_bytes
        self.bytes_up = 0
        self.bytes_down = 0
        options = [
            ("grpc.max_receive_message_length", max_receive_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if root_certificates is None:
            self._channel = grpc.insecure_channel(task.address, options)
        else:
            credentials = grpc.ssl_channel_credentials(root_certificates)
            self._channel = grpc.secure_channel(task.address, credentials, options)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: Any = None

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ExchangeError: ``tail_unreachable``.
        """
        try:
            grpc.channel_ready_future(self._channel).result(_CONNECT_S)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise ExchangeError(
                "tail_unreachable",
                f"Expected a tail at {self._task.address}, found none within {_CONNECT_S:.0f} s. Check that this "
                "address can be reached from the client (tail-address) and that both sides agree on TLS.",
            ) from None
        stream = self._channel.stream_stream(_METHOD)
        self._replies = stream(
            iter(self._outbox.get, None),
            timeout=self._task.time_limit_s,
            metadata=(("authorization", f"Bearer {self._task.token}"),),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the round and disconnect."""
        self.close()

    def close(self) -> None:
        """See `TailSession`."""
        self._outbox.put(None)
        self._channel.close()

    def fetch_delta(self, have: int) -> DeltaTensors:
        """Say hello; get what is missing between version `have` (0: nothing held) and the server's weights."""
        self._send(self._header("hello", have=have))
        frame = self._receive("delta", 0)
        tensors = dict(frame.tensors)
        for left in reversed(range(frame.header.left)):
            frame = self._receive("delta", 0)
            expect_header(frame.header, left=left)
            tensors |= frame.tensors
        return DeltaTensors(frame.header.version, frame.header.whole, tensors)

    def probe(self, bytes_up: int, bytes_down: int) -> None:
        """Send so many bytes and get so many back; only with a task to ``probe``."""
        self._send(self._header("probe", left=bytes_down), probe_filler(bytes_up))
        self._receive("probe", 0)

    def train_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> StepReply:
        """See `TailSession`."""
        batch = batch_tensors(activations, attention_mask, labels, self._dtype)
        self._send(self._header("train", step=step), batch)
        header, tensors = self._receive("gradient", step)
        gradient = check_gradient(tensors, like=activations, dtype=self._dtype)
        return StepReply(gradient, header.loss, header.tokens)

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        batch = batch_tensors(activations, attention_mask, labels, self._dtype)
        self._send(self._header("evaluate", step=step), batch)
        header, _ = self._receive("score", step)
        return ScoreReply(header.nll, header.tokens)

    def _header(self, kind: str, **numbers: int) -> Header:
        task = self._task
        return Header(kind, task.run, task.round, task.client, task.plan.cut, **numbers)  # type: ignore[arg-type]

    def _send(self, header: Header, tensors: dict[str, Tensor] | None = None) -> None:
        frame = encode(header, tensors)
        self.bytes_up += len(frame)
        self._outbox.put(frame)

    def _receive(self, kind: str, step: int) -> Frame:
        try:
            data: bytes | None = next(self._replies, None)
        except grpc.RpcError as error:
            raise _as_exchange_error(error) from error
        if data is None:
            raise ExchangeError("round_closed", "Expected an answer from the tail, found the end of the stream.")
        self.bytes_down += len(data)
        frame = decode(data, self._max_bytes)
        task = self._task
        expect_header(
            frame.header,
            kind=kind, run=task.run, round=task.round, client=task.client, cut=task.plan.cut, step=step,
        )  # fmt: skip
        return frame


def _as_exchange_error(error: Any) -> ExchangeError:
    """The tail's own error where it sent one (``[code] message``), else gRPC's status."""
    details = error.details() or ""
    sent = re.match(r"\[(\w+)\] (.*)", details, re.DOTALL)
    if sent:
        return ExchangeError(sent[1], sent[2])
    code = error.code()
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ExchangeError("frame_too_large", f"{details}. Use smaller batches or raise max_frame_bytes.")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return ExchangeError("round_timeout", "The round's time limit is over. Raise the round timeout.")
    if code == grpc.StatusCode.CANCELLED:
        return ExchangeError("round_closed", "The server closed the round.")
    return ExchangeError("tail_lost", f"Lost the connection to the tail: {code.name}: {details}")
