"""Measures on one round's aggregation: what lossy rules would have lost, and the spectrum of the exact update.

Measured on a few matrices, the most important ones of those that several adapters train: where only one does, every
rule gives the same. All sums are taken in float64, and dense (d_out, d_in) products only where they are cheaper than
Gram matrices of the factors.

Effective rank: Roy & Vetterli, "The effective rank" (EUSIPCO 2007), here of the *squared* singular values, so that it
counts energy as the share below does. That the energy of updates of unequal ranks gathers in the smallest client's
rank is called rank collapse (arXiv:2602.13486).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hsplit_flwr.lora.aggregation import EXACT_RULE, RULES, Contribution, Term, noise_free, terms_by_module
from hsplit_flwr.lora.factors import LoraFactors, product_norm
from hsplit_flwr.reports.health.records import AdapterCoverage, AggregationHealth, MatrixSpectrum

_log = logging.getLogger("hsplit_flwr")
MATRICES = 4
"""Measured per round: a few show what all do, and cost little beside aggregating all of them."""
KEPT_VALUES = 32
"""Singular values kept per matrix: more than most adapters' ranks, and still short in summary.json."""


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
    lost = dict.fromkeys((rule for rule in RULES if rule != EXACT_RULE), 0.0)
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


def update_spectrum(name: str, terms: Sequence[Term], exact: LoraFactors) -> MatrixSpectrum | None:
    """The singular spectrum of the exact sum of `terms`; None where it is zero or not finite."""
    values = singular_values(exact)
    energy = values.square()
    total = float(energy.sum())
    if not 0 < total < math.inf:
        return None
    shares = energy / total
    ranks = [term.factors.rank for term in terms]
    return MatrixSpectrum(
        name=name,
        norm=math.sqrt(total),
        singular_values=tuple(values[:KEPT_VALUES].tolist()),
        effective_rank=math.exp(-float(torch.special.xlogy(shares, shares).sum())),
        stacked_rank=sum(ranks),
        smallest_rank=min(ranks),
        largest_rank=max(ranks),
        energy_in_smallest=min(1.0, float(shares[: min(ranks)].sum())),
    )


def singular_values(factors: LoraFactors) -> Tensor:
    """Of ``scaling * B @ A``, descending, float64 (min(R, d_out, d_in),): QR of both factors, SVD of the small core."""
    if not factors.rank:
        return torch.zeros(0, dtype=torch.float64)
    core_out = torch.linalg.qr(factors.B.double(), mode="r").R
    core_in = torch.linalg.qr(factors.A.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(factors.scaling * (core_out @ core_in.T))
    return values


def difference_norm(found: LoraFactors, exact: LoraFactors) -> float:
    """``||found - exact||_F`` of the updates that two pairs of factors stand for."""
    A = torch.cat([found.A, exact.A]).double()
    B = torch.cat([found.scaling * found.B.double(), -exact.scaling * exact.B.double()], dim=1)
    d_out, d_in, rank = B.shape[0], A.shape[1], A.shape[0]
    if d_out * d_in <= (d_out + d_in) * rank:  # one product of d_out x d_in x rank, or two of rank x rank x d
        return float(torch.linalg.matrix_norm(B @ A))
    return product_norm(LoraFactors(A, B, 1.0))


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
