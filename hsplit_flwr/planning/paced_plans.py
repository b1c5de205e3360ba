"""The plan of most progress per second, where nobody states what a tail is worth.

Two kinds of plans are made and played on the virtual clock: one that leaves the tail what it can train, whose round
ends when the slowest client can be done with the shallowest head; and a few in which every client holds as many blocks
as a depth and a length of the round allow (`solver.depths`), which take work off a server that is slow or small. Where
people allow it, a third kind has heads that train nothing (`solver.frozen`), which takes most of its transfers off a
link; it must be worth it. Taken is the plan with most clients, then most progress (`solver.pace`) per second of the
clock.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from hsplit_flwr.planning.exchange_choice import WORTH
from hsplit_flwr.planning.round_plan import RoundPlan, progress_per_s
from hsplit_flwr.planning.solver.depths import depths, within
from hsplit_flwr.planning.solver.frozen import frozen
from hsplit_flwr.planning.solver.problem import Problem

DEPTHS = 3
"""that a plan is made for"""
LARGE = 3_000
"""pairs of client and cut from which only the best depth is tried: a plan takes half a second then"""
ROUNDING = 1 + 1e-6
Make = Callable[[Problem], RoundPlan]


def paced_plan(problem: Problem, stated_s: float, make: Make, *, frozen_heads: bool = False) -> RoundPlan:
    """The best plan that `make` makes of the problem and of variants of it.

    Args:
        problem: with the worth of a tail that trains what it can, and the round's deadline for such plans.
        stated_s: the deadline that people state; inf: none.
        make: problem -> its plan.
        frozen_heads: heads may train nothing.

    Raises:
        ConfigError: whatever `make` raises for `problem`.
    """
    shallow = make(problem)
    served = _served(problem, shallow, stated_s)
    if not served:
        return shallow
    plans = [shallow, *(_joined(make(deep), shallow) for deep in _deep(served))]
    most = max(len(plan.clients) for plan in plans)
    best = max((plan for plan in plans if len(plan.clients) == most), key=progress_per_s)
    untrained = frozen(served) if frozen_heads and most == served.num_clients else None
    if untrained:
        still = _joined(make(untrained), shallow)
        if len(still.clients) == most and progress_per_s(still) > (1 + WORTH) * progress_per_s(best):
            return still
    return best


def _served(problem: Problem, shallow: RoundPlan, stated_s: float) -> Problem | None:
    """The problem of whom the shallow plan serves, in which nothing is worth leaving to the tail; None: of nobody."""
    taking_part = [i for i, client in enumerate(problem.devices.clients) if client in shallow.clients]
    worthless = replace(problem.tail, values=np.zeros(problem.num_cuts))
    served = replace(problem.restricted(taking_part), tail=worthless, deadline_s=stated_s)
    return served if taking_part else None


def _deep(served: Problem) -> Iterator[Problem]:
    """That problem under depths worth trying."""
    most = DEPTHS if served.num_clients * served.num_cuts <= LARGE else 1
    for depth in depths(served, most):
        yield replace(within(served, 1, depth.deepest), deadline_s=depth.round_s * ROUNDING)


def _joined(plan: RoundPlan, first: RoundPlan) -> RoundPlan:
    """`plan`, of those who took part in `first`, with whom that one left out."""
    return replace(plan, left_out={**first.left_out, **plan.left_out})
