"""Products of a mixture's experts on fake tensors: each token's row times the matrix of its expert.

torch's kernel (``grouped_mm``) takes any float dtype on a CPU, its description for shapes alone only bfloat16. Which
expert a token goes to does not matter to shapes and FLOPs: there are as many rows as tokens times experts per token.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GROUPED = torch.ops.aten._grouped_mm


class GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers grouped products with tensors of the right form; to be entered inside of a fake tensor mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not GROUPED.default:
            return func(*args, **(kwargs or {}))
        rows, matrices = args[0], args[1]
        return rows.new_empty(rows.shape[0], matrices.shape[-1])


def grouped_flops(rows: torch.Size, matrices: torch.Size) -> float:
    """FLOPs of (S, d_in) rows, each times one of (E, d_in, d_out) matrices."""
    return 2.0 * rows[0] * rows[1] * matrices[-1]
