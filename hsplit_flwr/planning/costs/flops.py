"""FLOPs of a step with frozen weights and LoRA; a multiply-add counts as two.

Only what a gradient needs is computed backward: nothing before the first adapter, no gradient of frozen weights, and
of a matrix' input only if an adapter comes before it. N = B T tokens of a batch, r the rank of an adapter:

* base matrix: 2 N d_in d_out forward, as much backward if its input's gradient is needed
* adapter: 2 N r (d_in + d_out) forward; backward 2 N r (2 d_out + d_in) and, for its input's gradient, 2 N r d_in more
* attention and other matrix products: as the trace of a step found them
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hsplit_flwr.planning.costs.shapes import Matrix, blocks_of
from hsplit_flwr.planning.costs.step_recorder import EARLIER, BlockTrace
from hsplit_flwr.planning.costs.step_trace import StepTrace

Floats = NDArray[np.float64]


class FlopModel:
    """FLOPs of heads and tails of one model.

    Args:
        trace: of a step.
        matrices: of all blocks, in the order of the model.
        tokens: N.
        checkpointing: heads compute each block's forward pass again in the backward pass.
    """

    def __init__(self, trace: StepTrace, matrices: Sequence[Matrix], tokens: int, checkpointing: bool) -> None:
        self._trace = trace
        self._tokens = tokens
        self._checkpointing = checkpointing
        self._matrices = blocks_of(matrices, len(trace.blocks))

    def head(self, cut: int, ranks: Mapping[str, int] | None) -> float:
        """Blocks 0..cut-1 with these ranks; None: adapters everywhere, of ranks near 0."""
        total = _forward(self._trace.prelude)
        marks = 0
        for block in range(cut):
            total += self._block(block, marks, ranks, self._checkpointing)
            if ranks is None or any(ranks.get(matrix.name, 0) for matrix in self._matrices[block]):
                marks = EARLIER
        return total

    def tail(self, cut: int, ranks: Mapping[str, int]) -> float:
        """Blocks cut..L-1 with these ranks, final norm, LM head; down to the gradient of the activations."""
        blocks = range(cut, len(self._trace.blocks))
        total = sum(self._block(block, EARLIER, ranks, checkpointing=False) for block in blocks)
        return total + _forward(self._trace.postlude) + _backward(self._trace.postlude, EARLIER)

    def per_rank(self, *, in_head: bool) -> Floats:
        """Per matrix, in the order of the model: FLOPs of one unit of rank, where every matrix has an adapter."""
        again = in_head and self._checkpointing
        return np.array(
            [
                self._adapter(matrix, block > 0 or inputs > 0, again)
                for block, row in enumerate(self._matrices)
                for matrix, inputs in zip(row, self._trace.blocks[block].input_marks, strict=True)
            ]
        )

    def _block(self, block: int, marks: int, ranks: Mapping[str, int] | None, checkpointing: bool) -> float:
        trace = self._trace.blocks[block]
        matrices = self._matrices[block]
        for position, matrix in enumerate(matrices):
            if ranks is None or ranks.get(matrix.name, 0):
                marks |= 2 << position
        again = checkpointing and marks > 0
        adapters = sum(
            rank * self._adapter(matrix, bool(inputs & marks), again)
            for matrix, inputs in zip(matrices, trace.input_marks, strict=True)
            if (rank := (ranks or {}).get(matrix.name, 0))
        )
        return _forward(trace) * (2 if again else 1) + _backward(trace, marks) + adapters

    def _adapter(self, matrix: Matrix, needs_input_gradient: bool, again: bool) -> float:
        forward = matrix.sides * (2 if again else 1)
        backward = 2 * matrix.d_out + matrix.d_in + (matrix.d_in if needs_input_gradient else 0)
        return 2.0 * self._tokens * (forward + backward)


def _forward(trace: BlockTrace) -> float:
    return sum(operation.flops for operation in trace.operations)


def _backward(trace: BlockTrace, marks: int) -> float:
    return sum(
        operation.flops * factor
        for operation in trace.operations
        for needed_by, factor in operation.gradients
        if needed_by & marks
    )
