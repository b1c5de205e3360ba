"""How fast a plan learns: how many optimizer steps' worth of progress everybody's step makes.

A matrix that a head holds takes a step on that client's batch, and the steps of all heads are summed by their shares of
the data; one that the tail trains for k clients takes k steps after another. So with equal shares

    pace = sum_m I_m ( sum_{i holds m} (1/n) v(r_im) + (k_m / n) k_m^TAIL_STEPS v(r_m) )
    v(r) = (g(r) / g(R))^RANK_WORTH

(a joint tail takes one step for all: k_m^0), with I the importance, g `objective.gain` and R the largest candidate.
Fitted once to final perplexities of the embedded model (`simulations/benchmarks/pace.py`: 5 and 20 clients, cuts 1 to
7, ranks 4 to 16, 24 and 40 steps; 40 runs), where the loss is a floor and a power of pace times steps. Its figures are
off by 3.5 % of perplexity (root mean square), 7 % at worst. Those runs are scored on the validation half, and their
seeds are no table's (`simulations/evidence/pace.toml`, `pace_short.toml`, `pace_twenty.toml`), so that plans do not
depend on what tables are scored on. Other models and tasks are an extrapolation.
"""

import numpy as np

from hsplit_flwr.planning.solver.objective import Floats, Ints, gains
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.solution import Solution

TAIL_STEPS = 0.69
"""what steps after another bring: k of them make k^TAIL_STEPS times the progress of one"""
RANK_WORTH = 0.51
FIT_ERROR, WORST_FIT_ERROR = 0.035, 0.070
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
