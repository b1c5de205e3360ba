"""The tail as a client sees it: a `TailSession` over one stream of frames. Contract: `exchange/frames.py`."""

from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from hsplit_flwr.errors import AggregationError, ExchangeError
from hsplit_flwr.exchange.batches import batch_tensors, check_gradient
from hsplit_flwr.exchange.codecs import codec_named
from hsplit_flwr.exchange.frames import Frame, Header, decode, encode, expect_header, probe_filler, rounding_seed
from hsplit_flwr.exchange.positions import traveling
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.transport import Connect, FrameStream
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession, is_measured


class DeltaTensors(NamedTuple):
    """A `delta_log.DeltaUpdate` as it comes in, not yet checked against the head."""

    version: int
    whole: bool
    """does not build on what the client holds"""
    tensors: dict[str, Tensor]


class _Unanswered(NamedTuple):
    """A part whose gradient has not come."""

    part: BatchPart
    positions: Tensor
    """(B, T) that travel"""
    hidden_size: int


class RemoteTail(TailSession):
    """One client's stream for one round. Use as a context manager; first `fetch_delta`, then the steps.

    Args:
        task: what the Strategy sent.
        max_receive_bytes: the largest frame this client accepts.
        connect: opens the stream, e.g. ``partial(transport.connect, tls=tls)``.
        max_delta_bytes: that all tensors of a delta may take; None: any.

    Raises:
        ConfigError: a codec that this version does not have.
    """

    def __init__(
        self, task: RoundTask, max_receive_bytes: int, connect: Connect, max_delta_bytes: int | None = None
    ) -> None:
        self._task = task
        self._up = codec_named(task.training.activation_codec)
        self._down = codec_named(task.training.gradient_codec)
        self._max_bytes = max_receive_bytes
        self._max_delta_bytes = max_delta_bytes
        self._connect = connect
        self._stream: FrameStream | None = None
        self._unanswered: deque[_Unanswered] = deque()
        self.bytes_up = 0
        self.bytes_down = 0

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ExchangeError: ``tail_unreachable``.
        """
        task = self._task
        self._stream = self._connect(task.address, task.token, task.time_limit_s, self._max_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the round and disconnect."""
        self.close()

    def close(self) -> None:
        """See `TailSession`."""
        if self._stream:
            self._stream.close()

    def fetch_delta(
        self, have: int, aside: Callable[[Tensor], Tensor] = lambda tensor: tensor, own: int = 0
    ) -> DeltaTensors:
        """Say hello; get what is missing between version `have` (0: nothing held) and the server's weights.

        Args:
            have: the version held.
            aside: what becomes of a tensor while the others come in, e.g. `lora.places.Place.aside`.
            own: the round whose adapters of its own the client still holds, which need not come; 0: none.

        Raises:
            AggregationError: more bytes come than `max_delta_bytes`.
        """
        self._send(self._header("hello", have=have, own=own))
        frame = self._receive("delta")
        tensors = {key: aside(tensor) for key, tensor in frame.tensors.items()}
        for left in reversed(range(frame.header.left)):
            _check_bytes(tensors, self._max_delta_bytes)
            frame = self._receive("delta")
            expect_header(frame.header, left=left)
            tensors |= {key: aside(tensor) for key, tensor in frame.tensors.items()}
        _check_bytes(tensors, self._max_delta_bytes)
        return DeltaTensors(frame.header.version, frame.header.whole, tensors)

    def probe(self, bytes_up: int, bytes_down: int) -> None:
        """Send so many bytes and get so many back; only with a task to ``probe``."""
        self._send(self._header("probe", left=bytes_down), probe_filler(bytes_up))
        self._receive("probe")

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """See `TailSession`."""
        header = self._header("train", step=part.step, part=part.number, parts=part.parts)
        self._send_batch(header, activations, attention_mask, labels)
        self._unanswered.append(_Unanswered(part, traveling(attention_mask, labels), activations.shape[-1]))

    def receive_part(self) -> StepReply:
        """See `TailSession`."""
        part, positions, hidden_size = self._unanswered.popleft()
        header, tensors = self._receive("gradient", step=part.step, part=part.number)
        # Where importance is measured there is always one; elsewhere the head says whether it can do without.
        due = bool(tensors) or is_measured(part, self._task.training.importance_steps)
        gradient = check_gradient(tensors, positions, hidden_size, self._down) if due else None
        return StepReply(gradient, header.loss, header.tokens)

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        self._send_batch(self._header("evaluate", step=step), activations, attention_mask, labels)
        header, _ = self._receive("score", step=step)
        return ScoreReply(header.nll, header.tokens)

    def _send_batch(self, header: Header, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        self._send(header, batch_tensors(activations, attention_mask, labels, self._up, rounding_seed(header)))

    def _header(self, kind: str, **numbers: int) -> Header:
        task = self._task
        return Header(kind, task.run, task.round, task.client, task.plan.cut, **numbers)  # type: ignore[arg-type]

    def _send(self, header: Header, tensors: dict[str, Tensor] | None = None) -> None:
        frame = encode(header, tensors)
        self.bytes_up += len(frame)
        self._connected().send(frame)

    def _receive(self, kind: str, step: int = 0, part: int = 0) -> Frame:
        data = self._connected().receive()
        if data is None:
            raise ExchangeError("round_closed", "Expected an answer from the tail, found the end of the stream.")
        self.bytes_down += len(data)
        frame = decode(data, self._max_bytes)
        task = self._task
        expect_header(
            frame.header,
            kind=kind, run=task.run, round=task.round, client=task.client, cut=task.plan.cut, step=step, part=part,
        )  # fmt: skip
        return frame

    def _connected(self) -> FrameStream:
        if self._stream is None:
            raise ExchangeError(
                "tail_unreachable", "Expected a connected tail, found none yet. Use `with RemoteTail(...)`."
            )
        return self._stream


def _check_bytes(tensors: Mapping[str, Tensor], most: int | None) -> None:
    found = sum(tensor.nbytes for tensor in tensors.values())
    if most is not None and found > most:
        raise AggregationError(
            f"Expected a delta of at most {most} bytes, all of the head's linear layers, found {found} and maybe more. "
            "The server is broken or not to be trusted."
        )
