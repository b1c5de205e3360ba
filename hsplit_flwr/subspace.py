"""Where a new adapter starts to learn: in the subspace in which the weights have changed so far.

Adapters start anew every round, after the merge. An A drawn at random again and again forgets which of its inputs
mattered, and a round of few steps is over before it has found them. So A restarts among the inputs that the
cumulative delta responds to most. B restarts at 0: nothing changes before the first step, and aggregation stays exact.
Server and clients hold the same delta, so nothing more travels. Ours, not the paper's; measured in
simulations/README.md.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hsplit_flwr.lora import LoraFactors

RANDOM_PART = 1e-3
"""of the start, so that directions remain where the delta has a lower rank than the adapter"""


def restart_lora_A(fresh: Tensor, learned: Tensor | LoraFactors) -> Tensor:
    """An A (r, d_in) whose rows are orthogonal, of a fresh A's mean length, mostly in the row space of `learned`.

    One block power step with ``learned^T learned`` from `fresh` (Halko, Martinsson, Tropp, arXiv:0909.4061, algorithm
    4.3). The first k rows depend on the first k of `fresh` alone: adapters of unequal ranks start alike.

    Args:
        fresh: (r, d_in), float32, from `init_lora_A`.
        learned: the delta of the weights (d_out, d_in), dense or as factors; of zeros: `fresh` is returned.
    """
    if isinstance(learned, LoraFactors):
        responses = fresh @ learned.A.T @ (learned.B.T @ learned.B) @ learned.A
    else:
        responses = fresh @ learned.T @ learned
    if not responses.any():
        return fresh
    start = _unit_rows(responses) + RANDOM_PART * _unit_rows(fresh)
    columns: Tensor = torch.linalg.qr(start.T).Q
    return columns.T * 3**-0.5  # sqrt(d_in) times the standard deviation of uniform(-d_in^-0.5, d_in^-0.5)


def _unit_rows(matrix: Tensor) -> Tensor:
    return functional.normalize(matrix, dim=1, eps=torch.finfo(matrix.dtype).tiny)
