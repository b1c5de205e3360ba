"""A real deployment on loopback: TLS and node authentication, the tail behind TLS, three SuperNodes, both faces.

One SuperLink serves all tests. In between, a ServerApp and a SuperNode are killed, and go on.
"""

import re
import signal
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
    run_arguments,
    tail,
    timeless,
    wait_for_log,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NODES = 3
STEPS = 20
RUN_S = 420.0
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


def kill_in_round_2(deployment: Deployment, folder: Path) -> str:
    """A run whose ServerApp is killed in the middle of round 2, and a SuperNode with it; returns the run's id."""
    process, log = deployment.home.start("flwr", *run_arguments(MESSAGES, values(deployment, folder)))
    wait_for_log("round 2/2  step ", process, log, RUN_S)
    (server,) = deployment.server_apps()
    server.send_signal(signal.SIGKILL)
    deployment.restart_supernode(NODES - 1)  # as a supervisor does
    found = re.search(r"started run (\d+)", log.read_text(errors="replace"))
    assert found, tail(log)
    assert process.wait(RUN_S) is not None
    return found[1]


def comparable(folder: Path) -> dict[str, Any]:
    """A summary as equal runs have it; clients of the one that was resumed took the whole delta once more."""
    summary = timeless(read_summary(folder))
    for record in summary["history"]:
        for client in record["clients"]:
            client["bytes_down"] = None
    return summary


def test_both_faces_train_the_same_also_if_killed_and_resumed(deployment: Deployment, tmp_path: Path) -> None:
    """The Message API's run is killed in round 2 and resumed; the legacy face's is not. Bit by bit they end alike."""
    resumed, whole = tmp_path / "messages", tmp_path / "legacy"
    killed = kill_in_round_2(deployment, resumed)
    broken = read_summary(resumed)
    assert (broken["status"], broken["rounds"]) == ("running", 1)
    log = deployment.home.run(MESSAGES, values(deployment, resumed, resume="latest"), timeout_s=RUN_S)
    assert f"resumed from {resumed / 'checkpoints' / 'round-0001'}: 1 rounds are left" in log
    log = deployment.home.run(QUICKSTART, values(deployment, whole), timeout_s=RUN_S)
    assert f"Results: {whole}" in log

    assert comparable(resumed) == comparable(whole)
    for name in ("adapter/adapter_model.safetensors", "merged_model/model.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    assert_trained(read_summary(whole))
    statuses = deployment.statuses()
    assert statuses.pop(killed) == "finished:failed"
    assert list(statuses.values()) == ["finished:completed"] * 2
    assert deployment.server_apps() == []


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


def test_a_run_in_which_nobody_trained_has_failed(deployment: Deployment, tmp_path: Path) -> None:
    """It said "completed", with an untouched model. Here clients are told an address where there is no tail."""
    before = deployment.statuses()
    changes = {"rounds": 1, "tail-address": "127.0.0.1:9", "federated-evaluation": False}
    process, log = deployment.home.start("flwr", *run_arguments(MESSAGES, values(deployment, tmp_path, **changes)))
    process.wait(RUN_S)
    summary = read_summary(tmp_path)
    assert summary["status"] == "failed"
    assert "RunFailedError: Expected a client that finishes a round, found none in 1 rounds" in summary["reason"]
    for said in (summary["reason"], log.read_text(errors="replace")):
        assert "Expected a tail at 127.0.0.1:9, found none" in said
    assert not (tmp_path / "merged_model").exists()
    (run,) = deployment.statuses().items() - before.items()
    assert run[1] == "finished:failed"
