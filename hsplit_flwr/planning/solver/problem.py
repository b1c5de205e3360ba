"""The planning problem as arrays: what heads cost, what they are worth, what clients and server afford.

Shapes: n clients, C = L-1 cuts (column c is cut c+1), M candidate matrices in model order, R candidate ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.budgets.budget import Budget
from hsplit_flwr.planning.solver.objective import Floats, Ints, gain, spread_ranks

if TYPE_CHECKING:
    from hsplit_flwr.planning.costs.model_costs import ModelCosts


@dataclass(frozen=True)
class Problem:
    """The numbers of one planning problem.

    The tail's cost per client is affine in the blocks it runs, `..._base + ..._per_block * (L - cut)`: an upper bound
    where the blocks of a model differ. So only the sum of all clients' blocks in the tail couples the clients.
    """

    names: tuple[str, ...]
    """(M,) whole-model module names"""
    block: Ints
    """(M,) ascending"""
    importance: Floats
    """(M,) sum 1"""
    rank_size: Floats
    """(M,) parameters per unit of rank, d_in + d_out"""
    rank_bytes: Floats
    """(M,) memory of the head per unit of rank"""
    rank_flops: Floats
    """(M,) per step and unit of rank"""
    rank_wire_bytes: Floats
    """(M,) upload per round and unit of rank"""
    head_bytes: Floats
    """(C,) memory of a head without adapters"""
    head_flops: Floats
    """(C,) per step"""
    round_bytes_up: Floats
    """(C,) upload per round whatever the ranks: the stream's first frame, headers of the adapters' arrays"""
    round_bytes_down: Floats
    """(C,) download per round: at most what all adapters of the round before add to the head's weights"""
    step_bytes_up: float
    step_bytes_down: float
    local_steps: int
    tail_ranks: Ints
    """(M,) of the tail's adapters"""
    tail_flops_base: float
    """per client and step"""
    tail_flops_per_block: float
    tail_bytes_base: float
    """of one client's batch"""
    tail_bytes_per_block: float
    tail_values: Floats
    """(C,) what the tail's training of the blocks behind a cut is worth for one client"""
    server_fixed_bytes: float
    """whatever the clients do: the whole model's weights, the tail's adapters and their optimizer state"""
    ranks: tuple[int, ...]
    """(R,) ascending, without 0"""
    clients: tuple[str, ...]
    memory: Floats
    """(n,)"""
    flops_per_s: Floats
    uplink: Floats
    downlink: Floats
    latency: Floats
    server_memory: float
    server_flops_per_s: float
    deadline_s: float = math.inf

    @property
    def num_cuts(self) -> int:
        """C."""
        return len(self.head_bytes)

    @property
    def num_clients(self) -> int:
        """n."""
        return len(self.clients)

    @property
    def levels(self) -> Floats:
        """(R+1,) ranks with 0 in front: level k is rank levels[k]."""
        return np.array((0, *self.ranks), float)

    @property
    def level_gains(self) -> Floats:
        """(R+1,) g of every level."""
        return np.array([gain(rank) for rank in (0, *self.ranks)])

    def fixed_seconds(self, cut: int) -> Floats:
        """(n,) seconds of a round with a head of `cut` without adapters, the server's compute left out."""
        transfer = self.step_bytes_up / self.uplink + self.step_bytes_down / self.downlink + 2 * self.latency
        seconds: Floats = self.local_steps * (self.head_flops[cut - 1] / self.flops_per_s + transfer)
        seconds += self.round_bytes_up[cut - 1] / self.uplink + self.round_bytes_down[cut - 1] / self.downlink
        return seconds

    def server_step_s(self, tail_blocks: float, clients: int) -> float:
        """Seconds that the server computes in a step, `tail_blocks` being summed over the clients."""
        flops = clients * self.tail_flops_base + tail_blocks * self.tail_flops_per_block
        return flops / self.server_flops_per_s

    def server_bytes(self, tail_blocks: float, clients: int) -> float:
        """Memory that the server takes: activations summed over all clients, as if all were one batch."""
        return self.server_fixed_bytes + clients * self.tail_bytes_base + tail_blocks * self.tail_bytes_per_block

    def restricted(self, keep: Sequence[int] | Ints) -> "Problem":
        """The same problem with the clients at the indices `keep` alone, in that order."""
        index = np.asarray(keep, int)
        arrays = {name: getattr(self, name)[index] for name in CLIENT_ARRAYS}
        return replace(self, clients=tuple(self.clients[i] for i in index), **arrays)

    @classmethod
    def from_costs(
        cls,
        costs: "ModelCosts",
        importance: Mapping[str, float],
        clients: Mapping[str, Budget],
        server: Budget,
        *,
        ranks: Sequence[int],
        tail_rank: float,
        tail_worth: float,
        deadline_s: float = math.inf,
    ) -> "Problem":
        """The problem of a model.

        Raises:
            ConfigError: importance does not cover the matrices, or is not finite, >= 0 and > 0 somewhere.
        """
        cuts = range(1, costs.num_blocks)
        names = tuple(matrix.name for matrix in costs.matrices)
        weights = checked_importance(names, importance)
        size = np.array([matrix.sides for matrix in costs.matrices], float)
        block = np.array([matrix.block for matrix in costs.matrices])
        tail = spread_ranks(np.where(block >= 1, weights, 0.0), size, ranks, tail_rank * float(size[block >= 1].sum()))
        tail_ranks = dict(zip(names, tail.tolist(), strict=True))
        tail_value = tail_worth * weights * np.array([gain(rank) for rank in tail])
        flops_base, flops_per_block = _affine([costs.tail_flops(cut, tail_ranks) for cut in cuts])
        one = np.array([costs.tail_memory([cut], tail_ranks).total_bytes for cut in cuts], float)
        extra = np.array([costs.tail_memory([cut, cut], tail_ranks).total_bytes for cut in cuts]) - one
        bytes_base, bytes_per_block = _affine(extra)
        return cls(
            names=names,
            block=block,
            importance=weights,
            rank_size=size,
            rank_bytes=costs.rank_bytes,
            rank_flops=costs.rank_flops,
            rank_wire_bytes=4 * size,
            head_bytes=np.array([costs.head_base_bytes(cut) for cut in cuts], float),
            head_flops=np.array([costs.head_base_flops(cut) for cut in cuts]),
            round_bytes_up=costs.hello_bytes + _array_headers(costs),
            round_bytes_down=_update_bytes(costs, len(clients) * max(ranks) + tail),
            step_bytes_up=costs.step_bytes_up,
            step_bytes_down=costs.step_bytes_down,
            local_steps=costs.workload.local_steps,
            tail_ranks=tail,
            tail_flops_base=flops_base,
            tail_flops_per_block=flops_per_block,
            tail_bytes_base=bytes_base,
            tail_bytes_per_block=bytes_per_block,
            tail_values=np.array([tail_value[block >= cut].sum() for cut in cuts]),
            server_fixed_bytes=float((one - extra).max()),
            ranks=tuple(sorted(ranks)),
            **client_arrays(clients),
            server_memory=server.memory_bytes,
            server_flops_per_s=server.flops_per_s,
            deadline_s=deadline_s,
        )


