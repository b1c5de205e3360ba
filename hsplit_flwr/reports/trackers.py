"""A run is followed where people follow theirs: TensorBoard, W&B, MLflow, trackio and others, by accelerate's trackers.

None of them is imported unless it is asked for. A step's loss is logged at its step of the run, a round's figures at
its last step, so that curves of runs with other rounds lie on one axis.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsplit_flwr.common.optional_work import OptionalWork
from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.records import RoundRecord

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""names of accelerate's; which of them there are depends on its version"""


class Trackers:
    """The trackers of one run. What fails in them is logged, and ends nothing.

    Args:
        names: some of `TRACKERS`; none: nothing is followed.
        folder: where those that write files write them, below ``trackers``.
        project: what the run belongs to.
        config: of the run.

    Raises:
        ConfigError: an unknown name, or one whose package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, project: str, config: Mapping[str, Any]) -> None:
        self._lost = OptionalWork("a tracker failed, training goes on")
        self._accelerator: Any = None
        if not names:
            return
        if unknown := sorted(set(names) - set(TRACKERS)):
            raise ConfigError(f"Expected trackers among {', '.join(TRACKERS)}, found {', '.join(unknown)}.")
        from accelerate import Accelerator

        accelerator = Accelerator(log_with=list(names), project_dir=folder / "trackers", cpu=True)
        # accelerate leaves out what is not installed, without a word that people see
        if missing := sorted(set(names) - {str(tracker) for tracker in accelerator.log_with}):
            raise ConfigError(
                f"Expected the packages of the trackers {', '.join(names)}, found none for {', '.join(missing)}. "
                "Install it, or leave it out of trackers."
            )
        self._accelerator = accelerator
        plain = {key: value for key, value in config.items() if isinstance(value, bool | int | float | str)}
        with self._lost.spared():
            self._accelerator.init_trackers(project, config=plain)

    def log_round(self, record: RoundRecord, local_steps: int) -> None:
        """Log the losses of the round's steps and its figures."""
        if self._accelerator is None:
            return
        first = (record.round - 1) * local_steps
        with self._lost.spared():
            for step, loss in enumerate(record.steps.losses if record.steps else ()):
                self._accelerator.log({"step/loss": loss}, step=first + step)
            self._accelerator.log(figures(record), step=first + local_steps)

    def close(self) -> None:
        """End the trackers' runs."""
        if self._accelerator is not None:
            with self._lost.spared():
                self._accelerator.end_training()
        self._lost.close()


def figures(record: RoundRecord) -> dict[str, float]:
    """What a round was, as finite numbers by name; what was not measured is not there."""
    values = {
        "round": record.round,
        "perplexity/central": record.central_perplexity,
        "perplexity/federated": record.federated_perplexity,
        "train_loss": record.train_loss,
        "clients": len(record.clients),
        "incidents": len(record.failures),
        "tokens": record.tokens,
        "bytes/up": sum(client.bytes_up for client in record.clients),
        "bytes/down": sum(client.bytes_down for client in record.clients),
        **{f"seconds/{phase}": seconds for phase, seconds in record.seconds.items()},
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
