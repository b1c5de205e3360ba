"""Frames over gRPC: one bidirectional stream per client and round, raw frames as messages.

Method ``/hsplit_flwr.Tail/Exchange``; the client's token travels as ``authorization: Bearer ...``. What is served and
what is said comes as an argument: this file knows neither rounds nor frames.
"""

import logging
import math
import queue
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.exchange.addresses import listening_address, why_not_bound
from hsplit_flwr.exchange.tls_files import CLIENT_ROOTS, ClientTls, read_certificates, read_pair
from hsplit_flwr.exchange.transport import Serve
from hsplit_flwr.exchange.unreachable import described, is_final

SERVICE, METHOD = "hsplit_flwr.Tail", "Exchange"
SCHEME = "grpc://"
MAX_STREAMS = 1024
"""clients that may be connected at a time; each has a thread of the server's"""
CONNECT_S = 20.0
PATIENCE_S = 3.0
"""after a first failure to connect, for a server that is just coming up or a link that was cut for a moment"""
FAREWELL_S = 2.0
"""for the tail to take in what a client sent last"""
GREETING_S, IDLE_S = 20.0, 60.0
"""after which a connection is closed that has not said that it speaks HTTP/2, or on which there is no stream"""
_BACK_OFF = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 2_000)]
_KEEPALIVE = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 20_000)]
_SERVER_OPTIONS = [
    *_KEEPALIVE,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]
