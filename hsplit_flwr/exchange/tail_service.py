"""The gRPC face of the tail: admit, decode, check, call, encode. Contract: `exchange/frames.py`.

One bidirectional stream per client and round, method ``/hsplit_flwr.Tail/Exchange``, raw frames as messages. A client
authenticates with a one-time token (``authorization: Bearer ...``) that the Strategy sent it inside its Flower task.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from torch import Tensor

from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.exchange.frames import Frame, Header, check_batch, decode, encode, expect_header, probe_filler
from hsplit_flwr.exchange.task import Mode
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.training.tail import LocalSession, SharedTail

SERVICE, METHOD = "hsplit_flwr.Tail", "Exchange"
DELTA_FRAME_BYTES = 4 << 20
MAX_PROBES, MAX_PROBE_BYTES = 64, 16 << 20
WILDCARDS = ("0.0.0.0", "[::]", "*", "")
"""hosts to listen on, but not to connect to"""
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
_STATUS = {
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "frame_too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "round_closed": grpc.StatusCode.FAILED_PRECONDITION,
    "step_timeout": grpc.StatusCode.DEADLINE_EXCEEDED,
}
_LONGEST_S = 366 * 24 * 3600.0
"""a stream without a deadline has 9e18 s left in gRPC's books"""
_log = logging.getLogger("hsplit_flwr")

DeltaSource = Callable[[int, int], tuple[int, bool, dict[str, Tensor]]]
"""(version the client holds, its cut) -> (version it gets to, whether that is the whole delta, tensors)"""


@dataclass(frozen=True)
class ServiceConfig:
    """Where the tail listens and what it accepts."""

    bind: str = "127.0.0.1:0"
    """host:port to listen on; port 0 takes a free one"""
    advertise: str = ""
    """address that clients are told (default: the bound one); a host without port gets the bound port"""
    max_frame_bytes: int = 64 << 20
    activation_dtype: str = "fp32"
    certificate: Path | None = None
    """PEM certificate chain; with `private_key` it turns on TLS"""
    private_key: Path | None = None


@dataclass
class Ticket:
    """One client's admission to one round, and its traffic."""

    client: str
    round: int
    mode: Mode
    cut: int
    first_step: int
    bytes_up: int = 0
    bytes_down: int = 0
    delta_bytes: int = 0
    used: bool = False
    steps: int = 0
    tokens: int = 0
    """target tokens that the tail itself counted"""
    nll: float = 0.0
    """summed loss of those tokens, nats"""
    errors: list[str] = field(default_factory=list)


