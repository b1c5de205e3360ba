"""The heads that the planner chooses among: rank assignments worth having for every cut, whoever may afford them.

The family does not depend on any budget. A client takes the most valuable member that it can afford, so a larger budget
can only help it: monotone by construction. Members come from two sources, for several ways to weigh memory against
compute against upload into one cost:

- *chains*: the prefixes of all rank steps in order of gain per cost, each optimal for exactly what it costs;
- *frontiers*, for models of few matrices, where single steps are large: a dynamic programme over the matrices that
  keeps the best value for every cost, thinned out. One pass gives all cuts.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hsplit_flwr.planning.solver.objective import Floats, Ints, rank_steps
from hsplit_flwr.planning.solver.problem import Problem

DIRECTIONS = (
    (1.0, 0.0, 0.0),
    (0.0, 0.5, 0.5),
    (0.5, 0.25, 0.25),
    (0.25, 0.375, 0.375),
    (0.75, 0.125, 0.125),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
)
"""weights of memory, compute and upload, each as a share of what full ranks on all matrices would take"""
FRONTIER_MATRICES = 64
"""the most matrices that frontiers are computed for; with more, single steps are small and chains are as good"""
KEPT = 8
"""families, of a few megabytes at most: a planner solves one problem under many deadlines and depths"""


@dataclass(frozen=True)
class Heads:
    """The family's members with one cut, (K,) each, in ascending value."""

    value: Floats
    adapter_bytes: Floats
    adapter_flops: Floats
    """per step"""
    upload_bytes: Floats
    """per round"""
    levels: NDArray[np.int8] | None
    """(K, M) where they are kept; otherwise they are formed from `chain` when asked for"""
    chain: NDArray[np.int64]
    """(K, 2): which direction's chain, how many of its steps"""


