"""TLS between clients and tail as deployments have it: an authority, clients' certificates, proxies, IPv6, warnings."""

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.exchange import grpc_transport
from hsplit_flwr.exchange.grpc_transport import GrpcListener, ServiceConfig, connect
from hsplit_flwr.exchange.tls_files import ClientTls
from hsplit_flwr.exchange.transport import Caller
from hsplit_flwr.flower.client_settings import read_tls
from tests.helpers.certificates import Certificates

pytestmark = pytest.mark.timeout(60)

LIMIT = 1 << 20


def echo(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
    for frame in frames:
        yield caller.token.encode() + frame


@contextmanager
def listening(config: ServiceConfig) -> Iterator[GrpcListener]:
    listener = GrpcListener(echo, config, max_streams=8)
    listener.start()
    try:
        yield listener
    finally:
        listener.stop()


def answer(address: str, tls: ClientTls | None = None) -> bytes | None:
    with closing(connect(address, "me:", 30.0, LIMIT, tls)) as stream:
        stream.send(b"x")
        return stream.receive()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_transport, "PATIENCE_S", 0.2)


def tls_config(certificates: Certificates, bind: str = "127.0.0.1:0", asks_clients: bool = False) -> ServiceConfig:
    return ServiceConfig(
        bind,
        certificate=certificates.certificate,
        private_key=certificates.private_key,
        client_root_certificates=certificates.authority if asks_clients else None,
    )


# ---------------------------------------------------------------------------------------------- who is let in


def test_the_guides_authority_is_trusted_by_name_and_address(ours: Certificates) -> None:
    with listening(tls_config(ours)) as listener:
        port = listener.address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            assert answer(f"{host}:{port}", ClientTls.from_files(ours.authority)) == b"me:x"


@pytest.mark.usefixtures("impatient")
def test_another_authority_is_not(ours: Certificates, theirs: Certificates) -> None:
    with (
        listening(tls_config(ours)) as listener,
        pytest.raises(ExchangeError, match="CERTIFICATE_VERIFY_FAILED") as refusal,
    ):
        answer(listener.address, ClientTls.from_files(theirs.authority))
    assert refusal.value.code == "tail_unreachable"


@pytest.mark.usefixtures("impatient")
def test_a_tail_may_ask_clients_for_a_certificate(ours: Certificates, theirs: Certificates) -> None:
    """One of its authority is let in; none, or one of another authority, is not, whatever its token."""
    with listening(tls_config(ours, asks_clients=True)) as listener:
        known = ClientTls.from_files(ours.authority, *ours.client("client-0"))
        assert answer(listener.address, known) == b"me:x"
        strangers = [
            ClientTls.from_files(ours.authority),
            ClientTls.from_files(ours.authority, *theirs.client("client-0")),
        ]
        for stranger in strangers:
            with pytest.raises(ExchangeError, match="tail-client-certificate"):
                answer(listener.address, stranger)
        assert answer(listener.address, known) == b"me:x"


# ---------------------------------------------------------------------------------------------- files and keys


def test_a_nodes_own_files_come_before_the_runs(ours: Certificates, theirs: Certificates) -> None:
    run = {"tail-root-certificates": str(theirs.authority)}
    certificate, key = ours.client("client-1")
    node = {
        "tail-root-certificates": str(ours.authority),
        "tail-client-certificate": str(certificate),
        "tail-client-private-key": str(key),
    }
    assert read_tls(run, {}) == ClientTls(theirs.authority.read_bytes())
    both = read_tls(run, node)
    assert both == ClientTls(ours.authority.read_bytes(), (certificate.read_bytes(), key.read_bytes()))
    assert read_tls({}, {}) is None
    assert read_tls({"tail-root-certificates": ""}, {"partition-id": 1}) is None


def test_files_that_do_not_fit_are_named_with_their_keys(ours: Certificates, tmp_path: Path) -> None:
    certificate, key = ours.client("client-2")
    absent = tmp_path / "absent.pem"
    with pytest.raises(ConfigError, match=r"absent\.pem \(run config: tail-root-certificates\)"):
        ClientTls.from_files(absent)
    with pytest.raises(ConfigError, match=r"tail-client-certificate, tail-client-private-key\), found one"):
        ClientTls.from_files(ours.authority, certificate)
    with pytest.raises(ConfigError, match=r"\(tail-root-certificates\) beside tail-client-certificate"):
        ClientTls.from_files(None, certificate, key)
    with pytest.raises(ConfigError, match=r"private key of client-2\.pem, .*tail-client-private-key\), found: "):
        ClientTls.from_files(ours.authority, certificate, ours.private_key)
    with pytest.raises(ConfigError, match="tail-private-key beside tail-client-root-certificates, found none"):
        GrpcListener(echo, ServiceConfig(client_root_certificates=ours.authority))
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    config = ServiceConfig(certificate=ours.certificate, private_key=ours.private_key, client_root_certificates=junk)
    with pytest.raises(ConfigError, match=r"junk\.pem \(run config: tail-client-root-certificates\)"):
        GrpcListener(echo, config)


