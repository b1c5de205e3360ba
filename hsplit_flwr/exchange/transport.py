"""What a transport is to head and tail, and which there are: one file each, and one row of `TRANSPORTS`."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from hsplit_flwr.errors import ConfigError

if TYPE_CHECKING:
    from hsplit_flwr.exchange.grpc_transport import ServiceConfig
    from hsplit_flwr.exchange.tls_files import ClientTls

TRANSPORTS = {"grpc": "hsplit_flwr.exchange.grpc_transport", "messages": "hsplit_flwr.exchange.message_transport"}
"""scheme of an address -> module of the transport; the first is meant where an address (``host:port``) has none"""


class FrameStream(Protocol):
    """A head's end of its stream to the tail."""

    def send(self, frame: bytes) -> None:
        """Hand over a frame; does not wait until it has arrived."""

    def receive(self) -> bytes | None:
        """The tail's next frame; None: the tail ended the stream. Raises `ExchangeError`; ``tail_lost``: it broke."""

    def close(self) -> None:
        """End the stream once the tail has what was sent, and disconnect; may be called again."""


class Caller(Protocol):
    """The head at the other end of a stream, as the tail's transport knows it."""

    @property
    def token(self) -> str:
        """What it identifies itself with; empty: nothing."""

    @property
    def seconds_left(self) -> float:
        """Time until the deadline that it set itself; infinite or absurdly long: none."""

    def on_gone(self, action: Callable[[], object]) -> None:
        """Call `action`, from any thread, when the stream is over, however it ended."""

    def end(self) -> None:
        """End the stream from the tail's side."""


class Listener(Protocol):
    """Where the tail waits for heads."""

    @property
    def address(self) -> str:
        """What heads connect to."""

    @property
    def holds_clients(self) -> bool:
        """A head that waits for the tail's answer keeps its process busy."""

    def start(self) -> None:
        """Accept streams."""

    def stop(self) -> None:
        """Stop listening; open streams end at once."""


Serve = Callable[[Caller, Iterator[bytes]], Iterator[bytes]]
"""(who calls, its frames until it leaves) -> the tail's frames; an `ExchangeError` that it raises goes to the head"""
Connect = Callable[[str, str, float, int], FrameStream]
"""(address, token, time limit of the stream in seconds, largest frame to receive in bytes) -> a connected stream"""


class Transport(Protocol):
    """The functions that a transport's module has."""

    def listen(self, serve: Serve, config: "ServiceConfig") -> Listener:
        """A listener on ``config.bind`` that has its address, but is not started yet. Raises `ConfigError`."""

    def connect(
        self,
        address: str,
        token: str,
        time_limit_s: float,
        max_receive_bytes: int,
        tls: "ClientTls | None" = None,
    ) -> FrameStream:
        """See `connect`."""


def transport_of(address: str) -> Transport:
    """The transport that `address` asks for (``scheme://...``).

    Raises:
        ConfigError: there is none of that name.
    """
    scheme, separator, _ = address.partition("://")
    if not separator:
        scheme = next(iter(TRANSPORTS))
    if scheme not in TRANSPORTS:
        raise ConfigError(
            f"Expected an address host:port, or one that begins with one of {[f'{s}://' for s in TRANSPORTS]}, "
            f"found {address!r}. Correct tail-bind or tail-address."
        )
    return cast(Transport, import_module(TRANSPORTS[scheme]))


def connect(
    address: str, token: str, time_limit_s: float, max_receive_bytes: int, tls: "ClientTls | None" = None
) -> FrameStream:
    """A stream to the tail at `address`, by the transport it asks for; a `Connect` once `tls` is bound (None: without).

    Raises:
        ConfigError: no such transport.
        ExchangeError: ``tail_unreachable``.
    """
    return transport_of(address).connect(address, token, time_limit_s, max_receive_bytes, tls)
