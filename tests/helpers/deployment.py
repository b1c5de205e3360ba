"""A deployment on this machine as docs/deployment.md describes it: TLS, node authentication, a process per part."""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.helpers.certificates import Certificates
from tests.helpers.flower import (
    POLL_S,
    FlowerHome,
    Values,
    flower_home,
    free_port,
    run_arguments,
    tail,
    wait_for,
    wait_for_port,
)

START_S = 180.0
"""longest a SuperLink or SuperNode may take to come up, or one of Flower's commands"""
NAME = "loopback"
CONNECTION = """\
[superlink]
default = "{name}"

[superlink.{name}]
address = "127.0.0.1:{port}"
root-certificates = "{authority}"
"""


class Deployment:
    """A SuperLink that admits registered SuperNodes only, and `nodes` of these; `home` runs apps on it."""

    node_config = ""
    """further entries of every SuperNode's"""

    def __init__(self, home: FlowerHome, nodes: int) -> None:
        self.home = home
        self._nodes = nodes
        self.certificates = Certificates.make(home.folder / "tls")
        self._supernodes: dict[int, subprocess.Popen[bytes]] = {}
        self.port = free_port()
        """the SuperLink's"""
        config = CONNECTION.format(name=NAME, port=self.port, authority=self.certificates.authority)
        (home.folder / "config.toml").write_text(config)
        self.start_superlink()

    def start_superlink(self) -> None:
        """Start the SuperLink, or start it again: it knows the registered SuperNodes from its database."""
        authority, certificate, key = self.certificates
        self._superlink, log = self.home.start(
            "flower-superlink",
            *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certfile", str(authority)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--enable-supernode-auth"),
            *("--database", str(self.home.folder / "state.db")),
        )
        wait_for_port(self.port, self._superlink, log, START_S)

    def superlink_address(self, node: int) -> str:
        """What SuperNode `node` is told to connect to."""
        return f"127.0.0.1:{self.port}"

    def _private_key(self, node: int) -> Path:
        return self.home.folder / f"node-{node}"

    def register(self, node: int) -> None:
        """Make a key pair of a SuperNode and register its public half."""
        key = ec.generate_private_key(ec.SECP384R1())
        private = self._private_key(node)
        public = private.with_suffix(".pub")
        openssh, plain = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, openssh, plain))
        of = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        public.write_bytes(of)
        self.command("supernode", "register", str(public), NAME)

    def start_supernode(self, node: int) -> None:
        """Start a registered SuperNode, and again whenever it ends, as a supervisor does, until it is let in.

        A SuperNode that was killed seems online to the SuperLink for a while; until then its successor, which has the
        same key, is turned away and gives up (flwr 1.42).
        """
        deadline = time.monotonic() + START_S
        while not self._let_in(node):
            assert time.monotonic() < deadline, f"SuperNode {node} was not let in within {START_S} s"

    def _let_in(self, node: int) -> bool:
        """Start a SuperNode with a runtime port of its own; returns whether it stayed."""
        config = f"partition-id={node} num-partitions={self._nodes}"
        process, log = self.home.start(
            "flower-supernode",
            *("--superlink", self.superlink_address(node), "--root-certificates", str(self.certificates.authority)),
            *("--auth-supernode-private-key", str(self._private_key(node)), "--port", str(free_port())),
            *("--node-config", f"{config} tail-root-certificates='{self.certificates.authority}' {self.node_config}"),
        )
        self._supernodes[node] = process
        wait_for(
            lambda: process.poll() is not None or "SuperNode ID" in log.read_text(), "an answer", None, log, START_S
        )
        return process.poll() is None

    def kill_supernode(self, node: int) -> None:
        """End all processes of a SuperNode without a farewell."""
        end_all(self.supernode(node))

    def kill_superlink(self) -> None:
        """End all processes of the SuperLink without a farewell, those of its runs included."""
        end_all(family(self._superlink.pid))

    def supernode(self, node: int) -> list[psutil.Process]:
        """All processes of a SuperNode, itself first."""
        return family(self._supernodes[node].pid)

    def start(self, app: Path, run_config: Values) -> tuple["subprocess.Popen[bytes]", Path]:
        """``flwr run APP --stream``, under way; returns its process and log."""
        return self.home.start("flwr", *run_arguments(app, run_config))

    def statuses(self) -> dict[str, str]:
        """Run id -> its status, as `flwr list` says."""
        runs = json.loads(self.command("list", NAME, "--format", "json"))["runs"]
        return {str(run["run-id"]): str(run["status"]) for run in runs}

    def command(self, *arguments: str) -> str:
        """The output of ``flwr ...``, which must succeed."""
        process, log = self.home.start("flwr", *arguments)
        assert process.wait(START_S) == 0, tail(log)
        return log.read_text()

    def apps(self, kind: str) -> list[psutil.Process]:
        """Processes of runs: of their ``serverapp`` or their ``clientapp``."""
        return [process for process in self.home.processes() if f"flwr-{kind}" in " ".join(_words(process)[:3])]


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, itself first; nothing of one that has ended."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return []
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_all(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they have ended, be it as zombies of a parent that does not care."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + START_S
    while any(map(_lives, processes)):
        assert time.monotonic() < deadline, processes
        time.sleep(POLL_S)


def _lives(process: psutil.Process) -> bool:
    try:
        lives: bool = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    return lives


@contextmanager
def deployed(folder: Path, nodes: int) -> Iterator[Deployment]:
    """A deployment with `nodes` SuperNodes, connected; none of its processes is left behind."""
    with flower_home(folder) as home:
        deployment = Deployment(home, nodes)
        for node in range(nodes):
            deployment.register(node)
            deployment.start_supernode(node)
        yield deployment


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []  # gone meanwhile
    return words
