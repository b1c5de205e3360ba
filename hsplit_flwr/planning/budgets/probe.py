"""A client's own budget: what its node config states, and for the rest what a short probe measures.

Node config (``flower-supernode --node-config 'memory-gb=4 gflops=50'``): ``device="phone"`` stands for a whole budget
(`devices.DEVICES`); ``memory-gb`` or ``memory-mb``, ``gflops``, ``uplink-mbps``, ``downlink-mbps``, ``latency-ms``
override the device, or else the probe.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from hsplit_flwr.planning.budgets.budget import UNITS, Budget, budget_of, read_units
from hsplit_flwr.planning.budgets.devices import device_budget

Exchange = Callable[[int, int], None]
"""Sends so many bytes up, waits until so many have come down: ``exchange(bytes_up, bytes_down)``"""
MEMORY_SHARE = 0.8
"""of the memory that is free now: the rest is for what else the machine starts doing during a round"""
TRAINING_SHARE = 0.75
"""of the rate of `measure_compute` that training reaches: 0.67 to 0.80 measured (SmolLM2-135M, 8 x 64, one thread)"""
MATMUL = (512, 768, 3072)
"""rows, inner and columns of the product that compute is measured on: 8 x 64 tokens in GPT-2 small's first MLP layer"""
SMALL_BYTES = 64
LARGE_BYTES = 1 << 20
"""about the activations of a step"""
LINK_REPEATS = 5
LINK_LIMIT_S = 1.0
"""no repeats of one kind of exchange once it has taken so long in all"""
_SHORTEST_S = 1e-6


class Link(NamedTuple):
    """What a client's link to the server carries."""

    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    latency_s: float
    """one way"""


def stated_budget(node_config: Mapping[str, object]) -> Budget | None:
    """The budget that `node_config` states; None unless it is whole: a device, or memory, compute and both links.

    Raises:
        ConfigError: an unknown device, or a value of the wrong type or out of range; the message names the key.
    """
    stated = stated_figures(node_config)
    needed = {name for name, _ in UNITS.values()} - {"latency_s"}
    return budget_of(stated) if needed <= stated.keys() else None


def own_budget(node_config: Mapping[str, object], device: torch.device | str, link: Callable[[], Link]) -> Budget:
    """This process's budget: what `node_config` states, else measured on `device` and by `link`, once each.

    Call it before a head is loaded, and when nothing else trains on the machine: clients that share one each see all
    of it, and had better state their part.

    Args:
        node_config: Flower's node config of the SuperNode.
        device: where the head will train.
        link: measures the link, e.g. ``lambda: measure_link(exchange)``; not called if the link is stated.

    Raises:
        ConfigError: as `stated_budget`.
    """
    stated = stated_figures(node_config)
    measured: dict[str, float] = {}
    if "memory_bytes" not in stated:
        measured["memory_bytes"] = usable_memory(device)
    if "flops_per_s" not in stated:
        measured["flops_per_s"] = TRAINING_SHARE * measure_compute(device=device)
    if not set(Link._fields) <= stated.keys():
        measured |= link()._asdict()
    return budget_of({**measured, **stated})


def stated_figures(node_config: Mapping[str, object]) -> dict[str, float]:
    """The fields of a `Budget` that `node_config` states, as far as it states them.

    Raises:
        ConfigError: as `stated_budget`.
    """
    device = vars(device_budget(node_config["device"])) if "device" in node_config else {}
    # Flower's keys have dashes where TOML tables of Python projects have underscores.
    return {**device, **read_units({key.replace("-", "_"): value for key, value in node_config.items()})}


def measure_compute(
    seconds: float = 0.2, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> float:
    """Sustained FLOP/s of matrix products of a transformer's size (`MATMUL`), measured for `seconds` after a warm-up.

    With the threads that torch has here. A training step reaches `TRAINING_SHARE` of it: it is not all matrix products.
    """
    rows, inner, columns = MATMUL
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(inner, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    torch.mm(x, weight, out=out)
    _finish(out)
    started = time.perf_counter()
    products, elapsed = 0, 0.0
    while elapsed < seconds:
        torch.mm(x, weight, out=out)
        _finish(out)
        products += 1
        elapsed = time.perf_counter() - started
    return 2.0 * rows * inner * columns * products / elapsed


def _finish(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def usable_memory(device: torch.device | str = "cpu") -> int:
    """Bytes of `available_memory` that a client counts on."""
    return int(MEMORY_SHARE * available_memory(device))


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process could still take: on a CPU within the machine and its control groups, or on its GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = int(psutil.virtual_memory().available)
    headroom = cgroup_headroom()
    return free if headroom is None else min(free, headroom)


def cgroup_headroom(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control groups of this process still allow, the tightest of them; None without a limit.

    Both versions: https://docs.kernel.org/admin-guide/cgroup-v2.html (memory.max, memory.current) and
    https://docs.kernel.org/admin-guide/cgroup-v1/memory.html (memory.limit_in_bytes, memory.usage_in_bytes; no limit
    is an enormous one there). Cached files that are not in use (inactive_file) do not count: the kernel drops them
    before it refuses memory.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return None
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for mount in (groups, groups / "unified"):
                found += _headrooms(mount, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _headrooms(groups / "memory", path, *v1)
    return min(found, default=None)


def _headrooms(mount: Path, path: str, limit_file: str, usage_file: str, cached_key: str) -> list[int]:
    """One per group from `path` up to the `mount` that has a limit; in a container only the mount itself may exist."""
    leaf = mount / path.lstrip("/")
    found = []
    for folder in (leaf, *leaf.parents):
        try:
            limit = (folder / limit_file).read_text().strip()
            usage = int((folder / usage_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            limit = "max"
        if limit != "max":
            found.append(max(0, int(limit) - usage + int(stat.get(cached_key, 0))))
        if folder == mount:
            break
    return found


def measure_link(exchange: Exchange) -> Link:
    """The link as timed exchanges show it: medians of small ones both ways, of 1 MiB up, and of 1 MiB down.

    The first exchange is not timed: it may connect. On a long way, 1 MiB says more of TCP's slow start than of the
    line; so it is with the activations of a step, which are of that size.
    """
    exchange(SMALL_BYTES, SMALL_BYTES)
    small_s = _median_seconds(exchange, SMALL_BYTES, SMALL_BYTES)
    up_s = _median_seconds(exchange, LARGE_BYTES, SMALL_BYTES) - small_s
    down_s = _median_seconds(exchange, SMALL_BYTES, LARGE_BYTES) - small_s
    payload = LARGE_BYTES - SMALL_BYTES
    return Link(payload / max(up_s, _SHORTEST_S), payload / max(down_s, _SHORTEST_S), small_s / 2)


def _median_seconds(exchange: Exchange, bytes_up: int, bytes_down: int) -> float:
    times: list[float] = []
    while len(times) < LINK_REPEATS and sum(times) < LINK_LIMIT_S:
        started = time.perf_counter()
        exchange(bytes_up, bytes_down)
        times.append(time.perf_counter() - started)
    return median(times)
