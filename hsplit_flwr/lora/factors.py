"""Trained adapters as data: one pair of factors a module."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hsplit_flwr.common.finite import all_finite
from hsplit_flwr.errors import AggregationError

FLOAT32_ROUNDING = 1e-6
"""relative error of a product of float32 factors, with room for sums of many terms"""


@dataclass(frozen=True)
class LoraFactors:
    """One trained adapter: its module's weight changes by ``scaling * B @ A``.

    Always in ``nn.Linear`` orientation (a GPT-2 ``Conv1D`` weight is the transpose of this).
    """

    A: Tensor
    """(r, d_in), float32"""
    B: Tensor
    """(d_out, r), float32"""
    scaling: float
    """``lora_alpha / r``"""

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """The dense update ``scaling * B @ A`` (d_out, d_in)."""
        return self.scaling * (self.B @ self.A)


def init_lora_A(rank: int, in_features: int, seed: int) -> Tensor:
    """A fresh A (rank, in_features), float32: Kaiming-uniform with a = sqrt(5), as PEFT and nn.Linear start it."""
    bound = in_features**-0.5
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)


Increment: TypeAlias = Mapping[str, LoraFactors]
"""Module name -> factors whose ``scaling * B @ A`` the module's weight changes by. Absent: no change."""


def product_norm(factors: LoraFactors) -> float:
    """``||B A||_F`` from the two (r, r) Gram matrices, in float64: trace of (B^T B)(A A^T)."""
    A, B = factors.A.double(), factors.B.double()
    squared = float(((B.T @ B) * (A @ A.T)).sum())
    return math.sqrt(max(squared, 0.0))


def largest_product_norm(factors: LoraFactors) -> float:
    """``||B A||_F``, and what float32 may add to it by rounding where the factors cancel."""
    return product_norm(factors) + FLOAT32_ROUNDING * float(factors.A.double().norm() * factors.B.double().norm())


def check_factors(factors: LoraFactors) -> tuple[int, int]:
    """The (d_out, d_in) of the matrix that `factors` are for.

    Raises:
        AggregationError: not two float32 matrices of one rank, or NaN or Inf in them or in the scaling.
    """
    A, B = factors.A, factors.B
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AggregationError(
            f"Expected A (r, d_in) and B (d_out, r) of one rank, found A {tuple(A.shape)} and "
            f"B {tuple(B.shape)}. Report both factors of the same adapter."
        )
    if A.dtype != torch.float32 or B.dtype != torch.float32:
        raise AggregationError(f"Expected float32 factors, found A {A.dtype} and B {B.dtype}. Convert them first.")
    if not math.isfinite(factors.scaling) or not all_finite(A) or not all_finite(B):
        raise AggregationError(
            "Expected finite adapters, found NaN or Inf. Training diverged: lower the learning rate or drop the client."
        )
    return B.shape[0], A.shape[1]


Shape = tuple[int, int]
FLOAT32_BYTES = 4


def stack(pieces: Iterable[LoraFactors]) -> LoraFactors:
    """One pair of factors (scaling 1.0) for the sum of all `pieces` (at least one) of a matrix."""
    all_pieces = list(pieces)
    if len(all_pieces) == 1 and all_pieces[0].scaling == 1.0:
        return all_pieces[0]
    return LoraFactors(
        A=torch.cat([piece.A for piece in all_pieces]),
        B=torch.cat([piece.B if piece.scaling == 1.0 else piece.scaling * piece.B for piece in all_pieces], dim=1),
        scaling=1.0,
    )


def alike(one: LoraFactors, other: LoraFactors) -> bool:
    """Whether an adapter can go on from the other one: they have one form and one scaling."""
    return (one.A.shape, one.B.shape, one.scaling) == (other.A.shape, other.B.shape, other.scaling)


def changes(end: Increment, start: Increment) -> dict[str, LoraFactors]:
    """What adapters have moved by since they were `start`, exactly: ``c B A - c B' A'``, stacked (rank 2 r).

    An adapter that is not there, or not `alike`, has restarted: all of it is new.
    """
    kept = {name: start[name] for name, pair in end.items() if name in start and alike(pair, start[name])}
    return {name: _change(pair, kept[name]) if name in kept else pair for name, pair in end.items()}


def _change(end: LoraFactors, start: LoraFactors) -> LoraFactors:
    return LoraFactors(torch.cat([end.A, start.A]), torch.cat([end.B, -start.B], dim=1), end.scaling)


def factor_bytes(factors: LoraFactors) -> int:
    """Bytes of A and B."""
    return FLOAT32_BYTES * (factors.A.numel() + factors.B.numel())


def dense_bytes(shape: Shape) -> int:
    """Bytes of a dense float32 matrix."""
    return FLOAT32_BYTES * shape[0] * shape[1]
