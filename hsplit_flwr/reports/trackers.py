"""A run is followed where people follow theirs: TensorBoard, W&B, MLflow, trackio and others, by accelerate's trackers.

None of them is imported unless it is asked for. A step's loss is logged at its step of the run, a round's figures at
its last step, so that curves of runs with other rounds lie on one axis.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.reports.tracker import Tracker, config_values

_log = logging.getLogger(__name__)

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
"""names of accelerate's; which of them there are depends on its version"""
END_LIMIT_S = 60.0
"""seconds that the end of a run waits for its trackers"""


class Trackers:
    """The trackers of one run. What fails in them is logged, and ends nothing.

    Args:
        names: some of `TRACKERS`; none: nothing is followed.
        folder: the run's, see `Tracker`.
        project: what the run belongs to.
        config: of the run.

    Raises:
        ConfigError: an unknown name, or one whose package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, project: str, config: Mapping[str, Any]) -> None:
        _require_there(names)
        values = config_values(config)
        self._trackers = [Tracker(name, folder, project, values) for name in dict.fromkeys(names)]

    def log_round(self, record: RoundRecord, local_steps: int) -> None:
        """Log the losses of the round's steps and its figures."""
        first = (record.round - 1) * local_steps
        losses = record.steps.losses if record.steps else ()
        points: list[tuple[int, Mapping[str, float]]] = [
            *((first + step, {"step/loss": loss}) for step, loss in enumerate(losses)),
            (first + local_steps, figures(record)),
        ]
        for tracker in self._trackers:
            tracker.log(points)

    def close(self, failed: bool = False) -> None:
        """End the trackers' runs, `failed` or completed, within `END_LIMIT_S` in all."""
        for tracker in self._trackers:
            tracker.end(failed)
        deadline = time.monotonic() + END_LIMIT_S
        if late := [tracker.name for tracker in self._trackers if not tracker.ended(deadline)]:
            _log.warning(
                "%s did not end within %g s: what was not sent by then is lost there; the results have it all",
                ", ".join(late),
                END_LIMIT_S,
            )


def _require_there(names: Sequence[str]) -> None:
    if not names:
        return
    if unknown := sorted(set(names) - set(TRACKERS)):
        raise ConfigError(f"Expected trackers among {', '.join(TRACKERS)}, found {', '.join(unknown)}.")
    from accelerate.tracking import get_available_trackers

    if missing := sorted(set(names) - {str(tracker) for tracker in get_available_trackers()}):
        raise ConfigError(
            f"Expected the packages of the trackers {', '.join(names)}, found none for {', '.join(missing)}. "
            f"Install it where the server runs (pip install {' '.join(missing)}), or leave it out of trackers."
        )


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
