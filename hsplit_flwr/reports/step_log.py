"""Lines on how the training goes: now and then from the tail's steps, and of every round."""

import logging
from collections.abc import Callable, Iterable

from hsplit_flwr.common.log_lines import about
from hsplit_flwr.common.progress import Progress
from hsplit_flwr.common.reasons import client_of
from hsplit_flwr.common.tables import format_number
from hsplit_flwr.reports.records import RoundRecord
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
            told = about("step", round=number, step=step, loss=report.loss, tokens=report.tokens)
            _log.info("%s", line, extra=told)

    return on_step


def log_round(record: RoundRecord) -> None:
    """Log how many finished the round and with what loss."""
    _log.info(
        "round %d: %d clients finished, training loss %s",
        record.round,
        len(record.clients),
        format_number(record.train_loss),
        extra=about(
            "round_closed",
            round=record.round,
            clients=[client.client_id for client in record.clients],
            train_loss=record.train_loss,
            tokens=record.tokens,
        ),
    )


def log_incidents(round_number: int, lines: Iterable[str]) -> None:
    """Log a warning for each client that a round was without, or had otherwise than it wanted."""
    for line in lines:
        told = about("incident", round=round_number, client=client_of(line))
        _log.warning("round %d: %s", round_number, line, extra=told)
