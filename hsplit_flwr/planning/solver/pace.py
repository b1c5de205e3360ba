"""How fast a plan learns: how many optimizer steps' worth of progress everybody's step makes.

A matrix that a head holds takes a step on that client's batch, and the steps of all heads are summed by their shares of
the data; one that the tail trains for k clients takes k steps after another. So with equal shares

    pace = sum_m I_m ( sum_{i holds m} (1/n) v(r_im) + (k_m / n) k_m^TAIL_STEPS v(r_m) )
    v(r) = (g(r) / g(R))^RANK_WORTH

(a joint tail takes one step for all: k_m^0), with I the importance, g `objective.gain` and R the largest candidate.
Fitted once to final perplexities of the embedded model (`simulations/benchmarks/pace.py`: 5 clients, cuts 1 to 7, ranks
4 to 32, 24 and 40 steps), where the loss falls by `LOSS_PER_STEP` times the logarithm of pace times steps. Its figures
are off by 2.6 % of perplexity (root mean square), 9 % at worst, at the deepest cut: for the pace itself that is some
10 %. Other numbers of clients are an extrapolation. Those runs are scored on the test half, so what `auto` plans is not
independent of it: a table of its plans needs constants that are fitted anew, on the validation half
(`simulations/evidence/pace.toml`, `pace_short.toml`, `pace_twenty.toml`).
"""

import numpy as np

from hsplit_flwr.planning.solver.objective import Floats, Ints, gains
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.solution import Solution

TAIL_STEPS = 0.67
"""what steps after another bring: k of them make k^TAIL_STEPS times the progress of one"""
RANK_WORTH = 0.23
LOSS_PER_STEP = 0.25
FIT_ERROR, WORST_FIT_ERROR = 0.026, 0.094
"""by which the fit is off, relative to the perplexity: root mean square, and at worst"""


def pace(problem: Problem, solution: Solution) -> float:
    """Steps' worth of progress in a step; 1: as if every matrix took one step on everybody's mean gradient."""
    if not problem.num_clients:
        return 0.0
    heads = _worth(problem, problem.level_gains)[solution.levels].mean(axis=0)
    return _pace(problem, heads, (solution.cuts[:, None] <= problem.matrices.block).sum(axis=0))


def pace_of_cuts(problem: Problem, cuts: Ints) -> float:
    """The same of heads with the largest rank everywhere, for (n,) cuts of at least one client."""
    shallower = np.cumsum(np.bincount(cuts, minlength=problem.num_cuts + 2))  # [b]: how many have cut <= b
    behind = shallower[problem.matrices.block]
    return _pace(problem, 1 - behind / len(cuts), behind)


def pace_behind(problem: Problem, cut: int) -> float:
    """The same where all heads end at `cut` and train nothing."""
    behind = np.where(problem.matrices.block >= cut, problem.num_clients, 0)
    return _pace(problem, np.zeros(len(behind)), behind)


def _pace(problem: Problem, heads: Floats, behind: Ints) -> float:
    """From (M,) what the heads bring, and for how many clients the tail trains each matrix."""
    worth = 0.0 if problem.workload.joint_steps else TAIL_STEPS
    steps = behind * np.asarray(behind, float) ** worth / problem.num_clients
    tail = _worth(problem, gains(problem.tail.ranks)) * steps
    return float(problem.matrices.importance @ (heads + tail))


def _worth(problem: Problem, found: Floats) -> Floats:
    """What adapters of these gains bring, v: 1 at the largest candidate."""
    worth: Floats = (found / problem.level_gains[-1]) ** RANK_WORTH
    return worth