CLIENT_ARRAYS = ("memory", "flops_per_s", "uplink", "downlink", "latency")


@dataclass(frozen=True)
class Solution:
    """A cut and a rank level per matrix for every client of a problem."""

    cuts: Ints
    """(n,)"""
    levels: NDArray[np.int8]
    """(n, M) index into `Problem.levels`; 0 at blocks that the head does not hold"""


def client_arrays(clients: Mapping[str, Budget]) -> dict[str, Any]:
    """The fields of `Problem` that describe the clients, in an order that does not depend on the mapping's."""
    names = tuple(sorted(clients))
    budgets = [clients[name] for name in names]
    return {
        "clients": names,
        "memory": np.array([b.memory_bytes for b in budgets], float),
        "flops_per_s": np.array([b.flops_per_s for b in budgets], float),
        "uplink": np.array([b.uplink_bytes_per_s for b in budgets], float),
        "downlink": np.array([b.downlink_bytes_per_s for b in budgets], float),
        "latency": np.array([b.latency_s for b in budgets], float),
    }


def values(problem: Problem, solution: Solution) -> Floats:
    """(n,) every client's part of the objective."""
    heads: Floats = problem.level_gains[solution.levels] @ problem.importance
    return heads + problem.tail_values[solution.cuts - 1]


