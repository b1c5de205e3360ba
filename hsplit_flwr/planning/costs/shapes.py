"""The sizes of a model's parts, read off its skeleton."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from hsplit_flwr.lora.update_rounding import most_beside
from hsplit_flwr.models.block_layout import BlockLayout, block_of
from hsplit_flwr.models.quantized import Quantization
from hsplit_flwr.models.segments import linear_shape


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a block: what may get an adapter."""

    name: str
    """whole-model module name"""
    block: int
    d_out: int
    d_in: int

    @property
    def sides(self) -> int:
        """d_in + d_out: the parameters of one unit of rank."""
        return self.d_in + self.d_out


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the frozen weights and stored buffers, in the form they are held in, with what stands beside them."""

    prelude: int
    """embeddings and the like: in every head"""
    blocks: tuple[int, ...]
    whole: int
    """the whole model, tied tensors once"""


def matrices_of(skeleton: PreTrainedModel, layout: BlockLayout) -> tuple[Matrix, ...]:
    """The linear layers of all blocks, in the order of the model, named as `Segment.linear_modules` does."""
    return tuple(
        Matrix(name, block_of(name), *linear_shape(skeleton.get_submodule(name)))
        for name in layout.linear_layers(skeleton)
    )


def blocks_of(matrices: Sequence[Matrix], num_blocks: int) -> list[list[Matrix]]:
    """The matrices of each block, in order."""
    blocks: list[list[Matrix]] = [[] for _ in range(num_blocks)]
    for matrix in matrices:
        blocks[matrix.block].append(matrix)
    return blocks


def weight_bytes(
    skeleton: PreTrainedModel, layout: BlockLayout, quantization: Quantization | None = None, delta_rank: int = 0
) -> WeightBytes:
    """Bytes by part; a parameter that no module of prelude or postlude owns is in the prelude.

    Args:
        skeleton: the whole model, plain.
        layout: of it.
        quantization: of its base; None: it is held in the skeleton's dtype.
        delta_rank: the most that stands beside each quantised matrix, see `most_beside`.
    """
    held = quantized_bytes(skeleton, layout, quantization, delta_rank) if quantization else {}
    ties = skeleton.all_tied_weights_keys
    prelude, whole = 0, 0
    blocks = [0] * layout.num_blocks
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if name in ties:
            continue
        nbytes = held.get(name, parameter.nbytes)
        whole += nbytes
        if name.startswith(f"{layout.blocks}."):
            blocks[block_of(name)] += nbytes
        elif name.rpartition(".")[0] not in layout.postlude:
            prelude += nbytes
    for name, buffer in skeleton.named_buffers():
        whole += buffer.nbytes
        if name.startswith(f"{layout.blocks}."):
            blocks[block_of(name)] += buffer.nbytes
        else:
            prelude += buffer.nbytes
    return WeightBytes(prelude, tuple(blocks), whole)


def dequantized_elements(skeleton: PreTrainedModel, quantization: Quantization | None) -> int:
    """Elements of the largest quantised weight: of one at a time there is a plain copy while it is computed with."""
    names = quantization.layer_names(skeleton) if quantization else []
    return max((math.prod(linear_shape(skeleton.get_submodule(name))) for name in names), default=0)


def quantized_bytes(
    skeleton: PreTrainedModel, layout: BlockLayout, quantization: Quantization, delta_rank: int
) -> dict[str, int]:
    """Name of each quantised weight -> its bytes and scales, and the most that stands beside those that are trained."""
    trained = set(layout.linear_layers(skeleton))
    found = {}
    for name in quantization.layer_names(skeleton):
        shape = linear_shape(skeleton.get_submodule(name))
        beside = most_beside(delta_rank, shape) if name in trained else 0
        found[f"{name}.weight"] = quantization.weight_bytes(*shape) + beside
    return found
