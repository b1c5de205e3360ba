"""A solution of the planning problem: what it is worth, and what it takes of every client and the server."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hsplit_flwr.planning.solver.objective import Floats, Ints
from hsplit_flwr.planning.solver.problem import Problem


@dataclass(frozen=True)
class Solution:
    """A cut and a rank level per matrix for every client of a problem."""

    cuts: Ints
    """(n,)"""
    levels: NDArray[np.int8]
    """(n, M) index into `Problem.levels`; 0 at blocks that the head does not hold"""


def values(problem: Problem, solution: Solution) -> Floats:
    """(n,) every client's part of the objective."""
    heads: Floats = problem.level_gains[solution.levels] @ problem.matrices.importance
    return heads + problem.tail.values[solution.cuts - 1]


def needed_bytes(problem: Problem, solution: Solution) -> Floats:
    """(n,) memory of the heads."""
    ranks = problem.levels[solution.levels]
    needed: Floats = problem.heads.base_bytes[solution.cuts - 1] + ranks @ problem.heads.rank_bytes
    return needed


def tail_blocks(problem: Problem, solution: Solution) -> int:
    """Blocks that the tail runs, summed over the clients."""
    return int((problem.num_cuts + 1 - solution.cuts).sum())


def own_seconds(problem: Problem, solution: Solution) -> tuple[Floats, Floats]:
    """(n,) a round's seconds of each client without the server's compute, and of those what is outside of its steps."""
    heads, devices, cuts = problem.heads, problem.devices, solution.cuts - 1
    ranks = problem.levels[solution.levels]
    flops = heads.base_flops[cuts] + ranks @ heads.rank_flops
    compute = flops / devices.flops_per_s
    steps: Floats = problem.local_steps * (compute + problem.transfer_seconds() + 2 * devices.latency)
    upload = (heads.round_bytes_up[cuts] + ranks @ heads.rank_wire_bytes) / devices.uplink
    outside: Floats = upload + heads.round_bytes_down[cuts] / devices.downlink
    return steps + outside, outside
