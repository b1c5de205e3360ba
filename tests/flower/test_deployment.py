"""The quickstart in a real deployment on loopback, on both faces: one SuperLink, two SuperNodes, `flwr run`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.flower import (
    MESSAGES,
    QUICKSTART,
    FlowerHome,
    flower_home,
    free_port,
    read_summary,
    timeless,
    wait_for_log,
    wait_for_port,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 20
START_S = 120.0
"""longest a SuperLink or SuperNode may take to come up"""
RUN_S = 300.0
CONNECTION = """\
[superlink]
default = "loopback"

[superlink.loopback]
address = "127.0.0.1:{port}"
insecure = true
"""


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[FlowerHome]:
    """A SuperLink and two SuperNodes that are connected to it; `flwr run` finds them."""
    port = free_port()
    with flower_home(tmp_path / "home") as home:
        (home.folder / "config.toml").write_text(CONNECTION.format(port=port))
        superlink, log = home.start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        wait_for_port(port, superlink, log, START_S)
        nodes = [
            home.start(
                "flower-supernode",
                *("--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())),
                *("--node-config", f"partition-id={node} num-partitions=2"),
            )
            for node in range(2)
        ]
        for supernode, log in nodes:
            wait_for_log("SuperNode ID", supernode, log, START_S)
        yield home


def test_one_round_of_the_quickstart_on_both_faces(deployment: FlowerHome, tmp_path: Path) -> None:
    values = {"cuts": "2,4", "ranks": "4,8", "rounds": 1, "local-steps": STEPS}
    for name, app in {"legacy": QUICKSTART, "messages": MESSAGES}.items():
        log = deployment.run(app, {**values, "output-dir": str(tmp_path / name)}, timeout_s=RUN_S)
        assert f"Results: {tmp_path / name}" in log
    summary = read_summary(tmp_path / "legacy")
    assert timeless(read_summary(tmp_path / "messages")) == timeless(summary)
    (record,) = summary["history"]
    assert [(client["client_id"], client["cut"], client["steps"]) for client in record["clients"]] == [
        ("0", 2, STEPS),
        ("1", 4, STEPS),
    ]
    assert record["failures"] == []
    assert record["federated_perplexity"] is not None
    assert summary["final_perplexity"] < summary["initial_perplexity"]
    for client in record["clients"]:
        assert client["bytes_up"] > 0
        seconds = sum(client["seconds"].values()) - client["seconds"]["load"]
        print(f"client {client['client_id']}: {seconds / STEPS:.3f} s per step inside the round")
        assert seconds / STEPS < 3.0  # far below the ~12 s of one Flower message
    print(f"round: {record['seconds']}")
