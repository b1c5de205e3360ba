"""A run is followed by accelerate's trackers: what they are told, and that they end nothing."""

import json
import logging
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.health.records import TailSteps
from hsplit_flwr.reports.records import ClientRecord, RoundRecord
from hsplit_flwr.reports.trackers import Trackers, figures

CLIENTS = (ClientRecord("0", 1, "4", 4.0, 100, 2, 2.0, 10, 20), ClientRecord("1", 1, "4", 4.0, 50, 2, 2.0, 1, 2))
ROUNDS = [
    RoundRecord(number, central_perplexity=10.0 / number, clients=CLIENTS, steps=TailSteps((3.0, 2.0)))
    for number in (1, 2)
]
LOSSES = [(0, 3.0), (1, 2.0), (2, 3.0), (3, 2.0)]
PERPLEXITIES = [(2, 10.0), (4, 5.0)]
CONFIG = {"rounds": 2, "data": "a.jsonl", "odd": [1], "long": "x" * 7000}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "trackers" / "hsplit_flwr"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_is_told_steps_and_rounds(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, "hsplit_flwr", {"rounds": 2, "data": "a.jsonl", "odd": [1]})
    for record in ROUNDS:
        trackers.log_round(record, local_steps=2)
    trackers.close()
    found = scalars(tmp_path)
    assert found["step/loss"] == LOSSES
    assert found["perplexity/central"] == PERPLEXITIES
    assert found["bytes/up"] == [(2, 11.0), (4, 11.0)]
    assert "perplexity/federated" not in found


def test_figures_are_finite_numbers() -> None:
    record = RoundRecord(3, central_perplexity=math.inf, train_loss=math.nan, failures=("a",), seconds={"fit": 1.5})
    assert figures(record) == {
        "round": 3.0, "clients": 0.0, "incidents": 1.0, "tokens": 0.0, "bytes/up": 0.0, "bytes/down": 0.0,
        "seconds/fit": 1.5,
    }  # fmt: skip


def test_nothing_is_followed_unless_asked(tmp_path: Path) -> None:
    trackers = Trackers([], tmp_path, "hsplit_flwr", {})
    trackers.log_round(ROUNDS[0], 2)
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_there_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"Expected trackers among aim, .*, found tensorbord"):
        Trackers(["tensorbord"], tmp_path, "p", {})
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ConfigError, match=r"found none for tensorboard.*pip install tensorboard"):
        Trackers(["tensorboard"], tmp_path, "p", {})


def test_a_tracker_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", full)
    trackers = Trackers(["tensorboard"], tmp_path, "p", {})
    with caplog.at_level(logging.WARNING):
        for record in ROUNDS:
            trackers.log_round(record, 2)
        trackers.close()
    assert "a tracker failed, training goes on: OSError: No space left on device" in caplog.text
    assert "2 times in all" in caplog.text


def test_a_tracker_that_hangs_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's client asks a server that is away again and again, for minutes: training waited with it."""
    released = Event()
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.log", lambda *_, **__: released.wait(60))
    monkeypatch.setattr("hsplit_flwr.reports.trackers.END_LIMIT_S", 0.2)
    begun = time.monotonic()
    trackers = Trackers(["tensorboard"], tmp_path, "p", {})
    with caplog.at_level(logging.WARNING):
        trackers.log_round(ROUNDS[0], 2)
        trackers.close()
    released.set()
    assert time.monotonic() - begun < 10
    assert "tensorboard did not end within 0.2 s" in caplog.text


def test_one_tracker_that_cannot_begin_costs_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """accelerate begins and tells them in a row: the first that raised took the others with it."""
    monkeypatch.setattr("accelerate.tracking._available_trackers", ["wandb", "tensorboard"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        follow(["wandb", "tensorboard"], tmp_path)
    assert "wandb: a tracker failed, training goes on" in caplog.text
    assert scalars(tmp_path)["perplexity/central"] == PERPLEXITIES


def follow(names: list[str], folder: Path, failed: bool = False) -> None:
    """The two rounds, as a run tells its trackers of them; a machine under load gets time to import and begin them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hsplit_flwr.reports.trackers.END_LIMIT_S", 240.0)
        trackers = Trackers(names, folder, "hsplit_flwr", CONFIG)
        for record in ROUNDS:
            trackers.log_round(record, local_steps=2)
        trackers.close(failed)


@pytest.mark.parametrize(("failed", "status"), [(False, "FINISHED"), (True, "FAILED")])
def test_mlflow_has_runs_with_name_config_steps_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool, status: str
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    follow(["mlflow"], tmp_path / "run-2", failed)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("hsplit_flwr").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run-2", status)
    assert run.data.params == {"rounds": "2", "data": "a.jsonl", "odd": "[1]", "long": "x" * 497 + "..."}
    losses = client.get_metric_history(run.info.run_id, "step/loss")
    assert sorted((point.step, point.value) for point in losses) == LOSSES
    perplexity = client.get_metric_history(run.info.run_id, "perplexity/central")
    assert sorted((point.step, point.value) for point in perplexity) == PERPLEXITIES


def followed_alone(names: list[str], folder: Path, failed: bool, read: str = "", **environment: str) -> None:
    """`follow` in a process of its own: trackio and W&B keep for a process what the first run was told."""
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_trackers import follow
follow({names!r}, Path("run-2").resolve(), {failed})
{read}"""
    subprocess.run([sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, check=True, timeout=280)


def test_trackio_has_runs_with_name_config_and_steps(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    read = """
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("hsplit_flwr")
found = [run.name, run.config, SQLiteStorage.get_logs("hsplit_flwr", run.name)]
Path("found.json").write_text(json.dumps(found, default=str))
"""
    followed_alone(["trackio"], tmp_path, False, read, TRACKIO_DIR=str(tmp_path / "trackio"))
    name, config, metrics = json.loads((tmp_path / "found.json").read_text())
    assert name == "run-2"
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    assert own == {**CONFIG, "odd": "[1]", "long": "x" * 497 + "..."}
    assert [(point["step"], point["step/loss"]) for point in metrics if "step/loss" in point] == LOSSES
    found = [(point["step"], point["perplexity/central"]) for point in metrics if "perplexity/central" in point]
    assert found == PERPLEXITIES


@pytest.mark.parametrize(("failed", "exit_code"), [(False, 0), (True, 1)])
def test_wandb_has_runs_with_name_config_and_steps(tmp_path: Path, failed: bool, exit_code: int) -> None:
    """Offline; read back from the file that ``wandb sync`` would send."""
    pytest.importorskip("wandb")
    followed_alone(["wandb"], tmp_path, failed, WANDB_MODE="offline")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)
    runs = [record.run for record in records if record.HasField("run")]
    assert (runs[0].project, runs[0].display_name) == ("hsplit_flwr", "run-2")
    updates = [*(run.config for run in runs), *(record.config for record in records)]
    config = {item.key: json.loads(item.value_json) for update in updates for item in update.update}
    assert {key: config[key] for key in CONFIG} == {**CONFIG, "odd": "[1]", "long": "x" * 497 + "..."}
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["step/loss"]) for row in rows if "step/loss" in row] == LOSSES
    found = [(row["_step"], row["perplexity/central"]) for row in rows if "perplexity/central" in row]
    assert found == PERPLEXITIES
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [exit_code]


def wandb_records(file: Path) -> list[Any]:
    """What a file of W&B holds: its protocol buffers in a LevelDB log (chunks of records, in blocks of 32 KiB)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, begun, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:  # too small for a chunk's header
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        begun += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last chunk of one
            records.append(Record.FromString(begun))
            begun = b""
    return records
