"""Keeps a client's memory near what its head needs, whatever glibc's allocator would make of it.

torch asks for blocks that are aligned to 64 bytes. glibc (2.36 at least) cuts them out of larger ones, and small
objects that settle in the clippings keep freed tensors from growing together again: a head's process grows to 1.4 to
1.7 times what it holds (SmolLM2-135M, batch 8 x 64). Two remedies, see `simulations/benchmarks/split_overhead.py`:

* Start the client with ``GLIBC_TUNABLES`` set to `CLIENT_TUNABLES`: clippings go back at once, and `trim_after_step`
  returns what a step no longer needs. Costs next to nothing.
* Otherwise `return_freed_tensors` maps every large tensor on its own. Costs page faults.
"""

import ctypes
import math
import os
import sys
import time
from functools import lru_cache
from typing import Any

CLIENT_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
"""For the environment variable ``GLIBC_TUNABLES``, which glibc reads once, when a process starts"""
M_MMAP_THRESHOLD = -3
"""`mallopt(3)`"""
THRESHOLD_BYTES = 1 << 20
TRIM_SECONDS = 0.5
"""between two trims at least: a head whose memory matters steps more slowly; a small one's trim is a sixth of a step"""


def return_freed_tensors() -> bool:
    """Let glibc map every allocation of 1 MiB and more on its own; True if it was asked to.

    Not where the user has decided: ``GLIBC_TUNABLES`` or ``MALLOC_MMAP_THRESHOLD_`` is in the environment. Either way
    this process is a client's from now on, for `trim_after_step`.
    """
    global _stays_small
    _stays_small = True
    decided = "GLIBC_TUNABLES" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ
    if decided or not sys.platform.startswith("linux"):
        return False
    mallopt = _libc_function("mallopt")
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES))


def trim_heap() -> None:
    """Give the free pages of the heap back to the system (`malloc_trim(3)`); nothing where there is no such thing."""
    if trim := _libc_function("malloc_trim"):
        trim(0)


_trimmed_at = -math.inf
"""by `time.monotonic`; of the process, as the heap is"""
_stays_small = False
"""whether a client has said so in this process; where experiments train heads, trims would take a tenth of the time"""


def trim_after_step() -> None:
    """`trim_heap`, where a client's process has not done so for `TRIM_SECONDS`."""
    global _trimmed_at
    if _stays_small and time.monotonic() - _trimmed_at >= TRIM_SECONDS:
        trim_heap()
        _trimmed_at = time.monotonic()


@lru_cache
def _libc_function(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # another C library, or none to open
        return None
