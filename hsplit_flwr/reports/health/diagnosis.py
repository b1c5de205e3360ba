"""A run's health: the three known failure signs of split federated LoRA, with measured cause and remedy.

The signs are HSplitLoRA's (arXiv:2505.02795): poor convergence, a communication bottleneck, lossy aggregation. From a
run's records alone; what was not measured, or is not finite, is said to be so. The thresholds are ours.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hsplit_flwr.common.tables import format_bytes, format_number, format_seconds
from hsplit_flwr.reports.health.causes import Cause, convergence_causes
from hsplit_flwr.reports.health.links import LinkUse, link_use
from hsplit_flwr.reports.health.records import AggregationHealth, Finding, MatrixSpectrum
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.training.config import TrainingConfig

CONVERGENCE, COMMUNICATION, AGGREGATION = "convergence", "communication", "aggregation"
RISE = 0.02
"""Held-out perplexity this far above its best has turned: more than what two evaluations of one round differ by."""
STALL_ROUNDS = 3
"""Rounds that a stall lasts at least: one round may be poor by chance."""
STALL = 0.01
"""Relative gain of perplexity over `STALL_ROUNDS` below which they were not worth their time."""
LIVE_LEARNING_RATE = 0.1
"""Share of the peak learning rate below which a round is not expected to gain: the schedule ends, not the learning."""
LINK_SHARE = 0.5
"""From half of a client's time on the link, no faster device makes the round twice as fast; a faster link does."""
LOSS = 0.01
"""Relative error of the update that a rule may have: below it, runs with other seeds differ more."""
COLLAPSE = 0.95
"""Share of the update's energy in the smallest rank from which what larger ranks add is noise."""

UNEXPLAINED = Cause(
    "none of those measured (adapters, learning rate after re-initialisation, warm-up, overfitting)",
    "look at the data (more of it, less skew between clients), or stop earlier",
)


@dataclass(frozen=True)
class RunSettings:
    """What a run was configured to do, as far as its health depends on it."""

    training: TrainingConfig
    rule: str
    """of aggregation"""
    num_blocks: int
    """L, of the model"""


def diagnose(
    history: Sequence[RoundRecord], initial_perplexity: float | None, settings: RunSettings
) -> tuple[Finding, ...]:
    """A finding for each of the three signs. Never raises: a run's results are worth more than its health report."""
    checks: dict[str, Callable[[], Finding]] = {
        CONVERGENCE: lambda: convergence(history, initial_perplexity, settings),
        COMMUNICATION: lambda: communication(history, settings.training),
        AGGREGATION: lambda: aggregation(history, settings.rule),
    }
    return tuple(_guarded(sign, check) for sign, check in checks.items())


