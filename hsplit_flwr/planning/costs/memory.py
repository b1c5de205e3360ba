"""Bytes that a head needs to train, from the trace of one step.

What a head's process grows by is what it holds throughout (weights, adapters, their gradients and AdamW's two moments),
what autograd keeps of the forward pass, and the workspace: the largest of

* the forward pass: temporaries of one block; the last step's activations and gradient still stand
* the exchange: the activations' frame on its way out, the gradient's on its way in, what packs and unpacks them
* the backward pass: temporaries of one block, one tile of the importance measurement, the activations sent

Where a batch travels in parts, a part is what a pass computes on, and so many of them as may be in flight are kept with
their frames. With an optimizer step for each part, each in flight has the adapters that it went through.

And on top what the process needs beside its tensors. That part is measured, not derived (`HEAP_SPREAD`,
`PACKING_BYTES`, `PROCESS_BYTES`; simulations/benchmarks/cost_model.py measures it again): glibc cannot reuse every hole
that a freed tensor leaves, see `host_memory`. It describes a client on Linux with two compute threads that was started
with ``GLIBC_TUNABLES`` set to `host_memory.CLIENT_TUNABLES`; with other settings of the allocator it is less
(``glibc.malloc.mmap_threshold=131072``, at the price of page faults) or more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsplit_flwr.exchange.frame_bytes import packing_bytes, payload_bytes
from hsplit_flwr.exchange.kept_rows import ENTRY_BYTES, LEAST_ROW_BYTES, MOST_ROWS
from hsplit_flwr.lora.factors import FLOAT32_BYTES
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.quantized import INT8
from hsplit_flwr.planning.costs.shapes import Matrix, WeightBytes, blocks_of
from hsplit_flwr.planning.costs.step_trace import StepTrace
from hsplit_flwr.training.importance import TILE_BYTES
from hsplit_flwr.training.workload import Workload

FRAME_COPIES = 4
"""of a frame on its way: safetensors' buffer, the frame itself, what gRPC holds on either side of its own copy"""
TOKEN_BYTES = 3 * 8
"""input_ids, mask, labels: int64"""
HEAP_SPREAD = 0.65
HEAP_GROWTH = {False: 0.6, True: 0.4}
"""without and with gradient checkpointing, which leaves less between the holes. Holes of the heap that no tensor fits =
spread * what one block's two passes have alive at once * blocks of the head ^ growth"""
THREADS = 2
PACKING_BYTES = 5 << 18
"""the most that MKL keeps per thread for packed panels of the matrices it multiplies"""
PROCESS_BYTES = 1 << 20
"""all else: Python's and gRPC's objects"""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a step."""

    weights: int
    """frozen, in the workload's dtype; a whole model's for the tail"""
    adapters: int
    """A and B, float32, and copies of them: of parts in flight, of where a round started"""
    gradients: int
    optimizer: int
    """AdamW's two moments"""
    activations: int
    """kept for the backward pass"""
    workspace: int
    """alive for a moment: temporaries, frames on their way, holes in the heap"""
    cache: int = 0
    """at most: activations that a tail keeps from round to round; at a head that trains nothing, which those are"""

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        held = self.weights + self.adapters + self.gradients + self.optimizer
        return held + self.activations + self.workspace + self.cache


