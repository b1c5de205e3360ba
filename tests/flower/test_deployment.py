"""A real deployment on loopback: TLS and node authentication, the tail behind TLS, three SuperNodes, both faces.

One SuperLink serves all tests. In between, a ServerApp and a SuperNode are killed, and go on.
"""

import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.deployment import Deployment, deployed
from tests.helpers.flower import (
    MESSAGES,
    QUICKSTART,
    Values,
    read_summary,
    tail,
    timeless,
    wait_for_log,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NODES = 3
STEPS = 8
RUN_S = 600.0
"""longest that runs may take, two at a time on two busy cores; they take about a minute"""
CONFIGURED: Values = {"cuts": "2,4,6", "ranks": "4,8,8", "rounds": 2, "local-steps": STEPS, "warmup-steps": 2}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("deployment") / "home", NODES) as started:
        yield started


def values(deployment: Deployment, folder: Path, **changes: Any) -> dict[str, Any]:
    """A run config with the tail behind TLS."""
    files = deployment.certificates
    tls = {"tail-certificate": str(files.certificate), "tail-private-key": str(files.private_key)}
    return {**CONFIGURED, **tls, "output-dir": str(folder), **changes}


def finished(*runs: tuple["subprocess.Popen[bytes]", Path]) -> list[str]:
    """Logs of runs that were started, once all have ended."""
    for process, log in runs:
        try:
            process.wait(RUN_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"flwr run took more than {RUN_S} s:\n{tail(log)}") from None
    return [log.read_text(errors="replace") for _, log in runs]


def kill_in_round_2(deployment: Deployment, folder: Path) -> str:
    """A run whose ServerApp is killed in the middle of round 2, and a SuperNode with it; returns the run's id."""
    process, log = deployment.start(MESSAGES, values(deployment, folder))
    wait_for_log("round 2/2  step ", process, log, RUN_S)
    (server,) = deployment.apps("serverapp")
    server.send_signal(signal.SIGKILL)
    deployment.kill_supernode(NODES - 1)
    started = time.monotonic()
    deployment.start_supernode(NODES - 1)
    print(f"the SuperNode was back after {time.monotonic() - started:.0f} s")
    (said,) = finished((process, log))
    print(f"the run was over after {time.monotonic() - started:.0f} s")
    found = re.search(r"started run (\d+)", said)
    assert found, said
    return found[1]


def comparable(folder: Path) -> dict[str, Any]:
    """A summary as equal runs have it; clients of the one that was resumed took the whole delta once more."""
    summary = timeless(read_summary(folder))
    for record in summary["history"]:
        for client in record["clients"]:
            client["bytes_down"] = None
    return summary


def test_both_faces_train_the_same_also_if_killed_and_resumed(deployment: Deployment, tmp_path: Path) -> None:
    """The Message API's run is killed in round 2 and resumed; the legacy face's, at the same time, is not.

    Two runs at a time share the SuperNodes; each has a tail of its own. Bit by bit they end alike.
    """
    resumed, whole = tmp_path / "messages", tmp_path / "legacy"
    killed = kill_in_round_2(deployment, resumed)
    broken = read_summary(resumed)
    assert (broken["status"], broken["rounds"]) == ("running", 1)
    log, other = finished(
        deployment.start(MESSAGES, values(deployment, resumed, resume="latest")),
        deployment.start(QUICKSTART, values(deployment, whole)),
    )
    assert f"resumed from {resumed / 'checkpoints' / 'round-0001'}: 1 rounds are left" in log
    assert f"Results: {whole}" in other

    assert comparable(resumed) == comparable(whole)
    for name in ("adapter/adapter_model.safetensors", "merged_model/model.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    assert_trained(read_summary(whole))
    statuses = deployment.statuses()
    assert statuses.pop(killed) == "finished:failed"
    assert list(statuses.values()) == ["finished:completed"] * 2
    assert_no_app_is_left(deployment)


def assert_no_app_is_left(deployment: Deployment) -> None:
    """SuperLink and SuperNodes wait for the next run; of those that ended, nothing stays."""
    deadline = time.monotonic() + 60.0
    while left := [*deployment.apps("serverapp"), *deployment.apps("clientapp")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def assert_trained(summary: dict[str, Any]) -> None:
    assert summary["status"] == "completed"
    assert summary["final_perplexity"] < summary["initial_perplexity"]
    for record in summary["history"]:
        trained = [(client["client_id"], client["cut"], client["steps"]) for client in record["clients"]]
        assert trained == [("0", 2, STEPS), ("1", 4, STEPS), ("2", 6, STEPS)]
        assert record["failures"] == []
        assert record["federated_perplexity"] is not None
        for client in record["clients"]:
            assert client["bytes_up"] > 0
            seconds = sum(client["seconds"].values()) - client["seconds"]["load"]
            print(f"client {client['client_id']}: {seconds / STEPS:.3f} s per step inside the round")
            assert seconds / STEPS < 3.0  # far below the ~12 s of one Flower message
        print(f"round: {record['seconds']}")


def test_runs_that_come_to_nothing_have_failed_and_say_why(deployment: Deployment, tmp_path: Path) -> None:
    """One whose clients are told an address where there is no tail ("completed", it said); one whose port is taken."""
    before = deployment.statuses()
    nobody, no_port = tmp_path / "nobody", tmp_path / "no-port"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        once = {"rounds": 1, "local-steps": 2, "federated-evaluation": False}
        log, other = finished(
            deployment.start(MESSAGES, values(deployment, nobody, **once, **{"tail-address": "127.0.0.1:9"})),
            deployment.start(QUICKSTART, values(deployment, no_port, **once, **{"tail-bind": f"127.0.0.1:{port}"})),
        )
    summary = read_summary(nobody)
    assert summary["status"] == "failed"
    assert "RunFailedError: Expected a client that finishes a round, found none in 1 rounds" in summary["reason"]
    for said in (summary["reason"], log):
        assert "Expected a tail at 127.0.0.1:9, found none" in said
    assert not (nobody / "merged_model").exists()
    for said in (read_summary(no_port)["reason"], other):
        assert f"Expected to listen on 127.0.0.1:{port} (run config: tail-bind), found: the address is in use" in said
    statuses = deployment.statuses()
    assert [statuses[run] for run in statuses.keys() - before.keys()] == ["finished:failed"] * 2
    assert_no_app_is_left(deployment)
