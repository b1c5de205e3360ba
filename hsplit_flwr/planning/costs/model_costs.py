"""What a plan costs, from a model's config alone: bytes held, FLOPs per step, bytes on the wire.

`ModelCosts` runs one step on fake tensors (`traces`) and adds up its parts (`memory`, `flops`, and from the exchange's
`frame_bytes` what its frames weigh).
Beside what a given plan costs it has the coefficients of a linear form, ``base(cut) + sum of rank * per_rank``, for
planners: exact where every matrix of the head has an adapter, an upper bound where some have rank 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.exchange import frame_bytes
from hsplit_flwr.exchange.codecs import Part
from hsplit_flwr.lora.delta_update import ADDED, OWN, REPLACED
from hsplit_flwr.lora.update_coding import UpdateCoding
from hsplit_flwr.lora.update_rounding import TensorForm, tensor_forms
from hsplit_flwr.models.adaptable import layout_of
from hsplit_flwr.models.block_layout import build_skeleton
from hsplit_flwr.models.dtypes import DTYPES
from hsplit_flwr.models.files import with_attention
from hsplit_flwr.models.quantized import Quantization, plain_config
from hsplit_flwr.planning.costs import npy_bytes
from hsplit_flwr.planning.costs.delta_costs import DeltaCosts
from hsplit_flwr.planning.costs.flops import FlopModel
from hsplit_flwr.planning.costs.memory import HeadMemory, MemoryEstimate
from hsplit_flwr.planning.costs.shapes import Matrix, dequantized_elements, matrices_of, weight_bytes
from hsplit_flwr.planning.costs.tail_memory import TailMemory
from hsplit_flwr.planning.costs.traces import traced
from hsplit_flwr.training.batch import part_rows
from hsplit_flwr.training.workload import Workload

__all__ = ["Matrix", "MemoryEstimate", "ModelCosts", "Workload"]

Floats = NDArray[np.float64]


class ModelCosts:
    """The costs of heads and tails of one model. Nothing of the model but its config is needed.

    Ranks are given by whole-model module name; a name that is missing has rank 0.

    Args:
        config: of a decoder-only causal language model; of a checkpoint of bitsandbytes only under its quantization.
        workload: the batches, and how they are trained on.

    Raises:
        ConfigError: the checkpoint is quantised otherwise than the workload says.
        UnsupportedModelError: the model cannot be cut, or its costs depend on its data (`traces.traced`).
    """

    def __init__(self, config: PretrainedConfig, workload: Workload) -> None:
        self.workload = workload
        self._config = config
        self._by_workload = {workload: self}
        quantization = Quantization.chosen(config, workload.quantization)
        if quantization:
            config = plain_config(config)
        config = with_attention(config, workload.attn_implementation)
        skeleton = build_skeleton(config, DTYPES[workload.dtype])
        layout = layout_of(skeleton)
        self.hidden_size = layout.width
        """values of the activations at one position"""
        self.num_blocks = layout.num_blocks
        self.matrices: tuple[Matrix, ...] = matrices_of(skeleton, layout)
        """every linear layer of the blocks, in the order of the model"""
        self._by_name = {matrix.name: matrix for matrix in self.matrices}
        itemsize = DTYPES[workload.dtype].itemsize
        self.deltas = DeltaCosts(self.matrices, itemsize, workload.delta_rank if quantization else 0)
        """of the weight delta that the rounds leave behind"""
        weights = weight_bytes(skeleton, layout, quantization, workload.delta_rank)
        plain = replace(workload, gradient_checkpointing=False)
        largest = dequantized_elements(skeleton, quantization)
        held = self.matrices, workload, self.hidden_size, largest
        self._head_memory = HeadMemory(traced(config, workload.part), weights, *held)
        self._tail_memory = TailMemory(traced(config, plain.part), weights.whole, *held)
        tokens = workload.batch_size * workload.sequence_length
        self._flops = FlopModel(traced(config, plain), self.matrices, tokens, workload.gradient_checkpointing)
        parts = part_rows(workload.batch_size, workload.micro_batches)
        loads = [replace(workload, batch_size=rows.stop - rows.start) for rows in parts]
        self.step_bytes_up = sum(frame_bytes.step_bytes_up(load, self.hidden_size) for load in loads)
        """a step's frames of activations, mask and labels"""
        self.step_bytes_down = sum(frame_bytes.step_bytes_down(load, self.hidden_size) for load in loads)
        """a step's frames of the activations' gradient"""
        self.answer_bytes_down = sum(
            frame_bytes.step_bytes_down(load, self.hidden_size, wants_gradient=False) for load in loads
        )
        """a step's frames to a head that trains nothing"""
        self.hello_bytes = frame_bytes.hello_bytes()
        """what a client sends at the start of a round"""

    def under(self, workload: Workload) -> "ModelCosts":
        """The costs of the same model under another workload; made once."""
        if workload not in self._by_workload:
            made = self._by_workload[workload] = ModelCosts(self._config, workload)
            made._by_workload = self._by_workload
        return self._by_workload[workload]

    def head_memory(self, cut: int, ranks: Mapping[str, int]) -> MemoryEstimate:
        """Peak of a client that trains blocks 0..cut-1, above its idle process with all libraries imported."""
        self._check(cut, ranks)
        return self._head_memory.estimate(cut, ranks)

    def head_flops(self, cut: int, ranks: Mapping[str, int]) -> float:
        """FLOPs of one step of a head, forward and backward."""
        self._check(cut, ranks)
        return self._flops.head(cut, ranks)

    def tail_memory(self, cuts: Sequence[int], ranks: Mapping[str, int]) -> MemoryEstimate:
        """Peak of the server in a step of clients with these cuts; it holds the whole model."""
        for cut in cuts:
            self._check(cut, ranks)
        return self._tail_memory.estimate(cuts, ranks)

    def tail_flops(self, cut: int, ranks: Mapping[str, int]) -> float:
        """FLOPs of the tail for one client's batch that enters before block `cut`."""
        self._check(cut, ranks)
        return self._flops.tail(cut, ranks)

    def update_bytes(self, cut: int, ranks: Mapping[str, int]) -> int:
        """The arrays that a client returns at the end of a round: A, B and the importance of its matrices."""
        self._check(cut, ranks)
        held = [matrix for matrix in self.matrices if matrix.block < cut]
        factors = [
            shape
            for matrix in held
            if (rank := ranks.get(matrix.name, 0))
            for shape in ((rank, matrix.d_in), (matrix.d_out, rank))
        ]
        return npy_bytes.array_bytes([*factors, (len(held),)])

    def delta_bytes(self, cut: int, coding: UpdateCoding, ranks: Mapping[str, int], own_rank: int) -> int:
        """Frames of what a head lacks after a round: an update of these stacked ranks, `own_rank` of each its own."""
        held = [matrix for matrix in self.matrices if matrix.block < cut and ranks.get(matrix.name, 0)]
        forms: dict[str, TensorForm] = {}
        for matrix in held:
            forms |= tensor_forms(coding, matrix.name, (matrix.d_out, matrix.d_in), ranks[matrix.name], own_rank)
        order = sorted(forms, key=lambda key: (ADDED, OWN, REPLACED).index(key[: key.index("|") + 1]))
        return frame_bytes.delta_bytes({key: Part(*forms[key]) for key in order})

    def head_base_bytes(self, cut: int) -> int:
        """Memory of a head with adapters everywhere, of ranks near 0."""
        self._check(cut, {})
        return self._head_memory.base(cut)

    @property
    def rank_bytes(self) -> Floats:
        """Per matrix of `matrices`: a head's memory for one unit of rank."""
        return self._head_memory.rank_bytes

    def head_base_flops(self, cut: int) -> float:
        """FLOPs of a head's step with adapters everywhere, of ranks near 0."""
        self._check(cut, {})
        return self._flops.head(cut, None)

    @property
    def rank_flops(self) -> Floats:
        """Per matrix of `matrices`: FLOPs of one unit of rank in a head's step."""
        return self._flops.per_rank(in_head=True)

    def tail_base_bytes(self, cuts: Sequence[int]) -> int:
        """Memory of the server at ranks near 0."""
        return self.tail_memory(cuts, {}).total_bytes

    def tail_rank_bytes(self, cuts: Sequence[int]) -> Floats:
        """Per matrix of `matrices`: the server's memory for one unit of rank, in a step of clients with these cuts."""
        return self._tail_memory.rank_bytes(cuts)

    def tail_base_flops(self, cut: int) -> float:
        """FLOPs of the tail for one client's batch at ranks near 0."""
        return self.tail_flops(cut, {})

    @property
    def tail_rank_flops(self) -> Floats:
        """Per matrix of `matrices`: FLOPs of one unit of rank in the tail, for one client's batch."""
        return self._flops.per_rank(in_head=False)

    def _check(self, cut: int, ranks: Mapping[str, int]) -> None:
        if not 1 <= cut < self.num_blocks:
            raise ConfigError(
                f"Expected a cut in 1..{self.num_blocks - 1}, found {cut}. Each side of a cut holds a block."
            )
        if unknown := sorted(ranks.keys() - self._by_name.keys()):
            raise ConfigError(
                f"Expected ranks by whole-model module names such as {self.matrices[0].name!r}, found {unknown[:3]}."
            )
