"""LoRA's dropout in training passes, with masks that depend on seeds alone.

torch's own draws from one generator for the whole process, so masks would depend on who else computes, on what was
computed before a run was resumed, and on whether a block is computed again (gradient checkpointing). Here each layer
draws from a generator of its own, seeded by the pass and the layer's name.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hsplit_flwr.common.seeds import derive_seed


class PassDropout:
    """The dropout of the pass that a segment's adapters are in; none outside of `during`."""

    def __init__(self) -> None:
        self.share = 0.0
        self.seed = 0

    @contextmanager
    def during(self, share: float, seed: int) -> Iterator[None]:
        """Inside, `share` of what each adapter is given is dropped, by masks of this `seed`."""
        before = self.share, self.seed
        self.share, self.seed = share, seed
        try:
            yield
        finally:
            self.share, self.seed = before


class LayerDropout(nn.Module):
    """The dropout before one adapter, in the place of PEFT's.

    Args:
        name: of the adapted layer in the whole model.
        current: the pass.
    """

    def __init__(self, name: str, current: PassDropout) -> None:
        super().__init__()
        self._name = name
        self._pass = current

    def forward(self, x: Tensor) -> Tensor:
        """`x` outside of training passes; inside as ``nn.Dropout`` with a generator of this pass' and layer's seed."""
        if not self._pass.share:
            return x
        generator = torch.Generator(x.device).manual_seed(mask_seed(self._pass.seed, self._name))
        kept = 1 - self._pass.share
        return x * torch.empty_like(x).bernoulli_(kept, generator=generator).div_(kept)


def mask_seed(seed: int, name: str) -> int:
    """What the mask of the layer `name` is drawn by in a pass of `seed`."""
    return derive_seed(seed, "dropout", name)
