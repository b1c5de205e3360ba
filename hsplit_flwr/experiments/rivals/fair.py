"""LoRA-FAIR's corrected B (Bian et al., arXiv:2411.14961): with the mean A it points where the exact sum does.

    minimize over D:   1 - cos(T, (B + D) A)  +  strength * ||D||_F^2

with B and A the mean factors and T the exact sum of the products. The cosine knows no length: that of B stays, as near
as the second term keeps it. Not its text but a summary of it and three re-implementations by others were at hand. The
cosine is in all of them, and a strength of 0.01 in most; the summary has the norm of D, the others its square, as here.
They take up to 1,000 steps of SGD at a rate of 0.01, some from a random D. Here D starts at 0 and the minimum itself is
sought (L-BFGS in float64): how far such steps come depends on the length of B, and what was random in D would stay.
"""

import torch
from torch import Tensor

STRENGTH = 0.01
_MOST_STEPS = 500
_TOLERANCE = 1e-9
"""of the gradient's largest entry"""


def corrected(mean_B: Tensor, mean_A: Tensor, cross: Tensor, length: float, strength: float = STRENGTH) -> Tensor:
    """B + D, float64; `mean_B` itself where it or the exact sum is zero, where a cosine says nothing.

    Args:
        mean_B: (d_out, r).
        mean_A: (r, d_in).
        cross: ``T @ mean_A.T`` (d_out, r), all that the cosine needs of T but its length.
        length: ``||T||_F``.
        strength: of the second term.
    """
    start, gram = mean_B.double(), mean_A.double() @ mean_A.double().T
    cross = cross.double()
    if length == 0 or float(_squared_norm(start, gram)) <= 0:
        return start
    difference = torch.zeros_like(start, requires_grad=True)
    solver = torch.optim.LBFGS(
        [difference],
        max_iter=_MOST_STEPS,
        tolerance_grad=_TOLERANCE,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        B = start + difference
        cosine = (cross * B).sum() / (length * _squared_norm(B, gram).sqrt())
        value = 1 - cosine + strength * difference.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(objective)  # type: ignore[no-untyped-call]
    return start + difference.detach()


def _squared_norm(B: Tensor, gram: Tensor) -> Tensor:
    """``||B A||_F^2`` of the A with this ``A A^T``."""
    return ((B @ gram) * B).sum()
