"""`flwr run` whose ServerApp is killed, and a second one that resumes it, against one that nobody killed."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.helpers.flower import (
    FIVE_NODES,
    QUICKSTART,
    RUN_S,
    WHOLE,
    FlowerHome,
    flower_home,
    read_summary,
    run_arguments,
    timeless,
    wait_for,
    wait_for_log,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SERVER = "flwr-simulation"
"""the program whose process the ServerApp lives in, in a simulation"""


def servers(home: FlowerHome) -> list[psutil.Process]:
    return [process for process in home.processes() if any(Path(word).name == SERVER for word in words_of(process)[:2])]


def words_of(process: psutil.Process) -> list[str]:
    """The command of a process; none of one that has died meanwhile."""
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


def kill_in_round_2(folder: Path, out: Path) -> None:
    """A run whose ServerApp's process is killed in the middle of round 2, and everything that it leaves behind."""
    with flower_home(folder) as home:
        process, log = home.start("flwr", *run_arguments(QUICKSTART, {**WHOLE, "output-dir": str(out)}), *FIVE_NODES)
        wait_for_log("round 2/3  step ", process, log, RUN_S)
        (server,) = servers(home)
        server.send_signal(signal.SIGKILL)
        wait_for(lambda: not servers(home), "an end of the ServerApp", process, log, 60.0)


def without_downloads(summary: dict) -> dict:  # type: ignore[type-arg]
    """A summary as two equal runs have it; clients of the one that was resumed took the whole delta once more."""
    compared = timeless(summary)
    for record in compared["history"]:
        for client in record["clients"]:
            client["bytes_down"] = None
    return compared


def test_a_run_whose_server_was_killed_ends_as_if_it_had_not(home: FlowerHome, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_in_round_2(tmp_path / "first", out)
    broken = read_summary(out)
    assert (broken["status"], broken["rounds"]) == ("running", 1)
    checkpoint = out / "checkpoints" / "round-0001"
    print("checkpoint:", {path.name: path.stat().st_size for path in checkpoint.iterdir()})
    log = home.run(QUICKSTART, {**WHOLE, "output-dir": str(out), "resume": "latest"}, *FIVE_NODES, timeout_s=RUN_S)
    assert f"resumed from {checkpoint}: 2 rounds are left" in log
    resumed, reference = read_summary(out), read_summary(whole)
    assert not (tmp_path / "out-2").exists()
    assert resumed["status"] == "completed"
    assert without_downloads(resumed) == without_downloads(reference)
    for name in ("adapter/adapter_model.safetensors", "merged_model/model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    down = [[sum(c["bytes_down"] for c in r["clients"]) for r in s["history"]] for s in (resumed, reference)]
    print("bytes down by round, resumed and uninterrupted:", down)
