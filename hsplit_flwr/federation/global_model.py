"""The weights everyone agrees on: the base W_0 on disk plus the cumulative delta, in any segment of the model."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hsplit_flwr.lora.delta_log import DeltaLog
from hsplit_flwr.lora.factors import Increment
from hsplit_flwr.lora.merge import merge_delta
from hsplit_flwr.models.equality import require_cuttable
from hsplit_flwr.models.files import ModelFiles
from hsplit_flwr.models.segments import block_of, load_segment
from hsplit_flwr.training.loss import Score, score_segment


class GlobalModel:
    """The server's whole model, always at the newest version of the weights.

    Args:
        files: the base model.
        dtype: of the weights that train and serve; the delta itself is float32.
        device: where the model lives.

    Raises:
        UnsupportedModelError: head and tail would not compute what the model computes.
    """

    def __init__(self, files: ModelFiles, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        require_cuttable(files.config)
        self.files = files
        self.segment = load_segment(files, dtype=dtype, device=device)
        self.log = DeltaLog()

    @property
    def num_blocks(self) -> int:
        """L, the number of blocks; a cut is 1..L-1."""
        return self.segment.num_blocks

    def head_names(self, cut: int) -> list[str]:
        """The linear layers of blocks 0..cut-1, in the order of the model."""
        return [name for name in self.segment.linear_modules() if block_of(name) < cut]

    def apply(self, increment: Increment) -> int:
        """Add a round's increment and merge it; returns the new version."""
        version = self.log.append(increment)
        merge_delta(self.segment, self.files, self.log.total, increment)
        return version

    def since(self, have: int, cut: int) -> tuple[int, bool, dict[str, Tensor]]:
        """What a head of `cut` blocks at version `have` lacks: (version, whether that is the whole, tensors)."""
        update = self.log.since(have, self.head_names(cut))
        return update.version, update.base is None, update.to_tensors()

    def score(self, batches: Iterable[Mapping[str, Tensor]]) -> Score:
        """Loss of the whole model on `batches` (adapters that are not merged yet count too)."""
        return score_segment(self.segment, batches)
