"""What explains poor convergence, as far as a run measured it: divergence, overfitting, adapters, learning rate."""

import math
import statistics
from collections.abc import Callable, Sequence

from hsplit_flwr.reports.health.findings import Cause
from hsplit_flwr.reports.health.records import AggregationHealth
from hsplit_flwr.reports.records import RoundRecord
from hsplit_flwr.training.config import TrainingConfig

BARE_SHARE = 0.5
"""Share of the heads' matrices without an adapter from which most of a head cannot learn."""
SMALL_RANK = 0.25
"""Mean rank, as a share of the largest one given, below which budgets hold most adapters far under what was meant."""
SMALL_CUT = 0.25
"""Mean cut, as a share of the blocks, below which the tail's rank decides what the model can learn."""
EARLY_SHARE = 0.25
"""The part of a round after its first step in which a loss is looked at for a rise."""
LEAST_STEPS = 4
"""Fewer steps in a round show no course of the loss."""
LOSS_RISE = 0.05
"""Relative rise of the train loss over a round's first step that is more than the difference between batches."""
TRAIN_FALL = 0.02
"""Relative fall of the train loss that is more than chance."""


def convergence_causes(
    history: Sequence[RoundRecord], since: int, training: TrainingConfig, num_blocks: int
) -> list[Cause]:
    """Those that were measured, the plainest first.

    Args:
        history: the whole run.
        since: the round from which on held-out perplexity gained nothing.
        training: the run's.
        num_blocks: L, of the model.
    """
    checks: list[Callable[[], Cause | None]] = [
        lambda: _diverged(history, training),
        lambda: _overfitting(history, since),
        lambda: _bare(history),
        lambda: _small_ranks(history),
        lambda: _small_cut(history, num_blocks),
        lambda: _after_reset(history, training),
        lambda: _short_warmup(history, training),
    ]
    return [cause for check in checks if (cause := check())]


def _diverged(history: Sequence[RoundRecord], training: TrainingConfig) -> Cause | None:
    measured = ((record.round, value) for record in history for value in (record.train_loss, record.perplexity))
    first = next((number for number, value in measured if value is not None and not math.isfinite(value)), None)
    if first is None:
        return None
    return Cause(
        f"the model diverged: loss or perplexity is not a finite number from round {first} on",
        f"lower learning-rate ({training.learning_rate:g}) or raise warmup-steps ({training.warmup_steps})",
    )


def _overfitting(history: Sequence[RoundRecord], since: int) -> Cause | None:
    losses = [r.train_loss for r in history if r.round >= since and r.train_loss and _positive(r.train_loss)]
    if len(losses) < 2:
        return None
    start, end = losses[0], losses[-1]
    if end > (1 - TRAIN_FALL) * start:
        return None
    return Cause(
        f"train loss fell from {start:.3f} to {end:.3f} meanwhile, held-out loss did not: overfitting",
        "stop earlier, use more data, fewer local-steps or smaller ranks",
    )


def _bare(history: Sequence[RoundRecord]) -> Cause | None:
    health = _last_health(history)
    if health is None or not health.coverage.bare_share >= BARE_SHARE:
        return None
    return Cause(
        f"{100 * health.coverage.bare_share:.0f} % of the matrices in the heads have no adapter",
        "give clients more memory or gradient-checkpointing, or a longer deadline-s",
    )


def _small_ranks(history: Sequence[RoundRecord]) -> Cause | None:
    health = _last_health(history)
    if health is None:
        return None
    coverage, small = health.coverage, []
    if coverage.head_rank < SMALL_RANK * coverage.largest_rank:
        small.append(f"heads {coverage.head_rank:.1f}")
    if coverage.tail_rank < SMALL_RANK * coverage.largest_rank:
        small.append(f"tail {coverage.tail_rank:.1f}")
    if not small:
        return None
    return Cause(
        f"small ranks (mean of {', '.join(small)}; the largest given is {coverage.largest_rank})",
        "raise ranks or budgets of the heads, tail-rank for the tail",
    )


def _small_cut(history: Sequence[RoundRecord], num_blocks: int) -> Cause | None:
    cuts = next(([client.cut for client in record.clients] for record in reversed(history) if record.clients), [])
    health = _last_health(history)
    if not cuts or health is None or health.coverage.tail_rank >= health.coverage.head_rank:
        return None
    mean = sum(cuts) / len(cuts)
    if mean >= SMALL_CUT * num_blocks:
        return None
    return Cause(
        f"cuts are small (mean {mean:.1f} of {num_blocks} blocks), so most of the model has the tail's rank "
        f"{health.coverage.tail_rank:.1f}",
        "raise tail-rank, or give clients the memory for deeper cuts",
    )


def _after_reset(history: Sequence[RoundRecord], training: TrainingConfig) -> Cause | None:
    rises = [rise for r in history if r.round > 1 and (rise := early_rise(r)) is not None]
    if not rises or statistics.median(rises) <= LOSS_RISE:
        return None
    return Cause(
        f"the learning rate is too high for fresh adapters: train loss rises by {100 * statistics.median(rises):.0f} % "
        f"after the first step of a round (median of {len(rises)} rounds)",
        f"lower learning-rate ({training.learning_rate:g}), or use more local-steps and fewer rounds",
    )


def _short_warmup(history: Sequence[RoundRecord], training: TrainingConfig) -> Cause | None:
    rise = early_rise(history[0]) if history and history[0].round == 1 else None
    if rise is None or rise <= LOSS_RISE:
        return None
    return Cause(
        f"train loss rises by {100 * rise:.0f} % in the first steps of the run, with {training.warmup_steps} "
        "steps of warm-up",
        "raise warmup-steps",
    )


def early_rise(record: RoundRecord) -> float | None:
    """Mean train loss of the steps right after a round's first one, relative to that one, minus 1.

    The first step's loss is that of the merged weights, before any update of this round (of clients that train in
    later waves: after the tail's updates in earlier ones). None if not measured.
    """
    losses = record.steps.losses if record.steps else ()
    if len(losses) < LEAST_STEPS or not all(map(_positive, losses)):
        return None
    early = losses[1 : 1 + max(2, round(EARLY_SHARE * len(losses)))]
    return statistics.fmean(early) / losses[0] - 1


def _last_health(history: Sequence[RoundRecord]) -> AggregationHealth | None:
    """Health of the last aggregation that was measured: a round under way, or without a client, has none."""
    return next((record.aggregation for record in reversed(history) if record.aggregation), None)


def _positive(value: float) -> bool:
    return 0 < value < math.inf
