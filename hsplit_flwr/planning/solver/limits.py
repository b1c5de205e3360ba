"""What keeps each client from a better head: the figures behind `PlannedClient.limited_by`."""

import numpy as np

from hsplit_flwr.planning.round_plan import Limit
from hsplit_flwr.planning.solver.heads import HeadFamily, family_of
from hsplit_flwr.planning.solver.objective import Floats, Ints
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.solution import Solution, needed_bytes, own_seconds, tail_blocks, values

EVALUATIONS = 3_000_000


def limits(problem: Problem, solution: Solution) -> list[Limit]:
    """(n,) what the nearest better head of each client misses most.

    Better heads that exceed memory or deadline are measured by the factor by which they do; the nearest one tells the
    limit. A better head within both means "server": with more blocks in the tail, the server or another client would
    exceed its own. "none": there is no better head, or none that anything forbids.
    """
    if not problem.num_clients:
        return []
    pairs = problem.num_clients * problem.num_cuts
    family = family_of(problem, int(np.clip(EVALUATIONS // pairs, 32, 400)))
    search = _Search(problem, solution)
    best = np.full(problem.num_clients, np.inf)
    found = np.full(problem.num_clients, "none", dtype=object)
    for cut in range(1, problem.num_cuts + 1):
        size = len(family.by_cut[cut - 1].value)
        width = max(1, 500_000 // size)
        for start in range(0, problem.num_clients, width):
            clients = np.arange(start, min(start + width, problem.num_clients))
            distance, limit = search.nearest(family, cut, clients)
            nearer = distance < best[clients]
            best[clients[nearer]] = distance[nearer]
            found[clients[nearer]] = limit[nearer]
    return list(found)


class _Search:
    def __init__(self, problem: Problem, solution: Solution) -> None:
        self._problem, self._cuts = problem, solution.cuts
        self._value = values(problem, solution)
        blocks, clients = tail_blocks(problem, solution), problem.num_clients
        self._server_s = problem.local_steps * problem.server_step_s(blocks, clients)
        self._block_s = problem.local_steps * problem.server_step_s(1, 0)
        room_s = problem.deadline_s - self._server_s - own_seconds(problem, solution)[0].max()
        room_bytes = problem.devices.server_memory - problem.server_bytes(blocks, clients)
        self._room = min(room_s / self._block_s, room_bytes / max(problem.tail.bytes_per_block, 1.0))
        """blocks that the tail could run beyond the plan's"""
        self._memory_used = needed_bytes(problem, solution)

    def nearest(self, family: HeadFamily, cut: int, clients: Ints) -> tuple[Floats, np.ndarray]:
        """(clients,) the smallest excess of a better head with `cut`, and what it exceeds most."""
        problem, heads = self._problem, family.by_cut[cut - 1]
        lift = (self._cuts[clients] - cut)[:, None]
        memory = (problem.heads.base_bytes[cut - 1] + heads.adapter_bytes) / problem.devices.memory[clients, None] - 1
        seconds = problem.fixed_seconds(cut)[clients, None] + self._server_s + lift * self._block_s
        seconds = seconds + problem.local_steps * heads.adapter_flops / problem.devices.flops_per_s[clients, None]
        seconds += heads.upload_bytes / problem.devices.uplink[clients, None]
        deadline = seconds / problem.deadline_s - 1
        excess = np.maximum(memory, deadline)
        blocked = (excess > 0) | (lift > self._room)
        better = heads.value + problem.tail.values[cut - 1] > self._value[clients, None] * (1 + 1e-9)
        distance = np.where(better & blocked, np.maximum(excess, 0), np.inf)
        at = np.argmin(distance, axis=1)
        rows = np.arange(len(clients))
        own = np.where(memory >= deadline, "memory", "deadline")[rows, at]
        return distance[rows, at], np.where(excess[rows, at] > 0, own, "server").astype(object)