# ---------------------------------------------------------------------------------------------- a proxy that ends TLS


@contextmanager
def proxy(certificates: Certificates, target: str) -> Iterator[str]:
    """What `stunnel`, or a load balancer of TCP, does: TLS outside, the same bytes without it inside."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.certificate, certificates.private_key)
    context.set_alpn_protocols(["h2"])
    host, _, port = target.rpartition(":")

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()

    def accept(door: socket.socket) -> None:
        while True:
            try:
                outside, _ = door.accept()
            except OSError:
                return  # closed
            try:
                wrapped = context.wrap_socket(outside, server_side=True)
            except OSError:
                continue
            inside = socket.create_connection((host, int(port)))
            for pair in ((wrapped, inside), (inside, wrapped)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=accept, args=(door,), daemon=True).start()
        yield f"127.0.0.1:{door.getsockname()[1]}"
        door.shutdown(socket.SHUT_RDWR)


def test_a_proxy_may_end_tls_before_the_tail(ours: Certificates, caplog: pytest.LogCaptureFixture) -> None:
    """The tail behind it is plain, on loopback, and says nothing of that; clients are told the proxy's address."""
    with listening(ServiceConfig()) as tail, proxy(ours, tail.address) as outside:
        assert answer(outside, ClientTls.from_files(ours.authority)) == b"me:x"
        with listening(ServiceConfig(advertise=outside)) as told:
            assert told.address == outside
    assert caplog.records == []


# ---------------------------------------------------------------------------------------------- addresses


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_ipv6(ours: Certificates) -> None:
    with listening(ServiceConfig("[::1]:0")) as plain, listening(tls_config(ours, "[::1]:0")) as secure:
        assert plain.address.startswith("[::1]:")
        assert answer(plain.address) == b"me:x"
        assert answer(secure.address, ClientTls.from_files(ours.authority)) == b"me:x"
    with listening(ServiceConfig("[::]:0", "[::1]")) as everywhere:
        assert everywhere.address.startswith("[::1]:")
        assert answer(everywhere.address) == b"me:x"


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (ServiceConfig("::1:9095"), "tail-bind"),
        (ServiceConfig(":::0"), "tail-bind"),
        (ServiceConfig("127.0.0.1:0", "2001:db8::7"), "tail-address"),
        (ServiceConfig("127.0.0.1:0", "2001:db8::7:9095"), "tail-address"),
    ],
)
def test_an_ipv6_address_without_brackets_is_refused(config: ServiceConfig, key: str) -> None:
    """`tail-address="2001:db8::7"` was taken for port 7 of 2001:db8:, and told to clients."""
    with pytest.raises(ConfigError, match=rf"Expected an IPv6 address in brackets.*\(run config: {key}\)"):
        GrpcListener(echo, config)


@pytest.mark.parametrize("told", ["", "0.0.0.0", "0.0.0.0:9095", "[::]:9095"])
def test_clients_are_not_told_to_connect_to_everywhere(told: str) -> None:
    with pytest.raises(ConfigError, match=r"Expected an address that clients can reach.*tail-address"):
        GrpcListener(echo, ServiceConfig("0.0.0.0:0", told))


@pytest.mark.parametrize(
    ("bind", "encrypted", "warned"),
    [
        ("0.0.0.0:0", False, True),
        ("0.0.0.0:0", True, False),
        ("127.0.0.1:0", False, False),
        ("127.0.0.7:0", False, False),
        ("localhost:0", False, False),
    ],
)
def test_plain_text_beyond_this_machine_is_warned_of(
    ours: Certificates, caplog: pytest.LogCaptureFixture, bind: str, encrypted: bool, warned: bool
) -> None:
    files = (ours.certificate, ours.private_key) if encrypted else (None, None)
    config = ServiceConfig(bind, "127.0.0.1", certificate=files[0], private_key=files[1])
    with caplog.at_level(logging.WARNING, "hsplit_flwr"), listening(config):
        lines = [record.message for record in caplog.records]
    assert len(lines) == warned
    if warned:
        assert "without TLS" in lines[0]
        assert "tail-certificate and tail-private-key" in lines[0]
