"""Bytes that a head or the tail needs to train, from the trace of one step.

What is alive at the worst moment of a step is what is held throughout (weights, adapters, their gradients and AdamW's
two moments) plus what autograd keeps of the forward pass plus the workspace. The workspace is the largest of

* the forward pass: temporaries of one block above what it keeps; the last step's activations and gradient still stand
* the exchange: the activations' frame on its way out, the gradient's on its way in
* the backward pass: temporaries of one block; activations sent and gradient received still stand

All clients' kernels are the CPU's; see `step_trace`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsplit_flwr.heap_model import extrapolate, heap_excess
from hsplit_flwr.importance import TILE_BYTES
from hsplit_flwr.model_shapes import Matrix, WeightBytes
from hsplit_flwr.step_trace import TRACED_RANK, StepTrace
from hsplit_flwr.wire import DTYPES
from hsplit_flwr.workload import Workload

FRAME_COPIES = 4
"""of the outgoing activations alive at once: safetensors' buffer, the frame, gRPC's slices, the socket's"""
TOKEN_BYTES = 3 * 8
"""input_ids, mask, labels: int64"""
RUNTIME_BYTES = 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step."""

    weights: int
    """frozen, in the workload's dtype; a whole model's for the tail"""
    adapters: int
    """A and B, float32"""
    gradients: int
    optimiser: int
    """AdamW's two moments"""
    activations: int
    """kept for the backward pass"""
    workspace: int
    """alive for a moment: temporaries, frames on their way"""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.gradients + self.optimiser + self.activations + self.workspace


class MemoryModel:
    """Bytes of heads and tails of one model."""

    def __init__(
        self,
        trace: StepTrace,
        weights: WeightBytes,
        matrices: Sequence[Matrix],
        workload: Workload,
        hidden_size: int,
    ) -> None:
        self._weights = weights
        self._matrices = matrices
        self._workload = workload
        self._tokens = workload.batch_size * workload.sequence_length
        self._hidden_bytes = self._tokens * hidden_size * DTYPES[workload.dtype].itemsize
        self._frame_bytes = self._tokens * hidden_size * DTYPES[workload.activation_dtype].itemsize
        self._trace = trace
        self._rank_one = np.zeros(len(trace.blocks), np.int64)
        np.add.at(self._rank_one, [matrix.block for matrix in matrices], 4 * self._tokens * TRACED_RANK)
        kept = 0 if workload.gradient_checkpointing else self._rank_one
        grown = np.array([block.grown for block in trace.blocks]) - kept
        self._alive = trace.prelude.grown + np.concatenate([[0], np.cumsum(grown)])
        """after the forward pass of a head of so many blocks, adapters of rank 0"""
        known = [heap_excess(trace.head_events(cut, self._hidden_bytes)) for cut in range(1, trace.num_run + 1)]
        self._heap_excess = extrapolate(known, len(trace.blocks))
        self._tile = min(TILE_BYTES, max(4 * matrix.d_in * matrix.d_out for matrix in matrices))

    @property
    def rank_bytes(self) -> Floats:
        """Per matrix: bytes of one unit of rank. A and B four times over, and A's output for the backward pass."""
        return np.array([16 * matrix.sides + 4 * self._tokens for matrix in self._matrices], np.float64)

    def head(self, cut: int, ranks: Mapping[str, int]) -> MemoryEstimate:
        """Blocks 0..cut-1."""
        parameters = 0
        of_ranks = np.zeros(cut, np.int64)
        for matrix in self._matrices:
            if matrix.block < cut:
                parameters += ranks.get(matrix.name, 0) * matrix.sides
                of_ranks[matrix.block] += 4 * self._tokens * ranks.get(matrix.name, 0)
        again = self._workload.gradient_checkpointing  # then only one block's adapters keep their outputs at a time
        return MemoryEstimate(
            weights=self._weights.prelude + sum(self._weights.blocks[:cut]),
            adapters=4 * parameters,
            gradients=4 * parameters,
            optimiser=8 * parameters,
            activations=int(self._alive[cut] + (0 if again else of_ranks.sum())),
            workspace=self._head_workspace(cut) + int(of_ranks.max() if again else 0),
        )

    def _head_workspace(self, cut: int) -> int:
        alive = self._alive[: cut + 1]
        blocks = self._trace.blocks[:cut]
        forward = max(alive[b] + blocks[b].forward_peak for b in range(cut)) + 2 * self._hidden_bytes
        backward = max(alive[b + 1] + blocks[b].backward_peak for b in range(cut)) + self._hidden_bytes + self._tile
        exchange = alive[cut] + self._hidden_bytes + FRAME_COPIES * self._frame_bytes
        peak = max(forward, backward, exchange) - alive[cut]
        return int(peak) + self._heap_excess[cut - 1] + self._tokens * TOKEN_BYTES + RUNTIME_BYTES

    def tail(self, cuts: Sequence[int], ranks: Mapping[str, int]) -> MemoryEstimate:
        """The whole model, with adapters of these ranks, training one step for clients of these cuts."""
        parameters = sum(ranks.get(matrix.name, 0) * matrix.sides for matrix in self._matrices)
        activations, workspace = self._tail_step(cuts, ranks)
        return MemoryEstimate(
            weights=self._weights.whole,
            adapters=4 * parameters,
            gradients=4 * parameters,
            optimiser=8 * parameters,
            activations=activations,
            workspace=workspace,
        )

    def tail_rank_bytes(self, cuts: Sequence[int]) -> Floats:
        """Per matrix: bytes of one unit of rank in a step of these clients; an upper bound where cuts differ."""
        largest = max((list(cuts).count(cut) for cut in set(cuts)), default=0)
        return np.array([16 * m.sides + 4 * self._tokens * largest for m in self._matrices], np.float64)

    def _tail_step(self, cuts: Sequence[int], ranks: Mapping[str, int]) -> tuple[int, int]:
        """Activations and workspace of the group of equal cut that needs most; groups run one after another."""
        at_end = int(self._alive[-1]) + self._trace.postlude.grown
        kept, peak = 0, 0
        for cut in set(cuts):
            clients = list(cuts).count(cut)
            of_ranks = 4 * self._tokens * sum(ranks.get(m.name, 0) for m in self._matrices if m.block >= cut)
            group = clients * (at_end - int(self._alive[cut]) + self._hidden_bytes + of_ranks)
            extra = clients * max(self._trace.postlude.backward_peak, 0)
            kept, peak = max(kept, group), max(peak, group + extra)
        queued = len(cuts) * (2 * self._hidden_bytes + FRAME_COPIES * self._frame_bytes + self._tokens * TOKEN_BYTES)
        return kept, peak - kept + queued + self._tile
