"""Notes on the tail's steps of a round, taken from the reports that the tail gives for progress."""

from collections import defaultdict
from collections.abc import Callable

from hsplit_flwr.reports.health.records import TailSteps
from hsplit_flwr.training.step import StepReport


class StepNotes:
    """A listener for the tail's steps that passes every report on. `take` only while no round is open."""

    def __init__(self, on_step: Callable[[StepReport], None] | None = None) -> None:
        self._on_step = on_step
        self._reports: list[StepReport] = []

    def __call__(self, report: StepReport) -> None:
        """Note `report` and pass it on."""
        self._reports.append(report)
        if self._on_step:
            self._on_step(report)

    def take(self) -> TailSteps:
        """What the steps since the last call were."""
        reports, self._reports = self._reports, []
        nll: dict[int, float] = defaultdict(float)
        tokens: dict[int, int] = defaultdict(int)
        for report in reports:
            nll[report.step] += report.loss * report.tokens
            tokens[report.step] += report.tokens
        return TailSteps(tuple(nll[step] / tokens[step] for step in sorted(nll) if tokens[step]))
