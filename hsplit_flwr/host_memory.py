"""Keeps a client's memory near what its head needs: large tensors go back to the system when they are freed."""

import ctypes
import os
import sys

M_MMAP_THRESHOLD = -3
"""`mallopt(3)`"""
THRESHOLD_BYTES = 1 << 20
USER_SETTING = "MALLOC_MMAP_THRESHOLD_"


def return_freed_tensors() -> bool:
    """Let glibc map every allocation of 1 MiB and more on its own; True if it was asked to.

    By default glibc raises this threshold to up to 32 MiB as tensors come and go, and serves them from one heap. There,
    aligned blocks (torch asks for 64 bytes) seldom fit into the holes that equal blocks left, so that a head's process
    grows to 1.4 to 1.7 times what it holds (SmolLM2-135M, `simulations/benchmarks/split_overhead.py`). Mapping costs
    page faults instead. A threshold that the user set in the environment (``MALLOC_MMAP_THRESHOLD_``, in bytes) stays.
    """
    if not sys.platform.startswith("linux") or USER_SETTING in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES))
