"""One tracker of a run: accelerate's of that name, in a thread of its own.

A tracker may wait for a server that does not answer, minutes a call. Training does not wait with it: what is to be
logged waits in a queue, and the end of a run waits for the queue a limited time.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from hsplit_flwr.common.optional_work import OptionalWork

LONGEST_VALUE = 500
"""characters of a config value: MLflow refuses longer ones, or many of them at once"""
NAME_OPTIONS: Mapping[str, str] = {"mlflow": "run_name", "trackio": "name", "wandb": "name"}
"""what a tracker calls the name of a run; the others name runs themselves"""


class Tracker:
    """A run's tracker. What fails in it is logged, and ends nothing.

    Args:
        name: accelerate's, of an installed package.
        folder: the run's; its name is the run's, and trackers that write files write them below its ``trackers``.
        project: what the run belongs to, unless ``WANDB_PROJECT`` or ``MLFLOW_EXPERIMENT_NAME`` says otherwise.
        config: the run's, as text or numbers.
    """

    def __init__(self, name: str, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        self.name = name
        self._lost = OptionalWork(f"{name}: a tracker failed, training goes on")
        self._calls: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._thread = Thread(
            target=self._work, args=(folder, project, config), name=f"tracker {name}", daemon=True
        )  # daemon: a tracker that hangs must not keep the process
        self._thread.start()

    def log(self, points: list[tuple[int, Mapping[str, float]]]) -> None:
        """Log values by name, each at its step, soon."""

        def write(tracker: Any) -> None:
            for step, values in points:
                tracker.log(dict(values), step=step)

        self._calls.put(write)

    def end(self, failed: bool) -> None:
        """End the tracker's run as soon as all is logged; `failed`: say so where the tracker knows such runs."""
        self._calls.put(lambda tracker: _end(self.name, tracker, failed))
        self._calls.put(None)

    def ended(self, deadline: float) -> bool:
        """Wait for the tracker's end until `deadline` (of `time.monotonic`); whether it came."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        tracker = None
        with self._lost.spared():
            tracker = _begin(self.name, folder, project, config)
        while call := self._calls.get():
            if tracker is not None:
                with self._lost.spared():
                    call(tracker)
        self._lost.close()


def config_values(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """A config as every tracker takes it: numbers as they are, all else as text, cut to `LONGEST_VALUE` characters."""
    return {key: value if isinstance(value, bool | int | float) else _short(value) for key, value in config.items()}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _begin(name: str, folder: Path, project: str, config: Mapping[str, Any]) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # accelerate's loggers ask for it
    kind = LOGGER_TYPE_TO_CLASS[name]
    options: dict[str, Any] = {NAME_OPTIONS[name]: folder.name} if name in NAME_OPTIONS else {}
    if name == "trackio":
        options["config"] = dict(config)  # accelerate would store an option of its own call among them
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT") or project
    places = [folder / "trackers"] if kind.requires_logging_directory else []
    tracker = kind(project, *places, **options)
    tracker.start()
    if name != "trackio":
        tracker.store_init_configuration(dict(config))
    return tracker


def _end(name: str, tracker: Any, failed: bool) -> None:
    if failed and name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif failed and name == "mlflow":
        import mlflow

        mlflow.end_run("FAILED")
    else:
        tracker.finish()
