"""What training has changed so far: the cumulative float32 delta of the base weights.

The weights of a round are ``W = round(W_0 + delta)``, formed anew from the untouched base (`merge_into`). The
sum of all increments is kept in float32: adding small increments to bf16 weights again and again loses them.

`WeightDelta` keeps each matrix as factors or dense, whichever takes fewer bytes. Its tensors are never
changed in place, so a view or an update in flight stays valid while the sum moves on; callers leave what they
handed in alone, too. Where the tensors are, in memory or in files, is the business of :mod:`hsplit_flwr.lora.places`;
versions are that of :mod:`hsplit_flwr.lora.delta_log`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hsplit_flwr.common.finite import all_finite
from hsplit_flwr.common.state import State
from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.factors import (
    Increment,
    LoraFactors,
    Shape,
    check_factors,
    dense_bytes,
    stack,
)
from hsplit_flwr.lora.places import MEMORY, Dense, Piece, Place, as_factors, as_tensor, piece_bytes, shape_of

SEPARATOR = "|"


@dataclass(frozen=True)
class MatrixDelta:
    """The delta of one matrix (d_out, d_in): either dense, or the sum of `pieces`."""

    shape: Shape
    pieces: tuple[Piece, ...] = ()
    """summands ``scaling * B @ A``, float32; empty if dense"""
    dense: Dense | None = None
    """(d_out, d_in), float32"""

    @property
    def nbytes(self) -> int:
        """Bytes of the form it is in."""
        return dense_bytes(self.shape) if self.dense is not None else sum(map(piece_bytes, self.pieces))

    def plus(self, piece: Piece, place: Place = MEMORY) -> "MatrixDelta":
        """This delta and one more piece, kept in `place`; dense as soon as that takes no more bytes."""
        if self.dense is not None:
            factors = as_factors(piece)
            total = torch.addmm(as_tensor(self.dense), factors.B, factors.A, alpha=factors.scaling)
            return MatrixDelta(self.shape, dense=place.keep_dense(total))
        grown = MatrixDelta(self.shape, pieces=(*self.pieces, piece))
        smaller = grown if grown.nbytes < dense_bytes(self.shape) else MatrixDelta(self.shape, dense=grown.to_dense())
        return smaller.kept_in(place)

    def kept_in(self, place: Place) -> "MatrixDelta":
        """This delta with its tensors in `place`."""
        dense = None if self.dense is None else place.keep_dense(self.dense)
        return MatrixDelta(self.shape, tuple(map(place.keep_factors, self.pieces)), dense)

    def to_dense(self) -> Tensor:
        """(d_out, d_in), float32. Not to be changed in place."""
        form = self.form()
        return form.B @ form.A if isinstance(form, LoraFactors) else form

    def form(self) -> Tensor | LoraFactors:
        """Dense (d_out, d_in), or all pieces stacked into one pair of factors with scaling 1.0."""
        return as_tensor(self.dense) if self.dense is not None else stack(map(as_factors, self.pieces))

    def state(self) -> State:
        """The delta in the form it is in; tensors in files are mapped, not read."""
        if self.dense is not None:
            return {"dense": as_tensor(self.dense)}
        return {str(index): factors_to_state(as_factors(piece)) for index, piece in enumerate(self.pieces)}


class WeightDelta:
    """The cumulative delta per module name; a module that never changed is absent.

    Args:
        matrices: what it begins with.
        place: where what is added is kept.
    """

    def __init__(self, matrices: Mapping[str, MatrixDelta] | None = None, place: Place = MEMORY) -> None:
        self._matrices = dict(matrices or {})
        self.place = place

    def add(self, increment: Increment) -> None:
        """Adds an increment, in float32.

        Raises:
            AggregationError: factors that are malformed, not finite, or of another shape than this delta.
                Nothing is added then.
        """
        self.check(increment)
        self.add_checked(increment)

    def check(self, increment: Increment) -> None:
        """Whether `increment` can be added (raises as `add`)."""
        for name, shape in checked_shapes(increment).items():
            held = self._matrices.get(name)
            if held is not None and held.shape != shape:
                raise AggregationError(
                    f"Expected an increment of (d_out, d_in) = {held.shape} for {name!r}, found {shape}. "
                    f"Check that the increment belongs to this base model."
                )

    def add_checked(self, pieces: Mapping[str, Piece]) -> None:
        """Adds what `check` found good, wherever its tensors are by now."""
        for name, piece in pieces.items():
            if piece.rank > 0:
                held = self._matrices.get(name) or MatrixDelta(shape_of(piece))
                self._matrices[name] = held.plus(piece, self.place)

    def dense(self, name: str) -> Tensor:
        """The delta of one module (d_out, d_in), float32. Not to be changed in place.

        Raises:
            KeyError: the module never changed (see `names`).
        """
        return self._matrices[name].to_dense()

    def names(self) -> list[str]:
        """The modules that changed."""
        return list(self._matrices)

    def form(self, name: str) -> Tensor | LoraFactors:
        """The delta of one module in its smaller form, for `merge_into` (KeyError as in `dense`)."""
        return self._matrices[name].form()

    def matrix(self, name: str) -> MatrixDelta:
        """The delta of one module as it is kept (KeyError as in `dense`)."""
        return self._matrices[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(matrix.nbytes for matrix in self._matrices.values())

    def restricted(self, names: Iterable[str]) -> "WeightDelta":
        """The delta of those of `names` that changed: a snapshot that shares the tensors."""
        return WeightDelta({name: self._matrices[name] for name in names if name in self._matrices}, self.place)

    def replaced(self, other: "WeightDelta") -> "WeightDelta":
        """This delta with the modules of `other` taken from there, in this one's place."""
        taken = {name: matrix.kept_in(self.place) for name, matrix in other._matrices.items()}
        return WeightDelta({**self._matrices, **taken}, self.place)

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat float32: ``name|A`` (R, d_in) and ``name|B`` (d_out, R), or ``name|dense`` (d_out, d_in)."""
        tensors: dict[str, Tensor] = {}
        for name, matrix in self._matrices.items():
            form = matrix.form()
            if isinstance(form, LoraFactors):
                tensors.update(factors_to_tensors({name: form}))
            else:
                tensors[f"{name}{SEPARATOR}dense"] = form
        return tensors

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], place: Place = MEMORY
    ) -> "WeightDelta":
        """The delta that `to_tensors` wrote, in `place`; `shapes` gives (d_out, d_in) of every module that may occur.

        Raises:
            AggregationError: an unknown module or key, half a pair of factors, both forms at once, or a
                tensor of another shape or dtype, or with NaN or Inf.
        """
        dense = {key: tensor for key, tensor in tensors.items() if key.endswith(f"{SEPARATOR}dense")}
        factors = factors_from_tensors({k: t for k, t in tensors.items() if k not in dense}, shapes)
        matrices = {name: MatrixDelta(shapes[name]).plus(pair, place) for name, pair in factors.items()}
        for key, tensor in dense.items():
            name = key.rpartition(SEPARATOR)[0]
            shape = _expected_shape(name, shapes)
            if name in matrices:
                raise AggregationError(
                    f"Expected one form of the delta of {name!r}, found factors and dense. "
                    f"Send what to_tensors() wrote."
                )
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not all_finite(tensor):
                raise AggregationError(
                    f"Expected {key!r} to be a finite float32 {shape}, found {tensor.dtype} "
                    f"{tuple(tensor.shape)}{'' if all_finite(tensor) else ' with NaN or Inf'}. "
                    f"Send what to_tensors() wrote for this base model."
                )
            matrices[name] = MatrixDelta(shape, dense=place.keep_dense(tensor))
        return cls(matrices, place)

    def state(self) -> State:
        """Every matrix in the form it is in."""
        return {name: matrix.state() for name, matrix in self._matrices.items()}

    @classmethod
    def from_state(cls, state: State, shapes: Mapping[str, Shape], place: Place = MEMORY) -> "WeightDelta":
        """The delta that gave this `state`, in `place` (`shapes` and errors as in `from_tensors`)."""
        matrices = {}
        for name, saved in state.items():
            if "dense" in saved:
                key = f"{name}{SEPARATOR}dense"
                matrices[name] = cls.from_tensors({key: saved["dense"]}, shapes, place).matrix(name)
                continue
            matrices[name] = MatrixDelta(_expected_shape(name, shapes))
            for piece in map(factors_from_state, saved.values()):
                _require_shape(name, piece, shapes)
                matrices[name] = matrices[name].plus(piece, place)
        return cls(matrices, place)


def factors_to_state(factors: LoraFactors) -> State:
    """One pair of factors."""
    return {"A": factors.A, "B": factors.B, "scaling": factors.scaling}


def factors_from_state(state: State) -> LoraFactors:
    """What `factors_to_state` was given."""
    return LoraFactors(state["A"], state["B"], state["scaling"])


def factors_to_tensors(increment: Increment) -> dict[str, Tensor]:
    """``name|A`` and ``name|B`` of every module, scaling folded into B."""
    tensors: dict[str, Tensor] = {}
    for name, factors in increment.items():
        folded = stack([factors])
        tensors[f"{name}{SEPARATOR}A"], tensors[f"{name}{SEPARATOR}B"] = folded.A, folded.B
    return tensors


def factors_from_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, LoraFactors]:
    """The factors that `factors_to_tensors` wrote (errors as in `WeightDelta.from_tensors`)."""
    names = dict.fromkeys(key.rpartition(SEPARATOR)[0] for key in tensors)
    expected = {f"{name}{SEPARATOR}{factor}" for name in names for factor in "AB"}
    if expected != set(tensors):
        raise AggregationError(
            f"Expected the keys 'name|A' and 'name|B' for every module, found "
            f"{sorted(set(tensors) ^ expected)} without its counterpart or of another kind. "
            f"Send what to_tensors() wrote."
        )
    factors = {}
    for name in names:
        factors[name] = LoraFactors(tensors[f"{name}{SEPARATOR}A"], tensors[f"{name}{SEPARATOR}B"], scaling=1.0)
        _require_shape(name, factors[name], shapes)
    return factors


def _require_shape(name: str, pair: LoraFactors, shapes: Mapping[str, Shape]) -> None:
    found = checked_shapes({name: pair})[name]
    if found != (shape := _expected_shape(name, shapes)):
        raise AggregationError(
            f"Expected factors of (d_out, d_in) = {shape} for {name!r}, found {found}. "
            f"Check that both sides hold the same base model."
        )


def checked_shapes(increment: Increment) -> dict[str, Shape]:
    """(d_out, d_in) of every module of an increment; an `AggregationError` names a malformed one."""
    shapes = {}
    for name, factors in increment.items():
        try:
            shapes[name] = check_factors(factors)
        except AggregationError as error:
            raise AggregationError(f"Module {name!r}: {error}") from error
    return shapes


def _expected_shape(name: str, shapes: Mapping[str, Shape]) -> Shape:
    if name not in shapes:
        raise AggregationError(
            f"Expected deltas of modules that this process holds, found {name!r}. "
            f"Check that the plan and the model agree."
        )
    return shapes[name]