def needed_bytes(problem: Problem, solution: Solution) -> Floats:
    """(n,) memory of the heads."""
    needed: Floats = problem.head_bytes[solution.cuts - 1] + problem.levels[solution.levels] @ problem.rank_bytes
    return needed


def tail_blocks(problem: Problem, solution: Solution) -> int:
    """Blocks that the tail runs, summed over the clients."""
    return int((problem.num_cuts + 1 - solution.cuts).sum())


def own_seconds(problem: Problem, solution: Solution) -> tuple[Floats, Floats]:
    """(n,) a round's seconds of each client without the server's compute, and of those what is outside of its steps."""
    ranks = problem.levels[solution.levels]
    transfer = problem.step_bytes_up / problem.uplink + problem.step_bytes_down / problem.downlink
    flops = problem.head_flops[solution.cuts - 1] + ranks @ problem.rank_flops
    steps: Floats = problem.local_steps * (flops / problem.flops_per_s + transfer + 2 * problem.latency)
    upload = (problem.round_bytes_up[solution.cuts - 1] + ranks @ problem.rank_wire_bytes) / problem.uplink
    outside: Floats = upload + problem.round_bytes_down[solution.cuts - 1] / problem.downlink
    return steps + outside, outside


def _array_headers(costs: "ModelCosts") -> Floats:
    """(C,) bytes beside the numbers, if every matrix of a head has an adapter."""
    ones = dict.fromkeys((matrix.name for matrix in costs.matrices), 1)
    numbers = np.cumsum(np.bincount([m.block for m in costs.matrices], [4 * m.sides for m in costs.matrices]))
    return np.array([costs.update_bytes(cut, ones) - numbers[cut - 1] for cut in range(1, costs.num_blocks)])


def _update_bytes(costs: "ModelCosts", stacked_ranks: Ints) -> Floats:
    """(C,) of a head's weight updates as float32: stacked factors of these ranks (M,), or dense where that is less."""
    rows = zip(costs.matrices, stacked_ranks.tolist(), strict=True)
    sizes = [4 * min(rank * m.sides, m.d_in * m.d_out) for m, rank in rows]
    by_block: Floats = np.cumsum(np.bincount([m.block for m in costs.matrices], sizes))
    return by_block[:-1]


def _affine(by_cut: Sequence[float] | Floats) -> tuple[float, float]:
    """(base, per block) of the smallest base + per_block * (L - cut) that is nowhere below `by_cut`."""
    shallow_to_deep = np.asarray(by_cut, float)
    per_block = float(max(-np.diff(shallow_to_deep), default=shallow_to_deep[-1]))
    return max(0.0, float(shallow_to_deep[-1]) - per_block), per_block


def checked_importance(names: Sequence[str], importance: Mapping[str, float]) -> Floats:
    """(M,) importance of `names`, sum 1.

    Raises:
        ConfigError: a module is missing, a value is negative or not finite, or all are 0.
    """
    missing = [name for name in names if name not in importance]
    if missing:
        raise ConfigError(
            f"Expected importance for all {len(names)} candidate matrices, found none for {len(missing)} of them "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Give unmeasured ones a neutral value."
        )
    array = np.array([importance[name] for name in names], float)
    bad = [f"{name}: {value}" for name, value in zip(names, array, strict=True) if not 0 <= value < math.inf]
    if bad or not array.sum() > 0:
        found = ", ".join(bad[:3]) if bad else "only zeros"
        raise ConfigError(
            f"Expected finite importance >= 0, > 0 for at least one matrix, found {found}. "
            "Check the gradients that it was measured from, or plan with equal importance."
        )
    # by the largest value first: the sum of huge values may overflow
    scaled = array / array.max()
    return np.asarray(scaled / scaled.sum())
