"""How deep heads may be and how long a round may take, for the most progress per second: candidates, weighed roughly.

A shallow head leaves the tail what it trains faster (`pace`); a deep one takes work off a server that is the slowest,
and may be all that a server's memory allows. So for every deepest cut and every length of a round, each client is given
the deepest head that it can afford; what comes of it is estimated in arrays. The best few are for a solver and the
clock.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hsplit_flwr.planning.solver.objective import Floats, Ints
from hsplit_flwr.planning.solver.pace import pace_of_cuts
from hsplit_flwr.planning.solver.problem import Problem

CAPS = 12
"""deepest cuts that are tried, at most"""
TIMES = 8
"""lengths of a round for each of them"""


class Depth(NamedTuple):
    """Limits under which a plan is worth making."""

    deepest: int
    """cut that no head exceeds"""
    round_s: float
    """for everybody's compute, transfers and the tail's compute one after another, as a deadline counts them"""


def within(problem: Problem, shallowest: int, deepest: int) -> Problem:
    """The problem with cuts from `shallowest` to `deepest` alone: nobody has the memory for others."""
    cuts = np.arange(1, problem.num_cuts + 1)
    allowed = (cuts >= shallowest) & (cuts <= deepest)
    base_bytes = np.where(allowed, problem.heads.base_bytes, math.inf)
    return replace(problem, heads=replace(problem.heads, base_bytes=base_bytes))


def depths(problem: Problem, most: int) -> list[Depth]:
    """The `most` best, the best first; fewer where there are not as many that server and deadline allow."""
    weighed = sorted(_weighed(problem), key=lambda found: (-found[0], found[1]))
    return [depth for _, depth in weighed[:most]]


def _weighed(problem: Problem) -> Iterator[tuple[float, Depth]]:
    """Progress per second and the depth, for all that the server has the memory for, within the deadline."""
    seconds = _seconds(problem)
    shallowest = np.argmin(seconds == math.inf, axis=1)
    known: set[bytes] = set()
    for deepest in allowed_cuts(problem):
        reachable = seconds[:, :deepest]
        finite = reachable[(reachable < math.inf) & (reachable <= problem.deadline_s)]
        lengths = np.unique(np.quantile(finite, np.linspace(0, 1, TIMES))) if finite.size else np.zeros(0)
        for length in lengths:
            able = reachable <= length
            last = deepest - 1 - np.argmax(able[:, ::-1], axis=1)
            cuts = np.where(able.any(axis=1), last, shallowest) + 1
            if cuts.tobytes() not in known and (cuts <= deepest).all():
                known.add(cuts.tobytes())
                own_s = float(seconds[np.arange(len(cuts)), cuts - 1].max())
                found = _estimate(problem, own_s, cuts)
                if found and found.sum_s <= problem.deadline_s:
                    yield found.pace / found.round_s, Depth(deepest, found.sum_s)


class _Estimate(NamedTuple):
    """What comes of cuts."""

    pace: float
    round_s: float
    """as compute and transfers overlap, at best"""
    sum_s: float
    """one after another"""


def _estimate(problem: Problem, own_s: float, cuts: Ints) -> _Estimate | None:
    """Of the largest ranks everywhere; None: too much for the server's memory."""
    blocks, clients = int((problem.num_cuts + 1 - cuts).sum()), problem.num_clients
    if problem.server_bytes(blocks, clients) > problem.devices.server_memory:
        return None
    serving = problem.local_steps * problem.server_step_s(blocks, clients)
    return _Estimate(pace_of_cuts(problem, cuts), max(own_s + serving / clients, serving), own_s + serving)


def _seconds(problem: Problem) -> Floats:
    """(n, C) a round's seconds of every client with every cut, largest ranks; without the server's compute.

    Infinite where it has not the memory.
    """
    heads, devices, top = problem.heads, problem.devices, problem.ranks[-1]
    columns = []
    for cut in range(1, problem.num_cuts + 1):
        held = problem.matrices.block < cut
        flops, upload = top * heads.rank_flops[held].sum(), top * heads.rank_wire_bytes[held].sum()
        seconds = problem.fixed_seconds(cut) + problem.local_steps * flops / devices.flops_per_s
        fits = heads.base_bytes[cut - 1] <= devices.memory
        columns.append(np.where(fits, seconds + upload / devices.uplink, math.inf))
    return np.stack(columns, axis=1)


def allowed_cuts(problem: Problem) -> list[int]:
    """Cuts to try, `CAPS` at most: allowed ones, closer to each other where they are shallow."""
    allowed = np.flatnonzero(np.isfinite(problem.heads.base_bytes)) + 1
    if not len(allowed):
        return []
    spaced = np.geomspace(allowed[0], allowed[-1], CAPS).round().astype(int)
    return sorted({int(allowed[np.searchsorted(allowed, cut)]) for cut in spaced})
