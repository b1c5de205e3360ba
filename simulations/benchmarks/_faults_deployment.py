"""What `faults.py` hits: a deployment as docs/deployment.md describes it, whose links and disk can be taken away."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import _repository
import psutil
from _faults_links import Links

from tests.helpers.deployment import Deployment, end_all
from tests.helpers.flower import FlowerHome, Values, flower_home, free_port, run_arguments

APP = Path(__file__).parent / "_faults_app"
NODES = 2
VICTIM = 0
DISK_BYTES = 256 << 20
SUPERVISOR_S = 1.0
_COMMAND_LIMIT_S = 20.0


class Disk:
    """A small file system in memory at `folder`, which can be filled; an ordinary folder where that takes root.

    Args:
        folder: to be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.is_small = why_no_disk() is None
        if self.is_small:
            _command("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "hsplit-faults", str(folder))

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self) -> None:
        """Leave no byte free."""
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1))

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        if self.is_small:
            _command("umount", "--lazy", str(self.folder))


class FaultyDeployment(Deployment):
    """SuperLink, `NODES` SuperNodes behind links of their own, and a disk for results and the clients' state."""

    def __init__(self, home: FlowerHome, disk: Disk) -> None:
        self.disk = disk
        self.node_config = f"state-dir='{disk.folder / 'state'}'"
        self.tail_port = free_port()
        self._starting = threading.Lock()
        (home.folder / "marks").mkdir()
        home.environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HSPLIT_FAULTS": str(home.folder / "marks")}
        super().__init__(home, NODES)
        self.links = Links(NODES, self.port, self.tail_port, self._owner)

    def superlink_address(self, node: int) -> str:
        """The near end of its link."""
        return self.links.superlink_address(node)

    @property
    def marks(self) -> Path:
        """Where client 0 says in which phase it is."""
        return self.home.folder / "marks"

    def hold(self, round_number: int, phase: str) -> Path:
        """Let client 0 wait in that phase for a moment; returns the file that it leaves then."""
        mark = self.marks / phase
        mark.unlink(missing_ok=True)
        (self.marks / "hold").write_text(f"{round_number} {phase}")
        return mark

    def run(self, run_config: Values) -> tuple["subprocess.Popen[bytes]", Path]:
        """``flwr run``, under way, with the tail behind TLS and at the other end of the links."""
        address: dict[str, Any] = {
            "tail-bind": f"127.0.0.1:{self.tail_port}",
            "tail-address": self.links.tail_address,
            "tail-certificate": str(self.certificates.certificate),
            "tail-private-key": str(self.certificates.private_key),
        }
        return self.home.start("flwr", *run_arguments(APP, {**address, **run_config}))

    def client_app(self, node: int) -> list[psutil.Process]:
        """The ClientApp's processes of a SuperNode."""
        mine = self.supernode(node)
        return [process for process in self.apps("clientapp") if process in mine]

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """SuperNodes that end are started again, as docs/deployment.md says."""
        is_over = threading.Event()

        def supervise() -> None:
            while not is_over.wait(SUPERVISOR_S):
                for node in range(NODES):
                    with self._starting:
                        if not self.supernode(node):
                            self.start_supernode(node)

        supervisor = threading.Thread(target=supervise, name="supervisor", daemon=True)
        supervisor.start()
        try:
            yield
        finally:
            is_over.set()
            supervisor.join(_COMMAND_LIMIT_S)

    def restart_supernodes(self) -> None:
        """End all of them and start them again, until the SuperLink has let them in."""
        with self._starting:
            for node in range(NODES):
                self.kill_supernode(node)
                self.start_supernode(node)

    def end_apps(self) -> None:
        """SIGKILL what a run has left behind, so that the next one is not its victim."""
        end_all([*self.apps("serverapp"), *self.apps("clientapp")])

    def _owner(self, port: int) -> int | None:
        """The SuperNode one of whose processes has a connection from local `port`."""
        for node in range(NODES):
            for process in reversed(self.supernode(node)):
                with suppress(psutil.Error):
                    if any(held.laddr and held.laddr.port == port for held in process.net_connections("tcp")):
                        return node
        return None


@contextmanager
def faulty_deployment(folder: Path) -> Iterator[FaultyDeployment]:
    """A deployment, connected; nothing of it is left behind."""
    with ExitStack() as open_until_end:
        disk = Disk(folder / "disk")
        open_until_end.callback(disk.close)
        home = open_until_end.enter_context(flower_home(folder / "home"))
        quickstart = _repository.REPOSITORY / "simulations" / "quickstart"
        home.environment["PYTHONPATH"] = os.pathsep.join(map(str, (_repository.REPOSITORY, quickstart)))
        deployment = FaultyDeployment(home, disk)
        open_until_end.enter_context(deployment.links)
        for node in range(NODES):
            deployment.register(node)
            deployment.start_supernode(node)
        with deployment.supervised():
            yield deployment


def why_no_disk() -> str | None:
    """Why there can be no small disk here; None if there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a small disk (tmpfs) needs root on Linux"
    return None if shutil.which("mount") else "there is no `mount`"


def _command(*words: str) -> None:
    subprocess.run(words, check=True, timeout=_COMMAND_LIMIT_S)
