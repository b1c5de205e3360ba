"""A training pass of head or tail: what is switched on in it that is off while a segment scores."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hsplit_flwr.lora.segment_adapters import SegmentAdapters

AUTOCAST_DTYPES = {"none": None, "bf16": torch.bfloat16}
"""keys of `training.config.AUTOCASTS`"""


@contextmanager
def training_pass(
    adapters: SegmentAdapters, device: torch.device, lora_dropout: float, autocast: str, *which: object
) -> Iterator[None]:
    """Dropout before the adapters, and torch's autocast, for a forward pass.

    Args:
        adapters: of the segment that computes.
        device: where it does.
        lora_dropout: share of an adapter's input that is dropped.
        autocast: one of `AUTOCAST_DTYPES`.
        which: tells the pass from all others of these adapters; masks depend on it.
    """
    dtype = AUTOCAST_DTYPES[autocast]
    with (
        adapters.dropping_out(lora_dropout, *which),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        yield
