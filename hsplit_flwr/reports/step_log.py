"""A line on how the training goes, now and then, from the tail's steps."""

import logging
from collections.abc import Callable

from hsplit_flwr.common.progress import Progress
from hsplit_flwr.training.config import TrainingConfig
from hsplit_flwr.training.step import StepReport

_log = logging.getLogger("hsplit_flwr")


def log_progress(training: TrainingConfig, interval_s: float = 5.0) -> Callable[[StepReport], None]:
    """An ``on_step`` that logs a line with round, step, loss, tokens/s and time left, at most every `interval_s`."""
    progress = Progress(training.rounds, interval_seconds=interval_s)
    current = 0

    def on_step(report: StepReport) -> None:
        nonlocal current
        number = 1 + report.step // training.local_steps
        if number != current:
            current = number
            progress.start_round(number, report.round_clients, training.local_steps, report.compute_s)
        step = 1 + report.step % training.local_steps
        line = progress.step(step, len(report.clients), report.loss, report.tokens)
        if line:
            _log.info("%s", line)

    return on_step