class TailService:
    """Serves a `SharedTail` to remote heads.

    Raises:
        ConfigError: the address cannot be bound, or the TLS files cannot be read.
    """

    def __init__(self, tail: SharedTail, deltas: DeltaSource, run: str, config: ServiceConfig) -> None:
        self._tail = tail
        self._deltas = deltas
        self._run = run
        self._config = config
        self._lock = threading.Lock()
        self._tickets: dict[str, Ticket] = {}
        self._streams: dict[str, Any] = {}
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=1024, thread_name_prefix="tail-stream"),
            handlers=[grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})],
            options=[
                *KEEPALIVE,
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.max_receive_message_length", config.max_frame_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        self.address = self._bind()
        self._server.start()

    def _bind(self) -> str:
        config = self._config
        host = config.bind.rsplit(":", 1)[0]
        if host in WILDCARDS and not config.advertise:
            raise ConfigError(
                f"Expected an address that clients can reach, found only {config.bind}. "
                "Set advertise (run config: tail-address) to this host's name or address."
            )
        try:
            if config.certificate and config.private_key:
                pair = (config.private_key.read_bytes(), config.certificate.read_bytes())
                port = self._server.add_secure_port(config.bind, grpc.ssl_server_credentials([pair]))
            elif config.certificate or config.private_key:
                raise ConfigError(
                    "Expected both a certificate and a private key for TLS, found one. Give both or none."
                )
            else:
                port = self._server.add_insecure_port(config.bind)
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"Expected to listen on {config.bind} with the given TLS files, found: {error}. "
                "Choose a free port (or port 0) and readable PEM files."
            ) from error
        advertise = config.advertise or host
        return advertise if advertise.rpartition(":")[2].isdigit() else f"{advertise}:{port}"

    def open_round(
        self, round_number: int, mode: Mode, cuts: Mapping[str, int], first_step: int, **limits: Any
    ) -> dict[str, str]:
        """Admit the clients of a round; returns each one's one-time token. Earlier tokens are void."""
        tokens = {client: secrets.token_urlsafe(32) for client in cuts}
        with self._lock:
            self._tickets = {
                tokens[client]: Ticket(client, round_number, mode, cut, first_step) for client, cut in cuts.items()
            }
        return tokens

    def open_probe(self, node: str) -> str:
        """Admit a node that measures its link, until the next round opens; returns its one-time token."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._tickets[token] = Ticket(node, 0, "probe", 1, 0)
        return token

    def close_round(self) -> dict[str, Ticket]:
        """Void the tokens and end the streams that are still open; returns what each client did."""
        with self._lock:
            tickets, self._tickets = self._tickets, {}
            streams = list(self._streams.values())
        for context in streams:
            context.cancel()
        return {ticket.client: ticket for ticket in tickets.values()}

    def stop(self) -> None:
        """Stop listening; open streams end at once."""
        self.close_round()
        self._server.stop(grace=None).wait(10)

    def _exchange(self, frames: Iterator[bytes], context: Any) -> Iterator[bytes]:
        session: LocalSession | None = None
        token = _bearer(context)
        ticket: Ticket | None = None
        try:
            ticket = self._admit(token, context)
            if ticket.mode == "probe":
                yield from self._echo(frames, ticket)
                return
            hello = self._next_frame(frames, ticket)
            if hello is None:
                return
            self._check_header(hello.header, ticket, "hello")
            yield from self._send_delta(hello.header.have, ticket)
            session = self._session(ticket)
            context.add_callback(session.close)  # a client that vanishes while its step waits leaves at once
            kind = ticket.mode
            while (frame := self._next_frame(frames, ticket)) is not None:
                self._check_header(frame.header, ticket, kind)
                yield self._counted(self._answer(session, frame, ticket), ticket)
        except ExchangeError as error:
            if ticket:
                ticket.errors.append(str(error))
            _log.warning("tail: refused %s: %s", ticket.client if ticket else "an unknown client", error)
            context.abort(_STATUS.get(error.code, grpc.StatusCode.INVALID_ARGUMENT), str(error)[:1500])
        except grpc.RpcError:
            pass  # the client is gone; `finally` lets the others go on
        finally:
            if session:
                session.close()
            if ticket:  # not for a refused stream with a token that another one uses
                with self._lock:
                    self._streams.pop(token, None)

    def _admit(self, token: str, context: Any) -> Ticket:
        with self._lock:
            ticket = self._tickets.get(token)
            if ticket is None or ticket.used:
                found = "a used one" if ticket else "an unknown one"
                raise ExchangeError(
                    "unauthenticated",
                    f"Expected an unused token of the open round, found {found}. Ask for a new task.",
                )
            if context.time_remaining() > _LONGEST_S:
                raise ExchangeError("no_deadline", "Expected a deadline on the stream, found none. Set a timeout.")
            ticket.used = True
            self._streams[token] = context
            return ticket

    def _next_frame(self, frames: Iterator[bytes], ticket: Ticket) -> Frame | None:
        frame = next(frames, None)
        if frame is None:
            return None
        ticket.bytes_up += len(frame)
        return decode(frame, self._config.max_frame_bytes)

    def _check_header(self, header: Header, ticket: Ticket, kind: str) -> None:
        expect_header(header, kind=kind, run=self._run, round=ticket.round, client=ticket.client, cut=ticket.cut)

    def _echo(self, frames: Iterator[bytes], ticket: Ticket) -> Iterator[bytes]:
        """Answers as large as a probe asks for, up to a frame's limit."""
        for _ in range(MAX_PROBES):
            if (frame := self._next_frame(frames, ticket)) is None:
                return
            self._check_header(frame.header, ticket, "probe")
            wanted = min(frame.header.left, MAX_PROBE_BYTES)
            yield self._counted(encode(self._reply_header("probe", ticket), probe_filler(wanted)), ticket)

    def _session(self, ticket: Ticket) -> LocalSession:
        if ticket.mode == "train":
            return self._tail.join(ticket.client, ticket.cut, ticket.first_step)
        return self._tail.scorer(ticket.client, ticket.cut)

    def _reply_header(self, kind: str, ticket: Ticket, **fields: Any) -> Header:
        return Header(kind, self._run, ticket.round, ticket.client, ticket.cut, **fields)

    def _send_delta(self, have: int, ticket: Ticket) -> Iterator[bytes]:
        version, whole, tensors = self._deltas(have, ticket.cut)
        parts = _packed(tensors)
        for index, part in enumerate(parts):
            header = self._reply_header("delta", ticket, version=version, whole=whole, left=len(parts) - 1 - index)
            frame = encode(header, part)
            ticket.delta_bytes += len(frame)
            yield self._counted(frame, ticket)

    def _answer(self, session: LocalSession, frame: Frame, ticket: Ticket) -> bytes:
        header, tensors = frame
        dtype = DTYPES[self._config.activation_dtype]
        segment = self._tail.segment
        check_batch(tensors, dtype=dtype, hidden_size=segment.hidden_size, vocab_size=segment.vocab_size)
        batch = (tensors["activations"], tensors["mask"], tensors["labels"])
        common = (header.run, header.round, header.client, header.cut, header.step)
        if header.kind == "train":
            reply = session.train_step(header.step, *batch)
            _count(ticket, reply.loss * reply.tokens, reply.tokens)
            answer = Header("gradient", *common, loss=reply.loss, tokens=reply.tokens)
            return encode(answer, {"gradient": reply.gradient.to(dtype)})
        score = session.score_step(header.step, *batch)
        _count(ticket, score.nll, score.tokens)
        return encode(Header("score", *common, nll=score.nll, tokens=score.tokens))

    @staticmethod
    def _counted(frame: bytes, ticket: Ticket) -> bytes:
        ticket.bytes_down += len(frame)
        return frame


def _count(ticket: Ticket, nll: float, tokens: int) -> None:
    ticket.steps += 1
    ticket.nll += nll
    ticket.tokens += tokens


def _bearer(context: Any) -> str:
    for key, value in context.invocation_metadata():
        if key == "authorization" and isinstance(value, str):
            return value.removeprefix("Bearer ")
    return ""


def _packed(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Small tensors share a frame, a large one gets its own; at least one (possibly empty) frame."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > DELTA_FRAME_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts
