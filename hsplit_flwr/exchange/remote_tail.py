"""The tail as a client sees it: a `TailSession` over a stream of frames. Contract: `exchange/frames.py`.

Where the connection breaks, another stream goes on at the step where the client is (`Absence`): what has no answer is
sent again.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from hsplit_flwr.errors import AggregationError, ExchangeError
from hsplit_flwr.exchange.absence import Absence
from hsplit_flwr.exchange.batches import batch_tensors, check_gradient, without_kept
from hsplit_flwr.exchange.codecs import codec_named
from hsplit_flwr.exchange.frames import Frame, Header, decode, encode, expect_header, probe_filler, rounding_seed
from hsplit_flwr.exchange.kept_rows import UNKNOWN_ROWS, KeptRows
from hsplit_flwr.exchange.positions import traveling
from hsplit_flwr.exchange.row_references import references_in
from hsplit_flwr.exchange.task import RoundTask
from hsplit_flwr.exchange.transport import Connect, FrameStream
from hsplit_flwr.training.session import BatchPart, ScoreReply, StepReply, TailSession, is_measured

Answer = TypeVar("Answer")
_log = logging.getLogger("hsplit_flwr")


class DeltaTensors(NamedTuple):
    """A `delta_log.DeltaUpdate` as it comes in, not yet checked against the head."""

    version: int
    whole: bool
    """does not build on what the client holds"""
    tensors: dict[str, Tensor]


class _Unanswered(NamedTuple):
    """A part whose answer has not come."""

    part: BatchPart
    frame: bytes
    """sent again if the connection breaks"""
    positions: Tensor
    """(B, T) that travel"""
    hidden_size: int
    whole: tuple[Header, dict[str, Tensor]] | None
    """of the frame with all rows, where `frame` refers to some that the tail has"""


class RemoteTail(TailSession):
    """One client's way to the tail for one round. Use as a context manager; first `fetch_delta`, then the steps.

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
        self._returns = task.reconnect_grace_s > 0
        self._token = f"{task.token}.{secrets.token_urlsafe(32)}" if self._returns else task.token
        """with a key of this client's own where it may come back, see `exchange/admission.py`"""
        self._absence = Absence(task.reconnect_grace_s)
        self._began = 0.0
        self._stream: FrameStream | None = None
        self._joined = False
        self._unanswered: deque[_Unanswered] = deque()
        self._kept: KeptRows | None = None
        """the rows that the tail has; None: it keeps none, or all are sent whole"""
        self.bytes_up = 0
        self.bytes_down = 0

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ExchangeError: ``tail_unreachable``.
        """
        self._began = time.monotonic()
        self._open_stream(self._task.time_limit_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the round and disconnect."""
        self.close()

    def close(self) -> None:
        """See `TailSession`."""
        if self._stream is None:
            return
        if self._returns:
            self._send(encode(self._header("leave")))
        self._stream.close()
        self._stream = None

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
        hello = encode(self._header("hello", have=have, own=own))
        delta = self._until_answered(lambda: self._received_delta(hello, aside))
        self._joined = True
        return delta

    def probe(self, bytes_up: int, bytes_down: int) -> None:
        """Send so many bytes and get so many back; only with a task to ``probe``."""
        probe = encode(self._header("probe", left=bytes_down), probe_filler(bytes_up))
        self._until_answered(lambda: self._received_probe(probe))

    def send_part(self, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """See `TailSession`."""
        self._send_batch("train", part, activations, attention_mask, labels)

    def receive_part(self) -> StepReply:
        """See `TailSession`."""
        sent, (header, tensors) = self._answered("gradient")
        # Where importance is measured there is always one; elsewhere the head says whether it can do without.
        due = bool(tensors) or is_measured(sent.part, self._task.training.importance_steps)
        gradient = check_gradient(tensors, sent.positions, sent.hidden_size, self._down) if due else None
        return StepReply(gradient, header.loss, header.tokens)

    def score_step(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> ScoreReply:
        """See `TailSession`."""
        self.send_to_score(step, activations, attention_mask, labels)
        return self.receive_score()

    def send_to_score(self, step: int, activations: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        """Hand over a batch to be scored; does not wait for its answer."""
        self._send_batch("evaluate", BatchPart(step), activations, attention_mask, labels)

    def receive_score(self) -> ScoreReply:
        """The answer to the oldest batch that has none yet."""
        _, (header, _) = self._answered("score")
        return ScoreReply(header.nll, header.tokens)

    def await_score(self, step: int) -> None:
        """Batch `step` was sent by another process of this client's, and has no answer yet."""
        self._unanswered.append(_Unanswered(BatchPart(step), b"", torch.empty(0), 0, None))

    def _received_delta(self, hello: bytes, aside: Callable[[Tensor], Tensor]) -> DeltaTensors:
        self._send(hello)
        frame = self._receive("delta")
        tensors = {key: aside(tensor) for key, tensor in frame.tensors.items()}
        for left in reversed(range(frame.header.left)):
            _check_bytes(tensors, self._max_delta_bytes)
            frame = self._receive("delta")
            expect_header(frame.header, left=left)
            tensors |= {key: aside(tensor) for key, tensor in frame.tensors.items()}
        _check_bytes(tensors, self._max_delta_bytes)
        share = frame.header.share
        self._kept = KeptRows.of_told(self._receive("kept").tensors, share) if share else None
        return DeltaTensors(frame.header.version, frame.header.whole, tensors)

    def _received_probe(self, probe: bytes) -> None:
        self._send(probe)
        self._receive("probe")

    def _send_batch(
        self, kind: str, part: BatchPart, activations: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> None:
        header = self._header(kind, step=part.step, part=part.number, parts=part.parts)
        tensors = batch_tensors(activations, attention_mask, labels, self._up, rounding_seed(header))
        whole = None
        if self._kept is not None:
            all_rows = tensors
            tensors = without_kept(all_rows, attention_mask, labels, self._up, self._kept)
            whole = (header, all_rows) if references_in(tensors) else None
        frame = encode(header, tensors)
        positions = traveling(attention_mask, labels)
        self._unanswered.append(_Unanswered(part, frame, positions, activations.shape[-1], whole))
        self._send(frame)

    def _answered(self, kind: str) -> tuple[_Unanswered, Frame]:
        """The oldest part without an answer, and its answer of `kind`."""
        sent = self._unanswered[0]
        frame = self._until_answered(lambda: self._receive(kind, step=sent.part.step, part=sent.part.number))
        return self._unanswered.popleft(), frame

    def _until_answered(self, exchange: Callable[[], Answer]) -> Answer:
        """What `exchange` returns; it begins anew on another stream as often as the connection breaks."""
        while True:
            try:
                answer = exchange()
            except ExchangeError as error:
                self._come_back(error)
            else:
                self._absence.over()
                return answer

    def _come_back(self, error: ExchangeError) -> None:
        """Connect again after `error`, and send what has no answer.

        Raises:
            ExchangeError: see `Absence.wait`.
        """
        if error.code == UNKNOWN_ROWS:
            self._send_whole_rows(error)
        while True:
            self._absence.wait(error)
            self._connected().close()
            try:
                self._open_stream(self._task.time_limit_s - (time.monotonic() - self._began))
            except ExchangeError as further:
                error = further
            else:
                break
        if self._joined:
            part = self._unanswered[0].part
            self._send(encode(self._header("resume", step=part.step, part=part.number)))
            for sent in self._unanswered:
                self._send(sent.frame)

    def _send_whole_rows(self, error: ExchangeError) -> None:
        """From now on, and of what has no answer: the tail has other rows than this client was told."""
        _log.warning("client %s sends all activations until the end of the round: %s", self._task.client, error)
        self._kept = None
        self._unanswered = deque(
            sent._replace(frame=encode(*sent.whole), whole=None) if sent.whole else sent for sent in self._unanswered
        )

    def _open_stream(self, limit_s: float) -> None:
        self._stream = self._connect(self._task.address, self._token, limit_s, self._max_bytes)

    def _header(self, kind: str, **numbers: int) -> Header:
        task = self._task
        return Header(kind, task.run, task.round, task.client, task.plan.cut, **numbers)  # type: ignore[arg-type]

    def _send(self, frame: bytes) -> None:
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
