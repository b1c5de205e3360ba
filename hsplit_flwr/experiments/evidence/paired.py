"""Differences between two methods, seed by seed, with the interval that so few seeds leave.

Two methods of one seed share partition, batches and devices, so that their difference varies less than either does.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hsplit_flwr.common.tables import MISSING, format_table
from hsplit_flwr.experiments.evidence.stored_runs import StoredRun, StoredRuns

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and how far it may be off (Student's t, `CONFIDENCE`); infinitely far with one seed."""

    mean: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Of at least one finite value."""
        from scipy.stats import t  # only who asks for an interval waits for it

        count = len(values)
        mean = sum(values) / count
        if count == 1:
            return cls(mean, math.inf, 1)
        variance = sum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count), count)

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half_width


def perplexity_changes(ours: Sequence[StoredRun], rival: Sequence[StoredRun]) -> list[float]:
    """By how many percent the final perplexity of `ours` is above the rival's, for each seed that both have.

    A run that diverged makes no figure: it is no size of a difference.
    """
    theirs = {run.spec.seed: run.final_perplexity for run in rival}
    pairs = [(run.final_perplexity, theirs[run.spec.seed]) for run in ours if run.spec.seed in theirs]
    return [100 * (own / other - 1) for own, other in pairs if math.isfinite(own) and math.isfinite(other)]


def paired_table(runs: StoredRuns, ours: str, rivals: Collection[str], *, markdown: bool = False) -> str:
    """By how much `ours` ends above each rival (below: negative): a row per rival, a column per scenario.

    A cell is the mean difference of final perplexity in percent, its interval and the number of seeds; an interval
    around zero is no difference, and says so.
    """
    scenarios = runs.scenarios()
    rows = []
    for rival in rivals:
        cells = []
        for of_scenario in scenarios.values():
            mine, theirs = ([run for run in of_scenario if run.spec.method == name] for name in (ours, rival))
            cells.append(_cell(perplexity_changes(mine, theirs)))
        rows.append([rival, *cells])
    return format_table([f"{ours} against", *scenarios], rows, markdown, left_aligned=1)


def _cell(changes: Sequence[float]) -> str:
    if not changes:
        return MISSING
    found = Interval.of(changes)
    if found.count == 1:
        return f"{found.mean:+.1f} %, n = 1"
    shown = f"{found.mean:+.1f} +- {found.half_width:.1f} %, n = {found.count}"
    return f"{shown}: none" if found.low <= 0 <= found.high else shown