class HeadFamily:
    """The family's members for all cuts.

    Args:
        problem: whose costs and importance; its clients' and server's budgets are not looked at.
        size: members per cut, about.
    """

    def __init__(self, problem: Problem, size: int) -> None:
        self._problem = problem
        costs = _directions(problem)
        share = max(2, size // len(costs))
        self._steps = [rank_steps(problem.matrices.importance, cost, problem.ranks) for cost in costs]
        small = len(problem.matrices.names) <= FRONTIER_MATRICES
        frontiers = [_frontiers(problem, cost, share) for cost in costs] if small else []
        self.by_cut = [
            self._frontier_heads([frontier[cut - 1] for frontier in frontiers])
            if small
            else self._chain_heads(cut, share)
            for cut in range(1, problem.num_cuts + 1)
        ]

    def levels(self, cut: int, member: int) -> NDArray[np.int8]:
        """(M,) rank levels of one member."""
        heads = self.by_cut[cut - 1]
        if heads.levels is not None:
            kept: NDArray[np.int8] = heads.levels[member]
            return kept
        direction, length = heads.chain[member]
        matrices = self._steps_of(cut, int(direction))[:length, 0]
        levels: NDArray[np.int8] = np.bincount(matrices, minlength=len(self._problem.matrices.names)).astype(np.int8)
        return levels

    def _steps_of(self, cut: int, direction: int) -> Ints:
        steps = self._steps[direction]
        return steps[self._problem.matrices.block[steps[:, 0]] < cut]

    def _chain_heads(self, cut: int, share: int) -> Heads:
        problem = self._problem
        extra = np.diff(problem.levels)
        gains = np.diff(problem.level_gains)
        columns, chain = [], []
        for direction in range(len(self._steps)):
            matrix, level = self._steps_of(cut, direction).T
            per_unit = problem.heads.per_rank[:, matrix]
            step = np.vstack([problem.matrices.importance[matrix] * gains[level - 1], per_unit * extra[level - 1]])
            totals = np.hstack([np.zeros((4, 1)), step.cumsum(axis=1)])
            # denser where heads are small, and staggered, as the directions of real models are much alike
            spaced = ((np.arange(share) + direction / len(self._steps)) / share) ** 2
            lengths = np.unique(np.r_[0, np.round(spaced * len(matrix)).astype(int), len(matrix)])
            columns.append(totals[:, lengths])
            chain.append(np.stack([np.full_like(lengths, direction), lengths], axis=1))
        return _ascending(np.hstack(columns), np.vstack(chain), None)

    def _frontier_heads(self, levels: list[NDArray[np.int8]]) -> Heads:
        problem = self._problem
        kept = np.unique(np.vstack(levels), axis=0)
        ranks = problem.levels[kept]
        value = problem.level_gains[kept] @ problem.matrices.importance
        columns = np.vstack([value, (ranks @ problem.heads.per_rank.T).T])
        return _ascending(columns, np.zeros((len(kept), 2), int), kept)


def family_of(problem: Problem, size: int) -> HeadFamily:
    """The `HeadFamily`, made once in a process for all problems that differ in budgets, base costs or tail alone."""
    matrices = problem.matrices
    arrays = matrices.block, matrices.importance, problem.heads.per_rank
    return _made(_Source(tuple(array.tobytes() for array in arrays), problem.ranks, problem.num_cuts, size, problem))


@dataclass(frozen=True)
class _Source:
    """All that a family depends on, and a problem that has it."""

    arrays: tuple[bytes, ...]
    ranks: tuple[int, ...]
    num_cuts: int
    size: int
    problem: Problem = field(compare=False)


@lru_cache(KEPT)
def _made(source: _Source) -> HeadFamily:
    return HeadFamily(source.problem, source.size)


def _ascending(columns: Floats, chain: Ints, levels: NDArray[np.int8] | None) -> Heads:
    """`Heads` from (4, K) value, bytes, FLOPs, upload; of equal value the cheapest comes last."""
    order = np.lexsort((-columns[3], -columns[2], -columns[1], columns[0]))
    value, adapter_bytes, adapter_flops, upload = columns[:, order]
    return Heads(value, adapter_bytes, adapter_flops, upload, None if levels is None else levels[order], chain[order])


def _directions(problem: Problem) -> list[Floats]:
    """(M,) costs of a unit of rank, one for every direction that is not a repetition."""
    units = problem.heads.per_rank
    shares = units / units.sum(axis=1, keepdims=True)
    costs: list[Floats] = []
    for weights in DIRECTIONS:
        cost = np.asarray(weights) @ shares
        if not any(np.allclose(cost, known, rtol=1e-9, atol=0) for known in costs):
            costs.append(cost)
    return costs


def _frontiers(problem: Problem, cost: Floats, size: int) -> list[NDArray[np.int8]]:
    """Levels (K, M) for every cut: the best value for its cost, at most `size` of them."""
    total_cost, value = np.zeros(1), np.zeros(1)
    levels = np.zeros((1, len(problem.matrices.names)), np.int8)
    choices = np.arange(len(problem.levels), dtype=np.int8)
    result = []
    for cut in range(1, problem.num_cuts + 1):
        for matrix in np.flatnonzero((problem.matrices.block == cut - 1) & (problem.matrices.importance > 0)):
            costs = (total_cost[:, None] + cost[matrix] * problem.levels).ravel()
            gains = (value[:, None] + problem.matrices.importance[matrix] * problem.level_gains).ravel()
            keep = _best_for_cost(costs, gains, size)
            total_cost, value = costs[keep], gains[keep]
            levels = levels[keep // len(choices)]
            levels[:, matrix] = choices[keep % len(choices)]
        result.append(levels)
    return result


def _best_for_cost(cost: Floats, value: Floats, size: int) -> Ints:
    """Indices of what no other beats in both, by ascending cost; evenly spread over the square root of value."""
    order = np.lexsort((-value, cost))
    ahead = np.maximum.accumulate(np.r_[-1.0, value[order][:-1]])
    best = order[value[order] > ahead]
    if len(best) > size:
        wanted = np.linspace(0, 1, size) ** 2 * value[best[-1]]
        picked = np.searchsorted(value[best], wanted)
        best = best[np.unique(np.minimum(picked, len(best) - 1))]
    return best
