"""Who can take part in a round: as many clients as the server can serve before the deadline, and why the others cannot.

Common ground of the greedy and the exact planner. A client's *tolerance* at a cut is the longest that the server may
compute in a step without the client missing the deadline with a head without adapters; -inf where memory is short.
"""

import math

import numpy as np

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.solver.objective import Floats, Ints
from hsplit_flwr.planning.solver.problem import Problem

ROUNDING = 1e-9
"""relative, for sums of the same terms in another order"""


def tolerances(problem: Problem) -> Floats:
    """Tolerances (n, C) in seconds."""
    cuts = range(1, problem.num_cuts + 1)
    slack = problem.deadline_s - np.stack([problem.fixed_seconds(cut) for cut in cuts], axis=1)
    fits = problem.heads.base_bytes[None, :] <= problem.devices.memory[:, None]
    return np.where(fits, slack / problem.local_steps, -np.inf)


def serving_seconds(problem: Problem) -> Floats:
    """Seconds (C,) that the server computes in a step for one client with a cut."""
    blocks = problem.num_cuts - np.arange(problem.num_cuts)
    return np.array([problem.server_step_s(float(count), 1) for count in blocks])


def participants(problem: Problem) -> tuple[Ints, Ints, dict[str, str]]:
    """Who takes part (indices), with which cuts the server's load is least, and why each of the others does not.

    A client that fails alone is left out. If the deadline cannot be met by all others at once, the largest number that
    can meet it together stays, those that need least of the server first.

    Raises:
        ConfigError: the server's memory cannot hold its part for those that stay.
    """
    tolerance = tolerances(problem)
    alone = (tolerance >= serving_seconds(problem) * (1 - ROUNDING)).any(axis=1)
    left_out = {problem.devices.clients[i]: _reason_alone(problem, int(i)) for i in np.flatnonzero(~alone)}
    stay = np.flatnonzero(alone)
    cuts = least_load(problem, tolerance[stay])
    if cuts is None:
        served = _most_served(problem, tolerance[stay])
        crowded = np.setdiff1d(stay, stay[served])
        left_out |= {problem.devices.clients[i]: _reason_crowded(problem, tolerance[i], len(served)) for i in crowded}
        stay = stay[served]
        cuts = least_load(problem, tolerance[stay])
        assert cuts is not None
    _check_server(problem, cuts)
    return stay, cuts, dict(sorted(left_out.items()))


def least_load(problem: Problem, tolerance: Floats) -> Ints | None:
    """The deepest cuts that all clients of `tolerance` can have at once, or None if the deadline cannot be met.

    Deeper cuts shorten the server's step, which allows deeper cuts: the least fixed point, reached from a step of 0,
    has every client's deepest cut of all plans, so the least load and the least server memory.
    """
    if not len(tolerance):
        return np.zeros(0, int)
    serving = serving_seconds(problem)
    step = 0.0
    while True:
        able = tolerance >= step * (1 - ROUNDING)
        if not able.any(axis=1).all():
            return None
        cuts: Ints = problem.num_cuts - np.argmax(able[:, ::-1], axis=1)
        load = float(np.bincount(cuts - 1, minlength=len(serving)) @ serving)
        if load <= step:
            return cuts
        step = load


def _most_served(problem: Problem, tolerance: Floats) -> Ints:
    """Indices of the most clients that can be served together, ascending.

    For a step of given length, clients at their deepest cut for it need least of it; so the deepest are taken until it
    is full. The lengths worth trying are the tolerances, between which nobody's deepest cut changes.
    """
    serving = serving_seconds(problem)
    reach = np.maximum.accumulate(tolerance[:, ::-1], axis=1)[:, ::-1]  # the tolerance of cuts this deep or deeper
    lengths = np.unique(reach[reach > 0])
    able = np.stack([len(reach) - np.searchsorted(np.sort(column), lengths) for column in reach.T], axis=1)
    exactly = able - np.c_[able[:, 1:], np.zeros(len(lengths), int)]
    deeper = np.c_[np.cumsum((exactly * serving)[:, ::-1], axis=1)[:, ::-1][:, 1:], np.zeros(len(lengths))]
    room = np.floor((lengths[:, None] - deeper) / serving * (1 + ROUNDING))
    taken = np.where(room >= 0, able - exactly + np.clip(room, 0, exactly), 0).max(axis=1)
    step = lengths[np.argmax(taken)]
    deepest = (reach >= step).sum(axis=1)
    order = np.lexsort((-reach[:, 0], -deepest))
    return np.sort(order[: int(taken.max())])


def _reason_alone(problem: Problem, client: int) -> str:
    memory = problem.devices.memory[client]
    if problem.heads.base_bytes.min() > memory:
        return (
            f"memory: expected at least {problem.heads.base_bytes.min():,.0f} bytes for the smallest head (cut "
            f"{int(problem.heads.base_bytes.argmin()) + 1}, no adapters), found {memory:,.0f}. "
            "Give it more memory, smaller or shorter batches, or a 16-bit dtype."
        )
    fits = problem.heads.base_bytes <= memory
    whole = np.array([problem.fixed_seconds(cut)[client] for cut in range(1, problem.num_cuts + 1)])
    needed = float((whole + problem.local_steps * serving_seconds(problem))[fits].min())
    return (
        f"deadline: expected a round within {problem.deadline_s:,.1f} s, found {needed:,.1f} s for its fastest head "
        "without adapters, alone at the server. Raise the deadline, lower local_steps or the batch, or give it a "
        "faster link."
    )


def _reason_crowded(problem: Problem, tolerance: Floats, served: int) -> str:
    bearable = float(tolerance.max())
    return (
        f"deadline: expected at most {bearable:,.3g} s of server compute a step for it to meet "
        f"{problem.deadline_s:,.1f} s, found no room beside the {served} clients that are served. "
        "Raise the deadline, sample fewer clients a round, or give the server more compute."
    )


def _check_server(problem: Problem, cuts: Ints) -> None:
    blocks = int((problem.num_cuts + 1 - cuts).sum())
    needed = problem.server_bytes(blocks, len(cuts))
    if needed > problem.devices.server_memory * (1 + ROUNDING):
        raise ConfigError(
            f"Expected a server with at least {math.ceil(needed):,} bytes for the tail of {len(cuts)} clients "
            f"({problem.tail.fixed_bytes:,.0f} of them for weights and adapters, the rest for activations with the "
            f"deepest cuts that the clients can hold), found {problem.devices.server_memory:,.0f}. "
            "Sample fewer clients a round, use smaller batches or a 16-bit dtype, or give the server more memory."
        )
