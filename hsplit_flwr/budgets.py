"""What a device can afford."""

import math
from dataclasses import dataclass

from hsplit_flwr.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """One device's means, for training alone: what the idle client process and its libraries take is not in it."""

    memory_bytes: int
    """that a head may take: weights, adapters, gradients, optimiser state, activations, workspace"""
    flops_per_s: float
    """sustained, not the data sheet's peak; a multiply-add counts as two"""
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    latency_s: float = 0.0
    """one way"""

    def __post_init__(self) -> None:
        rates = (self.memory_bytes, self.flops_per_s, self.uplink_bytes_per_s, self.downlink_bytes_per_s)
        if not all(0 < rate < math.inf for rate in rates) or not 0 <= self.latency_s < math.inf:
            raise ConfigError(f"Expected finite memory and rates > 0 and a latency >= 0, found {self}.")