def _guarded(sign: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return _not_measured(sign, f"{type(error).__name__}: {error}")


def convergence(history: Sequence[RoundRecord], initial_perplexity: float | None, settings: RunSettings) -> Finding:
    """Whether held-out perplexity rises or stalls, and what was measured that explains it."""
    points = [(0, initial_perplexity), *((record.round, record.perplexity) for record in history)]
    curve = [(number, value) for number, value in points if value is not None and 0 < value < math.inf]
    if len(curve) < 2:
        return _not_measured(CONVERGENCE, "held-out perplexity before and after a round")
    (best_round, best), last = min(curve, key=lambda point: point[1]), curve[-1][1]
    measured = f"perplexity {format_number(curve[0][1])} -> {format_number(last)}"
    if (rise := last / best - 1) > RISE:
        measured += f", {_percent(rise)} above its best"
        causes = _explained(history, best_round, settings)
        return _judged(CONVERGENCE, 100 * rise, "% above its best", measured, causes)
    window = _live_rounds(curve, settings.training)[-1 - STALL_ROUNDS :]
    if len(window) > STALL_ROUNDS and (gain := 1 - window[-1][1] / window[0][1]) < STALL:
        measured += f", {_percent(gain)} lower over rounds {window[1][0]}-{window[-1][0]}"
        causes = _explained(history, window[0][0], settings)
        return _judged(CONVERGENCE, 100 * gain, f"% lower over {STALL_ROUNDS} rounds", measured, causes)
    gain = 1 - last / curve[-2][1]
    measured += f", {_percent(gain)} lower in the last round"
    return Finding(CONVERGENCE, "ok", 100 * gain, "% lower in the last round", measured)


def _live_rounds(curve: Sequence[tuple[int, float]], training: TrainingConfig) -> list[tuple[int, float]]:
    """The points of round 0 and of the rounds whose mean learning rate is not yet at the end of its schedule."""
    return [(r, value) for r, value in curve if r == 0 or _mean_rate(r, training) >= LIVE_LEARNING_RATE]


def _mean_rate(number: int, training: TrainingConfig) -> float:
    """Mean learning rate of round `number` as a share of the peak."""
    steps = range((number - 1) * training.local_steps, number * training.local_steps)
    return sum(map(training.learning_rate_at, steps)) / (len(steps) * training.learning_rate)


def _explained(history: Sequence[RoundRecord], since: int, settings: RunSettings) -> list[Cause]:
    return convergence_causes(history, since, settings.training, settings.num_blocks) or [UNEXPLAINED]


def communication(history: Sequence[RoundRecord], training: TrainingConfig) -> Finding:
    """Which share of its time the most link-bound client spent on the link."""
    uses = link_use(history)
    if not uses:
        return _not_measured(COMMUNICATION, "no client reported its seconds")
    worst = max(uses, key=lambda use: use.share)
    what = "on the link" if worst.tail_known else "on the link and waiting for the tail"
    measured = (
        f"client {worst.client}: {_percent(worst.share)} of its time {what} ({_seconds(worst.link_s)} for "
        f"{format_bytes(worst.bytes)}, compute {_seconds(worst.compute_s)})"
    )
    slow = sum(use.share >= LINK_SHARE for use in uses)
    why = f"{slow} of {len(uses)} clients spend at least half of their time on the link; {_rate(worst)}"
    causes = [Cause(why, _link_remedy(training.activation_dtype))] if slow else []
    return _judged(COMMUNICATION, 100 * worst.share, "% of a client's time on the link", measured, causes)


def _rate(use: LinkUse) -> str:
    per_step = f"{format_bytes(round(use.bytes / max(1, use.steps)))} and {_seconds(use.link_s / max(1, use.steps))}"
    compute = f", {format_bytes(round(use.bytes / use.compute_s))} per second of compute" if use.compute_s > 0 else ""
    return f"client {use.client} takes {per_step} per step{compute}"


def _link_remedy(activation_dtype: str) -> str:
    halve = "activation-dtype='bf16' halves the bytes of a step; " if activation_dtype == "fp32" else ""
    return f"{halve}fewer, larger steps save round trips; tail-passes > 1 has the server train meanwhile"


def aggregation(history: Sequence[RoundRecord], rule: str) -> Finding:
    """What the lossy rules would have lost, or the configured one did lose; whether the update's rank collapsed."""
    rounds = [record.aggregation for record in history if record.aggregation and _finite(record.aggregation)]
    if not rounds:
        return _not_measured(AGGREGATION, "no round's update")
    lost = {name: _mean([health.losses[name] for health in rounds]) for name in rounds[-1].losses}
    own = lost.pop(rule, 0.0)
    others = ", ".join(f"{name} {_percent(value)}" for name, value in lost.items())
    measured = f"{rule} loses {_percent(own) if own else 'nothing'}; would have lost: {others}"
    collapse = collapse_share(rounds[-1])
    if collapse is not None:
        measured += f"; the smallest rank holds {_percent(collapse)} of its energy"
    causes = [_lossy(rule, own)] if own > LOSS else []
    value, unit = 100 * own, "% of the update's norm lost"
    if collapse is not None and collapse >= COLLAPSE:
        if not causes:
            value, unit = 100 * collapse, "% of the update's energy in the smallest client's rank"
        causes.append(_collapsed(rounds[-1]))
    return _judged(AGGREGATION, value, unit, measured, causes)


def _lossy(rule: str, loss: float) -> Cause:
    why = f"{rule} changes the update of unequal adapters by {_percent(loss)} of its norm"
    return Cause(why, "use aggregation='noise_free'")


def collapse_share(health: AggregationHealth) -> float | None:
    """Mean share of energy in the smallest rank, over the matrices of unequal ranks; None if there are none."""
    unequal = unequal_matrices(health)
    return _mean([matrix.energy_in_smallest for matrix in unequal]) if unequal else None


def _collapsed(health: AggregationHealth) -> Cause:
    unequal = unequal_matrices(health)
    effective, stacked = _mean([m.effective_rank for m in unequal]), _mean([m.stacked_rank for m in unequal])
    why = (
        f"rank collapse: the update's energy lies in the smallest client's rank; "
        f"effective rank {effective:.1f} of {stacked:.0f}"
    )
    return Cause(why, "raise the smallest ranks, or lower the largest: what they add hardly reaches the weights")


def unequal_matrices(health: AggregationHealth) -> list[MatrixSpectrum]:
    """Those whose adapters differ in rank: only there can one client's rank hold the update down."""
    return [matrix for matrix in health.matrices if matrix.smallest_rank < matrix.largest_rank]


def _finite(health: AggregationHealth) -> bool:
    shares = [matrix.energy_in_smallest for matrix in health.matrices]
    return bool(shares) and all(map(math.isfinite, [*health.losses.values(), *shares]))


def _judged(sign: str, value: float, unit: str, measured: str, causes: Sequence[Cause]) -> Finding:
    """A warning with its causes; without any, all is well."""
    why, remedy = "; ".join(cause.why for cause in causes), "; ".join(cause.remedy for cause in causes)
    return Finding(sign, "warning" if causes else "ok", value, unit, measured, why, remedy)


def _not_measured(sign: str, what: str) -> Finding:
    return Finding(sign, "not measured", None, "", f"not measured: {what}")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if abs(share) < 0.0995 else f"{100 * share:.0f} %"


def _seconds(value: float) -> str:
    return f"{format_seconds(value)} s"
