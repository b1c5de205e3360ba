"""Bytes of the weight delta, at a client and at the server: on disk, and in memory while a head or a model is updated.

Every round's update is a pair of factors per matrix, of the sum of its trainers' ranks. A matrix' delta is those pairs,
or dense (float32) as soon as that takes no more bytes (`lora/deltas.py`). It lies in files, which are mapped one matrix
at a time, so memory holds one round's factors and a few of a matrix, however many rounds there were.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hsplit_flwr.exchange.codecs import Layout, Part
from hsplit_flwr.exchange.frame_bytes import tensor_file_bytes
from hsplit_flwr.lora.deltas import SEPARATOR
from hsplit_flwr.lora.factors import FLOAT32_BYTES, Shape, dense_bytes
from hsplit_flwr.lora.merge import MERGE_ROWS
from hsplit_flwr.lora.update_rounding import is_bounded
from hsplit_flwr.planning.costs.shapes import Matrix

LISTED_BYTES = 180
"""of a file in a client's list of them, beside the module's name"""
MOMENTS = 2
"""tensors that AdamW keeps of each factor"""


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes on disk after a round, and beside them for a moment."""

    delta: int
    """what a client keeps of the delta and of its own training; at the server the delta and the increments that clients
    may lack"""
    moment: int
    """more while the next round's update goes in: what comes, and the new next to the old"""
    checkpoints: int = 0
    """of the server, the one that is being written included"""

    @property
    def total_bytes(self) -> int:
        """Room that is needed."""
        return self.delta + self.moment + self.checkpoints


