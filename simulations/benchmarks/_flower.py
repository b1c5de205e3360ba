"""Flower's processes in a FLWR_HOME of their own, for benchmarks; each is ended by pid."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

START_S = 120.0
END_S = 20.0
NAME = "loopback"
BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parents[2]


class Loopback:
    """A SuperLink and SuperNodes without TLS.

    Args:
        home: their FLWR_HOME; logs are there, too.
        nodes: how many SuperNodes.
    """

    def __init__(self, home: Path, nodes: int) -> None:
        self._home = home
        self._processes: list[subprocess.Popen[bytes]] = []
        port = _free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        self._start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        _wait_for_port(port)
        for node in range(nodes):
            self._start(
                "flower-supernode",
                *("--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(_free_port())),
                *("--node-config", f"partition-id={node} num-partitions={nodes} state-dir='{home / f'state-{node}'}'"),
            )

    def run(self, app: Path, run_config: dict[str, object], limit_s: float) -> str:
        """``flwr run APP``; returns its log.

        Raises:
            RuntimeError: it failed.
            subprocess.TimeoutExpired: it took longer than `limit_s`.
        """
        pairs = " ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in run_config.items()
        )
        process = self._start("flwr", "run", str(app), NAME, "--stream", "--run-config", pairs)
        code = process.wait(limit_s)
        log = (self._home / f"{len(self._processes)}-flwr.log").read_text(errors="replace")
        if code:
            raise RuntimeError(f"flwr run ended with {code}:\n{log[-4000:]}")
        return log

    def end(self) -> None:
        """End every process that was started, and what it has started."""
        left = [member for process in self._processes for member in _family(process.pid)]
        for process in left:
            with suppress(psutil.Error):
                process.terminate()
        _, left = psutil.wait_procs(left, END_S)
        for process in left:
            with suppress(psutil.Error):
                process.kill()

    def _start(self, command: str, *arguments: str) -> "subprocess.Popen[bytes]":
        log = self._home / f"{len(self._processes) + 1}-{command}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(BIN / command), *arguments],
                env={**_environment(), "FLWR_HOME": str(self._home)},
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return process


@contextmanager
def loopback(home: Path, nodes: int) -> Iterator[Loopback]:
    """A deployment that leaves no process behind."""
    home.mkdir(parents=True)
    deployment = Loopback(home, nodes)
    try:
        yield deployment
    finally:
        deployment.end()


@contextmanager
def own_home(folder: Path) -> Iterator[dict[str, str]]:
    """What `flwr run` needs: a FLWR_HOME in `folder` and free ports; whatever was started with it is ended."""
    home = folder / "flower"
    home.mkdir()
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        yield environment
    finally:
        _end_processes(home)


def run_simulation(
    app: Path, federation: str, run_config: str, folder: Path, environment: dict[str, str], limit_s: float
) -> Path:
    """``flwr run`` of an app that writes to ``results`` in `folder`; returns its summary.json. The log is in `folder`.

    Raises:
        RuntimeError: it failed, or took longer than `limit_s`.
    """
    log, summary = folder / "log", folder / "results" / "summary.json"
    command = [str(BIN / "flwr"), "run", str(app), "--stream"]
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [*command, "--federation-config", federation, "--run-config", run_config],
                env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                timeout=limit_s, check=False,
            )  # fmt: skip
            end = f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            end = f"none after {limit_s:.0f} s"
    if end != "exit code 0" or not summary.exists():
        lines = log.read_text(errors="replace").splitlines()[-40:]
        raise RuntimeError("\n".join([f"Expected flwr run to end well, found {end}:", *lines]))
    return summary


def _end_processes(home: Path) -> None:
    """SIGTERM, then SIGKILL for what is left; again, since a parent that ends may have started another child."""
    for process in (left := _started_in(home)):
        process.terminate()
    psutil.wait_procs(left, END_S)
    while left := _started_in(home):
        for process in left:
            process.kill()
        psutil.wait_procs(left, END_S)


def _started_in(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("FLWR_HOME") == str(home)
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # gone meanwhile, or another user's
    return found


def _environment() -> dict[str, str]:
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    return {**os.environ, **quiet, **path, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"nobody listens on port {port} after {START_S} s")
