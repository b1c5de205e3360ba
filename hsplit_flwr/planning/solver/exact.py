"""The exact planner: the whole problem as a mixed-integer linear programme, solved by HiGHS. For small instances.

Variables: y_ic = 1 if client i has cut c; z_imk = 1 if its rank on matrix m is at least the k-th candidate.
A rank's cost is linear in z, its value too: g's increments are the coefficients.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from hsplit_flwr.errors import ConfigError
from hsplit_flwr.planning.solver.objective import Floats
from hsplit_flwr.planning.solver.participants import tolerances
from hsplit_flwr.planning.solver.problem import Problem
from hsplit_flwr.planning.solver.solution import Solution


def solve(problem: Problem, *, time_limit_s: float, gap: float) -> Solution:
    """Optimal cuts and ranks for all clients of `problem`, all of which can take part (see `participants`).

    Args:
        problem: at least one client.
        time_limit_s: for the solver.
        gap: relative to the optimum, at which the solver may stop.

    Raises:
        ConfigError: not solved within the time limit.
    """
    model = _Model(problem)
    answer = milp(
        model.objective(),
        constraints=model.constraints(),
        integrality=np.ones(model.size),
        bounds=Bounds(0, model.upper_bounds()),
        options={"time_limit": time_limit_s, "mip_rel_gap": gap},
    )
    if answer.status != 0:
        raise ConfigError(
            f"Expected an exact plan for {problem.num_clients} clients and {len(problem.matrices.names)} matrices "
            f"within {time_limit_s:g} s, found: {answer.message} Use plan() instead, or allow more time or a wider gap."
        )
    return model.solution(answer.x)


class _Model:
    """Rows and columns of the programme. Columns: y (n, C), then z (n, M', R), M' matrices below the deepest cut."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        n, cuts, ranks = problem.num_clients, problem.num_cuts, len(problem.ranks)
        self.matrices = np.flatnonzero(problem.matrices.block < cuts)
        shape = (n, len(self.matrices), ranks)
        self.y = np.arange(n * cuts).reshape(n, cuts)
        self.z = n * cuts + np.arange(int(np.prod(shape))).reshape(shape)
        self.size = n * cuts + self.z.size
        self.extra_rank = np.diff(problem.levels)
        self._entries: list[tuple[int, int, float]] = []
        self._lower: list[float] = []
        self._upper: list[float] = []

    def objective(self) -> Floats:
        """To be minimized."""
        cost = np.zeros(self.size)
        worth = np.outer(self.problem.matrices.importance[self.matrices], np.diff(self.problem.level_gains))
        cost[self.z] = -worth
        cost[self.y] = -self.problem.tail.values
        return cost

    def upper_bounds(self) -> Floats:
        """0 for cuts that a client cannot hold, or not in time even of an idle server; ranks worth nothing."""
        bounds = np.ones(self.size)
        bounds[self.z] = (self.problem.matrices.importance[self.matrices] > 0)[:, None]
        bounds[self.y] = tolerances(self.problem) >= 0
        return bounds

    def constraints(self) -> LinearConstraint:
        """Rows of the programme, each scaled by its right-hand side."""
        problem = self.problem
        for client in range(problem.num_clients):
            self._row(self.y[client], 1.0, lower=1, upper=1)
            self._structure(client)
            self._memory(client)
        if np.isfinite(problem.deadline_s):
            for client in range(problem.num_clients):
                self._deadline(client)
        self._server()
        rows, columns, values = (np.array(part) for part in zip(*self._entries, strict=True))
        matrix = coo_array((values, (rows.astype(int), columns.astype(int))), shape=(len(self._lower), self.size))
        return LinearConstraint(matrix.tocsr(), self._lower, self._upper)

    def solution(self, x: Floats) -> Solution:
        """Cuts and levels out of the solver's answer."""
        levels = np.zeros((self.problem.num_clients, len(self.problem.matrices.names)), np.int8)
        levels[:, self.matrices] = np.round(x[self.z]).sum(axis=2)
        return Solution(np.argmax(x[self.y], axis=1) + 1, levels)

    def _structure(self, client: int) -> None:
        """A rank needs the next smaller one, and the smallest a cut that is deep enough."""
        for column, matrix in enumerate(self.matrices):
            deep_enough = self.y[client, self.problem.matrices.block[matrix] :]
            steps = self.z[client, column]
            self._row(np.r_[steps[0], deep_enough], np.r_[1.0, -np.ones(len(deep_enough))], upper=0)
            for smaller, larger in pairwise(steps):
                self._row(np.r_[larger, smaller], np.array([1.0, -1.0]), upper=0)

    def _memory(self, client: int) -> None:
        problem = self.problem
        budget = problem.devices.memory[client]
        per_step = np.outer(problem.heads.rank_bytes[self.matrices], self.extra_rank)
        columns = np.r_[self.y[client], self.z[client].ravel()]
        base = np.where(np.isfinite(problem.heads.base_bytes), problem.heads.base_bytes, 0.0)  # others are out anyway
        self._row(columns, np.r_[base, per_step.ravel()] / budget, upper=1)

    def _deadline(self, client: int) -> None:
        problem = self.problem
        fixed = np.array([problem.fixed_seconds(cut)[client] for cut in range(1, problem.num_cuts + 1)])
        per_rank = problem.local_steps * problem.heads.rank_flops / problem.devices.flops_per_s[client]
        per_rank += problem.heads.rank_wire_bytes / problem.devices.uplink[client]
        coefficients = np.zeros(self.size)
        coefficients[self.y] = problem.local_steps * self._per_cut(problem.server_step_s)
        coefficients[self.y[client]] += fixed
        coefficients[self.z[client]] = np.outer(per_rank[self.matrices], self.extra_rank)
        used = np.flatnonzero(coefficients)
        self._row(used, coefficients[used] / problem.deadline_s, upper=1)

    def _server(self) -> None:
        problem = self.problem
        spare = problem.devices.server_memory - problem.tail.fixed_bytes
        per_cut = self._per_cut(problem.server_bytes) - problem.tail.fixed_bytes
        self._row(self.y.ravel(), np.tile(per_cut, problem.num_clients) / spare, upper=1)

    def _per_cut(self, cost: Callable[[float, int], float]) -> Floats:
        """(C,) of one client."""
        return np.array([cost(self.problem.num_cuts + 1 - cut, 1) for cut in range(1, self.problem.num_cuts + 1)])

    def _row(self, columns: NDArray[Any], values: Floats | float, *, upper: float, lower: float = -np.inf) -> None:
        row = len(self._lower)
        for column, value in zip(columns, np.broadcast_to(values, len(columns)), strict=True):
            self._entries.append((row, int(column), float(value)))
        self._lower.append(lower)
        self._upper.append(upper)
