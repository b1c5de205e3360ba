"""Versions of the cumulative delta: the server's log.

A round that changes the weights makes a new version. A client at version v is sent, per module, the smaller
of the increments it lacks (v+1..now, stacked) and the whole delta, so that a lagging client costs no more
than a new one (`lora/delta_update.py`). Versions count one server's rounds: a client may be at a version that a
restored log makes anew, with other increments, so ask it which run it was in, and treat those of another one as
unknown (``None``). Nobody can lack an increment of before the restart, then, and a log's state has none.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch

from hsplit_flwr.common.state import State
from hsplit_flwr.lora.aggregation import StackedPart
from hsplit_flwr.lora.delta_update import DeltaUpdate, OwnPlace, OwnRound
from hsplit_flwr.lora.deltas import MatrixDelta, WeightDelta
from hsplit_flwr.lora.factors import Increment, LoraFactors, Shape, dense_bytes, stack
from hsplit_flwr.lora.places import Dense, Piece, as_factors, as_tensor, piece_bytes

Parts: TypeAlias = Mapping[str, Sequence[StackedPart]]
"""module name -> which columns of an increment are whose"""


class _Entry(NamedTuple):
    version: int
    piece: Piece
    parts: Sequence[StackedPart]

    def part_of(self, own: OwnRound | None) -> StackedPart | None:
        return next((part for part in self.parts if own == (part.client, part.round_number)), None)


@dataclass
class _ModuleLog:
    """The last increments of one module, as long as they can be cheaper to send than its dense delta."""

    complete_since: int
    """every increment after this version is in `entries`"""
    entries: deque[_Entry] = field(default_factory=deque)
    nbytes: int = 0

    def append(self, entry: _Entry, dense_nbytes: int) -> None:
        self.entries.append(entry)
        self.nbytes += piece_bytes(entry.piece)
        while self.nbytes >= dense_nbytes:
            dropped = self.entries.popleft()
            self.complete_since = dropped.version
            self.nbytes -= piece_bytes(dropped.piece)

    def since(self, version: int) -> list[_Entry] | None:
        """The increments after `version`; None where some of them are gone."""
        if version < self.complete_since:
            return None
        return [entry for entry in self.entries if entry.version > version]


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

    def append(self, increment: Increment, parts: Parts | None = None, replaced: WeightDelta | None = None) -> int:
        """Adds a round's increment (possibly empty) and returns the new version.

        Args:
            increment: of the round.
            parts: of modules whose factors are stacked (with scaling 1.0): which columns are whose.
            replaced: modules whose delta is another from now on; whoever lacks the round is sent all of it.

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
            entry = _Entry(self.version, piece, (parts or {}).get(name, ()))
            log.append(entry, dense_bytes(self.total.matrix(name).shape))
        self._replace(replaced or WeightDelta())
        return self.version

    def add_dense(self, residuals: Mapping[str, Dense]) -> int:
        """Adds dense matrices (d_out, d_in) of modules that changed; returns the new version.

        No client can be sent them as an increment.
        """
        self.version += 1
        for name, residual in residuals.items():
            total = self.total.dense(name) + as_tensor(residual)
            matrix = MatrixDelta(self.total.matrix(name).shape, dense=total)
            self._replace(WeightDelta({name: matrix}))
        return self.version

    def _replace(self, delta: WeightDelta) -> None:
        """Take the modules of `delta` from there; their increments are gone."""
        self.total = self.total.replaced(delta)
        self._logs |= {name: _ModuleLog(self.version) for name in delta.names()}

    def since(
        self,
        version: int | None,
        names: Iterable[str],
        held: Collection[str] | None = None,
        own: OwnRound | None = None,
    ) -> DeltaUpdate:
        """What a client lacks of the modules `names`.

        Args:
            version: the version the client holds. None, 0 or one this log never made: it gets the whole.
            names: the modules it is to hold.
            held: the modules it holds at `version`, changed or not (default: all of `names`).
            own: what it holds of its own training; left out where it is a part of what is sent.
        """
        current = self.total.restricted(names)
        base = version if version is not None and 0 < version <= self.version else None
        added: dict[str, LoraFactors] = {}
        places: dict[str, OwnPlace] = {}
        whole: list[str] = []
        for name in current.names():
            known = base is None or held is None or name in held
            lacking = self._increments(name, base, current.matrix(name), own) if known else None
            if lacking is None:
                whole.append(name)
            elif lacking:
                others, place = _without_own(lacking, own)
                if others.rank:
                    added[name] = others
                if place:
                    places[name] = place
        return DeltaUpdate(base, self.version, added, current.restricted(whole), places)

    def _increments(self, name: str, base: int | None, total: MatrixDelta, own: OwnRound | None) -> list[_Entry] | None:
        """What a client at version `base` is to add to its delta of a module; None: it gets the whole of it."""
        log = self._logs.get(name, _ModuleLog(self._first_version))
        if base is None:  # the whole; that is all increments as long as none is gone, and its own may be among them
            entries = log.since(0) if total.dense is None else None
            return entries if entries and any(entry.part_of(own) for entry in entries) else None
        entries = log.since(base)
        # by all that is lacking, sent or not: the client's sums are the same, whether it holds its part or not
        if entries is not None and sum(piece_bytes(entry.piece) for entry in entries) >= total.nbytes:
            return None
        return entries

    def state(self) -> State:
        """The version and the whole delta."""
        return {"version": self.version, "total": self.total.state()}

    def load_state(self, state: State, shapes: Mapping[str, Shape]) -> None:
        """Go on from what `state` gave, as a log that starts there.

        Args:
            state: of any log.
            shapes: module -> (d_out, d_in), every module of the model.

        Raises:
            AggregationError: as `WeightDelta.from_state`; the log stays as it is.
        """
        self.total = WeightDelta.from_state(state["total"], shapes, self.total.place)
        self.version = self._first_version = state["version"]
        self._logs = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors kept, in memory or files; those that the total and the log share count once."""
        pieces = [entry.piece for log in self._logs.values() for entry in log.entries]
        matrices = [self.total.matrix(name) for name in self.total.names()]
        pieces += [piece for matrix in matrices for piece in matrix.pieces]
        dense = sum(matrix.nbytes for matrix in matrices if matrix.dense is not None)
        return dense + sum({id(piece): piece_bytes(piece) for piece in pieces}.values())


def _without_own(entries: Sequence[_Entry], own: OwnRound | None) -> tuple[LoraFactors, OwnPlace | None]:
    """The increments stacked; without the own part, and where that belongs, if one of them has it."""
    stacked = stack(as_factors(entry.piece) for entry in entries)
    start = 0
    for entry in entries:
        if part := entry.part_of(own):
            start, stop = start + part.start, start + part.start + part.rank
            A = torch.cat([stacked.A[:start], stacked.A[stop:]])
            B = torch.cat([stacked.B[:, :start], stacked.B[:, stop:]], dim=1)
            return LoraFactors(A, B, 1.0), OwnPlace(start, part.scale)
        start += entry.piece.rank
    return stacked, None
