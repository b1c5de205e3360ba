"""Flower as a user starts it, for tests: `flwr run` in a FLWR_HOME of its own, and every process of it ended by pid.

A process belongs to a home if FLWR_HOME in its environment says so: SuperLink, SuperExec, simulation and all of Ray's
processes inherit it. Nothing is ever matched by name.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "simulations" / "quickstart"
FAULTS = REPOSITORY / "tests" / "apps" / "faults"
MESSAGES = REPOSITORY / "tests" / "apps" / "messages"
"""the quickstart on the Message API, with the faults of `FAULTS`"""
BIN = Path(sys.executable).parent
POLL_S = 0.2
RUN_S = 420.0
"""longest a simulation may take on two busy cores; it takes 40-90 s"""
WHOLE: "Values" = {"rounds": 3, "local-steps": 6, "warmup-steps": 2}
"""of the run that others are compared with, see `tests/flower/conftest.py`"""
Values = Mapping[str, Any]
"""of a run config: bool, int, float, str"""


class FlowerHome:
    """A FLWR_HOME with ports of its own, so that two of them never meet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(folder),
            "PYTHONUNBUFFERED": "1",  # what a test waits for must be in the file as soon as it is said
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, QUICKSTART, FAULTS))),
        }

    def start(self, command: str, *arguments: str) -> tuple["subprocess.Popen[bytes]", Path]:
        """Start one of Flower's commands in the background; its output goes to the returned file."""
        log = self.folder / f"{command}-{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(BIN / command), *arguments],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return process, log

    def run(self, app: Path, run_config: Values, *arguments: str, timeout_s: float) -> str:
        """``flwr run APP --stream``; returns the log (AssertionError: the run failed, or took longer)."""
        process, log = self.start("flwr", *run_arguments(app, run_config), *arguments)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"flwr run took more than {timeout_s} s:\n{tail(log)}") from None
        assert code == 0, f"flwr run ended with {code}:\n{tail(log)}"
        return log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started under this home."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def end(self, grace_s: float = 10.0) -> list[psutil.Process]:
        """SIGTERM, then SIGKILL for what is left after `grace_s`; returns what survived even that."""
        for process in (left := self.processes()):
            process.terminate()
        psutil.wait_procs(left, grace_s)
        while left := self.processes():  # again: a dying parent may have started another child
            for process in left:
                process.kill()
            _, left = psutil.wait_procs(left, grace_s)
            if left:
                break
        return left

    def _owns(self, process: psutil.Process) -> bool:
        try:
            mine: bool = process.environ().get("FLWR_HOME") == str(self.folder)
            return mine and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False  # gone meanwhile, a zombie, or another user's


@contextmanager
def flower_home(folder: Path) -> Iterator[FlowerHome]:
    """A `FlowerHome` that leaves no process behind."""
    home = FlowerHome(folder)
    try:
        yield home
    finally:
        survivors = home.end()
        assert not survivors, f"still running: {survivors}"


def run_arguments(app: Path, run_config: Values) -> list[str]:
    """``run APP --stream --run-config ...``: a JSON scalar is a TOML scalar."""
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())
    return ["run", str(app), "--stream", "--run-config", pairs]


def simulation(nodes: int, actors: int) -> list[str]:
    """Arguments of ``flwr run`` for `nodes` SuperNodes on `actors` Ray actors, whatever cores there are."""
    values = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={actors}"
    return ["--federation-config", values]


FIVE_NODES = simulation(nodes=5, actors=5)


def read_summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a finished run."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    """Everything of a summary that two equal runs must have alike: no seconds, no commands, no folders."""
    kept = {
        key: summary[key] for key in ("initial_perplexity", "final_perplexity", "rounds", "seed", "adapter", "samples")
    }
    rounds = []
    for record in summary["history"]:
        clients = [{**client, "seconds": None, "held_s": None} for client in record["clients"]]
        rounds.append({**record, "clients": clients, "seconds": None, "steps": None})
    return {**kept, "history": rounds}


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path, timeout_s: float) -> None:
    """Until somebody listens on `port` (errors as `wait_for`)."""

    def listens() -> bool:
        with socket.socket() as probe:
            probe.settimeout(POLL_S)
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens, f"a listener on port {port}", process, log, timeout_s)


def wait_for_log(text: str, process: "subprocess.Popen[bytes]", log: Path, timeout_s: float) -> None:
    """Until `log` contains `text` (errors as `wait_for`)."""
    wait_for(lambda: text in log.read_text(errors="replace"), repr(text), process, log, timeout_s)


def wait_for(
    condition: Callable[[], bool], what: str, process: "subprocess.Popen[bytes] | None", log: Path, timeout_s: float
) -> None:
    """Until `condition` (AssertionError: `process`, if any, ended before that, or it took longer)."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process is not None:
            assert process.poll() is None, f"{process.args!r} ended before {what}:\n{tail(log)}"
        assert time.monotonic() < deadline, f"not {what} within {timeout_s} s:\n{tail(log)}"
        time.sleep(POLL_S)


def tail(log: Path, lines: int = 60) -> str:
    """The end of a log, for a failed assertion."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
