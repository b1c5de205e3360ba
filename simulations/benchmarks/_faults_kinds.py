"""The faults of `faults.py`: what each does to a deployment in the middle of a run, and what a supervisor does then."""

import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil
from _faults_deployment import NODES, VICTIM, FaultyDeployment, why_no_disk

from tests.helpers.deployment import NAME

STOPPED_S = 60.0
CUT_S = 2.0
SLOW_BYTES_PER_S = 50e3
MEMORY_MARGIN_BYTES = 4 << 20
"""what a server out of memory may still take: a few small tensors, not a step"""
ALL = range(NODES)


def _nothing(deployment: FaultyDeployment) -> None:
    """Nobody has to do anything."""


def _possible() -> None:
    """Nothing is needed for it."""


@dataclass(frozen=True)
class Fault:
    """One way for a deployment to break."""

    name: str
    strike: Callable[[FaultyDeployment, str], None]
    """does it, to the deployment and the run of that id"""
    mend: Callable[[FaultyDeployment], None] = _nothing
    """what people do before they start a run again"""
    why_not: Callable[[], str | None] = _possible
    """why it cannot be had here; None if it can"""


def kill_supernode(deployment: FaultyDeployment, run: str) -> None:
    """A machine that loses its power, and comes back."""
    deployment.kill_supernode(VICTIM)


def kill_clientapp(deployment: FaultyDeployment, run: str) -> None:
    """The process that trains, as the system ends one that takes too much memory."""
    _send(deployment.client_app(VICTIM), signal.SIGKILL)


def kill_serverapp(deployment: FaultyDeployment, run: str) -> None:
    """The process that has tail and rounds."""
    _send(deployment.apps("serverapp"), signal.SIGKILL)


def kill_superlink(deployment: FaultyDeployment, run: str) -> None:
    """The SuperLink, with all processes of its unit, which its supervisor starts again."""
    deployment.kill_superlink()
    deployment.start_superlink()


def restart_supernodes(deployment: FaultyDeployment) -> None:
    """One that was sending when the SuperLink was killed may hang: alive to Flower, and mute (flwr 1.42)."""
    deployment.restart_supernodes()


def stop_client(deployment: FaultyDeployment, run: str) -> None:
    """A client's machine that sleeps."""
    _pause(deployment.supernode(VICTIM))


def stop_server(deployment: FaultyDeployment, run: str) -> None:
    """A ServerApp that gets no time."""
    _pause(deployment.apps("serverapp"))


def cut_one(deployment: FaultyDeployment, run: str) -> None:
    """One client's connections."""
    deployment.links.cut([VICTIM], CUT_S)


def cut_all(deployment: FaultyDeployment, run: str) -> None:
    """Everybody's."""
    deployment.links.cut(ALL, CUT_S)


def slow_link(deployment: FaultyDeployment, run: str) -> None:
    """One client's link, until the end of the run."""
    deployment.links.limit([VICTIM], SLOW_BYTES_PER_S)


def fast_link(deployment: FaultyDeployment) -> None:
    """As before."""
    deployment.links.limit(ALL, None)


def fill_disk(deployment: FaultyDeployment, run: str) -> None:
    """The disk of the run's results and of the clients' copies of the delta, until somebody makes room."""
    deployment.disk.fill()


def free_disk(deployment: FaultyDeployment) -> None:
    """Make room."""
    deployment.disk.free()


def take_memory(deployment: FaultyDeployment, run: str) -> None:
    """A ServerApp that gets next to no memory any more."""
    for process in deployment.apps("serverapp"):
        limit = process.memory_info().vms + MEMORY_MARGIN_BYTES
        process.rlimit(psutil.RLIMIT_AS, (limit, limit))


def stop_run(deployment: FaultyDeployment, run: str) -> None:
    """What people type."""
    deployment.command("stop", run, NAME)


def _no_limits() -> str | None:
    return None if hasattr(psutil, "RLIMIT_AS") else "limits of another process are Linux's"


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("kill-supernode", kill_supernode),
        Fault("kill-clientapp", kill_clientapp),
        Fault("kill-serverapp", kill_serverapp),
        Fault("kill-superlink", kill_superlink, restart_supernodes),
        Fault("stop-client", stop_client),
        Fault("stop-server", stop_server),
        Fault("cut-one", cut_one),
        Fault("cut-all", cut_all),
        Fault("slow-link", slow_link, fast_link),
        Fault("disk-full", fill_disk, free_disk, why_no_disk),
        Fault("out-of-memory", take_memory, why_not=_no_limits),
        Fault("flwr-stop", stop_run),
    )
}


def _send(processes: list[psutil.Process], sent: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(sent)


def _pause(processes: list[psutil.Process]) -> None:
    _send(processes, signal.SIGSTOP)
    try:
        time.sleep(STOPPED_S)
    finally:
        _send(processes, signal.SIGCONT)
