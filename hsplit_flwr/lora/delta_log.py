"""Versions of the cumulative delta: the server's log, and the replica a client keeps.

A round that changes the weights makes a new version. A client at version v is sent, per module, the smaller
of the increments it lacks (v+1..now, stacked) and the whole delta, so that a lagging client costs no more
than a new one. Versions count one server's rounds: a client may be at a version that a restored log makes
anew, with other increments, so ask it which run it was in, and treat those of another one as unknown (``None``).
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from hsplit_flwr.common.state import State
from hsplit_flwr.errors import AggregationError
from hsplit_flwr.lora.deltas import (
    WeightDelta,
    factors_from_state,
    factors_from_tensors,
    factors_to_state,
    factors_to_tensors,
)
from hsplit_flwr.lora.factors import Increment, LoraFactors, Shape, dense_bytes, factor_bytes, stack
from hsplit_flwr.lora.places import Piece, Place, as_factors, piece_bytes

ADDED, REPLACED = "add|", "replace|"
LARGEST_FIGURE = 1e25
"""in what a client takes of a delta. Far above what a server makes of the worst adapters that it accepts (see
`federation/trained_head.py`): one client must not be able to make a delta that all others refuse."""


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

    @property
    def kind(self) -> str:
        """``whole`` where the client's own delta plays no part, otherwise ``increments``."""
        return "whole" if self.base is None else "increments"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(factor_bytes, self.added.values())) + self.replaced.nbytes

    def names(self) -> list[str]:
        """The modules whose delta it changes: those to merge anew."""
        return [*self.added, *self.replaced.names()]

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat float32 tensors: ``add|`` or ``replace|`` before the keys of `WeightDelta.to_tensors`."""
        added = {f"{ADDED}{key}": tensor for key, tensor in factors_to_tensors(self.added).items()}
        return added | {f"{REPLACED}{key}": tensor for key, tensor in self.replaced.to_tensors().items()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], *, base: int | None, version: int
    ) -> "DeltaUpdate":
        """The update that `to_tensors` wrote; `base` and `version` travel beside the tensors.

        Raises:
            AggregationError: an unknown key, a figure beyond `LARGEST_FIGURE`, or as `WeightDelta.from_tensors`.
        """
        for key, tensor in tensors.items():
            largest = float(tensor.abs().max()) if tensor.numel() and tensor.is_floating_point() else 0.0
            if not largest <= LARGEST_FIGURE:
                raise AggregationError(
                    f"Expected no figure beyond {LARGEST_FIGURE:g} in the delta of the weights, found {largest:g} "
                    f"in {key!r:.200}. Training diverged, or the server is not to be trusted."
                )
        added = {key.removeprefix(ADDED): t for key, t in tensors.items() if key.startswith(ADDED)}
        replaced = {key.removeprefix(REPLACED): t for key, t in tensors.items() if key.startswith(REPLACED)}
        if len(added) + len(replaced) != len(tensors):
            unknown = sorted(key for key in tensors if not key.startswith((ADDED, REPLACED)))
            raise AggregationError(
                f"Expected keys that start with {ADDED!r} or {REPLACED!r}, found {unknown}. "
                f"Check that both sides run the same hsplit_flwr."
            )
        return cls(base, version, factors_from_tensors(added, shapes), WeightDelta.from_tensors(replaced, shapes))


@dataclass
class DeltaReplica:
    """A client's copy of the delta of the modules it holds; a lost one starts empty, at version None."""

    version: int | None = None
    names: frozenset[str] = frozenset()
    """the modules it holds at `version`, changed or not"""
    total: WeightDelta = field(default_factory=WeightDelta)

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
        if missing := sorted(set(update.added) - self.names):
            raise AggregationError(
                f"Expected increments of modules that are held, found {missing}. Ask for the whole delta."
            )
        kept = self.total.restricted(() if update.base is None else wanted)
        kept.add(update.added)
        self.total = kept.replaced(update.replaced).restricted(wanted)
        self.version, self.names = update.version, wanted


