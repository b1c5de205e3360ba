"""The planning problem as arrays: what heads and tail cost, what they are worth, what clients and server afford.

Shapes: n clients, C = L-1 cuts (column c is cut c+1), M candidate matrices in model order, R candidate ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.solver.objective import Floats, Ints, gains
from hsplit_flwr.training.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """What may get an adapter."""

    names: tuple[str, ...]
    """(M,) whole-model module names"""
    block: Ints
    """(M,) ascending"""
    importance: Floats
    """(M,) sum 1; 0: never gets an adapter"""


@dataclass(frozen=True, kw_only=True)
class HeadCosts:
    """What a head takes: without adapters by its cut, and for every unit of a matrix's rank."""

    base_bytes: Floats
    """(C,) memory without adapters; inf: a cut that nobody may have"""
    base_flops: Floats
    """(C,) per step, without adapters"""
    forward_flops: Floats
    """(C,) of these, those of the forward pass"""
    rank_bytes: Floats
    """(M,) memory per unit of rank"""
    rank_flops: Floats
    """(M,) per step and unit of rank"""
    rank_wire_bytes: Floats
    """(M,) upload per round and unit of rank"""
    round_bytes_up: Floats
    """(C,) upload per round whatever the ranks: the stream's first frame, headers of the adapters' arrays"""
    round_bytes_down: Floats
    """(C,) download per round: at most what all adapters of the round before add to the head's weights"""
    step_bytes_up: float
    step_bytes_down: float
    answer_bytes_down: float
    """download per step of a head that trains nothing, and is sent no gradient"""

    @property
    def per_rank(self) -> Floats:
        """(3, M) memory, FLOPs of a step and upload of a round per unit of rank."""
        return np.stack([self.rank_bytes, self.rank_flops, self.rank_wire_bytes])


@dataclass(frozen=True, kw_only=True)
class TailCosts:
    """What the tail takes and is worth.

    Its cost per client is affine in the blocks it runs, `..._base + ..._per_block * (L - cut)`: an upper bound where
    the blocks of a model differ. So only the sum of all clients' blocks in the tail couples the clients.
    """

    ranks: Ints
    """(M,) of the tail's adapters"""
    values: Floats
    """(C,) what the tail's training of the blocks behind a cut is worth for one client"""
    flops_base: float
    """per client and step"""
    flops_per_block: float
    bytes_base: float
    """of one client's batch"""
    bytes_per_block: float
    fixed_bytes: float
    """whatever the clients do: the whole model's weights, the tail's adapters and their optimizer state"""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What clients and server afford; of the server its memory and compute."""

    clients: tuple[str, ...]
    """(n,) ids"""
    memory: Floats
    """(n,) bytes"""
    flops_per_s: Floats
    """(n,)"""
    uplink: Floats
    """(n,) bytes per second"""
    downlink: Floats
    """(n,) bytes per second"""
    latency: Floats
    """(n,) seconds one way"""
    server_memory: float
    """bytes"""
    server_flops_per_s: float

    @classmethod
    def of(cls, clients: Mapping[str, Budget], server: Budget) -> Self:
        """The devices with these budgets, in an order that does not depend on the mapping's."""
        names = tuple(sorted(clients))
        budgets = [clients[name] for name in names]
        return cls(
            clients=names,
            memory=np.array([b.memory_bytes for b in budgets], float),
            flops_per_s=np.array([b.flops_per_s for b in budgets], float),
            uplink=np.array([b.uplink_bytes_per_s for b in budgets], float),
            downlink=np.array([b.downlink_bytes_per_s for b in budgets], float),
            latency=np.array([b.latency_s for b in budgets], float),
            server_memory=server.memory_bytes,
            server_flops_per_s=server.flops_per_s,
        )

    def restricted(self, keep: Sequence[int] | Ints) -> Self:
        """The same server with the clients at the indices `keep` alone, in that order."""
        index = np.asarray(keep, int)
        return replace(
            self,
            clients=tuple(self.clients[i] for i in index),
            memory=self.memory[index],
            flops_per_s=self.flops_per_s[index],
            uplink=self.uplink[index],
            downlink=self.downlink[index],
            latency=self.latency[index],
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One planning problem."""

    matrices: Matrices
    heads: HeadCosts
    tail: TailCosts
    devices: Devices
    ranks: tuple[int, ...]
    """(R,) candidates, ascending, without 0"""
    workload: Workload
    """how batches travel and how many of them a round has; all costs are of it"""
    deadline_s: float = math.inf
    """for a round"""

    @property
    def local_steps(self) -> int:
        """Steps of a round."""
        return self.workload.local_steps

    @property
    def num_cuts(self) -> int:
        """Number of cuts, C."""
        return len(self.heads.base_bytes)

    @property
    def num_clients(self) -> int:
        """Number of clients, n."""
        return len(self.devices.clients)

    @property
    def levels(self) -> Floats:
        """(R+1,) ranks with 0 in front: level k is rank levels[k]."""
        return np.array((0, *self.ranks), float)

    @property
    def level_gains(self) -> Floats:
        """(R+1,) g of every level."""
        return gains((0, *self.ranks))

    def transfer_seconds(self) -> Floats:
        """(n,) seconds that a step's frames take on the wire, latency apart."""
        return self.heads.step_bytes_up / self.devices.uplink + self.heads.step_bytes_down / self.devices.downlink

    def fixed_seconds(self, cut: int) -> Floats:
        """(n,) seconds of a round with a head of `cut` without adapters, the server's compute left out."""
        heads, devices = self.heads, self.devices
        transfer = self.transfer_seconds() + 2 * devices.latency
        seconds: Floats = self.local_steps * (heads.base_flops[cut - 1] / devices.flops_per_s + transfer)
        seconds += heads.round_bytes_up[cut - 1] / devices.uplink + heads.round_bytes_down[cut - 1] / devices.downlink
        return seconds

    def server_step_s(self, tail_blocks: float, clients: int) -> float:
        """Seconds that the server computes in a step, all its passes, `tail_blocks` being summed over the clients."""
        flops = clients * self.tail.flops_base + tail_blocks * self.tail.flops_per_block
        return self.workload.tail_passes * flops / self.devices.server_flops_per_s

    def server_bytes(self, tail_blocks: float, clients: int) -> float:
        """Memory that the server takes: activations summed over all clients, as if all were one batch."""
        return self.tail.fixed_bytes + clients * self.tail.bytes_base + tail_blocks * self.tail.bytes_per_block

    def restricted(self, keep: Sequence[int] | Ints) -> Self:
        """The same problem with the clients at the indices `keep` alone, in that order."""
        return replace(self, devices=self.devices.restricted(keep))
