"""Bytes that the server needs to train the tail, from the trace of one step.

The server holds the whole model. It computes on one part of one client's batch at a time, so activations and workspace
are those of the one that enters first. Where clients step jointly, those of equal cut run as one batch, and they are
those of the largest such group. Either way every client of the step may have its activations, its gradient and the
frames of all its parts in flight there at once. What is kept of activations from round to round counts as if it were
full. Tensors alone: the holes in the server's heap are not in it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hsplit_flwr.exchange.frame_bytes import packing_bytes, payload_bytes
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.quantized import INT8
from hsplit_flwr.planning.costs.memory import FRAME_COPIES, TOKEN_BYTES, MemoryEstimate, tile_bytes
from hsplit_flwr.planning.costs.shapes import Matrix
from hsplit_flwr.planning.costs.step_trace import StepTrace
from hsplit_flwr.training.workload import Workload

Floats = NDArray[np.float64]


class TailMemory:
    """Bytes of the tails of one model.

    Args:
        trace: of a step on one part of a batch, without gradient checkpointing.
        weights: bytes of the whole model.
        matrices: of all blocks, in the order of the model.
        workload: of one client, whole batches.
        hidden_size: H.
        dequantized: elements of the largest quantised weight; 0: none is.
    """

    def __init__(
        self,
        trace: StepTrace,
        weights: int,
        matrices: Sequence[Matrix],
        workload: Workload,
        hidden_size: int,
        dequantized: int = 0,
    ) -> None:
        self._weights = weights
        self._matrices = matrices
        self._joint = workload.joint_steps
        self._cache = workload.activation_cache_mib << 20
        self._copies = workload.adapter_copies
        in_flight = workload.parts_alive
        rows_in_flight = workload.batch_size / workload.part.batch_size
        workload = workload.part
        self._tokens = workload.batch_size * workload.sequence_length
        itemsize = DTYPES[workload.dtype].itemsize
        self._hidden_bytes = self._tokens * hidden_size * itemsize
        frames = in_flight * FRAME_COPIES * payload_bytes(workload, hidden_size) + packing_bytes(workload, hidden_size)
        # Until the end of the step the activations of all its parts are there for further passes over them.
        self._queued = int((1 + rows_in_flight) * self._hidden_bytes) + frames + self._tokens * TOKEN_BYTES
        grown = np.array([block.grown for block in trace.blocks], np.int64)
        if workload.quantization == INT8:  # its layers keep their inputs, as adapters do in float32
            np.add.at(grown, [m.block for m in matrices], [self._tokens * itemsize * m.d_in for m in matrices])
        np.subtract.at(grown, [matrix.block for matrix in matrices], 4 * self._tokens)
        self._kept = np.concatenate([np.cumsum(grown[::-1])[::-1], [0]])
        """by blocks cut..L-1, for every cut; adapters of rank near 0"""
        end, last = trace.postlude, trace.blocks[-1]
        self._above = max(end.forward_peak, end.grown + end.backward_peak, last.backward_peak, 0)
        self._tile = max(tile_bytes(matrices, workload, dequantized), dequantized * itemsize)

    def estimate(self, cuts: Sequence[int], ranks: Mapping[str, int]) -> MemoryEstimate:
        """With adapters of these ranks, in one step of clients with these cuts."""
        parameters = sum(ranks.get(matrix.name, 0) * matrix.sides for matrix in self._matrices)
        copied = sum(ranks.get(m.name, 0) * m.sides for m in self._matrices if m.block < max(cuts, default=0))
        kept = [
            clients * (int(self._kept[cut]) + self._hidden_bytes + self._of_ranks(cut, ranks))
            for cut, clients in self._together(cuts).items()
        ]
        largest = max(self._together(cuts).values(), default=0)
        return MemoryEstimate(
            weights=self._weights,
            adapters=4 * (parameters + self._copies * copied),
            gradients=4 * parameters,
            optimizer=8 * parameters,
            activations=max(kept, default=0),
            workspace=largest * self._above + len(cuts) * self._queued + self._tile,
            cache=self._cache,
        )

    def rank_bytes(self, cuts: Sequence[int]) -> Floats:
        """Per matrix: bytes of one unit of rank in a step of these clients; an upper bound where cuts differ."""
        largest = max(self._together(cuts).values(), default=0)
        deepest = max(cuts, default=0)
        per_side = [16 + 4 * self._copies * (matrix.block < deepest) for matrix in self._matrices]
        sizes = [a * m.sides + 4 * self._tokens * largest for a, m in zip(per_side, self._matrices, strict=True)]
        return np.array(sizes, np.float64)

    def _together(self, cuts: Sequence[int]) -> Mapping[int, int]:
        """Cut -> clients that are computed on at once."""
        return Counter(cuts) if self._joint else dict.fromkeys(cuts, 1)

    def _of_ranks(self, cut: int, ranks: Mapping[str, int]) -> int:
        """What the adapters of blocks cut..L-1 keep for the backward pass."""
        return 4 * self._tokens * sum(ranks.get(matrix.name, 0) for matrix in self._matrices if matrix.block >= cut)
