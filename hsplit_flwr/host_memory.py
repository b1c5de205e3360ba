"""Keeps a client's memory near what its head needs, whatever glibc's allocator would make of it.

torch asks for blocks that are aligned to 64 bytes. glibc (2.36 at least) cuts them out of larger ones, and small
objects that settle in the clippings keep freed tensors from growing together again: a head's process grows to 1.4 to
1.7 times what it holds (SmolLM2-135M, batch 8 x 64). Two remedies, measured by `simulations/benchmarks/split_overhead.py`:

* Start the client with ``GLIBC_TUNABLES`` set to `CLIENT_TUNABLES`: clippings go back at once. Costs nothing.
* Otherwise `return_freed_tensors` maps every large tensor on its own. Costs page faults.
"""

import ctypes
import os
import sys

CLIENT_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""For the environment variable ``GLIBC_TUNABLES``, which glibc reads once, when a process starts"""
M_MMAP_THRESHOLD = -3
"""`mallopt(3)`"""
THRESHOLD_BYTES = 1 << 20


def return_freed_tensors() -> bool:
    """Let glibc map every allocation of 1 MiB and more on its own; True if it was asked to.

    Not where the user has decided: ``GLIBC_TUNABLES`` or ``MALLOC_MMAP_THRESHOLD_`` is in the environment.
    """
    decided = "GLIBC_TUNABLES" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ
    if decided or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES))
