"""The scalable planner: heads that no budget shapes, and an exact division of the server's time and memory.

Each client picks from a `HeadFamily`. What couples the clients is the number N of blocks that the tail runs for all of
them: it makes the server's step longer and takes its memory. For every N of a grid, each client's best head per cut is
tabulated with N blocks' worth of server time set aside; then `share` chooses cuts of the largest sum with at most N
blocks. The best N wins. So the plan is a maximum over a set of plans that no budget shapes, of which larger budgets, a
later deadline or a stronger server allow more: none of them lowers the objective, by construction.

Two bounds on work limit that to plans whose server is not at its limit: up to 512 pairs of client and cut the grid has
every N, beyond that some are skipped (and `least_load` steps in where none of the others can be served); and `share` is
exact up to a large table. Beyond them the promise holds up to the share of one client.
"""

import numpy as np

from hsplit_flwr.planning.solver.heads import HeadFamily, family_of
from hsplit_flwr.planning.solver.objective import Floats, Ints
from hsplit_flwr.planning.solver.participants import ROUNDING
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.sharing import share, upper_bounds
from hsplit_flwr.planning.solver.solution import Solution

EVALUATIONS = 16_000_000
"""heads weighed up against clients, about; fewer heads a cut where there are many clients"""
TABLE = 2_000_000
"""entries of the table client x cut x N, about"""


def solve(problem: Problem, least_load: Ints) -> Solution:
    """Cuts and ranks for all clients of `problem`, all of which can take part (see `participants`).

    Args:
        problem: at least one client.
        least_load: (n,) cuts with which the server's load is least; taken where no N of the grid can be served.
    """
    pairs = problem.num_clients * problem.num_cuts
    family = family_of(problem, int(np.clip(EVALUATIONS // pairs, 160, 2000)))
    grid = _grid(problem)
    table = best_members(problem, family, grid)
    values = _values(problem, family, table)
    limits = _block_limits(problem, grid) - problem.num_clients
    everyone = np.arange(problem.num_clients)
    best, best_value = None, -np.inf
    bounds = upper_bounds(values, limits)
    for column in np.lexsort((grid, -bounds)):
        if bounds[column] <= best_value:
            break
        cuts = share(values[:, :, column], int(limits[column]))
        if cuts is not None:
            value = float(values[everyone, cuts - 1, column].sum())
            if value > best_value:
                best, best_value = (cuts, table[everyone, cuts - 1, column]), value
    if best is None:
        blocks = np.array([(problem.num_cuts + 1 - least_load).sum()])
        best = least_load, best_members(problem, family, blocks)[everyone, least_load - 1, 0]
    levels = [family.levels(int(cut), int(member)) for cut, member in zip(*best, strict=True)]
    return Solution(best[0], np.stack(levels))


def best_members(problem: Problem, family: HeadFamily, grid: Ints) -> Ints:
    """(n, C, N) the most valuable member that a client can afford with a cut and N tail blocks; -1: none.

    Args:
        problem: the budgets.
        family: the heads.
        grid: (N,) ascending numbers of tail blocks of all clients.
    """
    table = np.empty((problem.num_clients, problem.num_cuts, len(grid)), np.int64)
    for cut in range(1, problem.num_cuts + 1):
        size = len(family.by_cut[cut - 1].value)
        width = max(1, 500_000 // size)
        for start in range(0, problem.num_clients, width):
            clients = np.s_[start : start + width]
            table[clients, cut - 1] = _best_of_cut(problem, family, grid, cut, clients)
    return table


def _best_of_cut(problem: Problem, family: HeadFamily, grid: Ints, cut: int, clients: slice) -> Ints:
    heads = family.by_cut[cut - 1]
    spare = problem.devices.memory[clients, None] - problem.heads.base_bytes[cut - 1]
    per_flop = (problem.local_steps / problem.devices.flops_per_s[clients])[:, None]
    seconds = problem.fixed_seconds(cut)[clients, None] + heads.adapter_flops * per_flop
    seconds += heads.upload_bytes / problem.devices.uplink[clients, None]
    columns = _columns(problem, grid, seconds)
    columns[heads.adapter_bytes > spare] = -1
    # Members come in ascending value and the last write stays; column -1 collects what cannot be afforded.
    best = np.full((len(columns), len(grid) + 1), -1, np.int64)
    rows = np.arange(len(columns))[:, None]
    best[rows, columns] = np.arange(len(heads.value))
    # What leaves time for N blocks leaves time for fewer.
    return np.maximum.accumulate(best[:, -2::-1], axis=1)[:, ::-1]


def _columns(problem: Problem, grid: Ints, seconds: Floats) -> Ints:
    """The last column of `grid` for whose server time the deadline leaves room beside `seconds`; -1: none."""
    if problem.deadline_s == np.inf:
        return np.full(seconds.shape, len(grid) - 1)
    base = problem.server_step_s(0, problem.num_clients)
    per_block = problem.server_step_s(1, 0)
    blocks = ((problem.deadline_s - seconds) / problem.local_steps - base) / per_block
    whole = np.clip(blocks * (1 + ROUNDING) + ROUNDING, -1, grid[-1]).astype(np.int64)
    column_of = np.searchsorted(grid, np.arange(-1, grid[-1] + 1), side="right") - 1
    return column_of[whole + 1]


def _grid(problem: Problem) -> Ints:
    """Numbers of tail blocks to try: from one a client up to what cut 1 for all would take."""
    clients, cuts = problem.num_clients, problem.num_cuts
    if problem.deadline_s == np.inf:
        return np.array([clients * cuts])
    columns = int(np.clip(TABLE // (clients * cuts), 12, 512))
    return np.unique(np.linspace(clients, clients * cuts, columns).round().astype(int))


def _values(problem: Problem, family: HeadFamily, table: Ints) -> Floats:
    """(n, C, N) values of the members in `table` and of the tail behind them, -inf where there is none."""
    values = np.empty(table.shape)
    for column, heads in enumerate(family.by_cut):
        values[:, column] = np.r_[heads.value, -np.inf][table[:, column]] + problem.tail.values[column]
    return values


def _block_limits(problem: Problem, grid: Ints) -> Ints:
    """(N,) blocks that the tail may run: those of `grid` for which the server has memory."""
    if problem.tail.bytes_per_block <= 0:
        return grid
    spare = problem.devices.server_memory * (1 + ROUNDING) - problem.server_bytes(0, problem.num_clients)
    return np.minimum(grid, int(min(spare / problem.tail.bytes_per_block, grid[-1])))
