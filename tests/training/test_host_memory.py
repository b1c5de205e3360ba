"""A client's allocator: asked once, unless the user decided."""

import os
import subprocess
import sys

import pytest

from hsplit_flwr.training.host_memory import CLIENT_TUNABLES

SCRIPT = """
from hsplit_flwr.training.host_memory import return_freed_tensors
import torch
asked = return_freed_tensors()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
start = resident()
kept = [torch.ones(400_000) for _ in range(3)]     # 1.6 MB each
holes = [torch.ones(400_000) for _ in range(60)]
last = torch.ones(1000)                              # keeps the end of the heap in use
del holes
print(asked, (resident() - start) // 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize(
    "user_setting", [{}, {"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": CLIENT_TUNABLES}], ids=str
)
def test_freed_tensors_go_back_unless_the_user_decides(user_setting: dict[str, str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")}
    environment |= user_setting
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    asked, grown_mib = out.stdout.split()
    assert asked == str(not user_setting)
    assert int(grown_mib) < 20  # 63 tensors are 96 MiB, three are 5 MiB
