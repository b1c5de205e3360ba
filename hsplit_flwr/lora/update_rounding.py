"""How a round's update goes out: as it is, or rounded, with the rounding error carried.

Everybody computes with what was sent, the server's own blocks included, so heads and tail fit together. What that lacks
of the exact update is kept at the server, a dense float32 residual a matrix, and added to the next round's update
before that is rounded (error feedback, Karimireddy et al., arXiv:1901.09847). So over any number of rounds

    sum of what was sent = sum of the exact updates - the last residual

and `take_residuals` gives the rest at the end of a run. Ours, not the paper's.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from hsplit_flwr.common.finite import all_finite
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.delta_update import ADDED, OWN, REPLACED
from hsplit_flwr.lora.deltas import SEPARATOR
from hsplit_flwr.lora.factors import FLOAT32_BYTES, Increment, LoraFactors, Shape, dense_bytes
from hsplit_flwr.lora.places import MEMORY, Dense, Place, as_tensor
from hsplit_flwr.lora.update_coding import UpdateCoding

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""of an update's factors as they travel"""
TensorForm: TypeAlias = tuple[tuple[int, int] | tuple[int], torch.dtype]
"""shape and dtype"""
_POWER_STEPS = 2
"""of the subspace iteration: the update's own row space is nearly the one that is looked for"""


def tensor_forms(coding: UpdateCoding, name: str, shape: Shape, rank: int, own_rank: int) -> dict[str, TensorForm]:
    """What `DeltaUpdate.to_tensors` makes of an update of `rank`, of which `own_rank` is the client's own."""
    d_out, d_in = shape
    sent = rank if coding.exact else min(rank, *shape, coding.rank or rank)
    if FLOAT32_BYTES * sent * sum(shape) >= dense_bytes(shape):
        return {f"{REPLACED}{name}{SEPARATOR}dense": (shape, torch.float32)}
    own = own_rank if coding.exact else 0
    dtype = _DTYPES[coding.codec]
    found: dict[str, TensorForm] = {f"{OWN}{name}": ((2,), torch.float64)} if own else {}
    if sent > own:
        found[f"{ADDED}{name}{SEPARATOR}A"] = (sent - own, d_in), dtype
        found[f"{ADDED}{name}{SEPARATOR}B"] = (d_out, sent - own), dtype
    return found


def shortened(tensors: Mapping[str, Tensor], coding: UpdateCoding) -> dict[str, Tensor]:
    """Tensors as they travel: what loses nothing by it in bf16, where that is the codec."""
    if coding.codec != "bf16":
        return dict(tensors)
    return {key: _in_bf16(tensor) for key, tensor in tensors.items()}


class UpdateRounding:
    """Rounds updates by a coding, and carries what they lack.

    Args:
        coding: how updates go out.
        place: where residuals are kept.
    """

    def __init__(self, coding: UpdateCoding | None = None, place: Place = MEMORY) -> None:
        self.coding = coding or UpdateCoding()
        self.place = place
        self._residuals: dict[str, Dense] = {}

    def round(self, update: Increment) -> Increment:
        """What is sent of `update` and of the residuals of its matrices, as factors of scaling 1.0."""
        if self.coding.exact:
            return update
        return {name: self._rounded(name, factors) for name, factors in update.items() if factors.rank}

    def take_residuals(self) -> dict[str, Dense]:
        """What the updates lacked so far, by matrix (d_out, d_in); nothing is carried any more."""
        residuals, self._residuals = self._residuals, {}
        return residuals

    def state(self) -> State:
        """The residuals."""
        return {name: as_tensor(residual) for name, residual in self._residuals.items()}

    def load_state(self, state: State, shapes: Mapping[str, Shape]) -> None:
        """Carry what `state` gave.

        Raises:
            AggregationError: a residual of another model, or not finite.
        """
        for name, residual in state.items():
            if tuple(residual.shape) != shapes.get(name) or not all_finite(residual):
                raise AggregationError(
                    f"Expected a finite residual of {name!r} with the shape {shapes.get(name)}, found "
                    f"{tuple(residual.shape)}. Resume a run of this base model."
                )
        self._residuals = {name: self.place.keep_dense(residual) for name, residual in state.items()}

    def _rounded(self, name: str, factors: LoraFactors) -> LoraFactors:
        exact = factors.delta()
        if name in self._residuals:
            exact = exact + as_tensor(self._residuals[name])
        A, B = best_factors(exact, factors.A, self.coding.rank or factors.rank)
        if self.coding.codec == "bf16":
            A, B = A.bfloat16().float(), B.bfloat16().float()
        self._residuals[name] = self.place.keep_dense(torch.addmm(exact, B, A, alpha=-1.0))
        return LoraFactors(A, B, 1.0)


def best_factors(matrix: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r), r <= `rank`, whose product is closest to `matrix` (d_out, d_in).

    By subspace iteration from the space of `rows` (k, d_in), so r <= k; close to the truncated SVD where they span most
    of `matrix`, at the cost of some products with k columns.
    """
    basis = torch.linalg.qr(rows.T)[0]
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis)[0])[0]
    U, S, Vh = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return Vh[:rank] @ basis.T, U[:, :rank] * S[:rank]


def _in_bf16(tensor: Tensor) -> Tensor:
    short = tensor.bfloat16()
    return short if tensor.dtype == torch.float32 and torch.equal(short.float(), tensor) else tensor
