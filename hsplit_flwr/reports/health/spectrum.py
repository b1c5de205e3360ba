"""The singular spectrum of an aggregated update, from its factors.

All sums are taken in float64, and dense (d_out, d_in) products only where they are cheaper than Gram matrices of the
factors.

Effective rank: Roy & Vetterli, "The effective rank" (EUSIPCO 2007), here of the *squared* singular values, so that it
counts energy as the share below does. That the energy of updates of unequal ranks gathers in the smallest client's
rank is called rank collapse (arXiv:2602.13486).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hsplit_flwr.lora.aggregation import Term
from hsplit_flwr.lora.factors import LoraFactors, product_norm
from hsplit_flwr.reports.health.records import MatrixSpectrum

KEPT_VALUES = 32
"""Singular values kept per matrix: more than most adapters' ranks, and still short in summary.json."""


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
    """Singular values of ``scaling * B @ A``, descending, float64 (min(R, d_out, d_in),): by QR, SVD of the core."""
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
