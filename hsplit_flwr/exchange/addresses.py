"""Addresses of a tail as people type them: where it listens, and what clients are told."""

import errno
import ipaddress
import socket
from typing import NamedTuple

from hsplit_flwr.errors import ConfigError

WILDCARDS = ("0.0.0.0", "[::]", "*", "")
"""hosts to listen on, but not to connect to"""


class ListeningAddress(NamedTuple):
    """Where a tail listens, and what clients connect to."""

    host: str
    """an IPv6 address in brackets"""
    port: int
    """0: any free one"""
    told_host: str
    told_port: str
    """empty: the one that is listened on"""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"


def listening_address(bind: str, advertise: str) -> ListeningAddress:
    """The parts of ``host:port`` to listen on and of the address that clients are told, which need not have a port.

    Raises:
        ConfigError: no port to listen on, an IPv6 address without brackets, or nothing that clients can connect to.
    """
    host, port = _split(bind)
    if not port or int(port) >= 1 << 16:
        raise ConfigError(f"Expected host:port to listen on (run config: tail-bind), found {bind!r}.")
    _check_brackets(host, bind, "tail-bind")
    told_host, told_port = _split(advertise)
    _check_brackets(told_host, advertise, "tail-address")
    if (told_host or host) in WILDCARDS:
        raise ConfigError(
            f"Expected an address that clients can reach, found only {advertise or bind}. "
            "Set advertise (run config: tail-address) to this host's name or address."
        )
    return ListeningAddress(host, int(port), told_host or host, told_port)


def why_not_bound(address: ListeningAddress) -> str | None:
    """What the operating system has against listening there; gRPC keeps that to itself. None: nothing any more."""
    try:
        host, port = address.host.strip("[]"), address.port
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, place in places:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "the address is in use, perhaps by another run on this machine that has not ended"
        return error.strerror or str(error)
    return None


def _split(address: str) -> tuple[str, str]:
    """Host and port; the latter empty where the address has none. A host in brackets may have colons."""
    host, _, port = address.rpartition(":")
    return (host, port) if port.isascii() and port.isdigit() else (address, "")


def _check_brackets(host: str, found: str, key: str) -> None:
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(
            f"Expected an IPv6 address in brackets, such as [2001:db8::7]:9095 (run config: {key}), found {found!r}. "
            "Without them its last part reads as a port."
        )
