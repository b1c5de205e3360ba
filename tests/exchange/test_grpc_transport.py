"""The transport alone, over real gRPC on loopback: where it listens, what it refuses, how many it serves, why not."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from hsplit_flwr.errors import ConfigError, ExchangeError
from hsplit_flwr.exchange import grpc_transport, transport
from hsplit_flwr.exchange.grpc_transport import GrpcListener, ServiceConfig, connect
from hsplit_flwr.exchange.tls_files import ClientTls
from hsplit_flwr.exchange.transport import Caller, FrameStream, Serve

pytestmark = pytest.mark.timeout(60)

SOON_S = 10.0
LIMIT = 1 << 20
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""the preface and empty settings"""


def echo(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
    for frame in frames:
        yield caller.token.encode() + frame


@contextmanager
def listening(serve: Serve = echo, config: ServiceConfig | None = None, max_streams: int = 8) -> Iterator[GrpcListener]:
    listener = GrpcListener(serve, config or ServiceConfig(), max_streams)
    listener.start()
    try:
        yield listener
    finally:
        listener.stop()


def opened(address: str, token: str = "t", roots: bytes | None = None) -> FrameStream:
    return connect(address, token, 30.0, LIMIT, ClientTls(roots) if roots else None)


# ---------------------------------------------------------------------------------------------- a stream


def test_frames_go_there_and_back() -> None:
    with listening() as listener, closing(opened(listener.address, "me:")) as stream:
        for frame in (b"one", b"", bytes(range(256))):
            stream.send(frame)
            assert stream.receive() == b"me:" + frame


def test_the_tails_end_of_the_stream_is_none_to_receive() -> None:
    with listening(lambda caller, frames: iter([b"bye"])) as listener, closing(opened(listener.address)) as stream:
        assert (stream.receive(), stream.receive()) == (b"bye", None)


def test_what_is_refused_arrives_with_its_code() -> None:
    def refusing(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
        yield next(frames)
        raise ExchangeError("too_many_steps", "Expected less,\nfound more.")

    with listening(refusing) as listener, closing(opened(listener.address)) as stream:
        stream.send(b"x")
        assert stream.receive() == b"x"
        with pytest.raises(ExchangeError, match="Expected less,\nfound more") as refusal:
            stream.receive()
    assert refusal.value.code == "too_many_steps"


def test_a_caller_has_a_deadline_an_end_and_is_missed_when_gone() -> None:
    callers: list[Caller] = []
    gone = threading.Event()

    def noting(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
        callers.append(caller)
        caller.on_gone(gone.set)
        yield from frames

    with listening(noting) as listener:
        with closing(opened(listener.address)) as stream:
            stream.send(b"x")
            assert stream.receive() == b"x"
            assert 0 < callers[0].seconds_left < 31.0
            callers[0].end()
            with pytest.raises(ExchangeError) as end:
                stream.receive()
            assert end.value.code == "round_closed"
            assert gone.wait(SOON_S)
        gone.clear()
        with closing(opened(listener.address)) as stream:
            stream.send(b"x")
            stream.receive()
        assert gone.wait(SOON_S)


def test_a_hundred_clients_at_a_time() -> None:
    """Each waits until all are there: with 64 threads for 100 streams, the first 64 would wait for ever."""
    clients = 100
    everyone = threading.Barrier(clients, timeout=30.0)

    def together(caller: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
        for frame in frames:
            everyone.wait()
            yield frame

    with listening(together, max_streams=grpc_transport.MAX_STREAMS) as listener:
        streams = [opened(listener.address, str(number)) for number in range(clients)]
        try:
            for number, stream in enumerate(streams):
                stream.send(str(number).encode())
            assert [stream.receive() for stream in streams] == [str(number).encode() for number in range(clients)]
        finally:
            for stream in streams:
                stream.close()


def test_a_client_beyond_the_limit_is_refused_not_kept_waiting() -> None:
    with listening(max_streams=2) as listener:
        streams = [opened(listener.address) for _ in range(2)]
        for stream in streams:
            stream.send(b"x")
            assert stream.receive() == b"tx"
        with closing(opened(listener.address)) as surplus:
            surplus.send(b"x")
            with pytest.raises(ExchangeError, match="Let fewer clients train at a time") as refusal:
                surplus.receive()
        assert refusal.value.code == "tail_full"
        streams.pop().close()
        end = time.monotonic() + SOON_S
        while not came_in(listener.address):
            assert time.monotonic() < end, "the freed place was not given to the next"
        streams.pop().close()


def came_in(address: str) -> bool:
    with closing(opened(address)) as stream:
        stream.send(b"x")
        try:
            return stream.receive() is not None
        except ExchangeError:
            return False


# ---------------------------------------------------------------------------------------------- where it listens


CROWD = 400
LOCKED_OUT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
import sys
from hsplit_flwr.exchange.grpc_transport import GrpcListener, ServiceConfig
listener = GrpcListener(lambda caller, frames: iter([b"welcome"]), ServiceConfig())
listener.start()
print(listener.address, flush=True)
sys.stdin.read()
listener.stop()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of open files")
def test_a_crowd_that_says_nothing_keeps_nobody_out() -> None:
    """At the soft limit of open files, 1024 on most systems, the tail took no further connection at all."""
    with subprocess.Popen([sys.executable, "-c", LOCKED_OUT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tail:
        assert tail.stdin
        assert tail.stdout
        address = tail.stdout.readline().decode().strip()
        host, _, port = address.rpartition(":")
        crowd = [socket.create_connection((host, int(port)), SOON_S) for _ in range(CROWD)]
        try:
            with closing(opened(address)) as stream:
                assert stream.receive() == b"welcome"
        finally:
            for connection in crowd:
                connection.close()
            tail.stdin.close()


def test_who_says_nothing_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections without a word of HTTP/2 stayed for two minutes, such without a stream for ever."""
    monkeypatch.setattr(grpc_transport, "GREETING_S", 0.5)
    monkeypatch.setattr(grpc_transport, "IDLE_S", 1.0)
    with listening() as listener:
        host, _, port = listener.address.rpartition(":")
        for greeting in (b"", HTTP2_GREETING):
            with socket.create_connection((host, int(port)), SOON_S) as connection:
                connection.sendall(greeting)
                while connection.recv(1 << 16):  # TimeoutError after SOON_S
                    pass
        with closing(opened(listener.address)) as stream:  # a stream is no idle connection, however quiet
            time.sleep(2.0)
            stream.send(b"x")
            assert stream.receive() == b"tx"


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536", "127.0.0.1:-1"])
def test_an_address_without_a_port_is_a_clear_error(bind: str) -> None:
    """gRPC would listen on 443 of it, or say nothing of use."""
    with pytest.raises(ConfigError, match=rf"Expected host:port to listen on \(.*tail-bind\), found '{bind}'"):
        GrpcListener(echo, ServiceConfig(bind=bind))


def test_a_taken_port_is_a_clear_error(certificates: tuple[Path, Path, bytes]) -> None:
    """Also with good TLS files: these are not to blame."""
    certificate, key, _ = certificates
    with listening() as listener:
        taken = ServiceConfig(bind=listener.address)
        for config in (taken, replace(taken, certificate=certificate, private_key=key)):
            with pytest.raises(ConfigError, match=f"Expected to listen on {taken.bind}.*Choose a free port") as refusal:
                GrpcListener(echo, config)
            assert "the address is in use, perhaps by another run" in str(refusal.value)
            assert "TLS" not in str(refusal.value)


def test_a_port_is_free_again_after_its_run() -> None:
    with listening() as listener, closing(opened(listener.address)) as stream:
        stream.send(b"x")
        stream.receive()
    with listening(config=ServiceConfig(listener.address)) as again:
        assert again.address == listener.address


@pytest.mark.parametrize(
    ("bind", "cause"),
    [("192.0.2.1:0", "Cannot assign requested address"), ("no-such-host.invalid:0", "[Nn]ame|resolution")],
    ids=["not this machine's", "no such name"],
)
def test_an_address_of_elsewhere_is_a_clear_error(bind: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=rf"Expected to listen on {bind} .*found: .*({cause}).*of this machine"):
        GrpcListener(echo, ServiceConfig(bind=bind))


def test_an_unknown_transport_is_a_clear_error() -> None:
    for refused in (lambda: transport.transport_of("tcp://h:1"), lambda: transport.connect("tcp://h:1", "t", 1.0, 1)):
        with pytest.raises(ConfigError, match=r"begins with one of \['grpc://'\], found 'tcp://h:1'"):
            refused()


def test_an_address_may_name_its_transport() -> None:
    listener = transport.transport_of("grpc://127.0.0.1:0").listen(echo, ServiceConfig("grpc://127.0.0.1:0"))
    listener.start()
    try:
        for address in (listener.address, f"grpc://{listener.address}"):
            with closing(transport.connect(address, "", 30.0, LIMIT)) as stream:
                stream.send(b"x")
                assert stream.receive() == b"x"
    finally:
        listener.stop()


# ---------------------------------------------------------------------------------------------- TLS files


def test_one_of_two_tls_files_is_refused(certificates: tuple[Path, Path, bytes]) -> None:
    certificate, key, _ = certificates
    for config in (ServiceConfig(certificate=certificate), ServiceConfig(private_key=key)):
        with pytest.raises(ConfigError, match=r"both a certificate and a private key .*-certificate, tail-private-key"):
            GrpcListener(echo, config)


@pytest.mark.parametrize(
    ("bad", "key", "message"),
    [
        ("absent", "tail-certificate", "readable TLS files, found for .*{} .*No such file"),
        ("absent", "tail-private-key", "readable TLS files, found for .*{} .*No such file"),
        ("a folder", "tail-private-key", "readable TLS files, found for .*{} .*directory"),
        ("empty", "tail-certificate", "a PEM certificate chain in .*{} .*found: "),
        ("junk", "tail-certificate", "a PEM certificate chain in .*{} .*found: "),
        ("the other", "tail-certificate", "a PEM certificate chain in .*{} .*found: "),
        ("empty", "tail-private-key", r"the private key of tail\.pem, .*{} .*found: "),
        ("junk", "tail-private-key", r"the private key of tail\.pem, .*{} .*found: "),
        ("of another", "tail-private-key", r"the private key of tail\.pem, .*{} .*found: .*mismatch"),
        ("encrypted", "tail-private-key", r"the private key of tail\.pem, in PEM and not encrypted, .*{} .*found: "),
    ],
)
def test_a_bad_tls_file_is_named_with_its_key(
    certificates: tuple[Path, Path, bytes], tmp_path: Path, bad: str, key: str, message: str
) -> None:
    good = {"tail-certificate": certificates[0], "tail-private-key": certificates[1]}
    path = tmp_path / "bad.pem"
    if bad == "a folder":
        path.mkdir()
    elif bad == "of another":
        path = good[key].with_name("other.key")
    elif bad == "encrypted":
        command = ["openssl", "ec", "-in", str(good[key]), "-aes256", "-passout", "pass:secret", "-out", str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=SOON_S)
    elif bad != "absent":
        content = {"empty": b"", "junk": b"\xff junk", "the other": good["tail-private-key"].read_bytes()}
        path.write_bytes(content[bad])
    files = good | {key: path}
    config = ServiceConfig(certificate=files["tail-certificate"], private_key=files["tail-private-key"])
    with pytest.raises(ConfigError, match=f"Expected {message.format(path.name)}") as refusal:
        GrpcListener(echo, config)
    assert key in str(refusal.value)


def test_roots_that_are_no_certificates_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"Expected PEM certificates .*tail-root-certificates\), found: "):
        opened("127.0.0.1:1", roots=b"junk")


# ---------------------------------------------------------------------------------------------- why not connected


def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_a_client_hears_soon_why_there_is_no_tail(
    certificates: tuple[Path, Path, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each client waited for 20 s and heard of nothing but reachability and TLS."""
    certificate, key, _ = certificates
    monkeypatch.setattr(grpc_transport, "PATIENCE_S", 0.2)
    with listening(config=ServiceConfig(certificate=certificate, private_key=key)) as secure:
        cases = [
            (nobody(), None, r"nobody listens there \(.*Connection refused"),
            ("no-such-host.invalid:1", None, r"that name does not resolve \(.*(resol|name|hostname)"),
            (secure.address, None, "perhaps the tail speaks TLS .*tail-root-certificates"),
        ]
        for address, roots, cause in cases:
            started = time.monotonic()
            with pytest.raises(ExchangeError, match=f"Expected a tail at {address}, found none .*{cause}") as refusal:
                opened(address, roots=roots)
            assert refusal.value.code == "tail_unreachable"
            assert time.monotonic() - started < SOON_S
        opened(secure.address, roots=certificate.read_bytes()).close()


@pytest.mark.parametrize(
    ("served", "trusted", "cause"),
    [
        (None, "other", r"this client speaks TLS, and the tail does not .*[Hh]andshake failed"),
        ("tail", "other", "no authority that this client trusts signed .*CERTIFICATE_VERIFY_FAILED"),
        ("expired", "expired", r"the tail's certificate has expired \(run config: tail-certificate\)"),
        ("elsewhere", "elsewhere", r"is for another host than that \(run config: tail-address\)"),
    ],
    ids=["TLS against plain", "wrong authority", "expired", "host name"],
)
def test_what_no_patience_would_help_is_said_at_once(
    certificate_files: Path, served: str | None, trusted: str, cause: str
) -> None:
    files = (certificate_files / f"{served}.pem", certificate_files / f"{served}.key") if served else (None, None)
    config = ServiceConfig(certificate=files[0], private_key=files[1])
    with listening(config=config) as listener:
        started = time.monotonic()
        with pytest.raises(ExchangeError, match=f"Expected a tail at {listener.address}, found none .*{cause}") as no:
            opened(listener.address, roots=(certificate_files / f"{trusted}.pem").read_bytes())
        assert no.value.code == "tail_unreachable"
        assert time.monotonic() - started < grpc_transport.PATIENCE_S


def test_a_tail_that_comes_up_late_is_found() -> None:
    address = nobody()
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(opened, address)
        time.sleep(0.3)
        with listening(config=ServiceConfig(address)), closing(stream.result(SOON_S)) as late:
            late.send(b"x")
            assert late.receive() == b"tx"


# ---------------------------------------------------------------------------------------------- what is loaded


def test_a_clients_side_loads_nothing_of_the_servers() -> None:
    code = "import sys, hsplit_flwr.exchange.remote_tail, hsplit_flwr.exchange.grpc_transport; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    servers = {"exchange.tail_service", "exchange.admission", "training.tail", "training.barrier"}
    assert not {f"hsplit_flwr.{name}" for name in servers} & set(done.stdout.split())


def test_remote_tail_and_task_need_no_grpc() -> None:
    code = "import sys, hsplit_flwr.exchange.remote_tail; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout.strip() == "False"
