"""The nginx of docs/deployment.md before a plain tail; skipped where there is none."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hsplit_flwr.exchange.grpc_transport import GrpcListener, ServiceConfig, connect
from hsplit_flwr.exchange.tls_files import ClientTls
from hsplit_flwr.exchange.transport import Caller
from tests.helpers.certificates import GUIDE, Certificates
from tests.helpers.flower import free_port, wait_for_port

pytestmark = pytest.mark.timeout(60)

LIMIT = 8 << 20
LOG, START_S = "nginx.log", 20.0
LARGE = 4 << 20
"""more bytes than nginx takes of a body by default"""
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
"""where Debian has what others compile in"""


@contextmanager
def nginx(folder: Path, places: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The guide's, in `folder`, where its certificates are; `places` are its own addresses and ours for them."""
    if not shutil.which("nginx"):
        pytest.skip("no nginx to stand before the tail")
    found = re.search(r"<!-- file: nginx.conf -->\n```nginx\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    assert found, "docs/deployment.md has no nginx.conf"
    lines = found[1].replace("http {", "http {\n  access_log off;")
    for stated, ours in places.items():
        assert stated in lines
        lines = lines.replace(stated, ours)
    module = f"load_module {STREAM_MODULE};\n" if STREAM_MODULE.exists() else ""
    main = f"{module}daemon off;\npid nginx.pid;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(main + lines)
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", LOG]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def echo(_: Caller, frames: Iterator[bytes]) -> Iterator[bytes]:
    yield from frames


def test_either_server_of_the_guide_ends_tls_before_the_tail(tmp_path: Path) -> None:
    """As gRPC and as TCP; a body may be larger than nginx would take by itself."""
    certificates = Certificates.make(tmp_path)
    listener = GrpcListener(echo, ServiceConfig(max_frame_bytes=LIMIT), max_streams=8)
    listener.start()
    as_grpc, as_tcp = free_port(), free_port()
    places = {
        "listen 443": f"listen 127.0.0.1:{as_grpc}",
        "listen 8443": f"listen 127.0.0.1:{as_tcp}",
        "127.0.0.1:9095": listener.address,
    }
    try:
        with nginx(tmp_path, places) as process:
            for port in (as_grpc, as_tcp):
                wait_for_port(port, process, tmp_path / LOG, START_S)
                tls = ClientTls.from_files(certificates.authority)
                with closing(connect(f"localhost:{port}", "me:", 30.0, LIMIT, tls)) as stream:
                    for size in (1, LARGE, 2):
                        stream.send(b"x" * size)
                        assert stream.receive() == b"x" * size
    finally:
        listener.stop()
