"""`flwr run` with its exchange inside Flower's messages: the same results as over gRPC, with one actor for all."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.flower import MESSAGES, QUICKSTART, RUN_S, FlowerHome, read_summary, simulation, timeless

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIGURED = {
    "cuts": "1,3",
    "ranks": "2,4",
    "tail-rank": 4,
    "rounds": 2,
    "local-steps": 2,
    "batch-size": 2,
    "reconnect-grace-s": 0.0,
}


def play(home: FlowerHome, app: Path, folder: Path, actors: int, **changes: Any) -> str:
    values = {**CONFIGURED, **changes, "output-dir": str(folder)}
    return home.run(app, values, *simulation(nodes=2, actors=actors), timeout_s=RUN_S)


@pytest.mark.parametrize("app", [QUICKSTART, MESSAGES], ids=["legacy", "messages"])
def test_an_exchange_over_messages_gives_bit_equal_results(home: FlowerHome, tmp_path: Path, app: Path) -> None:
    """An actor is only busy while a head computes: one of them does for any number of clients under way."""
    over_grpc, over_messages = tmp_path / "grpc", tmp_path / "messages"
    play(home, app, over_grpc, actors=2)
    log = play(home, app, over_messages, actors=1, exchange="messages")
    assert "the exchange goes over Flower's messages" in log

    assert timeless(read_summary(over_messages)) == timeless(read_summary(over_grpc))
    for name in ("adapter/adapter_model.safetensors", "merged_model/model.safetensors"):
        assert (over_messages / name).read_bytes() == (over_grpc / name).read_bytes(), name
    (first, second) = read_summary(over_messages)["history"]
    for record in (first, second):
        assert [client["steps"] for client in record["clients"]] == [2, 2]
        assert record["federated_perplexity"] is not None
        print("round over messages:", record["seconds"])
