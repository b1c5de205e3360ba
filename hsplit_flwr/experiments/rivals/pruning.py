"""HetLoRA's rank self-pruning (Cho et al., arXiv:2401.06432), as we read the paper's description.

During local training the penalty ``strength * ||B[:, q:]||_F ||A[q:, :]||_F`` of every adapter is added to the loss,
with q = floor(decay * r) the rank that would be left. If ``||B[:, q:] A[q:, :]||_F`` is smaller after the round than
before, the client goes on with rank q. ``decay``, 0.99, is what several public re-implementations have; ``strength``,
5e-3, is what we remember of its experiments.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hsplit_flwr.lora.factors import LoraFactors

DECAY = 0.99
STRENGTH = 5e-3


def pruned_rank(rank: int) -> int:
    """q: what is left of `rank`; never below 1."""
    return max(1, int(DECAY * rank))


def penalty(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over all adapters, (A (r, d_in), B (d_out, r)) each; a constant 0 once no rank can fall further."""
    terms = [STRENGTH * _norm(B[:, q:]) * _norm(A[q:]) for A, B in pairs if (q := pruned_rank(A.shape[0])) < A.shape[0]]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def ranks_after(before: Mapping[str, LoraFactors], after: Mapping[str, LoraFactors]) -> dict[str, int]:
    """Every adapter's rank in the next round."""
    return {
        name: pruned_rank(pair.rank) if _end_norm(pair) < _end_norm(before[name]) else pair.rank
        for name, pair in after.items()
    }


def _end_norm(pair: LoraFactors) -> float:
    q = pruned_rank(pair.rank)
    return float(torch.linalg.norm(pair.B[:, q:] @ pair.A[q:])) if q < pair.rank else 0.0


def _norm(tensor: Tensor) -> Tensor:
    """The Frobenius norm, with the gradient 0 at 0 (B starts there, where the norm itself has none)."""
    return (tensor.square().sum() + 1e-24).sqrt()
