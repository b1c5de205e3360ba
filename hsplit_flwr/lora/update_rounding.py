"""How a round's update goes out: as it is, or rounded, with the rounding error carried.

Everybody computes with what was sent, the server's own blocks included, so heads and tail fit together. What that lacks
of the exact update is kept at the server, a dense float32 residual a matrix, and added to the next round's update
before that is rounded (error feedback, Karimireddy et al., arXiv:1901.09847). So over any number of rounds

    sum of what was sent = sum of the exact updates - the last residual

and `take_residuals` gives the rest at the end of a run.

Where updates stand beside a quantised base they cannot go into the weights, and their rank would grow with every round.
So it is bounded (`UpdateCoding.total_rank`): as long as they fit they stand there as they are; then the best factors of
all of them take their place, and what those lack is carried in the same residual. Ours, not the paper's.
"""

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from hsplit_flwr.common.finite import all_finite
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.delta_update import ADDED, OWN, REPLACED
from hsplit_flwr.lora.deltas import SEPARATOR, MatrixDelta, WeightDelta
from hsplit_flwr.lora.factors import FLOAT32_BYTES, Increment, LoraFactors, Shape, dense_bytes, product_norm, stack
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
    if is_bounded(coding.total_rank, shape):  # in a late round: all updates together
        forms = _DTYPES[coding.codec]
        prefix, total = f"{REPLACED}{name}{SEPARATOR}", min(coding.total_rank, *shape)
        return {f"{prefix}A": ((total, d_in), forms), f"{prefix}B": ((d_out, total), forms)}
    if FLOAT32_BYTES * sent * sum(shape) >= dense_bytes(shape):
        return {f"{REPLACED}{name}{SEPARATOR}dense": (shape, torch.float32)}
    own = own_rank if coding.exact else 0
    dtype = _DTYPES[coding.codec]
    found: dict[str, TensorForm] = {f"{OWN}{name}": ((2,), torch.float64)} if own else {}
    if sent > own:
        found[f"{ADDED}{name}{SEPARATOR}A"] = (sent - own, d_in), dtype
        found[f"{ADDED}{name}{SEPARATOR}B"] = (d_out, sent - own), dtype
    return found


def is_bounded(total_rank: int, shape: Shape) -> bool:
    """Whether the rank of all updates of a matrix is bounded: where a dense matrix takes no more bytes it is kept."""
    return 0 < FLOAT32_BYTES * total_rank * sum(shape) < dense_bytes(shape)


def most_beside(total_rank: int, shape: Shape) -> int:
    """The most bytes that stand beside a quantised weight."""
    return FLOAT32_BYTES * total_rank * sum(shape) if is_bounded(total_rank, shape) else dense_bytes(shape)


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
        self._norms: dict[str, float] = {}
        """of the residuals (Frobenius)"""

    def round(self, update: Increment) -> Increment:
        """What is sent of `update` and of the residuals of its matrices, as factors of scaling 1.0."""
        if self.coding.exact:
            return update
        return {
            name: self._best(name, factors.delta(), factors.A, self.coding.rank or factors.rank)
            for name, factors in update.items()
            if factors.rank
        }

    def bound(self, increment: Increment, total: WeightDelta) -> tuple[Increment, WeightDelta]:
        """`increment` for a delta that is `total`: what of it is added as it is, and what all is replaced by."""
        added: dict[str, LoraFactors] = {}
        replaced: dict[str, MatrixDelta] = {}
        changed = set(total.names())
        for name, factors in increment.items():
            form = total.form(name) if name in changed else None
            shape = (factors.B.shape[0], factors.A.shape[1])
            if not is_bounded(self.coding.total_rank, shape) or isinstance(form, Tensor) or not factors.rank:
                added[name] = factors
                continue
            both = stack([form, factors] if form else [factors])
            if both.rank <= self.coding.total_rank:
                added[name] = factors
            else:
                best = self._best(name, both.delta(), both.A, self.coding.total_rank)
                replaced[name] = MatrixDelta(shape, (best,))
        return added, WeightDelta(replaced)

    def relative_error(self, total: WeightDelta) -> float:
        """How far `total` is from the sum of the exact updates, in units of that sum (Frobenius, all matrices)."""
        lost = sum(norm**2 for norm in self._norms.values())
        forms = map(total.form, total.names())
        kept = sum((product_norm(f) if isinstance(f, LoraFactors) else float(f.double().norm())) ** 2 for f in forms)
        # The best factors of a matrix and what they lack are orthogonal, so the squares add up to the whole.
        return math.sqrt(lost / (lost + kept)) if lost else 0.0

    def take_residuals(self) -> dict[str, Dense]:
        """What the updates lacked so far, by matrix (d_out, d_in); nothing is carried any more."""
        residuals, self._residuals, self._norms = self._residuals, {}, {}
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
        self._residuals, self._norms = {}, {}
        for name, residual in state.items():
            self._carry(name, residual)

    def _best(self, name: str, exact: Tensor, rows: Tensor, rank: int) -> LoraFactors:
        """The best factors of `exact` (d_out, d_in) and of what is carried, which is what they lack from now on."""
        if name in self._residuals:
            exact = exact + as_tensor(self._residuals[name])
        A, B = best_factors(exact, rows, rank)
        if self.coding.codec == "bf16":
            A, B = A.bfloat16().float(), B.bfloat16().float()
        self._carry(name, torch.addmm(exact, B, A, alpha=-1.0))
        return LoraFactors(A, B, 1.0)

    def _carry(self, name: str, residual: Tensor) -> None:
        self._residuals[name] = self.place.keep_dense(residual)
        self._norms[name] = float(residual.double().norm())


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
