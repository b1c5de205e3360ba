"""Errors that say that this machine has no memory left, which no input is to blame for."""

import torch

_CPU_ALLOCATOR = "DefaultCPUAllocator"
"""torch raises a plain RuntimeError for memory of the host"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is Python's, torch's or the accelerator's way to say it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    )
