"""A client's allocator: asked once, unless the user decided."""

import os
import subprocess
import sys

import pytest

from hsplit_flwr.training import host_memory
from hsplit_flwr.training.host_memory import CLIENT_TUNABLES, TRIM_SECONDS, trim_after_step

SCRIPT = """
from hsplit_flwr.training import host_memory
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
print(asked, (resident() - start) // 2**20, host_memory._stays_small)
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
    asked, grown_mib, stays_small = out.stdout.split()
    assert asked == str(not user_setting)
    assert stays_small == "True"  # trims after steps are for those who decided, too
    assert int(grown_mib) < 20  # 63 tensors are 96 MiB, three are 5 MiB


@pytest.mark.parametrize("stays_small", [True, False])
def test_steps_that_follow_fast_share_a_trim(monkeypatch: pytest.MonkeyPatch, stays_small: bool) -> None:
    """A trim after each of many small steps took a sixth of their time; in no client's process it is for nothing."""
    now, trims = [100.0], []
    monkeypatch.setattr(host_memory, "_stays_small", stays_small)
    monkeypatch.setattr(host_memory, "_trimmed_at", 0.0)
    monkeypatch.setattr(host_memory, "trim_heap", lambda: trims.append(now[0]))
    monkeypatch.setattr("hsplit_flwr.training.host_memory.time.monotonic", lambda: now[0])
    for step in range(11):
        now[0] = 100 + step * TRIM_SECONDS / 5
        trim_after_step()
    assert trims == ([100, 100 + TRIM_SECONDS, 100 + 2 * TRIM_SECONDS] if stays_small else [])
