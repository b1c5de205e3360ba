"""Sign: lossy aggregation. What lossy rules would have lost, the configured one did lose, and whether ranks collapse.

Measured in every round on a few matrices, the most important ones of those that several adapters train: where only one
does, every rule gives the same. Judged over the run.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from hsplit_flwr.lora.aggregation import EXACT_RULE, RULES, STACKING, Contribution, Term, noise_free, terms_by_module
from hsplit_flwr.lora.factors import LoraFactors
from hsplit_flwr.reports.health.facts import RunFacts
from hsplit_flwr.reports.health.findings import Cause, judged, mean, not_measured, percent
from hsplit_flwr.reports.health.records import AdapterCoverage, AggregationHealth, Finding, MatrixSpectrum
from hsplit_flwr.reports.health.spectrum import difference_norm, update_spectrum

_log = logging.getLogger("hsplit_flwr")
SIGN = "aggregation"
MATRICES = 4
"""Measured per round: a few show what all do, and cost little beside aggregating all of them."""
LOSS = 0.01
"""Relative error of the update that a rule may have: below it, runs with other seeds differ more."""
COLLAPSE = 0.95
"""Share of the update's energy in the smallest rank from which what larger ranks add is noise."""


def measure_aggregation(
    contributions: Sequence[Contribution],
    tail: Mapping[str, LoraFactors],
    modules: Sequence[str],
    block_of: Callable[[str], int],
    importance: Mapping[str, float],
) -> AggregationHealth | None:
    """The health of a round's aggregation; None where nothing was trained or nothing can be measured. Never raises.

    Args:
        contributions: of the clients that finished.
        tail: the tail's adapters, module name -> factors.
        modules: every linear layer of the model.
        block_of: block index of a whole-model module name.
        importance: module name -> importance, to choose the matrices by; a missing one counts 0.
    """
    try:
        return _measure(contributions, tail, modules, block_of, importance)
    except Exception as error:  # health is for people: a run does not end for it
        _log.warning("health of the aggregation not measured: %s: %s", type(error).__name__, error)
        return None


def _measure(
    contributions: Sequence[Contribution],
    tail: Mapping[str, LoraFactors],
    modules: Sequence[str],
    block_of: Callable[[str], int],
    importance: Mapping[str, float],
) -> AggregationHealth | None:
    terms = terms_by_module(contributions, tail, block_of)
    spectra = []
    lost = dict.fromkeys((rule for rule in RULES if rule not in STACKING), 0.0)
    for name in chosen_matrices(terms, importance):
        exact = noise_free(terms[name])
        spectrum = update_spectrum(name, terms[name], exact)
        if spectrum is None:
            continue
        spectra.append(spectrum)
        for rule in lost:
            lost[rule] += difference_norm(RULES[rule](terms[name]), exact) ** 2
    total = math.fsum(spectrum.norm**2 for spectrum in spectra)
    losses = {rule: math.sqrt(squared / total) for rule, squared in lost.items()} if spectra else {}
    if not spectra or not all(map(math.isfinite, losses.values())):
        return None
    return AggregationHealth(tuple(spectra), losses, adapter_coverage(contributions, tail, modules, block_of))


def chosen_matrices(terms: Mapping[str, Sequence[Term]], importance: Mapping[str, float]) -> list[str]:
    """The `MATRICES` most important modules of those with several terms, or of all where none has; model order."""
    shared = [name for name in terms if len(terms[name]) > 1] or list(terms)
    best = set(sorted(shared, key=lambda name: -importance.get(name, 0.0))[:MATRICES])
    return [name for name in shared if name in best]


def adapter_coverage(
    contributions: Sequence[Contribution],
    tail: Mapping[str, LoraFactors],
    modules: Sequence[str],
    block_of: Callable[[str], int],
) -> AdapterCoverage:
    """How much of the model the round's adapters could change; at least one contribution."""
    head_ranks = [
        _rank(contribution.factors.get(name))
        for contribution in contributions
        for name in modules
        if block_of(name) < contribution.cut
    ]
    smallest_cut = min(contribution.cut for contribution in contributions)
    tail_ranks = [_rank(tail.get(name)) for name in modules if block_of(name) >= smallest_cut]
    return AdapterCoverage(
        bare_share=head_ranks.count(0) / max(1, len(head_ranks)),
        head_rank=sum(head_ranks) / max(1, len(head_ranks)),
        tail_rank=sum(tail_ranks) / max(1, len(tail_ranks)),
        largest_rank=max([*head_ranks, *tail_ranks], default=0),
    )


def _rank(factors: LoraFactors | None) -> int:
    return factors.rank if factors else 0


def find(facts: RunFacts) -> Finding:
    """What the lossy rules would have lost, or the configured one did lose; whether the update's rank collapsed."""
    rule = facts.settings.rule
    rounds = [record.aggregation for record in facts.history if record.aggregation and _finite(record.aggregation)]
    if not rounds:
        return not_measured(SIGN, "no round's update")
    lost = {name: mean([health.losses[name] for health in rounds]) for name in rounds[-1].losses}
    own = lost.pop(rule, 0.0)
    others = ", ".join(f"{name} {percent(value)}" for name, value in lost.items())
    clips = rule in STACKING and rule != EXACT_RULE
    loses = percent(own) if own else "what it clips" if clips else "nothing"
    measured = f"{rule} loses {loses}; would have lost: {others}"
    collapse = collapse_share(rounds[-1])
    if collapse is not None:
        measured += f"; the smallest rank holds {percent(collapse)} of its energy"
    causes = [_lossy(rule, own)] if own > LOSS else []
    value, unit = 100 * own, "% of the update's norm lost"
    if collapse is not None and collapse >= COLLAPSE:
        if not causes:
            value, unit = 100 * collapse, "% of the update's energy in the smallest client's rank"
        causes.append(_collapsed(rounds[-1]))
    return judged(SIGN, value, unit, measured, causes)


def _lossy(rule: str, loss: float) -> Cause:
    why = f"{rule} changes the update of unequal adapters by {percent(loss)} of its norm"
    return Cause(why, "use aggregation='noise_free'")


def collapse_share(health: AggregationHealth) -> float | None:
    """Mean share of energy in the smallest rank, over the matrices of unequal ranks; None if there are none."""
    unequal = unequal_matrices(health)
    return mean([matrix.energy_in_smallest for matrix in unequal]) if unequal else None


def _collapsed(health: AggregationHealth) -> Cause:
    unequal = unequal_matrices(health)
    effective, stacked = mean([m.effective_rank for m in unequal]), mean([m.stacked_rank for m in unequal])
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
