"""What a client lacks of the cumulative delta, as it travels, and the replica that the client keeps.

Per module the increments since the version that it holds, stacked, or the whole delta. Of an increment that the client
trained a part of itself, and still holds, that part is left out: it is told where the part belongs and with which
scale, and builds the same stack in the same order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.deltas import WeightDelta, factors_from_tensors, factors_to_tensors
from hsplit_flwr.lora.factors import Increment, LoraFactors, Shape, factor_bytes

ADDED, REPLACED, OWN = "add|", "replace|", "own|"
"""how keys of an update's tensors begin"""
PLACE_BYTES = 16
"""of an `OwnPlace`"""
LARGEST_FIGURE = 1e25
"""in what a client takes of a delta. Far above what a server makes of the worst adapters that it accepts (see
`federation/trained_head.py`): one client must not be able to make a delta that all others refuse."""


class OwnRound(NamedTuple):
    """The adapters that a client trained in a round and still holds."""

    client: str
    round_number: int


class OwnFactors(NamedTuple):
    """What a client trained, as it sent it to the server."""

    round_number: int
    factors: Mapping[str, LoraFactors]


class OwnPlace(NamedTuple):
    """Where a client's own part belongs in an increment that came without it."""

    start: int
    """column of B, row of A"""
    scale: float
    """that B is multiplied by"""

    def complete(self, others: LoraFactors | None, own: LoraFactors) -> LoraFactors:
        """The increment with its part, from the factors of the `others` (scaling 1.0), if there are any."""
        B = own.B * self.scale
        if others is None:
            return LoraFactors(own.A, B, 1.0)
        start = self.start
        return LoraFactors(
            torch.cat([others.A[:start], own.A, others.A[start:]]),
            torch.cat([others.B[:, :start], B, others.B[:, start:]], dim=1),
            1.0,
        )


@dataclass(frozen=True)
class DeltaUpdate:
    """What a client at version `base` lacks of `version`."""

    base: int | None
    """the version to apply it to; None: to any, or none at all"""
    version: int
    added: Increment
    """modules to add to, with the sum of the increments since `base`"""
    replaced: WeightDelta
    """modules to replace, because the whole takes no more bytes or the client does not hold them"""
    own: Mapping[str, OwnPlace] = field(default_factory=dict)
    """modules whose increment lacks the client's own part (one of which all is its own is not in `added`)"""

    @property
    def kind(self) -> str:
        """``whole`` where the client's own delta plays no part, otherwise ``increments``."""
        return "whole" if self.base is None else "increments"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(factor_bytes, self.added.values())) + self.replaced.nbytes + PLACE_BYTES * len(self.own)

    def names(self) -> list[str]:
        """The modules whose delta it changes: those to merge anew."""
        return [*{**self.added, **self.own}, *self.replaced.names()]

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat float32 tensors: ``add|`` or ``replace|`` before the keys of `WeightDelta.to_tensors`.

        And ``own|NAME`` (2,) float64: start and scale.
        """
        added = {f"{ADDED}{key}": tensor for key, tensor in factors_to_tensors(self.added).items()}
        added |= {
            f"{OWN}{name}": torch.tensor([*map(float, place)], dtype=torch.float64) for name, place in self.own.items()
        }
        return added | {f"{REPLACED}{key}": tensor for key, tensor in self.replaced.to_tensors().items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], *, base: int | None, version: int
    ) -> "DeltaUpdate":
        """The update that `to_tensors` wrote, or shorter (bfloat16); `base` and `version` travel beside the tensors.

        Raises:
            AggregationError: an unknown key, a figure beyond `LARGEST_FIGURE`, or as `WeightDelta.from_tensors`.
        """
        tensors = {key: t.float() if t.dtype == torch.bfloat16 else t for key, t in tensors.items()}
        for key, tensor in tensors.items():
            largest = float(tensor.abs().max()) if tensor.numel() and tensor.is_floating_point() else 0.0
            if not largest <= LARGEST_FIGURE:
                raise AggregationError(
                    f"Expected no figure beyond {LARGEST_FIGURE:g} in the delta of the weights, found {largest:g} "
                    f"in {key!r:.200}. Training diverged, or the server is not to be trusted."
                )
        kinds: dict[str, dict[str, Tensor]] = {ADDED: {}, REPLACED: {}, OWN: {}}
        for key, tensor in tensors.items():
            kind = next((kind for kind in kinds if key.startswith(kind)), None)
            if kind is None:
                raise AggregationError(
                    f"Expected keys that start with {ADDED!r} or {REPLACED!r}, found [{key!r:.200}], and not {OWN!r} "
                    f"either. Check that both sides run the same hsplit_flwr."
                )
            kinds[kind][key.removeprefix(kind)] = tensor
        return cls(
            base,
            version,
            factors_from_tensors(kinds[ADDED], shapes),
            WeightDelta.from_tensors(kinds[REPLACED], shapes),
            {name: _own_place(name, tensor) for name, tensor in kinds[OWN].items()},
        )

    def completed(self, own: OwnFactors | None) -> Increment:
        """All increments, the client's `own` parts put where they belong.

        Raises:
            AggregationError: a part that is not held, or that has no place there.
        """
        added = dict(self.added)
        for name, place in self.own.items():
            if own is None or name not in own.factors:
                raise AggregationError(f"Expected increments of what is not held, found one without {name!r}.")
            others = added.get(name)
            if place.start > (others.rank if others else 0):
                raise AggregationError(f"Expected a place in the increment of {name!r}, found column {place.start}.")
            added[name] = place.complete(others, own.factors[name])
        return added


@dataclass
class DeltaReplica:
    """A client's copy of the delta of the modules it holds; a lost one starts empty, at version None."""

    version: int | None = None
    names: frozenset[str] = frozenset()
    """the modules it holds at `version`, changed or not"""
    total: WeightDelta = field(default_factory=WeightDelta)
    own: OwnFactors | None = None
    """what the client trained after `version`, which the server may leave out of the next update"""

    def apply(self, update: DeltaUpdate, names: Iterable[str]) -> None:
        """Moves to the update's version, holding `names` from now on (a new plan may have moved the cut).

        Raises:
            AggregationError: the update builds on another version, or adds to a module that is not held.
                The replica stays as it is; ask for the whole (``since(None, names)``).
        """
        wanted = frozenset(names)
        if update.base is not None and update.base != self.version:
            raise AggregationError(
                f"Expected an update on version {self.version}, found one on {update.base}. Ask for the whole delta."
            )
        added = update.completed(self.own)
        if missing := sorted(set(added) - self.names if update.base is not None else ()):
            raise AggregationError(
                f"Expected increments of modules that are held, found {missing}. Ask for the whole delta."
            )
        kept = self.total.restricted(() if update.base is None else wanted)
        kept.add(added)
        self.total = kept.replaced(update.replaced).restricted(wanted)
        self.version, self.names, self.own = update.version, wanted, None


def _own_place(name: str, tensor: Tensor) -> OwnPlace:
    if tensor.dtype != torch.float64 or tensor.shape != (2,) or not tensor[0] == tensor[0].trunc() >= 0:
        raise AggregationError(
            f"Expected start >= 0 and scale of {name!r:.200} as float64 (2,), found {tensor.dtype} "
            f"{tuple(tensor.shape)}. Check that both sides run the same hsplit_flwr."
        )
    return OwnPlace(int(tensor[0]), float(tensor[1]))
