"""Sign: poor convergence. Held-out perplexity rises or stalls, and what was measured that explains it."""

import math
from collections.abc import Sequence

from hsplit_flwr.common.tables import format_number
from hsplit_flwr.reports.health.causes import convergence_causes
from hsplit_flwr.reports.health.facts import RunFacts, RunSettings
from hsplit_flwr.reports.health.findings import Cause, judged, not_measured, percent
from hsplit_flwr.reports.health.records import Finding
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.training.config import TrainingConfig

SIGN = "convergence"
RISE = 0.02
"""Held-out perplexity this far above its best has turned: more than what two evaluations of one round differ by."""
STALL_ROUNDS = 3
"""Rounds that a stall lasts at least: one round may be poor by chance."""
STALL = 0.01
"""Relative gain of perplexity over `STALL_ROUNDS` below which they were not worth their time."""
LIVE_LEARNING_RATE = 0.1
"""Share of the peak learning rate below which a round is not expected to gain: the schedule ends, not the learning."""

UNEXPLAINED = Cause(
    "none of those measured (adapters, learning rate after re-initialisation, warm-up, overfitting)",
    "look at the data (more of it, less skew between clients), or stop earlier",
)


def find(facts: RunFacts) -> Finding:
    """Whether held-out perplexity rises or stalls, and what was measured that explains it."""
    history, settings = facts.history, facts.settings
    points = [(0, facts.initial_perplexity), *((record.round, record.perplexity) for record in history)]
    curve = [(number, value) for number, value in points if value is not None and 0 < value < math.inf]
    if len(curve) < 2:
        return not_measured(SIGN, "held-out perplexity before and after a round")
    (best_round, best), last = min(curve, key=lambda point: point[1]), curve[-1][1]
    measured = f"perplexity {format_number(curve[0][1])} -> {format_number(last)}"
    if (rise := last / best - 1) > RISE:
        measured += f", {percent(rise)} above its best"
        causes = _explained(history, best_round, settings)
        return judged(SIGN, 100 * rise, "% above its best", measured, causes)
    window = _live_rounds(curve, settings.training)[-1 - STALL_ROUNDS :]
    if len(window) > STALL_ROUNDS and (gain := 1 - window[-1][1] / window[0][1]) < STALL:
        measured += f", {percent(gain)} lower over rounds {window[1][0]}-{window[-1][0]}"
        causes = _explained(history, window[0][0], settings)
        return judged(SIGN, 100 * gain, f"% lower over {STALL_ROUNDS} rounds", measured, causes)
    gain = 1 - last / curve[-2][1]
    measured += f", {percent(gain)} lower in the last round"
    return Finding(SIGN, "ok", 100 * gain, "% lower in the last round", measured)


def _live_rounds(curve: Sequence[tuple[int, float]], training: TrainingConfig) -> list[tuple[int, float]]:
    """The points of round 0 and of the rounds whose mean learning rate is not yet at the end of its schedule."""
    return [(r, value) for r, value in curve if r == 0 or _mean_rate(r, training) >= LIVE_LEARNING_RATE]


def _mean_rate(number: int, training: TrainingConfig) -> float:
    """Mean learning rate of round `number` as a share of the peak."""
    steps = range((number - 1) * training.local_steps, number * training.local_steps)
    return sum(map(training.learning_rate_at, steps)) / (len(steps) * training.learning_rate)


def _explained(history: Sequence[RoundRecord], since: int, settings: RunSettings) -> list[Cause]:
    return convergence_causes(history, since, settings.training, settings.num_blocks) or [UNEXPLAINED]