_CLIENT_OPTIONS = [
    *_KEEPALIVE,
    *_BACK_OFF,
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
_STATUS = {
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "frame_too_large": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "round_closed": grpc.StatusCode.FAILED_PRECONDITION,
    "step_timeout": grpc.StatusCode.DEADLINE_EXCEEDED,
}
_NUDGE_S = 0.5
_BROKEN = re.compile(r"RST_STREAM|Stream removed|GOAWAY", re.IGNORECASE)
"""how gRPC says that a connection broke, where it does not say UNAVAILABLE"""
_LONGEST_DETAILS = 1500
"""characters: they travel in HTTP/2 trailers"""
_log = logging.getLogger("hsplit_flwr")


@dataclass(frozen=True)
class ServiceConfig:
    """Where the tail listens and what it accepts."""

    bind: str = "127.0.0.1:0"
    """host:port to listen on; port 0 takes a free one"""
    advertise: str = ""
    """address that clients are told (default: the bound one); a host without port gets the bound port"""
    max_frame_bytes: int = 64 << 20
    activation_codec: str = "fp32"
    """what heads encode activations by"""
    gradient_codec: str = "fp32"
    """what the tail encodes their gradients by"""
    frames_ahead: int = 0
    """of one client, taken in while the tail computes on the one before"""
    reconnect_grace_s: float = 0.0
    """how long a client whose connection broke may take to come back to its round; 0: it may not"""
    activation_cache_bytes: int = 0
    """the most that is kept of activations of heads that train nothing, of all clients together; 0: nothing"""
    certificate: Path | None = None
    """PEM certificate chain; with `private_key` it turns on TLS"""
    private_key: Path | None = None
    client_root_certificates: Path | None = None
    """PEM file of the authority behind the clients' certificates: only clients that show one are served"""


# ---------------------------------------------------------------------------------------------- the tail's side


class GrpcListener:
    """A gRPC server on ``config.bind``, not started yet. A client beyond `max_streams` is refused, not kept waiting.

    Raises:
        ConfigError: the address cannot be bound, or the TLS files cannot be used.
    """

    holds_clients = True

    def __init__(self, serve: Serve, config: ServiceConfig, max_streams: int = MAX_STREAMS) -> None:
        from hsplit_flwr.exchange.open_files import allow_connections  # a client does not listen

        allow_connections()
        self._serve = serve
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        self._server = grpc.server(
            ThreadPoolExecutor(max_streams, thread_name_prefix="tail-stream"),
            handlers=[grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})],
            options=[
                *_SERVER_OPTIONS,
                ("grpc.max_receive_message_length", config.max_frame_bytes),
                ("grpc.server_handshake_timeout_ms", round(1e3 * GREETING_S)),
                ("grpc.max_connection_idle_ms", round(1e3 * IDLE_S)),
            ],
            maximum_concurrent_rpcs=max_streams,
        )
        self.address = _bind(self._server, config)

    def start(self) -> None:
        """Accept streams."""
        self._server.start()

    def stop(self) -> None:
        """Stop listening; open streams end at once."""
        self._server.stop(grace=None).wait(10)

    def _exchange(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        try:
            yield from self._serve(_GrpcCaller(context), _until_gone(requests))
        except ExchangeError as error:
            status = _STATUS.get(error.code, grpc.StatusCode.INVALID_ARGUMENT)
            context.abort(status, str(error)[:_LONGEST_DETAILS])


listen = GrpcListener
"""See `Transport`."""


class _GrpcCaller:
    """A `Caller` by gRPC's context of the stream."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.end: Callable[[], None] = context.cancel

    def on_gone(self, action: Callable[[], object]) -> None:
        """See `Caller`."""
        if not self._context.add_callback(action):
            action()  # it is gone already, and gRPC will not say so again

    @property
    def token(self) -> str:
        """See `Caller`."""
        for key, value in self._context.invocation_metadata():
            if key == "authorization" and isinstance(value, str):
                return value.removeprefix("Bearer ")
        return ""

    @property
    def seconds_left(self) -> float:
        """See `Caller`."""
        left: float | None = self._context.time_remaining()
        return math.inf if left is None else left


def _until_gone(requests: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from requests
    except grpc.RpcError:
        return  # the client has vanished, which ends its frames too


def _bind(server: Any, config: ServiceConfig) -> str:
    """Take the address; returns what clients are told."""
    where = listening_address(config.bind.removeprefix(SCHEME), config.advertise.removeprefix(SCHEME))
    bind = f"{where.host}:{where.port}"
    credentials = _credentials(config)
    try:
        bound = server.add_secure_port(bind, credentials) if credentials else server.add_insecure_port(bind)
    except RuntimeError as error:
        raise ConfigError(
            f"Expected to listen on {bind} (run config: tail-bind), found: {why_not_bound(where) or error}. "
            "Choose a free port (0 takes any) of an address of this machine."
        ) from error
    if credentials is None and not where.is_loopback:
        _log.warning(
            "the tail listens on %s without TLS: whoever can read on the way sees activations, labels and tokens. "
            "Set tail-certificate and tail-private-key, unless a proxy of yours terminates TLS in front of it.",
            bind,
        )
    return f"{where.told_host}:{where.told_port or bound}"


def _credentials(config: ServiceConfig) -> Any:
    """TLS, or None; with the certificates of clients, if these are asked for theirs."""
    pair = read_pair(config.certificate, config.private_key)
    roots = config.client_root_certificates
    if pair is None:
        if roots:
            raise ConfigError(
                f"Expected tail-certificate and tail-private-key beside {CLIENT_ROOTS}, found none: clients show their "
                "certificates within TLS only. Set all three."
            )
        return None
    chain, key = pair
    if roots is None:
        return grpc.ssl_server_credentials([(key, chain)])
    return grpc.ssl_server_credentials([(key, chain)], read_certificates(roots, CLIENT_ROOTS), True)


# ---------------------------------------------------------------------------------------------- a head's side


def connect(
    address: str, token: str, time_limit_s: float, max_receive_bytes: int, tls: ClientTls | None = None
) -> "GrpcStream":
    """A stream to the tail at `address`.

    Args:
        address: host:port.
        token: this client's own for this round.
        time_limit_s: the stream ends then.
        max_receive_bytes: the largest frame that is accepted.
        tls: whom to trust, and what to show; None: no TLS.

    Raises:
        ExchangeError: ``tail_unreachable``.
    """
    target = address.removeprefix(SCHEME)
    options = [*_CLIENT_OPTIONS, ("grpc.max_receive_message_length", max_receive_bytes)]
    if tls is None:
        channel = grpc.insecure_channel(target, options)
    else:
        chain, key = tls.identity or (None, None)
        credentials = grpc.ssl_channel_credentials(tls.root_certificates, key, chain)
        channel = grpc.secure_channel(target, credentials, options)
    try:
        _wait_for_connection(channel, address)
    except BaseException:
        channel.close()
        raise
    return GrpcStream(channel, token, time_limit_s)


class GrpcStream:
    """A `FrameStream` on a channel of its own."""

    def __init__(self, channel: Any, token: str, time_limit_s: float) -> None:
        self._channel = channel
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies = channel.stream_stream(f"/{SERVICE}/{METHOD}")(
            iter(self._outbox.get, None),
            timeout=time_limit_s,
            metadata=(("authorization", f"Bearer {token}"),),
        )

    def send(self, frame: bytes) -> None:
        """See `FrameStream`."""
        self._outbox.put(frame)

    def receive(self) -> bytes | None:
        """See `FrameStream`."""
        try:
            frame: bytes | None = next(self._replies, None)
        except grpc.RpcError as error:
            raise _as_exchange_error(error) from error
        return frame

    def close(self) -> None:
        """See `FrameStream`."""
        self._outbox.put(None)
        with suppress(grpc.RpcError, grpc.FutureTimeoutError, grpc.FutureCancelledError):
            self._replies.result(FAREWELL_S)  # closed at once, what was sent last might not arrive
        self._channel.close()


def _wait_for_connection(channel: Any, address: str) -> None:
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    started = time.monotonic()
    end = started + CONNECT_S
    cause = ""
    channel.subscribe(states.put, try_to_connect=True)
    try:
        while not is_final(cause) and (left_s := end - time.monotonic()) > 0:
            try:
                state = states.get(timeout=min(left_s, _NUDGE_S))
            except queue.Empty:
                if left_s > 2 * _NUDGE_S:
                    _nudge(channel)
                continue
            if state == grpc.ChannelConnectivity.READY:
                return
            if state == grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                cause = _why_unreachable(channel)
                end = min(end, time.monotonic() + PATIENCE_S)
    finally:
        channel.unsubscribe(states.put)
    waited_s = time.monotonic() - started
    raise ExchangeError(
        "tail_unreachable",
        f"Expected a tail at {address}, found none within {waited_s:.0f} s: "
        f"{described(cause or _why_unreachable(channel))}. "
        "Check that this address can be reached from the client (tail-address) and that both sides agree on TLS "
        "(tail-root-certificates, and tail-client-certificate where the tail asks for one).",
    )


def _nudge(channel: Any) -> None:
    """Let a channel connect that is idle: it was connected and cut in a moment, and waits for somebody to call."""
    channel.subscribe(_ignore, try_to_connect=True)
    channel.unsubscribe(_ignore)


def _ignore(state: grpc.ChannelConnectivity) -> None:
    """Take no notice."""


def _why_unreachable(channel: Any) -> str:
    """What gRPC knows: the name, the connection or the TLS handshake. A call on a failed channel fails at once."""
    try:
        next(channel.stream_stream(f"/{SERVICE}/{METHOD}")(iter(()), timeout=0.5), None)
    except grpc.RpcError as error:
        status: Any = error
        if status.code() == grpc.StatusCode.UNAVAILABLE:
            return str(status.details())
    return ""


def _as_exchange_error(error: Any) -> ExchangeError:
    """The tail's own error where it sent one (``[code] message``), else gRPC's status."""
    details = error.details() or ""
    sent = re.match(r"\[(\w+)\] (.*)", details, re.DOTALL)
    if sent:
        return ExchangeError(sent[1], sent[2])
    code = error.code()
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "Concurrent RPC limit" in details:
        return ExchangeError(
            "tail_full",
            "Expected a free stream at the tail, found as many clients connected as it serves at a time. "
            "Let fewer clients train at a time (fraction-clients).",
        )
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ExchangeError("frame_too_large", f"{details}. Use smaller batches or raise max-frame-mib.")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return ExchangeError("round_timeout", "The round's time limit is over. Raise round-limit-s.")
    if code == grpc.StatusCode.CANCELLED:
        return ExchangeError("round_closed", "The server closed the round.")
    if code == grpc.StatusCode.UNAVAILABLE or _BROKEN.search(details):
        return ExchangeError("tail_lost", f"Lost the connection to the tail: {code.name}: {details}")
    return ExchangeError("tail_failed", f"The tail failed: {code.name}: {details}. See the server's log.")