class HeadMemory:
    """Bytes of the heads of one model.

    Args:
        trace: of a step on one part of a batch.
        weights: bytes of the model's parts.
        matrices: of all blocks, in the order of the model.
        workload: what is trained on, whole batches.
        hidden_size: H.
        dequantized: elements of the largest quantised weight; 0: none is.
    """

    def __init__(
        self,
        trace: StepTrace,
        weights: WeightBytes,
        matrices: Sequence[Matrix],
        workload: Workload,
        hidden_size: int,
        dequantized: int = 0,
    ) -> None:
        self._weights = weights
        self._matrices = matrices
        self._again = workload.gradient_checkpointing
        self._in_flight = workload.parts_alive
        self._table = _table_bytes(workload)
        moves_on = workload.micro_steps and self._in_flight > 1
        self._copies = (self._in_flight if moves_on else 0) + workload.adapter_copies
        workload = workload.part
        keeps_inputs = workload.quantization == INT8
        self._tokens = workload.batch_size * workload.sequence_length
        itemsize = DTYPES[workload.dtype].itemsize
        self._hidden_bytes = self._tokens * hidden_size * itemsize
        self._frame_bytes = payload_bytes(workload, hidden_size)
        self._packing_bytes = packing_bytes(workload, hidden_size)
        per_block = np.zeros((2, len(trace.blocks)), np.int64)
        for matrix in matrices:
            per_block[:, matrix.block] += 4 * self._tokens, matrix.d_in
        of_rank_one, inputs = per_block
        grown = np.array([block.grown for block in trace.blocks])
        if keeps_inputs and itemsize < FLOAT32_BYTES:  # beside the adapters' own, which are float32
            grown = grown + self._tokens * itemsize * inputs
        backward = np.array([block.backward_peak for block in trace.blocks])
        if self._again:
            backward = backward - of_rank_one
        else:
            grown = grown - of_rank_one
        self._alive = trace.prelude.grown + np.concatenate([[0], np.cumsum(grown)])
        """after the forward pass of a head of so many blocks, adapters of rank near 0"""
        self._forward_peaks = self._alive[:-1] + [block.forward_peak for block in trace.blocks]
        self._backward_peaks = self._alive[1:] + backward
        self._heap_peaks = np.maximum.accumulate([block.heap_peak for block in trace.blocks])
        self._dequantized = dequantized * itemsize
        self._tile = tile_bytes(matrices, workload, dequantized)
        self._packing = min(PACKING_BYTES, 8 * self._tokens * max(max(m.d_in, m.d_out) for m in matrices))
        sample = workload.measured_rows * workload.sequence_length * itemsize
        self._sampled_inputs = sample * np.cumsum(inputs) * self._again
        """what importance keeps of the matrices' inputs where a block does not keep them"""
        self._spared = [
            (block, max(0, nbytes - sample * sum(m.d_in for m in members)), tuple(m.name for m in members))
            for block, block_matrices in enumerate(blocks_of(matrices, len(trace.blocks)))
            for nbytes, marks in trace.blocks[block].adapter_inputs
            if (members := [m for position, m in enumerate(block_matrices) if marks & 2 << position])
            and not keeps_inputs
        ]
        """(block, bytes, matrices): not kept if none of the matrices has an adapter, a sample for importance apart"""

    @property
    def rank_bytes(self) -> Floats:
        """Per matrix: bytes of one unit of rank. A and B four times over, and A's output for the backward pass."""
        per_side, per_token = 16 + 4 * self._copies, 4 * self._in_flight
        sizes = [per_side * matrix.sides + per_token * self._tokens for matrix in self._matrices]
        return np.array(sizes, np.float64)

    def base(self, cut: int) -> int:
        """Blocks 0..cut-1 with adapters everywhere, of ranks near 0."""
        return self.estimate(cut, {}).total_bytes + self._in_flight * self._not_kept(cut, {})

    def estimate(self, cut: int, ranks: Mapping[str, int]) -> MemoryEstimate:
        """Blocks 0..cut-1."""
        parameters = 0
        of_ranks = [0] * cut
        for matrix in self._matrices:
            if matrix.block < cut and (rank := ranks.get(matrix.name, 0)):
                parameters += rank * matrix.sides
                of_ranks[matrix.block] += 4 * self._tokens * rank
        kept, transient = (0, max(of_ranks)) if self._again else (sum(of_ranks), 0)
        # Without a block's activations, importance keeps its sampled inputs: in a round's first step, before AdamW's
        # moments are there.
        sampled = max(0, int(self._sampled_inputs[cut - 1]) - 8 * parameters)
        return MemoryEstimate(
            weights=self._weights.prelude + sum(self._weights.blocks[:cut]),
            adapters=4 * parameters * (1 + self._copies),
            gradients=4 * parameters,
            optimizer=8 * parameters,
            activations=self._in_flight * (int(self._alive[cut]) + kept - self._not_kept(cut, ranks)),
            workspace=self._workspace(cut) + transient + sampled,
            cache=0 if parameters else self._table,
        )

    def _not_kept(self, cut: int, ranks: Mapping[str, int]) -> int:
        return sum(
            nbytes
            for block, nbytes, names in self._spared
            if block < cut and not any(ranks.get(name, 0) for name in names)
        )

    def _workspace(self, cut: int) -> int:
        forward = self._forward_peaks[:cut].max() + 2 * self._hidden_bytes + self._dequantized
        exchange = self._alive[cut] + self._hidden_bytes + FRAME_COPIES * self._frame_bytes + self._packing_bytes
        backward = self._backward_peaks[:cut].max() + self._hidden_bytes + max(self._tile, self._dequantized)
        temporaries = max(forward, exchange, backward) - self._alive[cut] + self._tokens * TOKEN_BYTES
        holes = HEAP_SPREAD * self._heap_peaks[cut - 1] * cut ** HEAP_GROWTH[self._again]
        on_their_way = (self._in_flight - 1) * (self._hidden_bytes + FRAME_COPIES * self._frame_bytes)
        return int(temporaries + holes + on_their_way) + THREADS * self._packing + PROCESS_BYTES


def _table_bytes(workload: Workload) -> int:
    """What a head needs to remember the rows of activations that the tail keeps, if it has them all to itself."""
    kept = (workload.activation_cache_mib << 20) // (ENTRY_BYTES + LEAST_ROW_BYTES)
    return ENTRY_BYTES * min(kept, MOST_ROWS + workload.local_steps * workload.batch_size)


def tile_bytes(matrices: Sequence[Matrix], workload: Workload, dequantized: int = 0) -> int:
    """The most that the importance measurement forms at once; 0 where nothing is measured.

    A tile of a gradient, and of a weight that is quantised a plain copy in float32, made of one in its own dtype.
    """
    if not workload.measured_rows:
        return 0
    tile = min(TILE_BYTES, max(4 * matrix.d_in * matrix.d_out for matrix in matrices))
    return tile + (FLOAT32_BYTES + DTYPES[workload.dtype].itemsize) * dequantized
