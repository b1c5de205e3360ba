"""Rounds in one process: a head that fails ends the run, and nobody waits for it."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from hsplit_flwr.errors import ConfigError, ExchangeError, RunFailedError
from hsplit_flwr.experiments import method_server
from hsplit_flwr.experiments.local_rounds import LocalDoor
from hsplit_flwr.experiments.methods import METHODS
from hsplit_flwr.experiments.split_head import SplitHead
from hsplit_flwr.experiments.split_model import SplitTrainer
from hsplit_flwr.experiments.task import Task
from hsplit_flwr.training.barrier import BarrierLimits
from hsplit_flwr.training.batch import Batch
from tests.helpers.references import SPEC

CLIENTS = ("0", "1", "2", "3", "4")
WAITING = BarrierLimits(start_gate_s=590.0, straggler_limit_s=590.0, step_limit_s=590.0)
SOON = 300.0
"""seconds; far below what those who wait would wait"""


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.setattr(method_server, "LIMITS", WAITING)
    return Task.of(replace(SPEC, local_steps=1))


def require_ended(started: float) -> None:
    assert time.monotonic() - started < SOON
    assert not [thread for thread in threading.enumerate() if thread.name == "tail-steps" and thread.is_alive()]


def test_data_that_cannot_be_read(task: Task) -> None:
    def broken(first_step: int) -> Iterator[Batch]:
        raise ConfigError(f"no row {first_step}")
        yield {}

    trainer = SplitTrainer(replace(task, streams={**task.streams, "2": broken}), METHODS["hsplitlora"])
    started = time.monotonic()
    with pytest.raises(ConfigError, match="no row 0"):
        trainer.round(1, CLIENTS)
    require_ended(started)


def test_a_head_that_never_joins(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = LocalDoor.enter

    def shut(door: LocalDoor, asked: Any) -> Any:
        if asked.client == "1":
            raise ExchangeError("round_closed", "no entry")
        return enter(door, asked)

    monkeypatch.setattr(LocalDoor, "enter", shut)
    started = time.monotonic()
    with pytest.raises(ExchangeError, match="no entry"):
        SplitTrainer(task, METHODS["splitlora"]).round(1, CLIENTS)
    require_ended(started)


def test_a_result_that_the_server_leaves_out(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run must not go on with four of five clients, as a deployment would."""
    train = SplitHead.train

    def lossy(head: SplitHead, asked: Any, *others: Any) -> Any:
        reply = train(head, asked, *others)
        return replace(reply, arrays={}) if asked.client == "3" else reply

    monkeypatch.setattr(SplitHead, "train", lossy)
    with pytest.raises(RunFailedError, match=r"finish round 1.*3"):
        SplitTrainer(task, METHODS["hsplitlora"]).round(1, CLIENTS)
