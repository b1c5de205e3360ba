"""A run's health: a finding for each sign of trouble, with measured cause and remedy.

The first three signs are HSplitLoRA's (arXiv:2505.02795): poor convergence, a communication bottleneck, lossy
aggregation. From a run's records alone; what was not measured, or is not finite, is said to be so. The thresholds are
ours. A further sign is a file beside this one and a row of `SIGNS`.
"""

from collections.abc import Callable, Mapping, Sequence

from hsplit_flwr.data.slots import SlotScore
from hsplit_flwr.reports.health import aggregation, communication, convergence, samples
from hsplit_flwr.reports.health.facts import RunFacts, RunSettings
from hsplit_flwr.reports.health.findings import not_measured
from hsplit_flwr.reports.health.records import Finding
from hsplit_flwr.reports.records import RoundRecord

__all__ = ["SIGNS", "RunSettings", "diagnose"]

SIGNS: Mapping[str, Callable[[RunFacts], Finding]] = {
    convergence.SIGN: convergence.find,
    communication.SIGN: communication.find,
    aggregation.SIGN: aggregation.find,
    samples.SIGN: samples.find,
}
"""sign -> what finds it in a run"""


def diagnose(
    history: Sequence[RoundRecord],
    initial_perplexity: float | None,
    settings: RunSettings,
    slots: Mapping[str, SlotScore] | None = None,
) -> tuple[Finding, ...]:
    """A finding for every sign, of a run that is over or under way.

    Never raises: a run's results are worth more than its health report.

    Args:
        history: the rounds so far.
        initial_perplexity: before the first round, on the data of the rounds' perplexities.
        settings: the run's.
        slots: ``before`` and ``after`` training -> score of texts for held-out prompts (`data.slots.score_slots`).
    """
    facts = RunFacts(history, initial_perplexity, settings, slots or {})
    return tuple(_guarded(sign, find, facts) for sign, find in SIGNS.items())


def _guarded(sign: str, find: Callable[[RunFacts], Finding], facts: RunFacts) -> Finding:
    try:
        return find(facts)
    except Exception as error:
        return not_measured(sign, f"{type(error).__name__}: {error}")
