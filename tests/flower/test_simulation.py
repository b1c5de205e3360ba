"""`flwr run` as a user types it, with real Ray actors: whole runs, waves, faults, and nothing left behind.

What Flower's simulation does after an actor's process dies (measured, flwr 1.41): the actor is not replaced. Its handle
goes back to the top of the pool's stack, and every message that it is given from then on fails at once with
ActorDiedError, so that it draws messages faster than the living: with two actors and one of them dead, four of five
clients were lost in every later round. `TaskProxy` asks again; all five came back.
"""

import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hsplit_flwr.exchange.frames import Header, encode
from tests.helpers.flower import (
    FAULTS,
    FIVE_NODES,
    MESSAGES,
    QUICKSTART,
    RUN_S,
    WHOLE,
    FlowerHome,
    read_summary,
    run_arguments,
    simulation,
    tail,
    timeless,
    wait_for_log,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CLIENTS = ["0", "1", "2", "3", "4"]
CUTS = [1, 2, 3, 4, 6]
"""what the quickstart's devices can hold"""
CONFIGURED = {"cuts": "1,2,3,4,6", "ranks": "2,4,8,12,16", "tail-rank": 8, "local-steps": 4, "batch-size": 4}
"""what the app `faults` has and the other one has not"""
SERVICES = {"flower-superlink", "flower-superexec", "flwr"}


def clients_of(record: dict[str, Any]) -> list[str]:
    return [client["client_id"] for client in record["clients"]]


def weighted_loss(record: dict[str, Any]) -> float:
    tokens = sum(client["tokens"] for client in record["clients"])
    return float(sum(client["loss"] * client["tokens"] for client in record["clients"]) / tokens)


def assert_all_trained(summary: dict[str, Any], rounds: int, steps: int) -> None:
    assert summary["rounds"] == rounds
    for record in summary["history"]:
        assert clients_of(record) == CLIENTS
        assert [client["steps"] for client in record["clients"]] == [steps] * len(CLIENTS)
        assert [client["cut"] for client in record["clients"]] == CUTS
        assert record["failures"] == []
        assert record["train_loss"] == pytest.approx(weighted_loss(record), rel=1e-9)
        assert record["federated_perplexity"] is not None
    assert summary["final_perplexity"] < summary["initial_perplexity"]


def assert_planned(summary: dict[str, Any]) -> None:
    """The first plan follows the budgets; importance, once measured, is the only reason for another one."""
    first, second = summary["history"]
    assert first["plan_reasons"] == ["first plan"]
    (reason,) = second["plan_reasons"]
    assert reason.startswith(f"importance drifted by {second['drift']:.3f}")
    for record in (first, second):
        planned = record["plan"]["clients"]
        assert [planned[client]["cut"] for client in CLIENTS] == CUTS
        used = [planned[client]["memory_bytes"] / planned[client]["memory_budget_bytes"] for client in CLIENTS]
        assert all(0.9 < share <= 1 for share in used)
    assert first["plan"]["clients"]["3"]["ranks"] != second["plan"]["clients"]["3"]["ranks"]


def test_quickstart_finishes_with_all_clients(home: FlowerHome, tmp_path: Path) -> None:
    """As typed: as many actors as there are cores."""
    values = {"rounds": 2, "local-steps": 4, "warmup-steps": 2, "output-dir": str(tmp_path)}
    log = home.run(QUICKSTART, values, timeout_s=RUN_S)
    assert "[SUMMARY]" in log
    summary = read_summary(tmp_path)
    assert_all_trained(summary, rounds=2, steps=4)
    assert_planned(summary)
    print(f"{summary['wall_seconds']:.0f} s, rounds:", [record["seconds"] for record in summary["history"]])
    assert (tmp_path / "merged_model" / "model.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    for picture in ("run", "importance", "budgets"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000


def test_both_faces_and_both_exchanges_give_bit_equal_summaries(home: FlowerHome, whole: Path, tmp_path: Path) -> None:
    """Perplexities, tokens, bytes, plans, samples and the adapter: legacy face over gRPC, Message API over messages.

    Steps inside Flower's messages: an actor is busy only while a head computes, so two do for five clients. The two
    faces over gRPC are compared in a real deployment (`test_deployment`).
    """
    values = {**WHOLE, "exchange": "messages", "output-dir": str(tmp_path / "out")}
    log = home.run(MESSAGES, values, *simulation(nodes=5, actors=2), timeout_s=RUN_S)
    assert "the exchange goes over Flower's messages" in log
    assert f"Results: {tmp_path / 'out'}" in "\n".join(log.splitlines()[-8:])
    assert_all_trained(read_summary(whole), rounds=3, steps=6)
    assert read_summary(whole)["history"][1]["plan"]
    over_grpc, over_messages = (timeless(read_summary(folder)) for folder in (whole, tmp_path / "out"))
    for summary, leaves in ((over_grpc, 1), (over_messages, 0)):
        for record in summary["history"]:
            for client in record["clients"]:
                client["bytes_up"] -= leaves * len(encode(Header("leave", "", 1, "0", 1)))
    assert over_messages == over_grpc
    adapter = Path("adapter", "adapter_model.safetensors")
    assert (tmp_path / "out" / adapter).read_bytes() == (whole / adapter).read_bytes()
    print([record["seconds"] for record in read_summary(tmp_path / "out")["history"]])


def test_faults_cost_their_part_of_the_round_and_not_the_run(home: FlowerHome, tmp_path: Path) -> None:
    """In round 1 client 1 raises, the process of client 2 is killed and client 3 sleeps past the round's limit."""
    values = {
        "faults": "1:raise 2:kill 3:stall",
        "stall-s": 80.0,
        "round-limit-s": 60.0,
        "start-gate-s": 15.0,
        "straggler-limit-s": 4.0,
        "rounds": 4,
        "output-dir": str(tmp_path),
    }
    home.run(FAULTS, values, *FIVE_NODES, timeout_s=RUN_S)
    summary = read_summary(tmp_path)
    first, *later = summary["history"]
    assert clients_of(first) == ["0", "4"]
    assert first["train_loss"] == pytest.approx(weighted_loss(first), rel=1e-9)
    for client, reason in {"1": "was told to raise", "2": "ActorDiedError", "3": "Message Unavailable"}.items():
        said = [failure for failure in first["failures"] if failure.startswith(f"client {client}: ")]
        assert any(reason in failure for failure in said), said
    assert first["seconds"]["fit"] < 75  # the round's limit, not the sleeper's 80 s
    assert len(later) == 3
    for record in later:
        assert len(clients_of(record)) >= 4
        assert record["train_loss"] == pytest.approx(weighted_loss(record), rel=1e-9)
    assert clients_of(later[-1]) == CLIENTS
    assert summary["final_perplexity"] < summary["initial_perplexity"]
    print([(clients_of(record), round(record["seconds"]["fit"], 1)) for record in summary["history"]])


def test_a_dead_actor_costs_one_client_one_round(home: FlowerHome, tmp_path: Path) -> None:
    """Two actors, five clients in waves; one actor dies in round 1 and is never replaced.

    On the Message API; the legacy face loses an actor in the test above.
    """
    values = {"faults": "1:kill", "start-gate-s": 3.0, "rounds": 2, "output-dir": str(tmp_path), **CONFIGURED}
    home.run(MESSAGES, values, *simulation(nodes=5, actors=2), timeout_s=RUN_S)
    first, second = read_summary(tmp_path)["history"]
    assert clients_of(first) == ["0", "2", "3", "4"]
    assert any(failure.startswith("client 1: ") and "ActorDiedError" in failure for failure in first["failures"])
    assert clients_of(second) == CLIENTS


def test_flwr_stop_leaves_neither_simulation_nor_ray(home: FlowerHome, tmp_path: Path) -> None:
    values = {"rounds": 500, "output-dir": str(tmp_path)}
    process, log = home.start("flwr", *run_arguments(QUICKSTART, values))
    wait_for_log("  step ", process, log, RUN_S)  # the tail has reported one
    found = re.search(r"started run (\d+)", log.read_text(errors="replace"))
    assert found
    assert "raylet" in {process.name() for process in home.processes()}
    stopping, stop_log = home.start("flwr", "stop", found[1])
    assert stopping.wait(120) == 0, tail(stop_log)
    deadline = time.monotonic() + 120
    while (left := {name_of(process) for process in home.processes()}) - SERVICES:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    process.wait(60)
    assert not (tmp_path / "summary.json").exists()


def name_of(process: psutil.Process) -> str:
    """The script's name where Python runs one, otherwise the program's."""
    try:
        words = [Path(word).name for word in process.cmdline()[:2]]
    except psutil.Error:
        return "flwr"  # gone meanwhile
    return words[-1] if words and words[0].startswith("python") else "".join(words[:1])