@dataclass
class _ModuleLog:
    """The last increments of one module, as long as they can be cheaper to send than its dense delta."""

    complete_since: int
    """every increment after this version is in `entries`"""
    entries: deque[tuple[int, Piece]] = field(default_factory=deque)
    nbytes: int = 0

    def append(self, version: int, piece: Piece, dense_nbytes: int) -> None:
        self.entries.append((version, piece))
        self.nbytes += piece_bytes(piece)
        while self.nbytes >= dense_nbytes:
            self.complete_since, dropped = self.entries.popleft()
            self.nbytes -= piece_bytes(dropped)

    def since(self, version: int) -> list[Piece] | None:
        """The increments after `version`; None where some of them are gone."""
        if version < self.complete_since:
            return None
        return [piece for at, piece in self.entries if at > version]

    def state(self) -> State:
        entries = {str(at): factors_to_state(as_factors(piece)) for at, piece in self.entries}
        return {"complete_since": self.complete_since, "entries": entries}

    @classmethod
    def of_state(cls, state: State, place: Place) -> "_ModuleLog":
        log = cls(state["complete_since"])
        for at, saved in state["entries"].items():
            log.entries.append((int(at), place.keep_factors(factors_from_state(saved))))
        log.nbytes = sum(piece_bytes(piece) for _, piece in log.entries)
        return log


class DeltaLog:
    """The server's cumulative delta and the recent increments that led to it; at most twice the dense bytes.

    Args:
        total: the delta to start from (a checkpoint's); default none. Increments are kept in its place, too.
        version: its version.
    """

    def __init__(self, total: WeightDelta | None = None, version: int = 0) -> None:
        self.total = WeightDelta() if total is None else total
        self.version = version
        self._first_version = version
        self._logs: dict[str, _ModuleLog] = {}

    def append(self, increment: Increment) -> int:
        """Adds a round's increment (possibly empty) and returns the new version.

        Raises:
            AggregationError: as `WeightDelta.add`; the log stays as it is.
        """
        self.total.check(increment)
        trained = {name: factors for name, factors in increment.items() if factors.rank > 0}
        self.version += 1
        for name, factors in trained.items():
            piece = self.total.place.keep_factors(factors)
            self.total.add_checked({name: piece})
            log = self._logs.setdefault(name, _ModuleLog(self._first_version))
            log.append(self.version, piece, dense_bytes(self.total.matrix(name).shape))
        return self.version

    def since(self, version: int | None, names: Iterable[str], held: Collection[str] | None = None) -> DeltaUpdate:
        """What a client lacks of the modules `names`.

        Args:
            version: the version the client holds. None, 0 or one this log never made: it gets the whole.
            names: the modules it is to hold.
            held: the modules it holds at `version`, changed or not (default: all of `names`).
        """
        current = self.total.restricted(names)
        if version is None or not 0 < version <= self.version:
            return DeltaUpdate(None, self.version, {}, current)
        added: dict[str, LoraFactors] = {}
        whole: list[str] = []
        for name in current.names():
            log = self._logs.get(name, _ModuleLog(self._first_version))
            missing = log.since(version) if held is None or name in held else None
            if missing is None or sum(map(piece_bytes, missing)) >= current.matrix(name).nbytes:
                whole.append(name)
            elif missing:
                added[name] = stack(map(as_factors, missing))
        return DeltaUpdate(version, self.version, added, current.restricted(whole))

    def state(self) -> State:
        """The version, the whole delta and the increments that are kept."""
        return {
            "version": self.version,
            "first_version": self._first_version,
            "total": self.total.state(),
            "increments": {name: log.state() for name, log in self._logs.items()},
        }

    def load_state(self, state: State, shapes: Mapping[str, Shape]) -> None:
        """Go on from what `state` gave; `shapes` gives (d_out, d_in) of every module of the model.

        Raises:
            AggregationError: as `WeightDelta.from_state`; the log stays as it is.
        """
        place = self.total.place
        self.total = WeightDelta.from_state(state["total"], shapes, place)
        self.version, self._first_version = state["version"], state["first_version"]
        self._logs = {name: _ModuleLog.of_state(saved, place) for name, saved in state["increments"].items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors kept, in memory or files; those that the total and the log share count once."""
        pieces = [piece for log in self._logs.values() for _, piece in log.entries]
        matrices = [self.total.matrix(name) for name in self.total.names()]
        pieces += [piece for matrix in matrices for piece in matrix.pieces]
        dense = sum(matrix.nbytes for matrix in matrices if matrix.dense is not None)
        return dense + sum({id(piece): piece_bytes(piece) for piece in pieces}.values())
