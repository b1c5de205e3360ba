"""What a device can afford, and how people write it down."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hsplit_flwr.common.checks import is_above, is_at_least, require
from hsplit_flwr.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """One device's means, for training alone: what the idle client process and its libraries take is not in it."""

    memory_bytes: int
    """that a head may take: weights, adapters, gradients, optimizer state, activations, workspace"""
    flops_per_s: float
    """sustained, not the data sheet's peak; a multiply-add counts as two"""
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    latency_s: float = 0.0
    """one way"""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "flops_per_s", "uplink_bytes_per_s", "downlink_bytes_per_s"):
            require(is_above(getattr(self, name), 0), name, "> 0 and finite", getattr(self, name), key=name)
        require(is_at_least(self.latency_s, 0), "latency_s", ">= 0 and finite", self.latency_s, key="latency_s")

    def scaled(self, *, memory: float = 1.0, compute: float = 1.0, link: float = 1.0) -> "Budget":
        """This budget times a factor each for memory, compute and both directions of the link (not its latency)."""
        return Budget(
            memory_bytes=int(self.memory_bytes * memory),
            flops_per_s=self.flops_per_s * compute,
            uplink_bytes_per_s=self.uplink_bytes_per_s * link,
            downlink_bytes_per_s=self.downlink_bytes_per_s * link,
            latency_s=self.latency_s,
        )


UNITS: Mapping[str, tuple[str, float]] = {
    "memory_gb": ("memory_bytes", 1e9),
    "memory_mb": ("memory_bytes", 1e6),
    "gflops": ("flops_per_s", 1e9),
    "uplink_mbps": ("uplink_bytes_per_s", 1e6 / 8),
    "downlink_mbps": ("downlink_bytes_per_s", 1e6 / 8),
    "latency_ms": ("latency_s", 1e-3),
}
"""how people state a budget: key -> (field of `Budget`, factor). Decimal units; links in megabits per second"""


def read_units(entry: Mapping[str, object]) -> dict[str, float]:
    """The fields of a `Budget` that `entry` states with the keys of `UNITS`; its other keys are left alone.

    Raises:
        ConfigError: not a number, out of range, or memory stated twice; the message names the key.
    """
    stated: dict[str, float] = {}
    for key, (name, factor) in UNITS.items():
        if key not in entry:
            continue
        number = _number(key, entry[key], zero_allowed=key == "latency_ms")
        if name in stated:
            raise ConfigError("Expected memory_gb or memory_mb, found both. Keep one.")
        stated[name] = number * factor
    return stated


def budget_of(stated: Mapping[str, float]) -> Budget:
    """The budget with the fields `stated`; latency is 0 unless stated.

    Raises:
        ConfigError: a field is missing.
    """
    missing = sorted({key for key, (name, _) in UNITS.items() if name not in stated} - {"latency_ms", "memory_mb"})
    if missing:
        raise ConfigError(f"Expected a device or all of memory, compute and link, found no {', '.join(missing)}.")
    return Budget(**{**stated, "memory_bytes": int(stated["memory_bytes"])})  # type: ignore[arg-type]


def _number(key: str, value: object, *, zero_allowed: bool) -> float:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (number >= 0 if zero_allowed else number > 0) or number == math.inf:
        expected = "a number >= 0" if zero_allowed else "a number > 0"
        raise ConfigError(f"Expected {key} as {expected}, found {value!r}. Write it without quotes or units.")
    return number