class DeltaCosts:
    """Bytes of the deltas of one model.

    Args:
        matrices: of all blocks, in the order of the model.
        itemsize: bytes of a weight.
        total_rank: the largest rank of all updates of a matrix together (`UpdateCoding.total_rank`); 0: any.
    """

    def __init__(self, matrices: Sequence[Matrix], itemsize: int, total_rank: int = 0) -> None:
        self._matrices = matrices
        self._itemsize = itemsize
        self._total_rank = total_rank

    def client_disk(
        self, cut: int, update_ranks: Mapping[str, int], own_ranks: Mapping[str, int], rounds: int
    ) -> DiskEstimate:
        """A client that has taken the updates of `rounds` rounds and holds what it trained in one more.

        Args:
            cut: blocks of its head.
            update_ranks: module -> rank of a round's update, everybody's.
            own_ranks: module -> rank of the client's own adapter.
            rounds: updates in its delta.
        """
        held = self._held(cut, update_ranks)
        own = {
            f"{matrix.name}{SEPARATOR}{side}": part
            for matrix in self._held(cut, own_ranks)
            for side, part in _factors(_shape(matrix), own_ranks[matrix.name]).items()
        }
        delta = sum(self._kept(matrix, update_ranks[matrix.name], rounds) for matrix in held) if rounds else 0
        listed, next_listed = (self._list_bytes(held, update_ranks, number) for number in (rounds, rounds + 1))
        comes = sum(_factor_bytes(_shape(m), update_ranks[m.name] - own_ranks.get(m.name, 0)) for m in held)
        grows = sum(self._written(matrix, update_ranks[matrix.name], rounds) for matrix in held)
        return DiskEstimate(delta + listed + (tensor_file_bytes(own) if own else 0), comes + grows + next_listed)

    def server_disk(
        self,
        update_ranks: Mapping[str, int],
        tail_ranks: Mapping[str, int],
        rounds: int,
        *,
        keep_checkpoints: int = 0,
        carries_rest: bool = False,
    ) -> DiskEstimate:
        """The server after `rounds` rounds.

        Args:
            update_ranks: module -> rank of a round's update, everybody's.
            tail_ranks: module -> rank of the tail's adapter, which checkpoints hold with its moments.
            rounds: updates in the delta.
            keep_checkpoints: how many stay.
            carries_rest: updates are rounded or cut, and what they lack is kept (`lora/update_rounding.py`).
        """
        held = self._held(None, update_ranks)
        lacking = [
            m for m in held if (carries_rest and rounds) or self._is_cut(_shape(m), update_ranks[m.name], rounds)
        ]
        rest = sum(_dense_file(_shape(matrix)) for matrix in lacking)
        total = sum(self._kept(matrix, update_ranks[matrix.name], rounds) for matrix in held) if rounds else 0
        # as long as a matrix' delta is its increments, they share files
        log = sum(
            self._increments(matrix, update_ranks[matrix.name], rounds)
            for matrix in held
            if self._is_dense(_shape(matrix), update_ranks[matrix.name], rounds)
        )
        largest = max((_dense_file(_shape(matrix)) for matrix in held), default=0)
        tail = sum(_factor_bytes(_shape(m), tail_ranks.get(m.name, 0)) for m in self._matrices) * (1 + MOMENTS)
        each = total + rest + tail
        writes = keep_checkpoints + 1 if keep_checkpoints else 0
        return DiskEstimate(total + log + rest, largest, writes * each)

    def client_loading(self, cut: int, update_ranks: Mapping[str, int]) -> int:
        """Memory of a client beside its weights while it takes a round's update: its factors, and of one matrix the
        delta before and after, or W_0 and W."""
        held = self._held(cut, update_ranks)
        factors = sum(_factor_bytes(_shape(matrix), update_ranks[matrix.name]) for matrix in held)
        return factors + self._of_one_matrix(held, update_ranks)

    def server_merging(self, update_ranks: Mapping[str, int]) -> int:
        """Memory of the server beside its weights while it merges a round: as `client_loading`, of the whole model."""
        held = self._held(None, update_ranks)
        factors = sum(_factor_bytes(_shape(matrix), update_ranks[matrix.name]) for matrix in held)
        return factors + self._of_one_matrix(held, update_ranks)

    def _of_one_matrix(self, held: Iterable[Matrix], update_ranks: Mapping[str, int]) -> int:
        """The most that one matrix takes: its dense delta twice, while an update is added, or once beside W_0 and W."""
        sizes = []
        for matrix in held:
            d_out, d_in = shape = _shape(matrix)
            merged = 2 * self._itemsize * d_out * d_in + MERGE_ROWS * max(shape) * FLOAT32_BYTES
            sizes.append(dense_bytes(shape) + max(dense_bytes(shape), merged))
        return max(sizes, default=0)

    def _held(self, cut: int | None, ranks: Mapping[str, int]) -> list[Matrix]:
        return [m for m in self._matrices if (cut is None or m.block < cut) and ranks.get(m.name, 0)]

    def _kept(self, matrix: Matrix, rank: int, rounds: int) -> int:
        """Files of a matrix' delta."""
        shape = _shape(matrix)
        if self._is_cut(shape, rank, rounds):
            return tensor_file_bytes(_factors(shape, self._total_rank))
        if self._is_dense(shape, rank, rounds):
            return _dense_file(shape)
        return rounds * tensor_file_bytes(_factors(shape, rank))

    def _list_bytes(self, held: Sequence[Matrix], ranks: Mapping[str, int], rounds: int) -> int:
        """A client's list of its files."""
        one = [
            self._is_dense(_shape(matrix), ranks[matrix.name], rounds)
            or self._is_cut(_shape(matrix), ranks[matrix.name], rounds)
            for matrix in held
        ]
        return sum(len(m.name) + LISTED_BYTES * (1 if o else rounds) for m, o in zip(held, one, strict=True))

    def _written(self, matrix: Matrix, rank: int, rounds: int) -> int:
        """The file that the next update makes."""
        shape = _shape(matrix)
        if self._is_cut(shape, rank, rounds + 1):
            return tensor_file_bytes(_factors(shape, self._total_rank))
        dense = self._is_dense(shape, rank, rounds + 1)
        return _dense_file(shape) if dense else tensor_file_bytes(_factors(shape, rank))

    def _is_cut(self, shape: Shape, rank: int, rounds: int) -> bool:
        """Whether all updates together are cut to the largest rank."""
        return is_bounded(self._total_rank, shape) and rounds * rank > self._total_rank

    def _is_dense(self, shape: Shape, rank: int, rounds: int) -> bool:
        return not is_bounded(self._total_rank, shape) and rounds * _factor_bytes(shape, rank) >= dense_bytes(shape)

    def _increments(self, matrix: Matrix, rank: int, rounds: int) -> int:
        """Files of the increments that the log keeps of a dense delta: fewer bytes than the matrix."""
        shape = _shape(matrix)
        fit = (dense_bytes(shape) - 1) // max(1, _factor_bytes(shape, rank))
        return min(rounds, fit) * tensor_file_bytes(_factors(shape, rank))


def update_ranks(
    heads: Iterable[tuple[int, Mapping[str, int]]], tail: Mapping[str, int], matrices: Iterable[Matrix]
) -> dict[str, int]:
    """Module -> rank of a round's update, of those that some head trains.

    Args:
        heads: cut and ranks of every client.
        tail: ranks of the tail.
        matrices: of all blocks.
    """
    clients = list(heads)
    last = max((cut for cut, _ in clients), default=0)
    return {
        matrix.name: sum(ranks.get(matrix.name, 0) for cut, ranks in clients if matrix.block < cut)
        + (tail.get(matrix.name, 0) if any(cut <= matrix.block for cut, _ in clients) else 0)
        for matrix in matrices
        if matrix.block < last
    }


def _shape(matrix: Matrix) -> Shape:
    return matrix.d_out, matrix.d_in


def _factor_bytes(shape: Shape, rank: int) -> int:
    return FLOAT32_BYTES * rank * sum(shape)


def _factors(shape: Shape, rank: int) -> Layout:
    d_out, d_in = shape
    return {"A": Part((rank, d_in), torch.float32), "B": Part((d_out, rank), torch.float32)}


def _dense_file(shape: Shape) -> int:
    return tensor_file_bytes({"dense": Part(shape, torch.float32)})
