"""What a rank is worth, and the order in which ranks are worth having."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def gain(rank: float) -> float:
    """g(r), what an adapter of rank r is worth on a matrix of importance 1: log2(1 + r).

    Concave with g(0) = 0, so that every further unit of rank is worth less. Ours; the paper's is not public text.
    """
    return math.log2(1 + rank)


def gains(ranks: Sequence[float] | Ints) -> Floats:
    """Worth g of every one of `ranks`."""
    return np.array([gain(rank) for rank in ranks])


def tail_values(importance: Floats, block: Ints, ranks: Ints, worth: float, cuts: int) -> Floats:
    """Worth (C,): what the tail's training of the blocks behind each cut is worth for one client.

    Args:
        importance: (M,).
        block: (M,) of every matrix, ascending.
        ranks: (M,) of the tail's adapters.
        worth: w, of a matrix in the tail against one of the same rank in a head.
        cuts: C.
    """
    of_matrix = worth * importance * gains(ranks)
    return np.array([of_matrix[block >= cut].sum() for cut in range(1, cuts + 1)])


def spread_ranks(importance: Floats, size: Floats, ranks: Sequence[int], budget: float) -> Ints:
    """(M,) ranks that maximize sum I_m g(r_m) subject to sum r_m size_m <= `budget`, greedily.

    Steps of rank in order of gain per parameter, as long as they fit.

    Args:
        importance: (M,); matrices of importance 0 stay at rank 0.
        size: (M,) cost of a unit of rank.
        ranks: candidates besides 0.
        budget: in units of `size`.
    """
    levels = np.array((0, *sorted(ranks)))
    chosen = np.zeros(len(size), int)
    for matrix, level in rank_steps(importance, size, ranks):
        step = (levels[level] - levels[level - 1]) * size[matrix]
        if chosen[matrix] == level - 1 and step <= budget:
            chosen[matrix] = level
            budget -= step
    result: Ints = levels[chosen]
    return result


def rank_steps(importance: Floats, cost: Floats, ranks: Sequence[int]) -> Ints:
    """(steps, 2) pairs (matrix, level): all steps from one rank to the next worth having, best gain per cost first.

    As g is concave, a matrix's own steps come in order. Ties go to the earlier matrix of the model.

    Args:
        importance: (M,).
        cost: (M,) of a unit of rank.
        ranks: (R,) candidates besides 0; level k is the k-th smallest.
    """
    levels = np.array((0, *sorted(ranks)), float)
    slope = np.diff(gains(levels)) / np.diff(levels)
    assert (np.diff(slope) < 0).all(), "g must be strictly concave"
    ratio = (importance[:, None] * slope / cost[:, None]).ravel()
    order = np.argsort(-ratio, kind="stable")
    order = order[ratio[order] > 0]
    return np.stack([order // len(slope), order % len(slope) + 1], axis=1)
