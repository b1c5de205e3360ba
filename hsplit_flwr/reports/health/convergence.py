"""Sign: poor convergence. Nobody trains, or held-out perplexity rises or stalls, with what was measured of it."""

import math
from collections.abc import Sequence

from hsplit_flwr.common.tables import format_number
from hsplit_flwr.reports.health.causes import convergence_causes
from hsplit_flwr.reports.health.facts import RunFacts
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


Points = Sequence[tuple[int, float]]
"""(round, held-out perplexity); round 0 is before training"""


def find(facts: RunFacts) -> Finding:
    """Whether anybody trained, whether held-out perplexity rises or stalls, and what was measured that explains it."""
    history, settings = facts.history, facts.settings
    idle = idle_rounds(history)
    causes = [_nobody(idle, history)] if idle else []
    points = [(0, facts.initial_perplexity), *((record.round, record.perplexity) for record in history)]
    evaluated = [(number, value) for number, value in points if value is not None]
    curve = [(number, value) for number, value in evaluated if 0 < value < math.inf]
    if idle and (len(curve) < 2 or len(idle) == len(history)):
        measured = f"no client finished in {len(idle)} of {len(history)} rounds"
        return judged(SIGN, len(idle), "rounds in which no client finished", measured, causes)
    if len(curve) < 2:
        return not_measured(SIGN, "held-out perplexity before and after a round, as finite numbers")
    value, unit, how, since = _course(curve, evaluated[-1][0], settings.training)
    if since is not None:
        causes += convergence_causes(history, since, settings.training, settings.num_blocks)
        causes = causes or [UNEXPLAINED]
    measured = f"perplexity {format_number(curve[0][1])} -> {format_number(curve[-1][1])}, {how}"
    return judged(SIGN, value, unit, measured, causes)


def _course(curve: Points, last_round: int, training: TrainingConfig) -> tuple[float, str, str, int | None]:
    """The figure that decides, its unit, both in words, and the round since when nothing is gained (None: all is well).

    Args:
        curve: finite perplexities only, at least two.
        last_round: that was evaluated, with whatever result.
        training: the run's.
    """
    (best_round, best), (number, last) = min(curve, key=lambda point: point[1]), curve[-1]
    if number < last_round:
        return number, "last round of finite perplexity", f"not a finite number after round {last_round}", number
    if (rise := last / best - 1) > RISE:
        return 100 * rise, "% above its best", f"{percent(rise)} above its best", best_round
    window = _live_rounds(curve, training)[-1 - STALL_ROUNDS :]
    if len(window) > STALL_ROUNDS and (gain := 1 - window[-1][1] / window[0][1]) < STALL:
        how = f"{percent(gain)} lower over rounds {window[1][0]}-{window[-1][0]}"
        return 100 * gain, f"% lower over {STALL_ROUNDS} rounds", how, window[0][0]
    gain = 1 - last / curve[-2][1]
    return 100 * gain, "% lower in the last round", f"{percent(gain)} lower in the last round", None


def idle_rounds(history: Sequence[RoundRecord]) -> list[RoundRecord]:
    """The rounds in which no client finished; one that is under way is not yet among them."""
    return [record for record in history if not record.tokens and not _under_way(record)]


def _under_way(record: RoundRecord) -> bool:
    return record.steps is None and record.perplexity is None and not record.failures


def _nobody(idle: Sequence[RoundRecord], history: Sequence[RoundRecord]) -> Cause:
    reasons = [reason for record in idle for reason in record.failures]
    why = reasons[0] if reasons else "no client says why"
    return Cause(
        f"no client finished in {len(idle)} of {len(history)} rounds, the first: {why}",
        "mend what the failures name and start again: such a round leaves the model as it was",
    )


def _live_rounds(curve: Points, training: TrainingConfig) -> list[tuple[int, float]]:
    """The points of round 0 and of the rounds whose mean learning rate is not yet at the end of its schedule."""
    return [(r, value) for r, value in curve if r == 0 or _mean_rate(r, training) >= LIVE_LEARNING_RATE]


def _mean_rate(number: int, training: TrainingConfig) -> float:
    """Mean learning rate of round `number` as a share of the peak."""
    steps = range((number - 1) * training.local_steps, number * training.local_steps)
    return sum(map(training.learning_rate_at, steps)) / (len(steps) * training.learning_rate)
