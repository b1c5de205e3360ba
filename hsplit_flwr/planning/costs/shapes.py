"""The sizes of a model's parts, read off its skeleton."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from hsplit_flwr.models.block_layout import BlockLayout, block_of
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
    """Bytes of the frozen weights and stored buffers, in the dtype they are held in."""

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


def weight_bytes(skeleton: PreTrainedModel, layout: BlockLayout) -> WeightBytes:
    """Bytes by part; a parameter that no module of prelude or postlude owns is in the prelude."""
    ties = skeleton.all_tied_weights_keys
    prelude, whole = 0, 0
    blocks = [0] * layout.num_blocks
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        if name in ties:
            continue
        whole += parameter.nbytes
        if name.startswith(f"{layout.blocks}."):
            blocks[block_of(name)] += parameter.nbytes
        elif name.rpartition(".")[0] not in layout.postlude:
            prelude += parameter.nbytes
    for name, buffer in skeleton.named_buffers():
        whole += buffer.nbytes
        if name.startswith(f"{layout.blocks}."):
            blocks[block_of(name)] += buffer.nbytes
        else:
            prelude += buffer.nbytes
    return WeightBytes(prelude, tuple(blocks), whole)
