"""A run is followed by accelerate's trackers: what they are told, and that they end nothing."""

import logging
import math
from pathlib import Path
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
    assert found["step/loss"] == [(0, 3.0), (1, 2.0), (2, 3.0), (3, 2.0)]
    assert found["perplexity/central"] == [(2, 10.0), (4, 5.0)]
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
    with pytest.raises(ConfigError, match="found none for tensorboard"):
        Trackers(["tensorboard"], tmp_path, "p", {})


def test_a_tracker_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, "p", {})

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(trackers._accelerator, "log", full)
    with caplog.at_level(logging.WARNING):
        for record in ROUNDS:
            trackers.log_round(record, 2)
        trackers.close()
    assert "a tracker failed, training goes on: OSError: No space left on device" in caplog.text
    assert "2 times in all" in caplog.text
